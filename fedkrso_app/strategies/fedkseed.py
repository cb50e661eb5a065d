"""FedKSeed and FedKSeed-Pro (arXiv:2312.06353): K directions for the whole run, and how far the model is along each.

    Server, round t                                Client n
    S^t: K numbers, cumulative since W^0    ->     W^t = W^0 + Σ_k S_k z_k
                                                   each step: draw a slot k; g = (f(W + εz_k) − f(W − εz_k)) / 2ε
    S_k += Σ_n w_n s_{n,k} (missing: 0)     <-     W ← W − η g z_k, s_k −= η g; send {(k, s_k)} of the slots drawn

The newest entry leads from W^0 to W^t whatever a node has missed, so a node keeps W^0. The Pro form draws slot k with
a probability that grows with the mean |g| seen along it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.config import Config, Settings, need, need_positive
from fedkrso_app.core.directions import seeds_of
from fedkrso_app.core.projection import beside, layer_key, philox
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Local, Means
from fedkrso_app.strategies.scalar import SCALE, ScalarLocal, ScalarMethod, Zeroth
from fedkrso_app.training.loop import Session
from fedkrso_app.training.model import LoadedModel
from fedkrso_app.training.shapes import Shapes

STEEPEST = 1000.0  # a larger |g| counts as this one (the authors' code)


@dataclass(frozen=True)
class FedKSeedSettings(Settings):
    table = "fedkseed"
    learning_rate: float
    slots: int  # K

    def __post_init__(self) -> None:
        need_positive("fedkseed.learning-rate", self.learning_rate)
        need(1 <= self.slots <= 65536, "fedkseed.slots", self.slots, "between 1 and 65536")


def probabilities(slopes: np.ndarray) -> np.ndarray:
    """FedKSeed-Pro: softmax of the mean |g| of every slot, spread over [0, 1]. None is above e times another."""
    spread = (slopes - slopes.min()) / (slopes.max() - slopes.min() + 1e-10)
    weights = np.exp(spread, dtype=np.float64)
    return weights / weights.sum()


class FedKSeedLocal(ScalarLocal):
    """Client half: one slot per step, drawn with replacement."""

    reports: ClassVar[bool] = False  # of what |g| was along each slot

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        K = config.of(FedKSeedSettings).slots
        self.seeds = seeds_of(int(philox(config.seed, layer_key("fedkseed")).random_raw(1)[0]), K)
        self.slots = np.zeros(K, np.float32)  # S^t
        self.start: list[Tensor] = []  # W^0 of what scalars move, once it is needed

    def state(self) -> dict[str, np.ndarray]:
        return {"slots": self.slots, **super().state()}

    def apply(self, arrays: Arrays) -> None:
        """W^t = W^0 + Σ_k S_k z_k, k ascending: the same bits whatever was applied before."""
        moved = self.shared()[: len(self.layers) + len(self.others)]
        if not self.start:
            self.start = [tensor.to("cpu", copy=True) for tensor in moved]
        with torch.no_grad():
            for tensor, start in zip(moved, self.start, strict=True):
                tensor.copy_(start)
        self.slots = np.array(arrays["slots"])
        used = np.flatnonzero(self.slots).tolist()
        self.move([self.seeds[k] for k in used], self.slots[used].tolist())
        self.take_head(arrays)

    def computing(self, device: torch.device) -> Local:
        start, self.start = self.start, []  # the copy takes no entries
        try:
            return super().computing(device)
        finally:
            self.start = start

    def probabilities(self, instructions: Mapping[str, Any]) -> np.ndarray | None:
        """Of each slot to be drawn; None: all alike."""
        return None

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        choices = beside(rng)
        p, drawn = self.probabilities(instructions), list[int]()

        def seeds(j: int) -> list[int]:
            drawn.append(int(choices.choice(len(self.seeds), p=p)))
            return [self.seeds[drawn[-1]]]

        with self.steps(self.config.of(FedKSeedSettings).learning_rate, seeds) as (steps, every):

            def update() -> dict[str, np.ndarray]:
                slots, where, counts = np.unique(drawn, return_inverse=True, return_counts=True)
                _, scalars, slopes = np.array(steps.taken, np.float64).T
                sums = [np.bincount(where, x) for x in (scalars, np.minimum(np.abs(slopes), STEEPEST))]
                arrays: dict[str, np.ndarray] = {"indices": slots.astype(np.uint16)}
                arrays["scalars"] = sums[0].astype(np.float32)
                if self.reports:
                    arrays |= {"slopes": sums[1].astype(np.float32), "counts": counts.astype(np.uint32)}
                return {**arrays, **ScalarLocal.state(self)}

            yield Session(every, update, from_losses=True)


class FedKSeed(ScalarMethod):
    """Server half: S, to which the mean of what clients did along each slot is added."""

    half = FedKSeedLocal
    settings = (Zeroth, FedKSeedSettings)
    arxiv = "2312.06353"
    learning_rate_key = "fedkseed.learning-rate"

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.K = config.of(FedKSeedSettings).slots
        self.slots = np.zeros(self.K, np.float32)  # S^t

    @property
    def reply(self) -> Schema:
        fields = {"indices": Field("uint16", ("s",), "key"), "scalars": Field("float32", ("s",))}
        return Schema({**fields, **self.head}, limits={"s": min(self.config.local_steps, self.K)})

    @property
    def entry(self) -> Schema:
        return Schema({"slots": Field("float32", (self.K,), "state"), **self.head})

    def paper_bytes(self) -> int:
        """A seed and a scalar per step up, the numbers of all slots down; and the head, of which the paper has none."""
        return 8 * self.config.local_steps + 4 * self.K + self.paper_head()

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        drawn = self.K * (1 - (1 - 1 / self.K) ** self.config.local_steps)
        return {"s": drawn}, {}, {"drawn": drawn}

    def client_bytes(self, lengths: Mapping[str, float]) -> int:
        """W^0 beside W^t, in the host's memory."""
        return self.weights_bytes

    def check(self, arrays: Arrays, round: int) -> None:
        indices = arrays["indices"]
        if (indices >= self.K).any():
            raise Refused(f"slot {int(indices.max())} is not below fedkseed.slots = {self.K}")
        if len(np.unique(indices)) < len(indices):
            raise Refused("a slot occurs twice")

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        by_slot = {int(k): s[None] * SCALE for k, s in zip(arrays["indices"], arrays["scalars"], strict=True)}
        return {**by_slot, **{name: arrays[name] for name in self.head}}

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        moved = [means.mean(k)[0] / SCALE if k in means else np.float32(0) for k in range(self.K)]
        return {"slots": self.slots + np.array(moved, np.float32), **{name: means.mean(name) for name in self.head}}

    def observe(self, version: int, arrays: Arrays) -> None:
        self.slots = np.array(arrays["slots"]) if "slots" in arrays else self.slots


class FedKSeedProLocal(FedKSeedLocal):
    """Client half: steeper slots are drawn more often, as the server says."""

    reports = True

    def probabilities(self, instructions: Mapping[str, Any]) -> np.ndarray:
        p = np.frombuffer(instructions["p"], "<f4").astype(np.float64)
        return p / p.sum()  # it was rounded


class FedKSeedPro(FedKSeed):
    """Server half: also the mean |g| along each slot over the whole run, from which the probabilities follow."""

    half = FedKSeedProLocal

    @property
    def reply(self) -> Schema:
        plain = super().reply
        more = {"slopes": Field("float32", ("s",), "key"), "counts": Field("uint32", ("s",), "key")}
        return Schema({**plain.fields, **more}, plain.limits)

    @property
    def entry(self) -> Schema:
        return Schema({**super().entry.fields, "seen": Field("float64", (self.K, 2), "server")})

    def paper_bytes(self) -> int:
        """As many again down: the probabilities."""
        return super().paper_bytes() + 4 * self.K

    @property
    def seen(self) -> np.ndarray:
        """Σ|g| and the number of draws, of every slot and of the mean client, over all rounds: K × 2."""
        return self.kept.get("seen", np.zeros((self.K, 2)))

    def instructions(self, round: int) -> dict[str, Any]:
        sums, draws = self.seen.T
        return {"p": probabilities(sums / np.maximum(draws, 1e-30)).astype("<f4").tobytes()}

    def check(self, arrays: Arrays, round: int) -> None:
        super().check(arrays, round)
        slopes, counts = arrays["slopes"], arrays["counts"]
        if not (counts.sum(dtype=np.int64) == self.config.local_steps and (counts > 0).all()):
            raise Refused(f"its counts of draws do not add up to local-steps = {self.config.local_steps}")
        if (slopes < 0).any() or (slopes > counts * STEEPEST * 1.001).any():
            raise Refused("its sums of slopes cannot be")

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        both = np.stack([arrays["slopes"] / np.float32(STEEPEST), arrays["counts"].astype(np.float32)], axis=1)
        by_slot = {("seen", int(k)): row for k, row in zip(arrays["indices"], both, strict=True)}
        return {**super().summands(arrays), **by_slot}

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        seen = [means.mean(("seen", k)) if ("seen", k) in means else np.zeros(2) for k in range(self.K)]
        return {**super().conclude(means, round), "seen": self.seen + np.stack(seen) * [STEEPEST, 1]}
