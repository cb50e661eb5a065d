"""Noise and clipping: distributions against scipy, clipped integers against Python's own."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkrso_app.core.fixed_point import FixedPointMeans
from fedkrso_app.core.noise import NoiseStream, clipped, derived_key, fresh_key, public_key

KEY = bytes(range(32))


def squares(arrays) -> int:
    """Σ q² of values on the grid 2^-36, in Python's integers; fails where a value is not on it."""
    values = [float(v) * 2**36 for x in arrays.values() for v in x.ravel()]
    assert all(value == int(value) for value in values)
    return sum(int(value) ** 2 for value in values)


def test_the_stream_is_aes_ctr():
    assert NoiseStream(KEY).words(2).tobytes().hex() == "f29000b62a499fd0a9f39a6add2e7780"  # as OpenSSL has it
    whole, parts = NoiseStream(KEY).words(10), NoiseStream(KEY)
    assert np.array_equal(np.concatenate([parts.words(3), parts.words(7)]), whole)


def test_noise_is_gaussian():
    z = NoiseStream(KEY).normal(1_000_000)
    assert abs(z.mean()) < 5e-3 and z.var() == pytest.approx(1.0, rel=0.01)
    assert scipy.stats.kstest(z[:200_000], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z[0::2], z[1::2])[0, 1]) < 5e-3  # cosine and sine of one angle
    assert NoiseStream(KEY).normal(3, 5).shape == (3, 5)


def test_integer_noise_has_its_deviation_and_each_key_its_own():
    first, second = (NoiseStream(derived_key(KEY, "round", r)).integers(200_000, 1000.0) for r in (1, 2))
    assert first.dtype == np.int64 and first.std() == pytest.approx(1000.0, rel=0.01)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert fresh_key() != fresh_key() and public_key(0) == public_key(0) != public_key(1)


def test_coins_are_uniform():
    coins = NoiseStream(KEY).uniform(100_000)
    assert coins.min() >= 0 and coins.max() < 1
    assert scipy.stats.kstest(coins, "uniform").pvalue > 1e-3


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 40),
    scale=st.sampled_from([1e-44, 1e-12, 1e-6, 0.1, 1.0, 30.0, 1e18, 3e37]),
    clip=st.sampled_from([1e-4, 0.3, 1.0, 7.7, 1000.0]),
)
def test_no_clipped_update_is_longer_than_its_clip(seed, size, scale, clip):
    rng = np.random.default_rng(seed)
    x = {"a": (rng.standard_normal((2, size)) * scale).astype(np.float32), "b": np.float32([scale])}
    out = clipped(x, clip)
    numerator, denominator = clip.as_integer_ratio()
    assert squares(out) * denominator**2 <= (numerator * 2**36) ** 2
    assert all(np.all(np.abs(out[name]) <= np.abs(x[name])) for name in x)  # toward zero
    again = clipped(out, clip)
    assert all(np.array_equal(out[name], again[name]) for name in x)


def test_clipping_keeps_the_direction_and_short_updates():
    x = {"a": np.float32([[3.0, 0.0]]), "b": np.float32([4.0])}
    assert np.concatenate([v.ravel() for v in clipped(x, 1.0).values()]) == pytest.approx([0.6, 0.0, 0.8], abs=1e-6)
    short = {"a": np.float32([0.25, -0.5])}
    assert np.array_equal(clipped(short, 1.0)["a"], short["a"])
    assert clipped({"a": np.zeros(0, np.float32)}, 1.0)["a"].shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_becomes_zeros(bad):
    out = clipped({"a": np.float32([1.0, bad]), "b": np.float32([2.0])}, 1.0)
    assert not out["a"].any() and not out["b"].any()


def test_without_noise_one_client_moves_the_integer_sum_by_at_most_its_clip():
    rng, clip = np.random.default_rng(0), 0.7
    updates = [clipped({"x": rng.standard_normal(300).astype(np.float32) * s}, clip) for s in (0.001, 1, 50)]
    with_all, without = FixedPointMeans(), FixedPointMeans()
    for i, update in enumerate(updates):
        with_all.add(update, 1)
        if i != 2:
            without.add(update, 1)
    with_all.mean("x", 1), without.mean("x", 1)  # take the offsets out of the sums
    moved = (with_all._sums["x"] - without._sums["x"]).tolist()
    assert 0.999 * (clip * 2**36) ** 2 < sum(q * q for q in moved) <= (clip * 2**36) ** 2
