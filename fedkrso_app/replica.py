"""W^t of this process: brought up to date by ledger entries, lent to training, given back bit for bit unchanged."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fedkrso_app import wire
from fedkrso_app.ledger import Ledger, LedgerError
from fedkrso_app.strategies.base import LocalMethod


def entries_folder(run_id: int) -> Path:
    """Where a node keeps a run's entries: shared by all processes of a machine, since entries are the same for all."""
    return Path(tempfile.gettempdir()) / f"fedkrso-{os.getuid()}" / f"run-{run_id}"


class NeedSync(RuntimeError):
    """The entries at hand do not lead to the version asked for."""


class Replica:
    """A model at a version. ``store`` holds the entries that this process can read."""

    def __init__(self, method: LocalMethod, store: Ledger, incremental: bool) -> None:
        torch.set_float32_matmul_precision("highest")  # TF32 would rebuild another W than the server's
        self.method, self.store, self.incremental = method, store, incremental
        self.version = -1
        self._kept: list[torch.Tensor] = []

    def advance(self, to: int) -> None:
        """Apply the entries that lead to version ``to``, in order and each once.

        Raises :class:`NeedSync` if one of them is missing, or if this replica is beyond ``to`` already.
        """
        if self.version > to:
            raise NeedSync(f"this replica is at version {self.version}, beyond {to}")
        first = self.version + 1 if self.incremental else max(to, self.version + 1)
        for version in range(first, to + 1):
            try:
                entry = self.store.read(version)
            except LedgerError as error:
                raise NeedSync(str(error)) from None
            self.method.apply(wire.decode(entry.arrays))
            self.version = version

    @contextmanager
    def lend(self) -> Iterator[LocalMethod]:
        """The model for training; on leaving, every trained tensor has the bits it had (copied, never subtracted)."""
        trained = self.method.trained()
        if not self._kept:
            self._kept = [torch.empty_like(tensor) for tensor in trained]
        with torch.no_grad():
            for kept, tensor in zip(self._kept, trained, strict=True):
                kept.copy_(tensor)
        try:
            yield self.method
        finally:
            with torch.no_grad():
                for kept, tensor in zip(self._kept, trained, strict=True):
                    tensor.copy_(kept)
