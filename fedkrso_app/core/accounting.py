"""ε of what was released with Gaussian noise: exact where everyone took part, by privacy loss distributions where coins
decided.

T sums of noise σ (in units of their sensitivity) compose exactly to one Gaussian with μ = √(Σ 1/σ²) (Dong, Roth and Su
2022, arXiv:1905.02383; Balle and Wang 2018, arXiv:1805.06530):

    δ(ε) = Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2)

With Poisson sampling there is no closed form. Google's dp-accounting composes privacy loss distributions; its adjacency
is that of one unit more or less.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

INSTALL = "pip install 'dp-accounting>=0.6,<0.7'"
TAILS = 1e-9  # of δ: our noise ends at 9.4 σ (:mod:`core.noise`); the terms sum to less for σ ≥ 0.5 and 1,000 releases
_GRID = 1e-3  # of a privacy loss; it is rounded up


@dataclass(frozen=True)
class Releases:
    """``count`` sums with noise of standard deviation ``noise`` × their sensitivity. A unit is in each of them with
    probability ``rate``, by a coin that nobody sees; 1: always, or by a draw that is known."""

    noise: float
    rate: float = 1.0
    count: int = 1


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) of a Gaussian whose mean moves by ``mu`` standard deviations."""
    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(min(epsilon + log_ndtr(-mu / 2 - epsilon / mu), 0.0)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The ε at which :func:`gaussian_delta` is ``delta``, or 0."""
    if mu == 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    upper = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # the tail bound: δ(upper) is below
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, upper, xtol=1e-9))


def epsilon(releases: Iterable[Releases], delta: float) -> float:
    """The ε that all ``releases`` together have at ``delta``; infinite if one has no noise, or if ``delta`` is no
    more than the tails need.

    Raises ImportError where a rate is below 1 and dp-accounting is not installed.
    """
    counts: dict[tuple[float, float], int] = {}
    for each in releases:
        if each.count and each.rate:
            counts[each.noise, each.rate] = counts.get((each.noise, each.rate), 0) + each.count
    if any(noise == 0 for noise, _ in counts) or (counts and delta <= TAILS):
        return math.inf
    if all(rate == 1 for _, rate in counts):
        return gaussian_epsilon(math.sqrt(sum(count / noise**2 for (noise, _), count in counts.items())), delta - TAILS)
    return _sampled_epsilon(tuple(sorted(counts.items())), delta - TAILS)


def rounded_up(epsilon: float, digits: int) -> float:
    """ε to so many digits after the point, and never below what it is: no promise may look stronger."""
    return math.ceil(epsilon * 10**digits - 1e-9) / 10**digits if epsilon < math.inf else epsilon


def shown(epsilon: float) -> str:
    """ε for a reader: to two digits after the point, rounded up."""
    return f"{rounded_up(epsilon, 2):.2f}" if epsilon < math.inf else "infinite"


def noise_for(target: float, delta: float, rate: float = 1.0, count: int = 1) -> float:
    """The smallest noise, to one part in 10,000, with which ``count`` releases have an ε of at most ``target`` > 0."""

    def kept(noise: float) -> bool:
        return epsilon([Releases(noise, rate, count)], delta) <= target

    upper = 1.0
    while not kept(upper):
        upper *= 2
    lower = upper / 2
    while kept(lower):
        lower, upper = lower / 2, lower
    while upper / lower > 1.0001:
        middle = math.sqrt(lower * upper)
        lower, upper = (lower, middle) if kept(middle) else (middle, upper)
    return upper


def can_sample() -> bool:
    """Whether what rates below 1 need is installed."""
    return find_spec("dp_accounting") is not None


@lru_cache(maxsize=256)
def _sampled_epsilon(counts: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise ImportError(f"ε of sampled batches needs dp-accounting: {INSTALL}") from None
    pld = PLDAccountant(value_discretization_interval=_GRID)
    for (noise, rate), count in counts:
        gaussian = dp_accounting.GaussianDpEvent(noise)
        pld.compose(gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian), count)
    return float(pld.get_epsilon(delta))
