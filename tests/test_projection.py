"""Projections: golden vectors, moments, and independence of anything but (seed, name, r, n)."""

import itertools

import numpy as np
import pytest
import torch

from fedkrso_app.core import projection as module
from fedkrso_app.core.projection import (
    KINDS,
    _gaussian,
    ahead,
    kept,
    layer_key,
    philox,
    placed,
    probe,
    projection,
    projections,
    signs,
    stream,
)


def test_golden_raw_words():
    words = [f"{word:016x}" for word in philox(1234, 7).random_raw(3)]
    assert words == ["e708c74f606173d3", "10c7f0971cb49ab1", "fc185a23b7c50880"]


def test_golden_gaussian_values():
    values = _gaussian([1234], 7, 4 * 8)[0] / 2
    np.testing.assert_allclose(values[:4], [-0.0045542, -1.0371687, -0.0813487, 0.2413075], atol=5e-8)


def test_golden_layer_key():
    assert layer_key("roberta.encoder.layer.0.attention.self.query") == 0x4943490D55E379AF


def test_rademacher_signs_follow_the_bits_from_the_lowest(monkeypatch):
    monkeypatch.setattr("fedkrso_app.core.projection.layer_key", lambda name: 7)
    signs = "".join("+" if value > 0 else "-" for value in projection(1234, "", 2, 8, "rademacher").ravel())
    assert signs == "++--+-++++--+++-"


@pytest.mark.parametrize("kind", KINDS)
def test_same_arguments_same_bits(kind):
    first, second = (projection(2**63 + 5, "layer.0", 4, 32, kind) for _ in range(2))
    assert first.dtype == np.float32 and first.shape == (4, 32)
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_several_seeds_are_the_single_ones_stacked(kind):
    together = projections([7, 2**63, 7], "x", 3, 21, kind)
    assert together.tobytes() == np.stack([projection(seed, "x", 3, 21, kind) for seed in (7, 2**63, 7)]).tobytes()


def test_gaussian_values_are_box_muller_in_numpy():
    bits, half = philox(5, layer_key("x")), 1536
    u1, u2 = (((bits.random_raw(half) >> np.uint64(11)) + shift) * 2.0**-53 for shift in (0.5, 0.0))
    radius, angle = np.sqrt(-2 * np.log(u1)), 2 * np.pi * u2
    expected = (np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]) / 2).astype(np.float32)
    assert np.array_equal(projection(5, "x", 4, 768).ravel(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_or_another_layer_gives_another_projection(kind):
    base = projection(1, "a", 4, 32, kind)
    assert not np.array_equal(base, projection(2, "a", 4, 32, kind))
    assert not np.array_equal(base, projection(1, "b", 4, 32, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_mean_of_PtP_is_the_identity(kind):
    n, draws = 6, 4000
    mean = sum(P.T @ P for P in (projection(s, "x", 2, n, kind) for s in range(draws))) / draws
    np.testing.assert_allclose(mean, np.eye(n), atol=6 * np.sqrt(2 / draws))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_drawn_on_the_cpu_whatever_the_default_device(kind):
    with torch.device("meta"):
        there = projection(3, "x", 2, 8, kind)
    assert there.tobytes() == projection(3, "x", 2, 8, kind).tobytes()


def test_orthonormal_rows_meet_assumption_4_exactly():
    P = projection(3, "x", 5, 20, "orthonormal").astype(np.float64)
    np.testing.assert_allclose(P @ P.T, 20 / 5 * np.eye(5), atol=1e-6)


def test_rademacher_rows_have_exact_norms():
    P = projection(3, "x", 4, 50, "rademacher")
    np.testing.assert_allclose((P**2).sum(1), 50 / 4, rtol=1e-6)


def test_more_orthonormal_rows_than_columns_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        projection(0, "x", 9, 8, "orthonormal")


def test_probe_is_constant_and_names_the_generator():
    assert probe() == probe() and probe().startswith("philox4x64-10")


def test_streams_differ_by_every_one_of_their_labels_and_repeat():
    labels = list(itertools.product((0, 1), ("client", "reply"), (1, 2), (0, 1)))
    drawn = [stream(*label).random(4).tobytes() for label in labels]
    assert len(set(drawn)) == len(labels) == 16
    assert drawn == [stream(*label).random(4).tobytes() for label in labels]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_or_drawn_ahead_has_the_bits_of_what_is_drawn_anew(kind):
    fresh, like = [projection(seed, "x", 3, 21, kind) for seed in (1, 2)], torch.zeros(1)
    ahead(1, {"x": (3, 21), "y": (3, 9)}, kind).result()
    assert kept(1, "x", 3, 21, kind) is kept(1, "x", 3, 21, kind)
    for seed, P in zip((1, 2), fresh, strict=True):
        assert kept(seed, "x", 3, 21, kind).tobytes() == P.tobytes()
        assert np.array_equal(placed(seed, "x", 3, 21, kind, like), P)
        assert torch.equal(placed(seed, "x", 3, 21, kind, like.bfloat16()), torch.from_numpy(P).bfloat16())


def test_no_more_projections_are_kept_than_may_be_and_the_newest_stay(monkeypatch):
    monkeypatch.setattr(module, "_newest", newest := module._Newest())
    monkeypatch.setattr(module, "_MOST", 100)
    for seed in range(9):
        kept(0, "first", 1, 30)
        kept(seed, "x", 2, 10)
    assert newest.values == sum(P.size for P in newest.arrays.values()) == 90
    assert [key[0] for key in newest.arrays] == [6, 7, 0, 8]  # each use makes one the newest again
    kept(1, "too large", 1, 101)
    assert not newest.arrays and newest.values == 0


@pytest.mark.parametrize("r, n", [(2, 8), (3, 50), (4, 64), (1, 1)])
def test_signs_are_unpacked_to_the_same_bits_wherever_that_is_done(r, n):
    words = torch.from_numpy(philox(5, layer_key("x")).random_raw(-(-r * n // 64)).view(np.int64))
    assert signs(words, r, n).numpy().tobytes() == projection(5, "x", r, n, "rademacher").tobytes()
