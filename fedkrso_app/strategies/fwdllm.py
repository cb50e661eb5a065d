"""FwdLLM (arXiv:2308.13894): zeroth-order steps of norms and biases alone, along directions that agree with the last
update.

    Server, round t                                   Client n
    p_t, and the pairs of the last entry      ->      ĝ = Σ s z over those pairs; each step: draw candidates, keep the
                                                      p_t with the largest cosine with ĝ; W ← W − (η/p) Σ g z
    the pairs of all clients, times w_n       <-      send the pairs (seed, s), s = −(η/p) g
    p_{t+1} = 2 p_t while clients disagree

Few values move, so the estimates are good: their variance grows with the number of values.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.config import Config, ConfigError, Settings, need, need_positive
from fedkrso_app.core.directions import move_vector, vectors
from fedkrso_app.core.projection import beside
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Means
from fedkrso_app.strategies.scalar import ScalarLocal, ScalarMethod, Zeroth
from fedkrso_app.training.loop import Session
from fedkrso_app.training.model import LoadedModel, find_small
from fedkrso_app.training.shapes import Shapes

_MOST = 2**22  # pairs of an entry: 48 MiB


@dataclass(frozen=True)
class FwdLLMSettings(Settings):
    table = "fwdllm"
    learning_rate: float
    perturbations: int  # p of the first round
    most_perturbations: int
    threshold: float
    candidates: int

    def __post_init__(self) -> None:
        need_positive("fwdllm.learning-rate", self.learning_rate)
        need(1 <= self.most_perturbations <= 1000, "fwdllm.most-perturbations", self.most_perturbations, "1 to 1000")
        rule = f"at least 1 and at most fwdllm.most-perturbations = {self.most_perturbations}"
        need(1 <= self.perturbations <= self.most_perturbations, "fwdllm.perturbations", self.perturbations, rule)
        need(0 <= self.threshold < float("inf"), "fwdllm.threshold", self.threshold, "0 (no pacing) or above")
        need(1 <= self.candidates <= 1000, "fwdllm.candidates", self.candidates, "between 1 (no choice) and 1000")


def paced(p: int, variance: float, threshold: float, most: int) -> int:
    """p of the next round: twice as many while clients disagree, half as many where they agree well."""
    if not threshold:
        return p
    return min(2 * p, most) if variance > threshold else max(p // 2, 1) if variance < threshold / 4 else p


class FwdLLMLocal(ScalarLocal):
    """Client half: the small tensors of the model, and the head if it is trained alike."""

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        self.layers, self.others = {}, {**find_small(loaded), **self.others}

    def apply(self, arrays: Arrays) -> None:
        if "seeds" in arrays:
            self.move(arrays["seeds"].tolist(), arrays["scalars"].tolist())
        self.take_head(arrays)

    def last(self, instructions: Mapping[str, Any]) -> dict[str, Tensor]:
        """ĝ by tensor; empty where there was no round before."""
        seeds, scalars = np.frombuffer(instructions["seeds"], "<u8"), np.frombuffer(instructions["scalars"], "<f4")
        sums = {name: torch.zeros_like(other.detach()) for name, other in self.others.items()} if len(seeds) else {}
        for name, total in sums.items():
            move_vector(total, seeds.tolist(), scalars.tolist(), name, self.zeroth.drawn_rank)
        return sums

    def closest(self, seeds: list[int], last: Mapping[str, Tensor], count: int) -> list[int]:
        """The ``count`` of ``seeds`` whose directions have the largest cosine with ``last``."""
        dots = norms = np.zeros(len(seeds))
        for name, total in last.items():
            z = vectors(seeds, name, total.numel(), self.zeroth.drawn_rank).to(total)
            dots = dots + (z @ total.flatten()).cpu().numpy()
            norms = norms + z.square().sum(1).cpu().numpy()
        order = np.argsort(-dots / np.sqrt(norms), kind="stable")
        return [seeds[k] for k in np.sort(order[:count])]

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        settings, p, last = self.config.of(FwdLLMSettings), int(instructions["p"]), self.last(instructions)
        choices = beside(rng)

        def seeds(j: int) -> list[int]:
            drawn = choices.integers(2**64, size=p * (settings.candidates if last else 1), dtype=np.uint64).tolist()
            return self.closest(drawn, last, p) if last else drawn

        with self.steps(settings.learning_rate, seeds) as (steps, every):

            def update() -> dict[str, np.ndarray]:
                drawn, scalars, _ = zip(*steps.taken, strict=True)
                pairs = {"seeds": np.array(drawn, np.uint64), "scalars": np.array(scalars, np.float32)}
                return {**pairs, **self.state()}  # type: ignore[dict-item]  # numpy's types are too narrow

            # The server must know g, to see how much clients disagree, and what travels is -(η/p) g.
            yield Session(every, update, constant_rate=True, from_losses=True)


class FwdLLM(ScalarMethod):
    """Server half: the pairs of all clients, those of one seed added up, and how many of them the next round needs."""

    half = FwdLLMLocal
    settings = (Zeroth, FwdLLMSettings)
    arxiv = "2308.13894"
    learning_rate_key = "fwdllm.learning-rate"
    rank_key = ""
    linear = False  # each client has directions of its own

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if not shapes.small:
            raise ConfigError("fwdllm trains norms and biases, and this model has none: take another strategy.")
        self.own = config.of(FwdLLMSettings)
        self.last: dict[str, np.ndarray] = {"seeds": np.zeros(0, np.uint64), "scalars": np.zeros(0, np.float32)}

    @classmethod
    def check_settings(cls, config: Config) -> None:
        return None

    @property
    def p(self) -> int:
        """p_t."""
        return int(self.kept["p"][0]) if "p" in self.kept else self.own.perturbations

    def _schema(self, most: int) -> Schema:
        pairs = {"seeds": Field("uint64", ("s",), "key"), "scalars": Field("float32", ("s",))}
        return Schema({**pairs, **self.head}, limits={"s": most})

    @property
    def reply(self) -> Schema:
        return self._schema(self.config.local_steps * self.own.most_perturbations)

    @property
    def entry(self) -> Schema:
        plain = self._schema(_MOST)
        return Schema({**plain.fields, "p": Field("int64", (1,), "server")}, plain.limits)

    @property
    def weights_sizes(self) -> tuple[int, int]:
        return 0, sum(self.shapes.small.values()) + super().weights_sizes[1]

    def paper_bytes(self) -> int:
        """All small tensors both ways; and the head, of which the paper has none."""
        return 8 * sum(self.shapes.small.values()) + self.paper_head()

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        pairs = self.config.local_steps * self.own.perturbations
        return {"s": pairs}, {"s": clients * pairs}, {}

    def instructions(self, round: int) -> dict[str, Any]:
        known = self.last if self.own.candidates > 1 else {name: values[:0] for name, values in self.last.items()}
        return {
            "p": self.p,
            "seeds": known["seeds"].astype("<u8").tobytes(),
            "scalars": known["scalars"].astype("<f4").tobytes(),
        }

    def check(self, arrays: Arrays, round: int) -> None:
        count = self.config.local_steps * self.p
        if len(arrays["seeds"]) != count:
            raise Refused(f"{len(arrays['seeds'])} pairs, expected {count}")
        if len(np.unique(arrays["seeds"])) < count:
            raise Refused("a seed occurs twice")
        if (np.abs(arrays["scalars"]) > 32).any():
            raise Refused("scalars above 32 are too large")

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        return {name: arrays[name] for name in self.head}

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        seeds, where = np.unique(np.concatenate([a["seeds"] for _, a in means.replies]), return_inverse=True)
        scalars = np.bincount(where, np.concatenate([share * a["scalars"].astype(float) for share, a in means.replies]))
        p = paced(self.p, self.variance(means), self.own.threshold, self.own.most_perturbations)
        head = {name: means.mean(name) for name in self.head}
        return {"seeds": seeds, "scalars": scalars.astype(np.float32), **head, "p": np.array([p])}

    def variance(self, means: Means) -> float:
        """Between clients, of the mean of g z on one tensor, the middle one by name: the mean over its values."""
        name, size = list(self.shapes.small.items())[len(self.shapes.small) // 2]
        estimates = []
        for _, arrays in means.replies if self.own.threshold else ():
            z = torch.zeros(size, dtype=torch.float64)
            move_vector(z, arrays["seeds"].tolist(), arrays["scalars"].tolist(), name, self.zeroth.drawn_rank)
            estimates.append(z.numpy() / (self.config.local_steps * self.own.learning_rate))
        return float(np.var(estimates, axis=0).mean()) if estimates else 0.0

    def observe(self, version: int, arrays: Arrays) -> None:
        if "seeds" in arrays:
            self.last = {name: np.array(arrays[name]) for name in self.last}
