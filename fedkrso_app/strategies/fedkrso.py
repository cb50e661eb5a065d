"""FedKRSO (arXiv:2602.03019): K seeds a round, clients train inside their subspaces, accumulators are averaged by seed.

    Server, round t                                  Client n
    S^t = K fresh seeds                              W^t = W^{t-1} + Σ_k B_k^t P_k^{t-1}
    send (S^{t-1}, B^t), S^t, head          ->       every J steps: draw k, rebuild P_k, zero the moments
    B_k^{t+1} = Σ_n w_n B_{k,n} (missing: 0)  <-     send {(k, B_k)} for the drawn k, and the head
    W^{t+1} = W^t + Σ_k B_k^{t+1} P_k^t

B already contains -η; eq. 13 of the paper multiplies by η once more.
"""

from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from fedkrso_app.config import Config
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.projection import projections, stream
from fedkrso_app.core.rso import RSO
from fedkrso_app.core.subspace import AdapterLinear, SubspaceLinear, attached, fold, matrix
from fedkrso_app.federation.round import FedTune
from fedkrso_app.records.wire import HEAD, Refused, Schema
from fedkrso_app.strategies.base import Arrays, Batches, LocalMethod, Shapes
from fedkrso_app.training.loop import head_optimizer, train


def draw_seeds(seed: int, round: int, count: int) -> np.ndarray:
    """S^t: ``count`` distinct uint64, the same for the same run seed and round."""
    rng = stream(seed, "pool", round)
    pool: dict[int, None] = {}
    while len(pool) < count:
        pool[int(rng.integers(2**64, dtype=np.uint64))] = None
    return np.array(list(pool), dtype=np.uint64)


class FedKRSOLocal(LocalMethod):
    """Client half: Algorithm 2 on the target layers, dense AdamW on the head."""

    def initial(self) -> dict[str, np.ndarray]:
        Q = self.config.fedkrso.rank * sum(matrix(layer).shape[0] for layer in self.targets.values())
        return {
            "seeds": np.zeros(0, np.uint64),
            "accumulators": np.zeros((0, Q), np.float32),
            "head": flatten(self.head.values()),
        }

    def apply(self, arrays: Arrays) -> None:
        """W^t = W^{t-1} + Σ_k B_k^t P_k^{t-1}: one product per layer over all seeds, k ascending."""
        seeds, r, kind = arrays["seeds"].tolist(), self.config.fedkrso.rank, self.config.fedkrso.projection
        B, start = torch.from_numpy(np.require(arrays["accumulators"], requirements="W")), 0
        for name, layer in self.targets.items() if seeds else ():
            W = matrix(layer)
            m, n = W.shape
            P = torch.from_numpy(projections(seeds, name, r, n, kind))
            fold(W, B[:, start : start + m * r].reshape(-1, m, r).to(W), P.to(W))
            start += m * r
        if "head" in arrays:
            unflatten(arrays["head"], self.head.values())

    def train(self, batches: Batches, instructions: ConfigRecord, rng: np.random.Generator) -> tuple[dict, float]:
        pool = np.frombuffer(instructions["seeds"], dtype="<u8")  # type: ignore[arg-type]
        config = self.config.fedkrso
        # Not from rng itself: the batches must be those that any other method sees.
        choices = np.random.Generator(rng.bit_generator.jumped())  # type: ignore[attr-defined]
        form = AdapterLinear if self.config.compute_dtype == "bfloat16" else SubspaceLinear
        with attached(self.module, self.targets, config.rank, form) as layers:
            rso = RSO(layers, config.learning_rate, config.projection)

            def before_step(j: int) -> None:
                if j % config.interval == 0:
                    rso.start_interval(int(choices.choice(pool)))  # with replacement

            optimizers = [rso, head_optimizer(self.head, config.learning_rate)]
            loss = train(self.module, batches, optimizers, self.config, rng, before_step)
        drawn = [seed for seed in pool.tolist() if seed in rso.accumulators]
        return {
            "seeds": np.array(drawn, dtype=np.uint64),
            "accumulators": np.stack([flatten([rso.accumulators[seed]]) for seed in drawn]),
            "head": flatten(self.head.values()),
        }, loss

    def optimized(self) -> list[nn.Parameter]:
        return list(self.head.values())

    def trained(self) -> list[Tensor]:
        return [matrix(layer) for layer in self.targets.values()] + super().trained()


class FedKRSO(FedTune):
    """Server half: the seed pool and the average, seed by seed."""

    local = FedKRSOLocal
    incremental = True
    arxiv = "2602.03019"
    learning_rate_key = "fedkrso.learning-rate"
    rank_key = "fedkrso.rank"

    @classmethod
    def entry_schema(cls, config: Config, shapes: Shapes) -> Schema:
        return Schema(
            {
                "seeds": ("uint64", ("s",)),
                "accumulators": (config.wire_dtype, ("s", shapes.outputs(config.fedkrso.rank))),
                "head": (HEAD[config.wire_dtype], (shapes.head,)),
            },
            limits={"s": config.fedkrso.num_seeds},
            optional=frozenset({"head"}),
        )

    @classmethod
    def weights_size(cls, config: Config, shapes: Shapes) -> int:
        return sum(m * n for m, n in shapes.targets.values()) + shapes.head

    @classmethod
    def reply_schema(cls, config: Config, shapes: Shapes) -> Schema:
        intervals = -(-config.local_steps // config.fedkrso.interval)
        limit = min(intervals, config.fedkrso.num_seeds)  # at most one seed an interval
        return Schema(cls.entry_schema(config, shapes).arrays, limits={"s": limit})

    def paper_bytes(self) -> int:
        config = self.config.fedkrso
        return 8 * (config.num_seeds * self.shapes.outputs(config.rank) + self.shapes.head)

    def instructions(self, round: int) -> dict[str, Any]:
        return {"seeds": draw_seeds(self.config.seed, round, self.config.fedkrso.num_seeds).tobytes()}

    def begin(self) -> None:
        super().begin()
        self.pool = draw_seeds(self.config.seed, self.round, self.config.fedkrso.num_seeds).tolist()

    def check(self, arrays: Arrays) -> None:
        seeds = arrays["seeds"].tolist()
        stranger = next((seed for seed in seeds if seed not in self.pool), None)
        if stranger is not None:
            raise Refused(f"seed {stranger} is not in this round's pool")
        if len(set(seeds)) < len(seeds):
            raise Refused("a seed occurs twice")

    def absorb(self, arrays: Arrays, weight: int, partition: int) -> None:
        by_seed = dict(zip(arrays["seeds"].tolist(), arrays["accumulators"], strict=True))
        self.sums.add({**by_seed, "head": arrays["head"]}, weight)

    def average(self, total_weight: int) -> dict[str, np.ndarray]:
        used = [seed for seed in self.pool if seed in self.sums]
        Q = self.shapes.outputs(self.config.fedkrso.rank)
        averages = [self.sums.mean(seed, total_weight) for seed in used]  # who did not draw k counts as B_k = 0
        return {
            "seeds": np.array(used, dtype=np.uint64),
            "accumulators": np.stack(averages) if used else np.zeros((0, Q), np.float32),
            "head": self.sums.mean("head", total_weight),
        }
