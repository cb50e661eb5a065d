"""FedKRSO (arXiv:2602.03019): K seeds per round, clients train in their subspaces, accumulators are averaged by seed.

    Server, round t                                  Client n
    S^t = K fresh seeds                              W^t = W^{t-1} + Σ_k B_k^t P_k^{t-1}
    send (S^{t-1}, B^t), S^t, head          ->       every J steps: draw k, rebuild P_k, zero the moments
    B_k^{t+1} = Σ_n w_n B_{k,n} (missing: 0)  <-     send {(k, B_k)} for the drawn k, and the head
    W^{t+1} = W^t + Σ_k B_k^{t+1} P_k^t

B already contains -η; eq. 13 of the paper multiplies by η once more.
"""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedkrso_app.config import Config, ConfigError, Settings, choice, need, need_positive
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.projection import beside, projections, stream
from fedkrso_app.core.rso import RSO
from fedkrso_app.core.stacked import Group, Stack, StackedSubspace, SubspaceSlice, sliced, stacked_linears
from fedkrso_app.core.subspace import AdapterLinear, SubspaceLinear, attached, fold, matrix, replaced
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Local, Means, Method
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.training import threads
from fedkrso_app.training.loop import Session, head_optimizer


@dataclass(frozen=True)
class FedKRSOSettings(Settings):
    table = "fedkrso"
    rank: int  # r
    num_seeds: int  # K
    interval: int  # J, steps along one projection
    draw: str
    projection: str
    learning_rate: float

    def __post_init__(self) -> None:
        need(self.rank >= 1, "fedkrso.rank", self.rank, "at least 1")
        need(1 <= self.num_seeds <= 65536, "fedkrso.num-seeds", self.num_seeds, "between 1 and 65536")
        choice("fedkrso.projection", self.projection, ["gaussian", "rademacher", "orthonormal"])
        choice("fedkrso.draw", self.draw, ["own", "each"])
        need_positive("fedkrso.learning-rate", self.learning_rate)


def intervals(config: Config) -> int:
    """I, of one client and round."""
    return -(-config.local_steps // config.of(FedKRSOSettings).interval)


def draw_seeds(seed: int, round: int, count: int) -> np.ndarray:
    """S^t: ``count`` distinct uint64, the same for the same run seed and round."""
    rng = stream(seed, "pool", round)
    pool: dict[int, None] = {}
    while len(pool) < count:
        pool[int(rng.integers(2**64, dtype=np.uint64))] = None
    return np.array(list(pool), dtype=np.uint64)


def drawn(pool: np.ndarray, intervals: int, draw: str, choices: np.random.Generator) -> list[int]:
    """A client's seed in each of its intervals: one of ``pool`` with replacement ("own"), or all of it in an order of
    the client's own ("each")."""
    if draw == "each":
        return choices.permutation(pool).tolist()
    return [int(choices.choice(pool)) for _ in range(intervals)]


def distinct_seeds(pool: int, draws: int) -> float:
    """Expected number of different seeds among ``draws`` from ``pool`` with replacement: K (1 − (1 − 1/K)^draws)."""
    return pool * (1 - (1 - 1 / pool) ** draws)


class FedKRSOLocal(Local):
    """Client half: Algorithm 2 on the target layers, dense AdamW on the head."""

    by_row: ClassVar[bool] = True

    def state(self) -> dict[str, np.ndarray]:
        return {"head": flatten(self.head.values())}

    def apply(self, arrays: Arrays) -> None:
        """W^t = W^{t-1} + Σ_k B_k^t P_k^{t-1}: one product per layer over all seeds, k ascending."""
        settings = self.config.of(FedKRSOSettings)
        seeds, r = arrays["seeds"].tolist() if "seeds" in arrays else [], settings.rank
        start = 0
        for name, layer in self.targets.items() if seeds else ():
            B = torch.from_numpy(np.require(arrays["accumulators"], requirements="W"))
            m, n = matrix(layer).shape
            P = torch.from_numpy(projections(seeds, name, r, n, settings.projection))
            with self.moving(name) as W:
                fold(W, B[:, start : start + m * r].reshape(-1, m, r).to(W), P.to(W))
            start += m * r
        if "head" in arrays:
            unflatten(arrays["head"], self.head.values())

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        pool = np.frombuffer(instructions["seeds"], dtype="<u8")
        settings = self.config.of(FedKRSOSettings)
        # again from the first: a plan may count more steps than a round has
        turns = drawn(pool, intervals(self.config), settings.draw, beside(rng))
        with self._subspaces() as layers:
            most = len(pool), intervals(self.config)
            rso = RSO(layers, settings.learning_rate, settings.projection, seeds=most)
            # random signs are drawn in no time
            spare = settings.projection != "rademacher" and threads.spare(next(self.module.parameters()).device)

            def before_step(j: int) -> None:
                if j % settings.interval == 0:
                    rso.start_interval(turns[j // settings.interval % len(turns)])
                    if spare and j + settings.interval < self.config.local_steps:
                        rso.draw_ahead(turns[(j // settings.interval + 1) % len(turns)])

            def update() -> dict[str, np.ndarray]:
                used = [seed for seed in pool.tolist() if seed in rso.accumulators]
                return {
                    "seeds": np.array(used, dtype=np.uint64),
                    "accumulators": np.stack([flatten([rso.accumulators[seed]]) for seed in used]),
                    "head": flatten(self.head.values()),
                }

            yield Session([rso, head_optimizer(self.head, settings.learning_rate)], update, before_step)

    def _subspaces(self) -> AbstractContextManager[Mapping[str, Any]]:
        """The target layers as :class:`RSO` trains them."""
        form = AdapterLinear if self.config.at_rest else SubspaceLinear
        return attached(self.module, self.targets, self.config.of(FedKRSOSettings).rank, form)

    @contextmanager
    def stacked(self, group: Group) -> Iterator[tuple[list[Local], list[Stack]]]:
        """The pool is common to all clients: each layer computes x Pᵀ once, along every seed that one of them drew."""
        layers, heads = stacked_linears(self.module, list(self.head), group)
        rank = self.config.of(FedKRSOSettings).rank
        inside = {name: StackedSubspace(layer, rank, group) for name, layer in self.targets.items()}
        stacks = {id(self.head[name]): stack for name, stack in heads.items()}
        halves: list[Local] = []
        for client in range(group.clients):
            half = sliced(self, stacks, client)
            slices = {name: SubspaceSlice(layer, client) for name, layer in inside.items()}
            half._subspaces = partial(nullcontext, slices)  # type: ignore[method-assign, assignment]
            halves.append(half)
        with replaced(self.module, layers | inside):
            yield halves, [*stacks.values(), *(layer.B for layer in inside.values())]

    def optimized(self) -> list[nn.Parameter]:
        return list(self.head.values())

    def shared(self) -> list[Tensor]:
        return [matrix(layer) for layer in self.targets.values()] + super().shared()


class FedKRSO(Method):
    """Server half: the seed pool and the average, seed by seed."""

    half = FedKRSOLocal
    settings = (FedKRSOSettings,)
    arxiv = "2602.03019"
    learning_rate_key = "fedkrso.learning-rate"
    rank_key = "fedkrso.rank"

    @classmethod
    def check_settings(cls, config: Config) -> None:
        J = config.of(FedKRSOSettings).interval
        rule = f"at least 1 and at most local-steps = {config.local_steps}"
        need(1 <= J <= config.local_steps, "fedkrso.interval", J, rule)
        if config.of(FedKRSOSettings).draw == "each":
            rule = f"{intervals(config)} with fedkrso.draw = 'each', one for each interval of a round"
            K = config.of(FedKRSOSettings).num_seeds
            need(intervals(config) == K, "fedkrso.num-seeds", K, rule)
        # Who draws what follows from the run's public seed. Where clients are protected, noise covers every slot.
        alone = config.of(FedKRSOSettings).draw == "own" and config.of(FedKRSOSettings).num_seeds > 1
        if config.secure_aggregation and alone and config.of(Privacy).unit != "client":
            raise ConfigError(
                "secure-aggregation needs fedkrso.draw = 'each', since the sum along a seed that one client alone draws"
                f" is that client's: set it, and fedkrso.num-seeds = {intervals(config)}."
            )

    @property
    def own(self) -> FedKRSOSettings:
        return self.config.of(FedKRSOSettings)

    @property
    def intervals(self) -> int:
        return intervals(self.config)

    @property
    def reply(self) -> Schema:
        Q = self.shapes.outputs(self.own.rank)
        fields = {
            "seeds": Field("uint64", ("s",), "key"),
            "accumulators": Field(self.config.wire_dtype, ("s", Q), "update"),
            "head": self.head_field(),
        }
        return Schema(fields, limits={"s": min(self.intervals, self.own.num_seeds)})  # at most one seed an interval

    @property
    def entry(self) -> Schema:
        return replace(self.reply, limits={"s": self.own.num_seeds})

    @property
    def weights_sizes(self) -> tuple[int, int]:
        return self.shapes.weights, self.shapes.head

    def paper_bytes(self) -> int:
        return 8 * (self.own.num_seeds * self.shapes.outputs(self.own.rank) + self.shapes.head)

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        K = self.own.num_seeds
        drawn, used = (distinct_seeds(K, self.intervals * n) for n in (1, clients))
        if self.own.draw == "each":
            drawn = used = K
        if self.config.of(Privacy).unit == "client":
            used = K  # noise goes to all
        return {"s": drawn}, {"s": used}, {"drawn": drawn, "used": used}

    def client_bytes(self, lengths: Mapping[str, float]) -> int:
        """Every seed that a client draws after the first leaves an accumulator beside it; where W is at rest, also
        columns for what it computes with."""
        each = 4 * self.shapes.outputs(self.own.rank)
        if self.config.at_rest:
            width = 2 if self.config.compute_dtype == "bfloat16" else 4
            each += width * (self.shapes.outputs(self.own.rank) + self.shapes.inputs(self.own.rank))
        return round(each * (lengths["s"] - 1))

    def pool(self, round: int) -> np.ndarray:
        """S^t."""
        return draw_seeds(self.config.seed, round, self.own.num_seeds)

    def instructions(self, round: int) -> dict[str, Any]:
        return {"seeds": self.pool(round).tobytes()}

    def check(self, arrays: Arrays, round: int) -> None:
        seeds, pool = arrays["seeds"].tolist(), set(self.pool(round).tolist())
        stranger = next((seed for seed in seeds if seed not in pool), None)
        if stranger is not None:
            raise Refused(f"seed {stranger} is not in this round's pool")
        if len(set(seeds)) < len(seeds):
            raise Refused("a seed occurs twice")

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        by_seed = dict(zip(arrays["seeds"].tolist(), arrays["accumulators"], strict=True))
        return {**by_seed, "head": arrays["head"]}

    def layout(self, round: int, instructions: Mapping[str, Any]) -> Mapping[Hashable, tuple[int, ...]]:
        Q = self.shapes.outputs(self.own.rank)
        return dict.fromkeys(self.pool(round).tolist(), (Q,)) | {"head": (self.shapes.head,)}

    def reach(self, round: int, instructions: Mapping[str, Any]) -> Mapping[Hashable, float]:
        """A slot moves for one interval, or for all of a round's steps where there is one seed."""
        steps = self.own.interval if self.own.draw == "each" else self.config.local_steps
        slots = dict.fromkeys(self.pool(round).tolist(), self.own.learning_rate * steps)
        return super().reach(round, instructions) | slots  # type: ignore[operator]

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        used = [seed for seed in self.pool(round).tolist() if seed in means]
        averages = [means.mean(seed) for seed in used]  # who did not draw k counts as B_k = 0
        Q = self.shapes.outputs(self.own.rank)
        return {
            "seeds": np.array(used, dtype=np.uint64),
            "accumulators": np.stack(averages) if used else np.zeros((0, Q), np.float32),
            "head": means.mean("head"),
        }
