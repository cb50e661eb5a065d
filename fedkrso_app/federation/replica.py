"""W^t of this process: brought up to date by ledger entries, lent to training, given back bit for bit unchanged."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from fedkrso_app.core.few_bits import FewBits, in_full, requantize
from fedkrso_app.core.flat import raw
from fedkrso_app.federation.store import NodeStore
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger, LedgerError
from fedkrso_app.strategies.base import Arrays, Local
from fedkrso_app.training.device import device, exact_products

logger = logging.getLogger("flwr")


class NeedSync(RuntimeError):
    """The entries at hand do not lead to the version asked for."""


class Replica:
    """A model at a version. ``entries`` is where it reads them, of which the newest ``span`` (None: all) are needed; a
    client's comes with the ``store`` around them."""

    def __init__(self, local: Local, entries: Ledger, span: int | None, store: NodeStore | None = None) -> None:
        exact_products()  # TF32 would rebuild another W than the server's
        self.local, self.entries, self.span, self.store = local, entries, span, store
        self.version = self._applying = -1
        self._kept: list[torch.Tensor] = []
        self._copy: Local | None = None
        self._copied = -1  # the version that its weights of few bits were made of

    def advance(self, to: int) -> None:
        """Apply the entries that lead to version ``to``, in order and each once.

        A client's replica starts from the weights on its disk if they are newer than itself, and one that starts
        from scratch leaves its own there. Raises :class:`NeedSync` if an entry is missing or damaged, or if this
        replica is beyond ``to`` already.
        """
        if self.version > to:
            raise NeedSync(f"this replica is at version {self.version}, beyond {to}")
        fresh = self.version < 0
        try:
            self._advance(to)
        except LedgerError:
            try:
                self._advance(to)  # another process may just have replaced the entries by weights
            except LedgerError as error:
                if self.store:  # a node's entry that is damaged must go, so that it can be sent again; a run's never
                    self.entries.discard(self._applying)
                raise NeedSync(str(error)) from None
        if self.store:
            self._tidy(to, fresh)

    def _tidy(self, to: int, fresh: bool) -> None:
        """Leave on disk what the next fresh process needs, and no more than the store may keep."""
        assert self.store
        kept = self.entries.versions()
        if self.span:
            for version in kept[: -self.store.keep]:
                self.entries.discard(version)
        elif to > max(0, self.store.weights_version) and (fresh or len(kept) > self.store.keep):
            self.store.put_weights(to, self.store.stamp(to), self._shared())

    def state(self) -> dict[str, np.ndarray]:
        """All shared tensors, flat, as :attr:`Method.weights` has them: with W^0, the model at :attr:`version`."""
        return {name: np.concatenate([raw(part) for part in parts]) for name, parts in self._shared().items()}

    def _shared(self) -> dict[str, list[torch.Tensor]]:
        tensors = self.local.shared()
        few = [tensor for tensor in tensors if tensor.dtype == torch.bfloat16]
        others = [tensor for tensor in tensors if tensor.dtype != torch.bfloat16]
        arrays = {"weights": few, "rest": others} if few else {"weights": others}
        return {name: parts for name, parts in arrays.items() if parts}

    def _advance(self, to: int) -> None:
        if self.store and self.span is None:
            self.version = max(self.version, self.store.load_weights(self.version, to, self._shared()))
        for version in range(first_needed(self.version, to, self.span), to + 1):
            self._applying = version
            self.follow(version, wire.decode(self.entries.read(version).arrays))

    def follow(self, version: int, arrays: Arrays) -> None:
        """Take over the decoded entry of ``version``, the next one that is needed."""
        self.local.version = version
        if arrays:
            self.local.apply({**self.local.absent, **arrays})
        self.version = version

    def computing(self) -> Local:
        """The model to compute with: this one; or a copy of it on the device, in other numbers, brought up to date."""
        if self.local.config.on_device:
            return self.local
        if self._copy is None:
            self._copy, self._copied = self.local.computing(self._place()), self.version
            self._say_how_far(self._copy)
        with torch.no_grad():
            for copied, tensor in zip(self._copy.moved(), self.local.moved(), strict=True):
                copied.copy_(tensor)
        if self._copied != self.version:
            requantize(self._copy.targets.values())
            self._copied = self.version
        return self._copy

    def _place(self) -> torch.device:
        """Where copies compute; a model without weights has no other place."""
        own = next(self.local.module.parameters()).device
        return own if own.type == "meta" else device(self.local.config.device)

    def _say_how_far(self, copied: Local) -> None:
        """Log how far weights of few bits are from W, once in a process."""
        few = [layer for layer in copied.targets.values() if isinstance(layer, FewBits) and not layer.weight.is_meta]
        if not few:
            return
        far = [layer.distance() for layer in few]
        logger.info(
            "compute-weights = %r: clients compute with weights whose distance from W^t is %.4f of its norm, "
            "in the mean over %d layers, and %.4f at most",
            *(self.local.config.compute_weights, sum(far) / len(far), len(far), max(far)),
        )

    @contextmanager
    def judged(self, own: Arrays) -> Iterator[Local]:
        """The model to judge, W^t in full, with what a partition keeps to itself."""
        with ExitStack() as stack:
            local = stack.enter_context(self.lend()) if own else self.computing()
            stack.enter_context(in_full(local.targets.values()))
            if own:
                local.adopt(own)
            yield local

    @contextmanager
    def lend(self) -> Iterator[Local]:
        """The model for training; on leaving, every trained tensor has the bits it had (copied, never subtracted)."""
        if (local := self.computing()) is not self.local:
            yield local
            return
        trained = self.local.trained()
        if not self._kept:
            self._kept = [torch.empty_like(tensor) for tensor in trained]
        with torch.no_grad():
            for kept, tensor in zip(self._kept, trained, strict=True):
                kept.copy_(tensor)
        try:
            yield self.local
        finally:
            with torch.no_grad():
                for kept, tensor in zip(self._kept, trained, strict=True):
                    tensor.copy_(kept)


def first_needed(since: int, to: int, span: int | None) -> int:
    """The first entry that leads from version ``since`` to version ``to``, where the newest ``span`` suffice."""
    return since + 1 if span is None else max(since + 1, to - span + 1)
