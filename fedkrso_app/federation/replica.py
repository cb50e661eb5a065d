"""W^t of this process: brought up to date by ledger entries, lent to training, given back bit for bit unchanged."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Entry, Ledger, LedgerError
from fedkrso_app.strategies.base import LocalMethod

_KEEP = 25  # entries on a node's disk: about the bytes of the weights themselves (RoBERTa-base, K = 10, r = 4)
_FORGOTTEN = 14 * 86400  # seconds after which the files of a run that never ended are removed


class NeedSync(RuntimeError):
    """The entries at hand do not lead to the version asked for."""


class NodeStore:
    """What a node keeps of a run on disk, so that a fresh process soon has W^t again: some entries, and one W.

    The files are those of a run, not of a partition: W^t is the same for all partitions, so the processes and nodes of
    a machine share them. After each message they are at most ``keep`` entries and one copy of the trained weights.
    """

    def __init__(self, run: str, keep: int = _KEEP) -> None:
        if not re.fullmatch("[0-9a-f]{16}", run):  # it becomes the name of a folder
            raise ValueError(f"{run!r} is not the id of a run")
        cache = Path(os.environ.get("FEDKRSO_CACHE") or "~/.cache/fedkrso").expanduser()
        self.folder = cache / "nodes" / run
        self.entries, self.keep = Ledger(self.folder), keep
        for leftover in self.folder.glob("*.tmp"):  # of a process that was killed while it wrote
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > 3600:
                    leftover.unlink()

    @property
    def version(self) -> int:
        """The newest version that these files lead to; -1 if none."""
        return max(self.entries.version, self.weights_version)

    @property
    def weights_version(self) -> int:
        """The version whose weights are here; -1 if none are."""
        return max(self._weights(), default=-1)

    def stamp(self, version: int) -> str:
        """The digest of entry ``version``, from which its weights were made; "" if it is not here."""
        for _ in range(2):  # another process may put weights in the place of the entry between two looks
            try:
                if version in self._weights():
                    with safe_open(self._weights()[version], framework="numpy") as file:
                        return file.metadata()["stamp"]
                return self.entries.stamp(version)
            except (LedgerError, SafetensorError, KeyError, OSError):
                continue
        return ""

    def put(self, entry: Entry) -> None:
        """Keep an entry, unless weights of a version as new are here already."""
        if entry.version > self.weights_version:
            self.entries.put(entry)

    def put_weights(self, version: int, stamp: str, values: np.ndarray) -> None:
        """Keep the weights of ``version`` in place of all entries that led to it. Whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{version:06d}.weights"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file({"values": values}, temporary, {"stamp": stamp, "crc32": str(crc32(values.data))})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for older, file in self._weights().items():
            if older < version:
                file.unlink(missing_ok=True)
        for older in self.entries.versions():
            if older <= version:
                self.entries.discard(older)

    def weights(self, after: int, upto: int) -> tuple[int, np.ndarray | None]:
        """The newest weights of a version in (after, upto], and that version; (-1, None) if there are none."""
        for version, file in sorted(self._weights().items(), reverse=True):
            if after < version <= upto:
                try:
                    with safe_open(file, framework="numpy") as opened:
                        values = opened.get_tensor("values")
                        if opened.metadata()["crc32"] == str(crc32(values.data)):
                            return version, values
                except (SafetensorError, KeyError, OSError):
                    pass
                file.unlink(missing_ok=True)  # damaged
        return -1, None

    def clear(self) -> None:
        """Remove all files of this run, and those of runs that ended long ago without a farewell."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for other in self.folder.parent.glob("*"):
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > _FORGOTTEN:
                    shutil.rmtree(other)

    def _weights(self) -> dict[int, Path]:
        return {int(path.stem): path for path in self.folder.glob("*.weights")}


class Replica:
    """A model at a version. ``entries`` is where it reads them; a client's comes with the ``store`` around them."""

    def __init__(self, method: LocalMethod, entries: Ledger, incremental: bool, store: NodeStore | None = None) -> None:
        torch.set_float32_matmul_precision("highest")  # TF32 would rebuild another W than the server's
        self.method, self.entries, self.incremental, self.store = method, entries, incremental, store
        self.version = -1
        self._kept: list[torch.Tensor] = []
        self._copy: LocalMethod | None = None

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
                self._advance(to)  # another process may have put weights in the place of the entries just now
            except LedgerError as error:
                if self.store:  # a node's entry that is damaged must go, so that it can be sent again; a run's never
                    self.entries.discard(self.version + 1 if self.incremental else to)
                raise NeedSync(str(error)) from None
        if self.store:
            self._tidy(to, fresh)

    def _tidy(self, to: int, fresh: bool) -> None:
        """Leave on disk what the next fresh process needs, and no more than the store may keep."""
        assert self.store
        kept = self.entries.versions()
        if not self.incremental:
            for version in kept[: -self.store.keep]:
                self.entries.discard(version)
        elif to > max(0, self.store.weights_version) and (fresh or len(kept) > self.store.keep):
            self.store.put_weights(to, self.store.stamp(to), self.state())

    def state(self) -> np.ndarray:
        """All trained tensors as one float32 vector: with W^0, the model at :attr:`version`."""
        return flatten(self.method.trained())

    def restore(self, version: int, values: np.ndarray) -> None:
        """Take over a :meth:`state`."""
        unflatten(values, self.method.trained())
        self.version = version

    def _advance(self, to: int) -> None:
        if self.store and self.incremental:
            version, values = self.store.weights(self.version, to)
            if values is not None:
                self.restore(version, values)
        for version in range(self.version + 1 if self.incremental else max(to, self.version + 1), to + 1):
            if arrays := self.entries.read(version).arrays:
                self.method.apply(wire.decode(arrays))
            self.version = version

    def computing(self) -> LocalMethod:
        """The model to compute with: this one; or, in bfloat16, a copy of it on the device, brought up to date."""
        if self.method.config.on_device:
            return self.method
        if self._copy is None:
            self._copy = self.method.in_bfloat16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        with torch.no_grad():
            for copied, tensor in zip(self._copy.trained(), self.method.trained(), strict=True):
                copied.copy_(tensor)
        return self._copy

    @contextmanager
    def lend(self) -> Iterator[LocalMethod]:
        """The model for training; on leaving, every trained tensor has the bits it had (copied, never subtracted)."""
        if (method := self.computing()) is not self.method:
            yield method
            return
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
