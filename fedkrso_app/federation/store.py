"""What a node keeps of a run on its disk, so that a fresh process soon has W^t, and its own state, again."""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedkrso_app.config import ConfigError, cache
from fedkrso_app.core.flat import raw, take_raw
from fedkrso_app.records import disk
from fedkrso_app.records.ledger import Entry, Ledger, LedgerError

_KEEP = 25  # entries on a node's disk: about the bytes of the weights themselves (RoBERTa-base, K = 10, r = 4)
_FORGOTTEN = 14 * 86400  # seconds after which the files of a run that never ended are removed


class NodeStore:
    """Some entries and one W, and of each partition the arrays of the roles "personal" and "memory".

    Entries and W are those of a run, not of a partition: W^t is the same for all partitions, so the processes and nodes
    of a machine share them. After each message they are at most ``keep`` entries and one copy of the trained weights.
    Personal arrays outlive the run: :meth:`clear` moves them to ``<cache>/personal/<run>``, where export finds them.
    """

    def __init__(self, run: str, keep: int = _KEEP) -> None:
        if not re.fullmatch("[0-9a-f]{16}", run):  # it becomes the name of a folder
            raise ValueError(f"{run!r} is not the id of a run")
        self.folder, self.released = cache() / "nodes" / run, cache() / "personal" / run
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
        for _ in range(2):  # another process may replace the entry by weights between two looks
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
            _private(self.folder)
            self.entries.put(entry)

    def put_weights(self, version: int, stamp: str, arrays: Mapping[str, Sequence[Tensor | np.ndarray]]) -> None:
        """Keep the weights of ``version`` in place of all entries that led to it. Whole or not at all.

        Each array is the tensors one after another; none but the one being written is copied.
        """
        _private(self.folder)
        path = self.folder / f"{version:06d}.weights"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            _write(temporary, arrays, {"stamp": stamp})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for older, file in self._weights().items():
            if older < version:
                file.unlink(missing_ok=True)
        for older in self.entries.versions():
            if older <= version:
                self.entries.discard(older)

    def load_weights(self, after: int, upto: int, arrays: Mapping[str, Sequence[Tensor]]) -> int:
        """Copy the newest weights of a version in (after, upto] into ``arrays``; that version, or -1 if there are none.

        The file is read tensor by tensor, and once before for its checksum: what is damaged moves nothing.
        """
        for version, file in sorted(self._weights().items(), reverse=True):
            if after < version <= upto:
                try:
                    with safe_open(file, framework="numpy") as opened:
                        crc = 0
                        for _, part in _slices(opened, arrays):
                            crc = crc32(part.data, crc)
                        if int(opened.get_tensor("crc32")[0]) == crc:
                            for tensor, part in _slices(opened, arrays):
                                take_raw(part, tensor)
                            return version
                except (SafetensorError, KeyError, OSError):
                    pass
                file.unlink(missing_ok=True)  # damaged
        return -1

    def put_personal(self, partition: int, round: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a partition's own arrays as they are after ``round``; those of the two newest rounds stay."""
        self._put_own(self._personal(partition), round, arrays)

    def put_memory(self, partition: int, round: int, arrays: Mapping[str, np.ndarray]) -> None:
        """The same for arrays of role "memory", which :meth:`clear` removes."""
        self._put_own(Ledger(self.folder / f"memory-{partition}"), round, arrays)

    def _put_own(self, kept: Ledger, round: int, arrays: Mapping[str, np.ndarray]) -> None:
        _private(self.folder)
        kept.discard(round)  # the round is done again
        kept.put(Entry(round, arrays))
        for older in kept.versions()[:-2]:
            kept.discard(older)

    def personal(self, partition: int, before: int | None = None) -> Mapping[str, np.ndarray]:
        """A partition's own arrays after its newest round (below ``before``); empty if it has none.

        A message that comes twice, or a round that is done again, so begins with the same arrays. Raises LedgerError
        if the file is damaged.
        """
        return _newest(self._personal(partition), before)

    def memory(self, partition: int, before: int) -> Mapping[str, np.ndarray]:
        """A partition's arrays of role "memory" after its newest round below ``before``, in the same way."""
        return _newest(Ledger(self.folder / f"memory-{partition}"), before)

    def released_personal(self, partition: int, before: int) -> Mapping[str, np.ndarray]:
        """The same, where :meth:`clear` has left it."""
        return _newest(Ledger(self.released / f"personal-{partition}"), before)

    def _personal(self, partition: int) -> Ledger:
        return Ledger(self.folder / f"personal-{partition}")

    def pin(self, commits: Mapping[str, str]) -> None:
        """Keep the commits of what the run reads from the hub, for the processes to come.

        Raises :class:`ConfigError` where nothing can be written, also if there are none to keep.
        """
        temporary = self.folder / f"commits.{os.getpid()}.tmp"
        try:
            _private(self.folder)
            temporary.write_text(json.dumps(dict(commits)))
            if commits:
                os.replace(temporary, self.folder / "commits.json")
            else:
                temporary.unlink()
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be written ({error.strerror}); set FEDKRSO_CACHE to a folder that this node may "
                "write to."
            ) from None

    def begins(self, model: str) -> bool:
        """Whether these files are of a run that began with the W^0 of this digest; where there are none yet, the digest
        is kept for those to come."""
        kept = self.folder / "begin"
        if self.version < 0:
            _private(self.folder)
            kept.write_text(model)
        with suppress(OSError):
            return kept.read_text() == model
        return False

    def put_history(self, record: Mapping[str, Any]) -> None:
        """Keep the record of a :class:`History`."""
        _private(self.folder)
        disk.write(self.folder / "history.json", json.dumps(dict(record)))

    def history(self) -> Mapping[str, Any] | None:
        """What :meth:`put_history` kept; None if there is nothing that can be read."""
        with suppress(OSError, ValueError):
            return json.loads((self.folder / "history.json").read_text())
        return None

    def commits(self) -> Mapping[str, str]:
        """What :meth:`pin` kept; nothing if the file is missing."""
        with suppress(FileNotFoundError):
            return json.loads((self.folder / "commits.json").read_text())
        return {}

    def clear(self) -> Path | None:
        """Remove all files of this run but the personal arrays, and those of runs that ended long ago without a
        farewell. Returns where the personal arrays are now, if there are any."""
        moved = None
        for own in sorted(self.folder.glob("personal-*")):
            moved = self.released
            _private(moved)
            shutil.rmtree(moved / own.name, ignore_errors=True)
            shutil.move(own, moved / own.name)
        shutil.rmtree(self.folder, ignore_errors=True)
        for other in self.folder.parent.glob("*"):
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > _FORGOTTEN and not list(other.glob("personal-*")):
                    shutil.rmtree(other)
        return moved

    def forget(self) -> None:
        """Remove all files of this run, the personal arrays too: they belong to another history. The commits stay."""
        commits = self.commits()
        shutil.rmtree(self.folder, ignore_errors=True)
        if commits:
            self.pin(commits)

    def _weights(self) -> dict[int, Path]:
        return {int(path.stem): path for path in self.folder.glob("*.weights")}


def _write(path: Path, arrays: Mapping[str, Sequence[Tensor | np.ndarray]], metadata: Mapping[str, str]) -> None:
    """A safetensors file, tensor by tensor; the library's own writer wants all bytes at once. The checksum is last."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, parts in arrays.items():
        few = parts[0].dtype.itemsize == 2
        size = sum(math.prod(part.shape) for part in parts)
        begin, end = end, end + (2 if few else 4) * size
        header[name] = {"dtype": "U16" if few else "F32", "shape": [size], "data_offsets": [begin, end]}
    header["crc32"] = {"dtype": "U32", "shape": [1], "data_offsets": [end, end + 4]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parts in arrays.values():
            for part in parts:
                file.write(values := raw(part).data)
                crc = crc32(values, crc)
        file.write(crc.to_bytes(4, "little"))


def _slices(opened: Any, arrays: Mapping[str, Sequence[Tensor]]) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Each tensor and its values in the file. Raises KeyError where the file holds others."""
    for name, parts in arrays.items():
        whole, start = opened.get_slice(name), 0
        if whole.get_shape() != [sum(part.numel() for part in parts)]:
            raise KeyError(name)
        for part in parts:
            yield part, np.ascontiguousarray(whole[start : start + part.numel()])
            start += part.numel()


def _private(folder: Path) -> None:
    """Make ``folder``, for its owner's eyes alone, unless it is there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _newest(kept: Ledger, before: int | None) -> Mapping[str, np.ndarray]:
    """The arrays after the newest round (below ``before``) in ``kept``; empty if there is none."""
    rounds = [round for round in kept.versions() if before is None or round < before]
    return kept.read(rounds[-1]).arrays if rounds else {}
