"""ε by other routes: numerical integrals, Rényi orders, the privacy loss distributions of another library."""

import math

import numpy as np
import pytest

from fedkrso_app.config import ConfigError
from fedkrso_app.core.accounting import TAILS, Releases, epsilon, gaussian_delta, gaussian_epsilon, noise_for
from fedkrso_app.strategies.privacy import Privacy

NOISES = (1, 2, 5, 10, 20, 50)
EPSILONS = {  # rounds -> ε at δ = 1e-5 for each noise, as another library's PLD has them
    10: (17.857, 7.511, 2.594, 1.199, 0.561, 0.207),
    30: (37.623, 14.830, 4.866, 2.207, 1.024, 0.376),
    100: (91.817, 33.104, 9.997, 4.377, 1.993, 0.726),
}
SAMPLED = {(0.1, 100, 1.0): 7.047, (0.1, 30, 1.0): 4.178, (0.01, 1000, 1.0): 1.829, (0.05, 200, 0.8): 7.702}


def renyi_epsilon(noise: float, rate: float, count: int, delta: float) -> float:
    """By integer Rényi orders (Mironov, Talwar and Zhang 2019), converted as in Canonne, Kamath and Steinke 2020."""
    best = math.inf
    for order in range(2, 256):
        terms = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + (k * math.log(rate) if k else 0.0)
            + ((order - k) * math.log(1 - rate) if order > k and rate < 1 else -math.inf if order > k else 0.0)
            + k * (k - 1) / (2 * noise**2)
            for k in range(order + 1)
        ]  # fmt: skip
        top = max(terms)
        loss = count * (top + math.log(sum(math.exp(term - top) for term in terms))) / (order - 1)
        best = min(best, loss + math.log(1 - 1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return best


@pytest.mark.parametrize("rounds", EPSILONS)
def test_epsilon_of_unsampled_rounds_is_what_another_accountant_has(rounds):
    found = [epsilon([Releases(noise, count=rounds)], 1e-5) for noise in NOISES]
    assert found == pytest.approx(EPSILONS[rounds], abs=1.5e-3)  # those are given to three digits
    for noise, value in zip(NOISES, found, strict=True):
        largest = 1.25 if noise == 1 else 1.15  # whole orders are coarse where the best one is near 1
        assert value <= renyi_epsilon(noise, 1.0, rounds, 1e-5) <= largest * value


@pytest.mark.parametrize("mu", [0.02, 0.3, 1.0, 4.0])
def test_delta_is_the_integral_of_the_privacy_loss(mu):
    loss = mu * mu / 2 + mu * np.linspace(-9, 9, 200_001)
    density = np.exp(-(((loss - mu * mu / 2) / mu) ** 2) / 2) / (mu * math.sqrt(2 * math.pi))
    for bound in (0.0, mu, 3 * mu):
        integral = np.trapezoid(np.maximum(0.0, 1 - np.exp(bound - loss)) * density, loss)
        assert gaussian_delta(bound, mu) == pytest.approx(integral, abs=1e-9)


def test_epsilon_and_delta_are_inverse():
    for mu in (1e-3, 0.1, 1.0, 10.0, 50.0):
        for delta in (1e-3, 1e-5, 1e-9):
            found = gaussian_epsilon(mu, delta)
            assert found == 0 or gaussian_delta(found, mu) == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize("case", SAMPLED)
def test_epsilon_of_sampled_batches_is_the_libraries_and_below_renyis(case):
    pytest.importorskip("dp_accounting", reason="the optional package dp-accounting is not installed")
    rate, count, noise = case
    found = epsilon([Releases(noise, rate, count)], 1e-5)
    assert found == pytest.approx(SAMPLED[case], abs=1.5e-3)
    assert found < renyi_epsilon(noise, rate, count, 1e-5) < 1.2 * found
    assert found < epsilon([Releases(noise, 1.0, count)], 1e-5)  # without the coins


def test_releases_add_up_whatever_their_order_and_grouping():
    once = epsilon([Releases(2.0, count=10), Releases(5.0, count=5)], 1e-5)
    assert epsilon([Releases(5.0)] * 5 + [Releases(2.0)] * 10, 1e-5) == once
    assert once > epsilon([Releases(2.0, count=10)], 1e-5)
    assert epsilon([], 1e-5) == epsilon([Releases(1.0, count=0)], 1e-5) == 0
    assert epsilon([Releases(3.0), Releases(0.0)], 1e-5) == math.inf


def test_a_delta_that_the_ends_of_the_noise_use_up_promises_nothing():
    assert epsilon([Releases(50.0)], TAILS) == epsilon([Releases(50.0)], TAILS / 10) == math.inf
    assert epsilon([Releases(50.0)], 2 * TAILS) < 1
    with pytest.raises(ConfigError, match=r"privacy\.delta = 1e-09 is impossible: it must be at least 1e-08"):
        Privacy("client", 1.0, 1.0, 1e-9, 0.0, "os")


def test_the_noise_for_an_epsilon_has_it_and_hardly_more():
    for target, count, known in ((8, 30, 3.29), (3, 30, 7.62), (1, 30, 20.4)):
        noise = noise_for(target, 1e-5, count=count)
        assert noise == pytest.approx(known, rel=2e-3)
        assert epsilon([Releases(noise, count=count)], 1e-5) <= target
        assert epsilon([Releases(0.9998 * noise, count=count)], 1e-5) > target
