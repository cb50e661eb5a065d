"""Robust means: equal to numpy's, whatever the order, and out of reach of a minority."""

import numpy as np
import pytest

from fedkrso_app.core.fixed_point import LARGEST
from fedkrso_app.core.robust import RobustMeans


def mean(kind, rows, total=None):
    means = RobustMeans(kind)
    for row in rows:
        means.add({"x": row}, 1)
    return means.mean("x", total or len(rows))


@pytest.mark.parametrize("x", [LARGEST, 2 * LARGEST, -LARGEST])
def test_values_from_the_exact_means_limit_on_are_refused_and_nothing_is_kept(x):
    means, most = RobustMeans("median"), np.nextafter(np.float32(LARGEST), np.float32(0))
    with pytest.raises(OverflowError, match="too large to be averaged"):
        means.add({"x": np.ones(1, np.float32), "y": np.full(1, x, np.float32)}, 1)
    assert "x" not in means
    means.add({"x": np.full(1, -most), "y": np.full(1, most)}, 1)
    assert (means.mean("x", 1), means.mean("y", 1)) == (-most, most)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 10])
def test_median_equals_numpys(n):
    rows = np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32)
    np.testing.assert_allclose(mean("median", rows), np.median(rows.astype(np.float64), axis=0), rtol=1e-6)


def test_trimmed_mean_of_ten_leaves_three_out_at_either_end():
    rows = np.random.default_rng(0).permutation(np.arange(10.0)).astype(np.float32)[:, None]
    assert mean("trimmed-mean", rows * rows)[0] == (9 + 16 + 25 + 36) / 4


@pytest.mark.parametrize(("n", "out"), [(1, 0), (2, 0), (3, 1), (4, 1), (7, 3), (11, 4), (20, 6)])
def test_the_trimmed_mean_leaves_out_three_tenths_rounded_up_while_any_are_left(n, out):
    rows = np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32)
    expected = [np.mean(sorted(column)[out : n - out]) for column in rows.T.astype(np.float64)]
    np.testing.assert_allclose(mean("trimmed-mean", rows), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["median", "trimmed-mean"])
def test_any_order_gives_the_same_bits(kind):
    rows = np.random.default_rng(1).normal(size=(9, 50)).astype(np.float32)
    first = mean(kind, rows)
    for seed in range(5):
        np.testing.assert_array_equal(mean(kind, np.random.default_rng(seed).permutation(rows)), first)


@pytest.mark.parametrize("kind", ["median", "trimmed-mean"])
def test_three_of_ten_cannot_leave_the_range_of_the_others(kind):
    honest = np.random.default_rng(2).normal(size=(7, 20)).astype(np.float32)
    for wild in (1e5, -1e5):
        result = mean(kind, [*honest, *np.full((3, 20), wild, np.float32)])
        assert (honest.min(0) <= result).all() and (result <= honest.max(0)).all()


def test_who_added_nothing_shrinks_the_result_by_its_share():
    rows = np.array([[1.0], [2.0], [9.0]], np.float32)
    assert mean("median", rows, total=4)[0] == 2 * 3 / 4
