"""FedSRD and FedSRD-e (arXiv:2510.04601): sparsify, reconstruct, decompose.

    Client n                                          Server
    train A, B; ΔB, ΔA                                B_n = B + ΔB_n, A_n = A + ΔA_n
    importance (eq. 5-6) -> ρ per matrix -> prune ->  W̄ = Σ p_n B_n A_n (eq. 9)
    send values and a bitmap                          least squares for one factor: B first, then in turn
    add the same sparse delta  <-                     drop a share p, rescale (DARE), add the sparse delta

Both sides add the *sparse* delta, as the authors' code does; Algorithm 1 adds the dense one on the server, which would
let the two drift apart. The first round moves B: B = 0 makes an A round a round without effect.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.config import Config, Settings, choice, need, need_positive
from fedkrso_app.core import lora, srd
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.projection import layer_key, philox
from fedkrso_app.core.srd import Term
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Means, Method
from fedkrso_app.strategies.factors import bounded
from fedkrso_app.strategies.lora import Lora, LoraLocal
from fedkrso_app.training.loop import Session, factor_optimizer, head_optimizer
from fedkrso_app.training.shapes import Shapes

logger = logging.getLogger("flwr")

FACTORS = ("B", "A")  # the order in which they take turns


@dataclass(frozen=True)
class FedSRDSettings(Settings):
    table = "fedsrd"
    learning_rate: float
    alpha: float  # least share of each update that is pruned
    max_sparsity: float
    compensate: str
    download_sparsity: float  # p
    rcond: float  # 0: torch's
    sparsify_head: bool

    def __post_init__(self) -> None:
        need_positive("fedsrd.learning-rate", self.learning_rate)
        choice("fedsrd.compensate", self.compensate, ["l1", "none"])
        need(0 <= self.alpha < 1, "fedsrd.alpha", self.alpha, "at least 0 and below 1")
        rule = f"at least fedsrd.alpha = {self.alpha} and below 1"
        need(self.alpha <= self.max_sparsity < 1, "fedsrd.max-sparsity", self.max_sparsity, rule)
        p = self.download_sparsity
        need(0 <= p < 1, "fedsrd.download-sparsity", p, "at least 0 and below 1")
        need(0 <= self.rcond < 1, "fedsrd.rcond", self.rcond, "at least 0 (torch's own) and below 1")


def add_broadcast(arrays: Arrays, pair: Mapping[str, Sequence[Tensor]], extra: Sequence[Tensor], p: float) -> None:
    """Add a ledger entry's sparse delta to one factor of ``pair`` and to ``extra`` (the head, where it is sparse too).

    The server and every client call this, which is what keeps their factors equal. Nothing happens for entry 0.
    """
    if "values" not in arrays:
        return
    moved = [*pair[FACTORS[int(arrays["mask"][1])]], *extra]
    delta = np.zeros(sum(tensor.numel() for tensor in moved), np.float32)
    delta[srd.dare_mask(delta.shape, p, srd.dare_rng(int(arrays["mask"][0])))] = arrays["values"]
    unflatten(flatten(moved) + delta, moved)


class FedSRDLocal(LoraLocal):
    """Client half: LoRA training, then pruning of what it changed."""

    def state(self) -> dict[str, np.ndarray]:
        return {"head": flatten(self.head.values())}

    def apply(self, arrays: Arrays) -> None:
        """Add the broadcast delta to one factor (and to the head, where that is sparse too)."""
        settings = self.config.of(FedSRDSettings)
        extra = self.tensors["head"] if settings.sparsify_head else []
        add_broadcast(arrays, self.tensors, extra, settings.download_sparsity)
        if "head" in arrays:
            unflatten(arrays["head"], self.tensors["head"])

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        rate = self.config.of(FedSRDSettings).learning_rate
        before = {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in self.tensors.items()}
        adamw = factor_optimizer([*self.tensors["A"], *self.tensors["B"]], rate)
        yield Session([adamw, head_optimizer(self.head, rate)], lambda: self.update(before), constant_rate=True)

    def update(self, before: Mapping[str, Sequence[Tensor]]) -> dict[str, np.ndarray]:
        """The pruned changes since ``before``: a bitmap and the values that are left."""
        sparsify_head = self.config.of(FedSRDSettings).sparsify_head
        after = {name: [tensor.detach() for tensor in tensors] for name, tensors in self.tensors.items()}
        pruned: dict[str, list[Tensor]] = {name: [] for name in self.tensors}
        for B, A, B_i, A_i in zip(before["B"], before["A"], after["B"], after["A"], strict=True):
            dB, dA = B_i - B, A_i - A
            I_B, I_A = srd.importance(dB, dA, A, B_i)
            pruned["B"].append(self.prune(dB, I_B))
            pruned["A"].append(self.prune(dA, I_A))
        parts = [*pruned["B"], *pruned["A"]]
        if sparsify_head:
            deltas = [new - old for new, old in zip(after["head"], before["head"], strict=True)]
            parts += [self.prune(delta, delta.abs()) for delta in deltas]
        update = flatten(parts)
        arrays = {"bits": srd.pack_bits(update != 0), "values": update[update != 0]}
        return arrays if sparsify_head else {**arrays, "head": flatten(after["head"])}

    def prune(self, delta: Tensor, scores: Tensor) -> Tensor:
        """Steps 3 to 5: ρ from the scores, the survivors, and their L1 norm restored if so configured."""
        settings = self.config.of(FedSRDSettings)
        pruned = srd.prune(delta, scores, srd.sparsity(scores, settings.alpha, settings.max_sparsity))
        return srd.compensate_l1(delta, pruned) if settings.compensate == "l1" else pruned


class FedSRD(Method):
    """Server half. It holds the same (B, A) as every client, rebuilt from the ledger."""

    half = FedSRDLocal
    settings = (Lora, FedSRDSettings)
    linear = False  # the factors of a sum are not a sum of factors
    arxiv = "2510.04601"
    learning_rate_key = "fedsrd.learning-rate"
    rank_key = "lora.rank"

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.own, self.rank = config.of(FedSRDSettings), config.of(Lora).rank
        self.pair = {
            "B": [torch.zeros(m, self.rank) for m, _ in shapes.targets.values()],
            "A": lora.initial_As(config.seed, shapes.targets, self.rank),
        }
        self.version = -1  # the newest entry that is in the pair

    @property
    def factors(self) -> int:
        """L, the size of all B and all A."""
        return self.shapes.outputs(self.rank) + self.shapes.inputs(self.rank)

    @property
    def update_size(self) -> int:
        """Elements of the vector that a bitmap of a reply covers: all B, all A, and the head if it is sparse."""
        return self.factors + (self.shapes.head if self.own.sparsify_head else 0)

    @property
    def reply(self) -> Schema:
        fields = {
            "bits": Field("uint8", (-(-self.update_size // 8),), "key"),
            "values": Field(self.config.wire_dtype, ("v",), "update"),
            **({} if self.own.sparsify_head else {"head": self.head_field()}),
        }
        return Schema(fields, limits={"v": self.update_size})

    @property
    def entry(self) -> Schema:
        fields = {
            "mask": Field("uint64", (2,), "key"),
            "values": Field(self.config.wire_dtype, ("v",), "update"),
            "head": replace(self.head_field(), optional=self.own.sparsify_head),  # then entry 0 alone has one
        }
        most = max(self.shapes.outputs(self.rank), self.shapes.inputs(self.rank)) + self.shapes.head
        return Schema(fields, limits={"v": most})

    @property
    def weights_sizes(self) -> tuple[int, int]:
        return 0, self.factors + self.shapes.head

    def paper_bytes(self) -> int:
        """The paper's mean sparsity up (94.8 %), one of two factors at p down, bitmaps both ways, a dense head."""
        L, p = self.factors, self.own.download_sparsity
        return round(L * (4 * 0.052 + 1 / 8) + L / 2 * (4 * (1 - p) + 1 / 8) + 8 * self.shapes.head)

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        """Up, the values that pruning leaves at max-sparsity, which real updates come to: those at or above the
        quantile of each matrix. Down, the share 1 - p of one factor; B and A take turns."""
        rho = self.own.max_sparsity
        sizes = [side * self.rank for shape in self.shapes.targets.values() for side in shape]
        head = self.shapes.head if self.own.sparsify_head else 0
        survivors = sum(size - math.ceil(rho * (size - 1)) for size in [*sizes, *([head] if head else [])])
        return {"v": survivors}, {"v": (self.factors / 2 + head) * (1 - self.own.download_sparsity)}, {}

    def check(self, arrays: Arrays, round: int) -> None:
        try:
            mask = srd.unpack_bits(arrays["bits"], self.update_size)
        except ValueError as error:
            raise Refused(f"array 'bits': {error}") from None
        if mask.sum() != len(arrays["values"]):
            raise Refused(f"{len(arrays['values'])} values for {mask.sum()} bits")
        bounded(arrays["values"])

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        return {"head": arrays["head"]} if "head" in arrays else {}

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        version, size = self.version + 1, self.update_size
        turn = (version - 1) % 2
        factor = FACTORS[turn]
        shares, deltas = [], []
        for share, arrays in means.replies:
            update = np.zeros(size, np.float32)
            update[srd.unpack_bits(arrays["bits"], size)] = arrays["values"]
            shares.append(share)
            deltas.append(torch.from_numpy(update))
        sizes = [tensor.numel() for name in FACTORS for tensor in self.pair[name]]
        layers = len(self.pair["B"])
        split = [delta[: sum(sizes)].split(sizes) for delta in deltas]
        moves = []
        for i, (B, A) in enumerate(zip(self.pair["B"], self.pair["A"], strict=True)):
            terms = [
                (p, B + parts[i].view_as(B), A + parts[layers + i].view_as(A))
                for p, parts in zip(shares, split, strict=True)
            ]
            target = self.represent(terms, B.shape[1])
            moves.append(srd.least_squares_factors(target, B, A, factor, self.own.rcond or None))
        move = flatten(moves)
        size_of_factor = float(np.linalg.norm(flatten(self.pair[factor])))
        ratio = float(np.linalg.norm(move)) / size_of_factor if size_of_factor else 0.0
        if ratio > 1:  # the paper reports below .03 for A and below .10 for B
            logger.warning(
                "%s moves by %.1f times its own size: lower fedsrd.learning-rate, or set fedsrd.rcond = 1e-3",
                factor,
                ratio,
            )
        if self.own.sparsify_head:
            head = sum(p * delta[sum(sizes) :].double() for p, delta in zip(shares, deltas, strict=True))
            move = np.concatenate([move, head.float().numpy()])  # type: ignore[union-attr]
        seed = int(philox(self.config.seed, layer_key(f"dare/{version}")).random_raw(1)[0])
        p = self.own.download_sparsity
        mask = srd.dare_mask(move.shape, p, srd.dare_rng(seed))
        values = (move[mask] / (1 - p)).astype(np.float32)
        entry: dict[str, np.ndarray] = {"mask": np.array([seed, turn], np.uint64), "values": values}
        return entry if self.own.sparsify_head else {**entry, "head": means.mean("head")}

    def observe(self, version: int, arrays: Arrays) -> None:
        """Add an entry's sparse delta to the server's pair."""
        extra = [torch.zeros(self.shapes.head)] if self.own.sparsify_head else []  # the server keeps no head
        add_broadcast(arrays, self.pair, extra, self.own.download_sparsity)
        self.version = version

    def represent(self, terms: list[Term], rank: int) -> list[Term]:
        """The target W̄ as factor pairs: FedSRD takes its best approximation of rank r."""
        shares, Bs, As = zip(*terms, strict=True)
        return [(1.0, *srd.truncated_svd(list(Bs), list(As), list(shares), rank))]


class FedSRDe(FedSRD):
    """FedSRD-e: the target is W̄ itself, without a singular value decomposition."""

    def represent(self, terms: list[Term], rank: int) -> list[Term]:
        return terms
