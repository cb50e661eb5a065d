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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord
from torch import Tensor

from fedkrso_app.config import Config
from fedkrso_app.core import lora, srd
from fedkrso_app.core.fixed_point import FixedPointMeans
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.projection import layer_key, philox
from fedkrso_app.core.srd import Term
from fedkrso_app.federation.round import FedTune
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.wire import HEAD, Refused, Schema
from fedkrso_app.strategies.base import Arrays, Batches, LoraLocal, Shapes
from fedkrso_app.training.loop import head_optimizer, train

logger = logging.getLogger("flwr")

FACTORS = ("B", "A")  # the order in which they take turns
_LARGEST = 1e6  # of an update's values; sound ones are far below 1


def dare_rng(seed: int) -> np.random.Generator:
    """The generator of a broadcast's mask; its seed travels in the place of a bitmap."""
    return np.random.Generator(philox(seed, layer_key("dare")))


def add_broadcast(arrays: Arrays, pair: Mapping[str, Sequence[Tensor]], extra: Sequence[Tensor], p: float) -> None:
    """Add a ledger entry's sparse delta to one factor of ``pair`` and to ``extra`` (the head, where it is sparse too).

    The server and every client call this, which is what keeps their factors equal. Nothing happens for entry 0.
    """
    if "values" not in arrays:
        return
    moved = [*pair[FACTORS[int(arrays["mask"][1])]], *extra]
    delta = np.zeros(sum(tensor.numel() for tensor in moved), np.float32)
    delta[srd.dare_mask(delta.shape, p, dare_rng(int(arrays["mask"][0])))] = arrays["values"]
    unflatten(flatten(moved) + delta, moved)


class FedSRDLocal(LoraLocal):
    """Client half: LoRA training, then pruning of what it changed."""

    def initial(self) -> dict[str, np.ndarray]:
        return {"head": flatten(self.head.values())}

    def apply(self, arrays: Arrays) -> None:
        """Add the broadcast delta to one factor (and to the head, where that is sparse too)."""
        config = self.config.fedsrd
        extra = self.state["head"] if config.sparsify_head else []
        add_broadcast(arrays, self.state, extra, config.download_sparsity)
        if "head" in arrays:
            unflatten(arrays["head"], self.state["head"])

    def train(self, batches: Batches, instructions: ConfigRecord, rng: np.random.Generator) -> tuple[dict, float]:
        config = self.config.fedsrd
        before = {name: [tensor.detach().clone() for tensor in tensors] for name, tensors in self.state.items()}
        adamw = torch.optim.AdamW([*self.state["A"], *self.state["B"]], lr=config.learning_rate, weight_decay=0.0)
        optimizers = [adamw, head_optimizer(self.head, config.learning_rate)]
        loss = train(self.module, batches, optimizers, self.config, rng, constant_rate=True)
        after = {name: [tensor.detach() for tensor in tensors] for name, tensors in self.state.items()}
        pruned: dict[str, list[Tensor]] = {name: [] for name in self.state}
        for B, A, B_i, A_i in zip(before["B"], before["A"], after["B"], after["A"], strict=True):
            dB, dA = B_i - B, A_i - A
            I_B, I_A = srd.importance(dB, dA, A, B_i)
            pruned["B"].append(self.prune(dB, I_B))
            pruned["A"].append(self.prune(dA, I_A))
        parts = [*pruned["B"], *pruned["A"]]
        if config.sparsify_head:
            deltas = [new - old for new, old in zip(after["head"], before["head"], strict=True)]
            parts += [self.prune(delta, delta.abs()) for delta in deltas]
        update = flatten(parts)
        arrays = {"bits": srd.pack_bits(update != 0), "values": update[update != 0]}
        return arrays if config.sparsify_head else {**arrays, "head": flatten(after["head"])}, loss

    def prune(self, delta: Tensor, scores: Tensor) -> Tensor:
        """Steps 3 to 5: ρ from the scores, the survivors, and their L1 norm restored if so configured."""
        config = self.config.fedsrd
        pruned = srd.prune(delta, scores, srd.sparsity(scores, config.alpha, config.max_sparsity))
        return srd.compensate_l1(delta, pruned) if config.compensate == "l1" else pruned


class FedSRD(FedTune):
    """Server half. It holds the same (B, A) as every client, rebuilt from the ledger."""

    local = FedSRDLocal
    robust = False
    incremental = True
    arxiv = "2510.04601"
    learning_rate_key = "fedsrd.learning-rate"
    rank_key = "lora.rank"

    def __init__(self, config: Config, shapes: Shapes, ledger: Ledger, *rest: Any) -> None:
        super().__init__(config, shapes, ledger, *rest)
        r = config.lora.rank
        self.pair = {
            "B": [torch.zeros(m, r) for m, _ in shapes.targets.values()],
            "A": [lora.initial_A(config.seed, name, r, n) for name, (_, n) in shapes.targets.items()],
        }
        self.moved = -1  # the newest entry that is in the pair

    @classmethod
    def entry_schema(cls, config: Config, shapes: Shapes) -> Schema:
        most = max(shapes.outputs(config.lora.rank), shapes.inputs(config.lora.rank)) + shapes.head
        arrays: dict[str, Any] = {
            "mask": ("uint64", (2,)),
            "values": (config.wire_dtype, ("v",)),
            "head": (HEAD[config.wire_dtype], (shapes.head,)),
        }
        return Schema(arrays, limits={"v": most}, optional=frozenset(arrays))

    @classmethod
    def weights_size(cls, config: Config, shapes: Shapes) -> int:
        r = config.lora.rank
        return shapes.outputs(r) + shapes.inputs(r) + shapes.head

    @classmethod
    def reply_schema(cls, config: Config, shapes: Shapes) -> Schema:
        size = cls.update_size(config, shapes)
        arrays: dict[str, Any] = {"bits": ("uint8", (-(-size // 8),)), "values": (config.wire_dtype, ("v",))}
        if not config.fedsrd.sparsify_head:
            arrays["head"] = (HEAD[config.wire_dtype], (shapes.head,))
        return Schema(arrays, limits={"v": size})

    @staticmethod
    def update_size(config: Config, shapes: Shapes) -> int:
        """Elements of the vector that a bitmap of a reply covers: all B, all A, and the head if it is sparse."""
        r = config.lora.rank
        return shapes.outputs(r) + shapes.inputs(r) + (shapes.head if config.fedsrd.sparsify_head else 0)

    def paper_bytes(self) -> int:
        """The paper's mean sparsity up (94.8 %), one of two factors at p down, bitmaps both ways, a dense head."""
        r, p = self.config.lora.rank, self.config.fedsrd.download_sparsity
        L = self.shapes.outputs(r) + self.shapes.inputs(r)
        return round(L * (4 * 0.052 + 1 / 8) + L / 2 * (4 * (1 - p) + 1 / 8) + 8 * self.shapes.head)

    def check(self, arrays: Arrays) -> None:
        try:
            mask = srd.unpack_bits(arrays["bits"], self.update_size(self.config, self.shapes))
        except ValueError as error:
            raise Refused(f"array 'bits': {error}") from None
        if mask.sum() != len(arrays["values"]):
            raise Refused(f"{len(arrays['values'])} values for {mask.sum()} bits")
        largest = float(np.abs(arrays["values"]).max(initial=0.0))
        if largest > _LARGEST:
            raise Refused(f"values up to {largest:g} are too large: products of factors must stay finite")

    def begin(self) -> None:
        self.updates: dict[int, tuple[Arrays, int]] = {}  # kept sparse; the factors of a sum are not a sum of factors
        self.sums = FixedPointMeans()
        for version in self.ledger.versions():
            if version > self.moved:
                self.move(wire.decode(self.ledger.read(version).arrays))
                self.moved = version

    def absorb(self, arrays: Arrays, weight: int, partition: int) -> None:
        if "head" in arrays:
            self.sums.add({"head": arrays["head"]}, weight)
        self.updates[partition] = (arrays, weight)

    def average(self, total_weight: int) -> dict[str, np.ndarray]:
        config, version = self.config.fedsrd, self.ledger.version + 1
        turn = (version - 1) % 2
        factor = FACTORS[turn]
        size = self.update_size(self.config, self.shapes)
        shares, deltas = [], []  # in the order of the partitions, whatever that of arrival
        for partition in sorted(self.updates):
            arrays, weight = self.updates[partition]
            update = np.zeros(size, np.float32)
            update[srd.unpack_bits(arrays["bits"], size)] = arrays["values"]
            shares.append(weight / total_weight)
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
            moves.append(srd.least_squares_factors(target, B, A, factor, config.rcond or None))
        move = flatten(moves)
        own = float(np.linalg.norm(flatten(self.pair[factor])))
        ratio = float(np.linalg.norm(move)) / own if own else 0.0
        if ratio > 1:  # the paper reports below .03 for A and below .10 for B
            logger.warning(
                "%s moves by %.1f times its own size: lower fedsrd.learning-rate, or set fedsrd.rcond = 1e-3",
                factor,
                ratio,
            )
        if config.sparsify_head:
            head = sum(p * delta[sum(sizes) :].double() for p, delta in zip(shares, deltas, strict=True))
            move = np.concatenate([move, head.float().numpy()])  # type: ignore[union-attr]
        seed = int(philox(self.config.seed, layer_key(f"dare/{version}")).random_raw(1)[0])
        p = config.download_sparsity
        mask = srd.dare_mask(move.shape, p, dare_rng(seed))
        values = (move[mask] / (1 - p)).astype(np.float32)
        entry: dict[str, np.ndarray] = {"mask": np.array([seed, turn], np.uint64), "values": values}
        if not config.sparsify_head:
            entry["head"] = self.sums.mean("head", total_weight)
        return entry

    def represent(self, terms: list[Term], rank: int) -> list[Term]:
        """The target W̄ as factor pairs: FedSRD takes its best approximation of rank r."""
        shares, Bs, As = zip(*terms, strict=True)
        return [(1.0, *srd.truncated_svd(list(Bs), list(As), list(shares), rank))]

    def move(self, entry: Arrays) -> None:
        """Add an entry's sparse delta to the server's pair."""
        config = self.config.fedsrd
        extra = [torch.zeros(self.shapes.head)] if config.sparsify_head else []  # the server keeps no head
        add_broadcast(entry, self.pair, extra, config.download_sparsity)


class FedSRDe(FedSRD):
    """FedSRD-e: the target is W̄ itself, without a singular value decomposition."""

    def represent(self, terms: list[Term], rank: int) -> list[Term]:
        return terms
