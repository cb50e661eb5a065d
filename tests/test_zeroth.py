"""Directions and zeroth-order steps: by hand on quadratics, in float64, and by sums over all signs."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fedkrso_app.core import directions, zeroth
from fedkrso_app.core.directions import move, move_vector, pair, seeds_of, vectors
from fedkrso_app.core.zeroth import ZerothOrder


def z_of(seed, name, m, n, rank):
    C, P = pair([seed], name, m, n, rank)
    return (C.double() @ P.double())[0]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_entries_of_a_direction_are_uncorrelated_with_variance_one(rank):
    C, P = pair(range(20_000), "layer", 2, 3, rank)
    z = (C @ P).reshape(-1, 6).double()
    second = z.T @ z / len(z)
    assert (second - torch.eye(6)).abs().max() < 5 * (3 / len(z)) ** 0.5  # fourth moments are at most 3
    assert z.mean(0).abs().max() < 5 / len(z) ** 0.5


def test_directions_of_other_seeds_and_names_are_others():
    one, again, seed, name = (z_of(*which, 4, 8, 1) for which in ((1, "a"), (1, "a"), (2, "a"), (1, "b")))
    assert torch.equal(one, again) and not torch.equal(one, seed) and not torch.equal(one, name)
    assert set(one.flatten().tolist()) == {-1.0, 1.0}
    assert len(set(seeds_of(5, 1000))) == 1000 and seeds_of(5, 10) == seeds_of(5, 1000)[:10] != seeds_of(6, 10)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_many_scalars_move_a_matrix_by_the_sum_of_their_directions(rank, monkeypatch):
    seeds, s = seeds_of(1, 40), (np.random.default_rng(0).standard_normal(40) * 1e-3).astype(np.float32).tolist()
    W = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = W.double() + sum(x * z_of(seed, "l", 5, 7, rank) for seed, x in zip(seeds, s, strict=True))
    for chunk in (1 << 23, 1):  # all at once, and one by one
        monkeypatch.setattr(directions, "_CHUNK", chunk)
        moved, exact = W.clone(), W.double()
        move(moved, seeds, s, "l", rank)
        move(exact, seeds, s, "l", rank)
        torch.testing.assert_close(moved.double(), expected, rtol=0, atol=3e-6)
        torch.testing.assert_close(exact, expected, rtol=0, atol=1e-13)
        v = torch.zeros(2, 3, dtype=torch.float64)
        move_vector(v, seeds, s, "v", rank)
        torch.testing.assert_close(v.flatten(), torch.tensor(s).double() @ vectors(seeds, "v", 6, rank).double())


class Quadratic(nn.Module):
    """f = ½ |x Wᵀ − y|² + ½ vᵀDv, with a layer W (3 × 4) and a vector v (5), float64."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layer, self.v = nn.Linear(4, 3, bias=False).double(), nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.x, self.y = (torch.randn(6, k, generator=draw, dtype=torch.float64) for k in (4, 3))
        self.D = torch.arange(1.0, 6, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(3, 4, generator=draw, dtype=torch.float64))
            self.v.copy_(torch.randn(5, generator=draw, dtype=torch.float64))

    def forward(self):
        return 0.5 * (self.layer(self.x) - self.y).square().sum() + 0.5 * (self.D * self.v.square()).sum()

    def gradient(self):
        """By hand: (xWᵀ − y)ᵀ x and Dv."""
        W = self.layer.weight.detach()
        return (self.x @ W.T - self.y).T @ self.x, self.D * self.v.detach()


def optimizer(f, seeds, rate=0.01, epsilon=0.1, rank=1, **more):
    return ZerothOrder({"layer": f.layer}, {"v": f.v.detach()}, rate, epsilon, rank, seeds, **more)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 10.0])
def test_on_a_quadratic_the_slope_is_the_directional_derivative_whatever_epsilon_is(rank, epsilon):
    f = Quadratic()
    dW, dv = f.gradient()
    steps = optimizer(f, lambda j: [7], epsilon=epsilon, rank=rank)
    with steps.beside():
        steps.step(f)
    ((seed, s, g),) = steps.taken
    expected = (dW * z_of(7, "layer", 3, 4, rank)).sum() + (dv * vectors([7], "v", 5, rank)[0]).sum()
    assert seed == 7 and g == pytest.approx(expected.item(), rel=1e-9) and s == pytest.approx(-0.01 * g, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_many_steps_end_where_their_scalars_lead(rank):
    f, start = Quadratic(), Quadratic()
    steps = optimizer(f, lambda j: [j % 20, 100 + j], rank=rank, rate=1e-3)  # slots come again
    with steps.beside():
        for _ in range(100):
            steps.step(f)
    W, v = start.layer.weight.detach(), start.v.detach()
    seeds, s, _ = zip(*steps.taken, strict=True)
    move(W, seeds, s, "layer", rank)
    move_vector(v, seeds, s, "v", rank)
    torch.testing.assert_close(W, f.layer.weight.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(v, f.v.detach(), rtol=0, atol=1e-12)
    assert len(steps.taken) == 200 and f() < 0.5 * Quadratic()()


def test_the_mean_over_all_signs_is_the_gradient(monkeypatch):
    """E[g z] = ∇f, as a finite sum over all 2^5 sign vectors; the layer is not moved by its own here."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)))
    monkeypatch.setattr(zeroth, "vectors", lambda seeds, name, size, rank: signs[list(seeds)])
    f = Quadratic()
    before, (_, dv) = f.v.detach().clone(), f.gradient()
    steps = ZerothOrder({}, {"v": f.v.detach()}, 1.0, 0.1, 1, lambda j: range(32))
    steps.step(f)
    torch.testing.assert_close(f.v.detach(), before - dv, rtol=0, atol=1e-6)  # the scalars are float32


def test_two_clients_along_one_direction_see_the_mean_loss():
    """The mean of the slopes is that of the mean: a common direction loses nothing."""
    f, g, both = Quadratic(), Quadratic(), Quadratic()
    with torch.no_grad():
        g.y.mul_(-3)
    slopes = []
    for closure, of in ((f, f), (g, g), (lambda: (_at(f, both) + _at(g, both)) / 2, both)):
        steps = optimizer(of, lambda j: [3])
        with steps.beside():
            slopes.append(steps._slope(torch.no_grad()(closure), 0, *drawn(steps, 3)))
    assert slopes[2] == pytest.approx((slopes[0] + slopes[1]) / 2, rel=1e-9)


def _at(f, other):
    """The loss of f at the weights of ``other``, through its layer."""
    return 0.5 * (other.layer(f.x) - f.y).square().sum() + 0.5 * (f.D * other.v.square()).sum()


def drawn(steps, seed):
    pairs = {name: tuple(part.double() for part in pair([seed], name, 3, 4, 1)) for name in steps.sides}
    return pairs, {name: vectors([seed], name, 5, 1).double() for name in steps.others}


def test_losses_are_taken_beside_the_weight_and_what_is_perturbed_in_place_comes_back_bit_for_bit():
    f = Quadratic()
    W, v, seen = f.layer.weight.detach().clone(), f.v.detach().clone(), []

    def closure():
        seen.append((f.layer.weight.detach().clone(), f.v.detach().clone()))
        return f()

    steps = optimizer(f, lambda j: [1, 2], rate=0.0)
    with steps.beside():
        steps.step(closure)
    assert len(seen) == 4 and all(torch.equal(weight, W) and not torch.equal(vector, v) for weight, vector in seen)
    assert torch.equal(f.layer.weight, W) and torch.equal(f.v, v) and not f.layer._forward_hooks


def test_at_rest_the_losses_are_those_of_moved_weights():
    moved, resting = Quadratic(), Quadratic()
    W = resting.layer.weight.detach().clone()
    pairs = [optimizer(moved, lambda j: [j, j + 50]), optimizer(resting, lambda j: [j, j + 50], at_rest=True)]
    with pairs[0].beside(), pairs[1].beside():
        for _ in range(10):
            pairs[0].step(moved)
            pairs[1].step(resting)
        assert resting().item() == pytest.approx(moved().item(), rel=1e-12)
    assert torch.equal(resting.layer.weight, W) and not torch.equal(moved.layer.weight, W)
    np.testing.assert_allclose(*([s for _, s, _ in each.taken] for each in pairs), rtol=1e-6)
    assert [part.shape for part in pairs[1].held()] == [(3, 20), (20, 4)]


def test_a_step_by_signs_has_one_length_and_goes_down():
    f = Quadratic()
    steps = optimizer(f, lambda j: [j, j + 9, j + 99], signs=True, rate=0.03)
    with steps.beside():
        for _ in range(5):
            steps.step(f)
    assert all(s == np.float32(-0.01 if g > 0 else 0.01) for _, s, g in steps.taken) and len(steps.taken) == 15
