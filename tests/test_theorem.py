"""FedKRSO's rates on problems whose L, σ, ς and optimum are known: an exact floor, a bound, and slopes of both."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import theorem
from benchmarks.theorem import Quadratic, bound, floor, logistic, quadratic, run, slope, stationary
from fedkrso_app.core.projection import projection
from fedkrso_app.core.rso import RSO
from fedkrso_app.core.subspace import attached, fold


def test_the_recursion_is_what_the_packages_own_layers_do(monkeypatch):
    """Two clients, three steps along their projections in SubspaceLinear, accumulators averaged and folded into W."""
    drawn = []
    original = theorem.projections

    def spied(seeds, *rest):
        drawn.append(list(seeds))
        return original(seeds, *rest)

    monkeypatch.setattr(theorem, "projections", spied)
    problem = quadratic(2, 3, 6, 1.0, uneven=True)
    squares, W = run(problem, 0.02, 1, 2, J=3, K=1, seed=4)
    (seed,) = drawn[0]
    ends = []
    for C, H in zip(problem.C, problem.H, strict=True):
        model = nn.Sequential(nn.Linear(6, 3, bias=False)).double()
        nn.init.zeros_(model[0].weight)
        root = torch.from_numpy(np.linalg.cholesky(H).T.copy())  # rows x with Σ x xᵀ = H
        with attached(model, {"0": model[0]}, 2) as layers:
            layers = {"theorem": layers["0"]}  # the name that the projections are drawn by
            rso = RSO(layers, 0.02, "orthonormal", betas=None)
            rso.start_interval(seed)
            for _ in range(3):
                rso.zero_grad()
                ((model(root) - root @ torch.from_numpy(C).T).square().sum() / 2).backward()
                rso.step()
        ends.append(rso.accumulators[seed].view(3, 2))
    folded = torch.zeros(3, 6, dtype=torch.float64)
    P = torch.from_numpy(projection(seed, "theorem", 2, 6, "orthonormal")).double()
    fold(folded, torch.stack(ends).mean(0)[None], P[None])
    np.testing.assert_allclose(W, folded.numpy(), rtol=1e-9, atol=1e-12)
    assert squares[0] == pytest.approx((problem.gradients(np.zeros((3, 6))).mean(0) ** 2).sum())


@pytest.mark.parametrize(
    "problem", [quadratic(3, 2, 5, 0.7, uneven=True), logistic(3, 5)], ids=["quadratic", "logistic"]
)
def test_gradients_optimum_and_smoothness_are_those_of_the_value(problem):
    _, m, n = problem.shape
    rng = np.random.default_rng(0)
    W, step = rng.normal(size=(2, m, n))
    step *= 1e-5
    along = (problem.value(W + step) - problem.value(W - step)) / 2
    assert (problem.gradients(W).mean(0) * step).sum() == pytest.approx(along, rel=1e-5)
    assert all(problem.value(rng.normal(size=(m, n))) >= problem.least for _ in range(20))
    turned = problem.gradients(W + step).mean(0) - problem.gradients(W).mean(0)
    assert np.linalg.norm(turned) <= problem.L * np.linalg.norm(step) * (1 + 1e-9)


@pytest.mark.parametrize("N, r, J", [(2, 4, 1), (8, 4, 1), (8, 2, 1), (8, 4, 5), (8, 16, 3)])
def test_noise_ends_at_its_exact_floor_whatever_the_steps(N, r, J):
    """E‖∇f‖² = η ω σ² / (N (2 − η ω)), ω = n/r: found from the fixed point of the second moment, without simulating."""
    eta = 0.2 * r / 16
    measured = floor(run(quadratic(N, 4, 16, 1.0), eta, 2500, r, J=J, sigma=1.0)[0])
    assert measured == pytest.approx(stationary(eta, N, 16, r, 1.0), rel=0.12)


def test_unlike_clients_do_not_disturb_one_shared_seed_but_disturb_several():
    """Without noise and with J = 1: the mean gradient goes to zero with K = 1, and to a floor ∝ (1 − 1/K) ς²/N else."""
    problem = quadratic(8, 4, 16, 1.0)
    assert run(problem, 0.05, 1500, 4, K=1)[0][-1] < 1e-20
    two, many = (floor(run(problem, 0.05, 1500, 4, K=K)[0]) for K in (2, 1024))
    assert two / many == pytest.approx(0.5, rel=0.12)
    half = quadratic(16, 4, 16, 1.0)
    fewer = floor(run(half, 0.05, 1500, 4, K=1024)[0]) / half.heterogeneity()
    assert fewer / (many / problem.heterogeneity()) == pytest.approx(0.5, rel=0.12)


def test_drift_grows_with_the_square_of_the_further_steps():
    problem = quadratic(8, 4, 16, 1.0, uneven=True)
    floors = [run(problem, 0.04 / problem.L, 1500, 16, J=J)[0][-1] for J in (1, 2, 3, 5)]
    assert floors[0] < 1e-20  # one step is the mean's own
    assert slope([1, 2, 4], floors[1:]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("K", [1, 3, 1024])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_the_bound_holds(K, share):
    """In the mean over ten runs, with a tenth to spare where it is an equality: H = I at the largest rate."""
    for problem in (quadratic(4, 4, 16, 1.0), quadratic(4, 4, 16, 0.0, uneven=True)):
        eta = share / (problem.L * 4)
        means = [run(problem, eta, 150, 4, K=K, sigma=2.0, seed=seed)[0].mean() for seed in range(10)]
        varsigma2 = problem.heterogeneity() if np.ptp(problem.H, axis=0).max() == 0 else 0.0
        if varsigma2 or K == 1:  # with other H_n ς² is not the same everywhere
            assert np.mean(means) < 1.1 * bound(problem, eta, 150, 4, K, 2.0, varsigma2)


def test_the_bound_holds_for_logistic_regression():
    problem = logistic(4, 16)
    for share in (1.0, 0.1):
        eta = share / (problem.L * 4)
        means = [run(problem, eta, 150, 4, sigma=2.0, seed=seed)[0].mean() for seed in range(5)]
        assert np.mean(means) < bound(problem, eta, 150, 4, 1, 2.0, 0.0)


def test_the_mean_over_the_rounds_falls_like_1_over_T_and_like_1_over_root_T_with_noise():
    problem, times = quadratic(8, 4, 16, 1.0), [200, 800, 3200]
    quiet = [run(problem, 0.1, T, 4)[0].mean() for T in times]
    noisy = [run(problem, 0.5 / T**0.5, T, 4, sigma=4.0)[0].mean() for T in times]
    assert slope(times, quiet) == pytest.approx(-1, abs=0.02)
    assert slope(times, noisy) == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("J", [1, 4])
def test_rates_up_to_2r_over_nL_converge_and_no_larger_ones(J):
    problem = quadratic(4, 4, 16, 1.0)
    below, above = (run(problem, factor * 4 / 16, 400, 4, J=J)[0] for factor in (1.9, 2.1))
    assert below[-1] < 1e-3 * below[0] and above[-1] > 10 * above[0]


def test_a_quadratic_with_equal_H_has_the_same_heterogeneity_everywhere():
    problem = quadratic(5, 2, 6, 0.8)
    assert isinstance(problem, Quadratic)
    gradients = problem.gradients(np.ones((2, 6)) * 7)
    apart = ((gradients - gradients.mean(0)) ** 2).sum() / 5
    assert problem.heterogeneity() == pytest.approx(apart)
