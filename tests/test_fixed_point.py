"""The mean that no order can change."""

import itertools

import numpy as np
import pytest

from fedkrso_app.core.fixed_point import GRID, LARGEST, FixedPointMeans


def mean(arrays, weights, total=None):
    means = FixedPointMeans()
    for x, w in zip(arrays, weights, strict=True):
        means.add({"x": x}, w)
    return means.mean("x", total or sum(weights))


def some(count, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(3, 5)) * 10.0 ** rng.integers(-6, 3)).astype(np.float32) for _ in range(count)]


def test_every_order_gives_the_same_bits():
    arrays, weights = some(5), [1, 7, 3, 2, 11]
    results = {
        mean([arrays[i] for i in order], [weights[i] for i in order]).tobytes()
        for order in itertools.permutations(range(5))
    }
    assert len(results) == 1


def test_mean_equals_float64():
    arrays, weights = some(5), [1, 7, 3, 2, 11]
    expected = np.average(np.array(arrays, dtype=np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(mean(arrays, weights), expected, rtol=1e-6, atol=1e-10)


def test_identical_arrays_average_to_themselves():
    x = some(1)[0]
    np.testing.assert_array_equal(mean([x] * 7, [1] * 7), mean([x], [1]))


def test_who_adds_nothing_counts_as_zero():
    x = some(1)[0]
    np.testing.assert_allclose(mean([x], [1], total=4), x / 4, rtol=1e-6, atol=1e-11)


def test_overflow_is_refused_and_adds_nothing():
    means = FixedPointMeans()
    small, large = np.full(3, 0.5, np.float32), np.full(3, 1e9, np.float32)
    means.add({"a": small, "b": small}, 1)
    with pytest.raises(OverflowError, match="too large"):
        means.add({"a": small, "b": large}, 1)
    np.testing.assert_array_equal(means.mean("a", 1), small)
    np.testing.assert_array_equal(means.mean("b", 1), small)


def test_the_limit_is_of_a_value_times_its_weight_on_either_side_of_zero():
    quarter = np.array([0.25 * LARGEST, 1.0], np.float32)
    for x in (quarter, -quarter):
        np.testing.assert_array_equal(mean([x], [3]), x)
        for weight in (4, 5):
            with pytest.raises(OverflowError, match=f"with weight {weight} are too large"):
                mean([x], [weight])


def test_half_a_million_is_a_value_and_two_to_the_19th_is_none():
    assert mean([np.full(1, 5e5, np.float32)], [1])[0] == 5e5
    with pytest.raises(OverflowError):
        mean([np.full(1, 2.0**19, np.float32)], [1])


def test_a_mean_can_be_asked_for_twice_and_added_to_in_between():
    means, x = FixedPointMeans(), some(1)[0]
    means.add({"x": x}, 1)
    first = means.mean("x", 1)
    np.testing.assert_array_equal(means.mean("x", 1), first)
    means.add({"x": x}, 1)
    np.testing.assert_array_equal(means.mean("x", 2), first)


def test_values_are_kept_to_the_36th_binary_digit():
    np.testing.assert_array_equal(mean([np.array([2.0**-36, 3 * 2.0**-36], np.float32)], [1]), [2.0**-36, 3 * 2.0**-36])


def test_heavy_additions_never_wrap_around_either():
    means, x, added = FixedPointMeans(), np.full(2, -(LARGEST - 1) / 8, np.float32), 0
    with pytest.raises(OverflowError):
        for _ in range(1000):
            means.add({"x": x}, 8)
            added += 8
    assert added >= 8 * 255
    np.testing.assert_allclose(means.mean("x", added), x)


def test_many_additions_near_the_limit_never_wrap_around():
    means = FixedPointMeans()
    x = np.full(2, LARGEST - 1, np.float32)  # 2^55 steps of the grid
    added = 0
    with pytest.raises(OverflowError):
        for _ in range(1000):
            means.add({"x": x}, 1)
            added += 1
    assert added >= 255
    np.testing.assert_allclose(means.mean("x", added), x)


def test_an_array_longer_than_one_chunk_is_summed_whole():
    x = np.arange(200_000, dtype=np.float32) / 1024
    np.testing.assert_array_equal(mean([x, x, x], [1, 2, 1]), x)


def test_sums_are_whole_grid_steps_of_float64_rounding_at_every_size():
    """The oracle is numpy's rint in float64; the sizes lie on both sides of where the quick rounding ends."""
    for size in (1e-11, 1e-3, 1.0, 3.2767e4, 3.2768e4, 1e5):
        x = (np.random.default_rng(1).normal(size=1000) * size).clip(-size, size).astype(np.float32)
        steps = np.rint(x.astype(np.float64) * GRID)
        np.testing.assert_array_equal(mean([x, x], [1, 2]), (3 * steps / (3 * GRID)).astype(np.float32))


def test_halves_round_to_even():
    step = np.float32(1 / GRID)
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32) * step
    np.testing.assert_array_equal(mean([x], [1]) / step, [0, 2, 2, 0, -2, -2])
