"""DeComFL (arXiv:2405.15861): a round's directions are the same for all clients, who send a scalar along each.

    Server, round t                                 Client n
    a root seed, hence τP directions         ->     step j: g_p = (f(W + εz_p) − f(W − εz_p)) / 2ε along P of them
    s_jp = Σ_n w_n s_{n,jp}                  <-             W ← W + Σ_p s_p z_p, s_p = −(η/P) g_p; send all s
    W^{t+1} = W^t + Σ s_jp z_jp                     forget W, and apply the entry

With ``quantize = "sign"`` it is FeedSign (arXiv:2501.17610): a client sends the sign of each g, one bit, the majority
decides, and all steps have the length η/P.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkrso_app.config import Settings, choice, need, need_positive
from fedkrso_app.core import srd
from fedkrso_app.core.directions import seeds_of
from fedkrso_app.core.flat import flatten
from fedkrso_app.core.projection import layer_key, philox
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Means
from fedkrso_app.strategies.scalar import SCALE, ScalarLocal, ScalarMethod, Zeroth
from fedkrso_app.training.loop import Session


@dataclass(frozen=True)
class DeComFLSettings(Settings):
    table = "decomfl"
    learning_rate: float
    perturbations: int  # P
    quantize: str

    def __post_init__(self) -> None:
        need_positive("decomfl.learning-rate", self.learning_rate)
        need(1 <= self.perturbations <= 1000, "decomfl.perturbations", self.perturbations, "between 1 and 1000")
        choice("decomfl.quantize", self.quantize, ["none", "sign"])

    @property
    def signs(self) -> bool:
        return self.quantize == "sign"


class DeComFLLocal(ScalarLocal):
    """Client half: P directions per step, in the order that the root gives."""

    def directions(self, root: int) -> list[int]:
        return seeds_of(root, self.config.local_steps * self.config.of(DeComFLSettings).perturbations)

    def apply(self, arrays: Arrays) -> None:
        settings = self.config.of(DeComFLSettings)
        if "root" in arrays:
            seeds = self.directions(int(arrays["root"][0]))
            if settings.signs:
                up = srd.unpack_bits(arrays["bits"], len(seeds))
                scalars = np.where(up, 1, -1) * np.float32(settings.learning_rate / settings.perturbations)
            else:
                scalars = arrays["scalars"]
            self.move(seeds, scalars.tolist())
        self.take_head(arrays)

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        settings = self.config.of(DeComFLSettings)
        seeds, P = self.directions(int(np.frombuffer(instructions["root"], "<u8")[0])), settings.perturbations
        with self.steps(settings.learning_rate, lambda j: seeds[j * P : (j + 1) * P], settings.signs) as (steps, every):

            def update() -> dict[str, np.ndarray]:
                scalars = np.array([s for _, s, _ in steps.taken], np.float32)
                sent = {"bits": srd.pack_bits(scalars > 0)} if settings.signs else {"scalars": scalars}
                return {**sent, **({"head": flatten(self.head.values())} if self.zeroth.sends_head else {})}

            # All must know the length of a step whose sign is all that travels.
            yield Session(every, update, constant_rate=settings.signs, from_losses=True)


class DeComFL(ScalarMethod):
    """Server half: the mean scalar along each direction, or the sign of the majority."""

    half = DeComFLLocal
    settings = (Zeroth, DeComFLSettings)
    arxiv = "2405.15861"
    learning_rate_key = "decomfl.learning-rate"

    @property
    def own(self) -> DeComFLSettings:
        return self.config.of(DeComFLSettings)

    @property
    def count(self) -> int:
        """τP, the directions of a round."""
        return self.config.local_steps * self.own.perturbations

    @property
    def reply(self) -> Schema:
        signs = Field("uint8", (-(-self.count // 8),))
        sent = {"bits": signs} if self.own.signs else {"scalars": Field("float32", (self.count,))}
        return Schema({**sent, **self.head})

    @property
    def entry(self) -> Schema:
        return Schema({"root": Field("uint64", (1,), "key"), **self.reply.fields})

    def paper_bytes(self) -> int:
        """τP scalars (or bits) up, as many and a seed down; and the head, of which the paper has none."""
        return 2 * (-(-self.count // 8) if self.own.signs else 4 * self.count) + 8 + self.paper_head()

    def root(self, round: int) -> np.ndarray:
        return philox(self.config.seed, layer_key(f"decomfl/{round}")).random_raw(1)

    def instructions(self, round: int) -> dict[str, Any]:
        return {"root": self.root(round).astype("<u8").tobytes()}

    def check(self, arrays: Arrays, round: int) -> None:
        if self.own.signs:
            try:
                srd.unpack_bits(arrays["bits"], self.count)
            except ValueError as error:
                raise Refused(f"array 'bits': {error}") from None

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        head = {name: arrays[name] for name in self.head}
        if self.own.signs:
            return {**head, "votes": np.where(srd.unpack_bits(arrays["bits"], self.count), 1, -1).astype(np.float32)}
        return {**head, "scalars": arrays["scalars"] * SCALE}

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        head = {name: means.mean(name) for name in self.head}
        if self.own.signs:
            return {"root": self.root(round), "bits": srd.pack_bits(means.mean("votes") > 0), **head}
        return {"root": self.root(round), "scalars": means.mean("scalars") / SCALE, **head}
