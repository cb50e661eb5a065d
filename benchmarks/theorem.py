"""FedKRSO's rates where everything is known: quadratics and logistic regression, orthonormal P, plain SGD, I = 1.

``python -m benchmarks.theorem [PICTURE.png]`` prints the slopes of docs/theorem.md, in less than a minute on one core.
The clients of a problem have L, the optimum, the gradient noise σ² and the heterogeneity ς² of a formula, so that what
is measured can be held against what is proven.
"""

import io
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import minimize

from fedkrso_app.core.projection import projections


class Problem(Protocol):
    """N clients with smooth losses f_n(W), W of m × n, and their mean f."""

    shape: tuple[int, int, int]  # N, m, n
    L: float  # of f

    def gradients(self, W: np.ndarray) -> np.ndarray:
        """∇f_n at W_n, for W of N × m × n or m × n: N × m × n."""

    def value(self, W: np.ndarray) -> float:
        """f(W)."""

    @property
    def least(self) -> float:
        """f at its minimum."""


@dataclass(frozen=True)
class Quadratic:
    """f_n(W) = ½ tr((W − C_n) H_n (W − C_n)ᵀ): least squares with second moments H_n and solutions C_n."""

    C: np.ndarray  # N × m × n
    H: np.ndarray  # N × n × n

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.C.shape  # type: ignore[return-value]

    @cached_property
    def L(self) -> float:
        return float(np.linalg.eigvalsh(self.H.mean(0))[-1])

    def gradients(self, W: np.ndarray) -> np.ndarray:
        return (W - self.C) @ self.H

    def value(self, W: np.ndarray) -> float:
        return float(((W - self.C) * self.gradients(W)).sum() / 2 / len(self.C))

    @cached_property
    def optimum(self) -> np.ndarray:
        """W*, m × n."""
        return np.linalg.solve(self.H.mean(0), (self.C @ self.H).mean(0).T).T

    @property
    def least(self) -> float:
        return self.value(self.optimum)

    def heterogeneity(self) -> float:
        """ς² = mean ‖∇f_n − ∇f‖² at the optimum; the same everywhere where all H_n are equal."""
        return float((self.gradients(self.optimum) ** 2).sum() / len(self.C))


@dataclass(frozen=True)
class Logistic:
    """f_n(W) = mean log(1 + exp(−y W x)) + μ/2 ‖W‖² over the client's rows; W of 1 × n."""

    X: np.ndarray  # N × b × n
    y: np.ndarray  # N × b, -1 or 1
    mu: float = 0.1

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.X), 1, self.X.shape[2]

    @cached_property
    def L(self) -> float:
        rows = self.X.reshape(-1, self.X.shape[2])
        return float(np.linalg.eigvalsh(rows.T @ rows / len(rows))[-1] / 4 + self.mu)

    def gradients(self, W: np.ndarray) -> np.ndarray:
        W = np.broadcast_to(W, self.shape)
        margins = self.y * (self.X @ W[:, 0, :, None])[..., 0]
        pull = -self.y / (1 + np.exp(margins)) / self.y.shape[1]
        return (pull[:, None] @ self.X) + self.mu * W

    def value(self, W: np.ndarray) -> float:
        margins = self.y * (self.X @ np.broadcast_to(W, self.shape)[:, 0, :, None])[..., 0]
        return float(np.logaddexp(0, -margins).mean() + self.mu / 2 * (W**2).sum())

    @cached_property
    def least(self) -> float:
        n = self.shape[2]
        gradient = lambda w: self.gradients(w.reshape(1, n)).mean(0)[0]  # noqa: E731
        return float(minimize(lambda w: self.value(w.reshape(1, n)), np.zeros(n), jac=gradient, tol=1e-12).fun)


def quadratic(N: int, m: int, n: int, apart: float, uneven: bool = False, seed: int = 0) -> Quadratic:
    """Clients whose solutions lie ``apart`` (rms of an entry); H = I for all, or ``uneven`` ones with mean near I."""
    rng = np.random.default_rng(seed)
    H = np.tile(np.eye(n), (N, 1, 1))
    if uneven:
        X = rng.normal(size=(N, 2 * n, n))
        H = np.swapaxes(X, 1, 2) @ X / (2 * n)
    return Quadratic(1.0 + apart * rng.normal(size=(N, m, n)), H)


def logistic(N: int, n: int, seed: int = 0) -> Logistic:
    """Clients with other means of x, so that they are not alike."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(N, 32, n)) + 0.5 * rng.normal(size=(N, 1, n))
    return Logistic(X, np.where(rng.random((N, 32)) < 1 / (1 + np.exp(-X.sum(2))), 1.0, -1.0))


def run(
    problem: Problem, eta: float, rounds: int, r: int, J: int = 1, K: int = 1, sigma: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """FedKRSO with SGD from W = 0: ‖∇f(W_t)‖² at the start of every round, and the last W.

    Every round has K new seeds; each client draws one of them (I = 1) and takes J steps along it, on gradients with
    Gaussian noise of variance σ² = E‖noise‖². The server averages ΣB_nP_n over all clients.
    """
    N, m, n = problem.shape
    rng, W, squares = np.random.default_rng(seed), np.zeros((m, n)), []
    for start in range(0, rounds, 500):  # in blocks: all projections of a run do not fit into memory
        count = min(500, rounds - start)
        drawn = rng.integers(K, size=(count, N))  # who draws which of the round's K seeds
        names, places = np.unique(drawn + K * np.arange(count)[:, None], return_inverse=True)
        seeds = rng.integers(2**63, size=len(names)).tolist()
        pool = projections(seeds, "theorem", r, n, "orthonormal").astype(np.float64)
        for of_client in places.reshape(count, N):
            P = pool[of_client]  # N × r × n
            squares.append(float((problem.gradients(W).mean(0) ** 2).sum()))
            B = np.zeros((N, m, r))
            for _ in range(J):
                G = problem.gradients(W + B @ P)
                if sigma:
                    G = G + sigma / np.sqrt(m * n) * rng.normal(size=G.shape)
                B -= eta * G @ P.swapaxes(1, 2)
            W = W + (B @ P).mean(0)
    return np.array(squares), W


def bound(problem: Problem, eta: float, rounds: int, r: int, K: int, sigma: float, varsigma2: float) -> float:
    """An upper bound of mean_t E‖∇f(W_t)‖² for J = 1 and η ≤ 1/(L ω), ω = n/r, derived in docs/theorem.md:

    2 (f(W_0) − f*)/(η T) + L η (ω σ² + (ω − 1)(1 − 1/K) ς²)/N.
    """
    N, m, n = problem.shape
    gap = problem.value(np.zeros((m, n))) - problem.least
    noise = (n / r * sigma**2 + (n / r - 1) * (1 - 1 / K) * varsigma2) / N
    return 2 * gap / (eta * rounds) + problem.L * eta * noise


def slope(x: list[float], y: list[float]) -> float:
    """Of log y over log x, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def floor(squares: np.ndarray) -> float:
    """The mean over the second half, where the start is forgotten."""
    return float(squares[len(squares) // 2 :].mean())


def stationary(eta: float, N: int, n: int, r: int, sigma: float) -> float:
    """E‖∇f‖² that :func:`run` ends at where all H_n = I and K = 1, for any J: exact (docs/theorem.md)."""
    omega = n / r
    return eta * omega * sigma**2 / (N * (2 - eta * omega))


N, M, WIDTH, RANK, ROUNDS = 8, 4, 32, 4, 4000  # clients, rows, n, r, T of the measurements below
ETA, SIGMA, APART = 0.025, 1.0, 1.0

Series = tuple[str, str, list[float], list[float], list[float]]  # what, over what, its values, measured, predicted


def measured() -> list[Series]:
    """All measurements of E‖∇f‖², each beside its prediction.

    Predictions of "gradient noise" are exact; the others follow a rate from the first point on.
    """
    counts, ranks, rates = [2.0, 4.0, 8.0, 16.0], [2.0, 4.0, 8.0, 16.0], [0.00625, 0.0125, 0.025, 0.05]
    steps, pools, times = [1.0, 2.0, 4.0, 8.0], [2.0, 4.0, 8.0, 32.0], [250.0, 500.0, 1000.0, 2000.0, 4000.0]
    even, omega = quadratic(N, M, WIDTH, APART), WIDTH / RANK

    def noisy(eta: float = ETA, clients: float = N, r: float = RANK, J: float = 1) -> tuple[float, float]:
        """The floor, measured and exact."""
        problem = quadratic(int(clients), M, WIDTH, APART)
        found = floor(run(problem, eta, ROUNDS, int(r), int(J), sigma=SIGMA)[0])
        return found, stationary(eta, int(clients), WIDTH, int(r), SIGMA)

    def unlike(clients: float, K: float) -> float:
        """The floor without noise, at the heterogeneity of eight clients."""
        problem = quadratic(int(clients), M, WIDTH, APART)
        found = floor(run(problem, ETA, ROUNDS, RANK, K=int(K))[0])
        return found / problem.heterogeneity() * even.heterogeneity()

    def mean(eta: float, T: float, sigma: float = 0.0) -> float:
        return float(run(even, eta, int(T), RANK, sigma=sigma)[0].mean())

    uneven = quadratic(N, M, WIDTH, APART, uneven=True)
    drift = [floor(run(uneven, 0.125 / (uneven.L * omega), ROUNDS, WIDTH, J=J)[0]) for J in (2, 3, 5, 9)]
    seeds, clients = [unlike(N, K) for K in pools], [unlike(c, 1024) for c in counts]
    quiet, loud = [mean(0.5 / omega, T) for T in times], [mean(0.5 / T**0.5, T, 4.0) for T in times]
    found: list[Series] = []
    for over, x, key in (
        ("clients N", counts, "clients"),
        ("rank r", ranks, "r"),
        ("rate η", rates, "eta"),
        ("steps J", steps, "J"),
    ):
        pairs = [noisy(**({"eta": ETA / 4} if key == "r" else {}) | {key: value}) for value in x]
        found.append(("gradient noise", over, x, [y for y, _ in pairs], [y for _, y in pairs]))
    return [
        *found,
        ("unlike clients, no noise", "seeds K", pools, seeds, [seeds[0] * (1 - 1 / K) / 0.5 for K in pools]),
        ("unlike clients, K = 1024", "clients N", counts, clients, [clients[0] * counts[0] / c for c in counts]),
        ("drift, no noise, r = n", "J − 1", [1.0, 2.0, 4.0, 8.0], drift, [drift[0] * k**2 for k in (1, 2, 4, 8)]),
        ("no noise, mean of all rounds", "rounds T", times, quiet, [quiet[0] * times[0] / T for T in times]),
        ("η = 0.5/√T, mean of all rounds", "rounds T", times, loud, [loud[0] * (times[0] / T) ** 0.5 for T in times]),
    ]


def looseness(problem: Problem, share: float, K: int = 1, repeats: int = 20, rounds: int = 500) -> float:
    """:func:`bound` over the measured mean, at η = ``share``/(L ω) with noise, over ``repeats`` runs."""
    eta = share / (problem.L * problem.shape[2] / RANK)
    varsigma2 = problem.heterogeneity() if isinstance(problem, Quadratic) else 0.0
    runs = [run(problem, eta, rounds, RANK, K=K, sigma=SIGMA, seed=seed)[0] for seed in range(repeats)]
    return bound(problem, eta, rounds, RANK, K, SIGMA, varsigma2) / float(np.mean(runs))


def draw(found: list[Series], file: Path) -> None:
    """One panel for each measurement: points measured, lines predicted."""
    figure = Figure(figsize=(9, 8.4), layout="constrained")
    for axes, (what, over, x, y, predicted) in zip(figure.subplots(3, 3).flat, found, strict=True):
        axes.loglog(x, predicted, color="#1a1a1a", linewidth=1, label="predicted")
        axes.loglog(x, y, "o", color="#0072B2", label="measured")
        axes.set_title(what, fontsize=9)
        axes.set_xlabel(over)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        low, high = min(*y, *predicted), max(*y, *predicted)
        axes.set_ylim(low / 2, high * 2)
        axes.grid(color="#dddddd", linewidth=0.7)
    figure.supylabel("E‖∇f‖²")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    Image.open(buffer).convert("RGB").quantize(64).save(file, format="png", optimize=True)


def main(arguments: list[str]) -> None:
    found = measured()
    for what, over, x, y, predicted in found:
        worst = max(abs(a / b - 1) for a, b in zip(y, predicted, strict=True))
        slopes = f"slope {slope(x, y):+.2f}, predicted {slope(x, predicted):+.2f}"
        print(f"{what:32} over {over:10} {slopes}, points within {worst:.0%}")
    for share in (1.0, 0.1):
        even, unlike = (
            looseness(quadratic(N, M, WIDTH, 0.0), share),
            looseness(quadratic(N, M, WIDTH, APART), share, 10),
        )
        uneven, curved = looseness(quadratic(N, M, WIDTH, 0.0, True), share), looseness(logistic(N, WIDTH), share)
        print(
            f"bound / measured at {share:g} r/(nL): H = I {even:.2f}, unlike clients and K = 10 {unlike:.2f}, ", end=""
        )
        print(f"uneven H {uneven:.2f}, logistic {curved:.2f}")
    for factor in (1.9, 2.1):
        squares, _ = run(quadratic(N, M, WIDTH, APART), factor * RANK / WIDTH, 500, RANK)
        print(f"eta = {factor} r/(nL): the squared gradient goes from {squares[0]:.3g} to {squares[-1]:.3g}")
    if arguments:
        draw(found, Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
