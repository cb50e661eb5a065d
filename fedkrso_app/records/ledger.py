"""The run as a list of entries on disk: W^0 plus the ledger *is* the model.

Entry v leads from version v-1 to version v (entry 0 sets what W^0 does not have, such as the head). One safetensors
file an entry, written whole or not at all; its metadata holds what happened in the round and a digest of the arrays.
"""

import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedkrso_app.records import disk

logger = logging.getLogger("flwr")


class LedgerError(ValueError):
    """The ledger cannot be read or continued; the message names the file."""


@dataclass(frozen=True)
class Entry:
    version: int
    arrays: Mapping[str, np.ndarray]
    record: Mapping[str, Any] = field(default_factory=dict)  # JSON: the round, who took part, bytes, loss


class Ledger:
    """Entries in ``folder``. ``keep`` = how many of the newest stay on disk (None: all)."""

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder, self.keep = folder, keep

    @property
    def version(self) -> int:
        """The newest version on disk; -1 if there is none."""
        return max(self.versions(), default=-1)

    def versions(self) -> list[int]:
        """All versions on disk, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors") if path.stem.isdigit())

    def append(self, entry: Entry) -> None:
        """Make ``entry`` the newest. Raises LedgerError if it does not follow; an OSError leaves all as it was."""
        if entry.version != self.version + 1:
            raise LedgerError(f"entry {entry.version} cannot follow entry {self.version} in {self.folder}")
        self.put(entry)
        if self.keep:
            for version in self.versions()[: -self.keep]:
                self._path(version).unlink()

    def put(self, entry: Entry) -> None:
        """Write ``entry`` atomically unless its version is there already (entries never change)."""
        path = self._path(entry.version)
        if path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(value) for name, value in entry.arrays.items()}
        metadata = {
            "version": str(entry.version),
            "digest": digest(arrays),
            "crc32": str(checksum(arrays)),
            "record": json.dumps(dict(entry.record), sort_keys=True),
        }
        disk.write(path, save(arrays, metadata))

    def read(self, version: int) -> Entry:
        """Entry ``version``. Raises LedgerError if it is missing or damaged."""
        path = self._path(version)
        if not path.is_file():
            raise LedgerError(f"entry {version} is missing: {path} does not exist")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record = json.loads(metadata["record"])
            sound = metadata["crc32"] == str(checksum(arrays)) and metadata["version"] == str(version)
        except (SafetensorError, KeyError, ValueError) as error:
            raise LedgerError(f"entry {version} is damaged: {path} ({error})") from None
        if not sound:
            raise LedgerError(f"entry {version} is damaged: {path} does not match its checksum")
        return Entry(version, arrays, record)

    def stamp(self, version: int) -> str:
        """The digest that entry ``version`` carries. Raises LedgerError if it is missing or cannot be read."""
        path = self._path(version)
        try:
            with safe_open(path, framework="numpy") as file:
                return file.metadata()["digest"]
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            raise LedgerError(f"entry {version} cannot be read: {path} ({error})") from None

    def names(self, version: int) -> list[str]:
        """The arrays of entry ``version``. Raises LedgerError as :meth:`stamp` does."""
        path = self._path(version)
        try:
            with safe_open(path, framework="numpy") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise LedgerError(f"entry {version} cannot be read: {path} ({error})") from None

    def discard(self, version: int) -> None:
        """Remove entry ``version`` if it is there: on a node, whose entries can be sent again."""
        self._path(version).unlink(missing_ok=True)

    def recovered(self) -> Iterator[Entry]:
        """All entries, oldest first, each read once. The newest is set aside, with a warning, if it is damaged: the run
        continues from the one before it. Raises LedgerError if an earlier one is damaged or missing."""
        versions = self.versions()
        for version, expected in zip(versions, itertools.count(versions[0] if versions else 0), strict=False):
            try:
                if version != expected:
                    raise LedgerError(f"entry {expected} is missing: {self._path(expected)} does not exist")
                entry = self.read(version)
            except LedgerError as error:
                if version != versions[-1] or version != expected:
                    raise LedgerError(f"{error}; the later ones lead nowhere without it: restore the file") from None
                path = self._path(version)
                path.rename(path.with_suffix(".damaged"))
                logger.warning("%s; set aside as %s.damaged, continuing from the entry before it", error, path.stem)
                return
            yield entry

    def _path(self, version: int) -> Path:
        return self.folder / f"{version:06d}.safetensors"


def checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of what :func:`digest` reads: it tells damage as well, in a fifth of the time."""
    return functools.reduce(lambda crc, part: crc32(part, crc), _parts(arrays), 0)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for part in _parts(arrays):
        sha.update(part)
    return sha.hexdigest()


def _parts(arrays: Mapping[str, np.ndarray]) -> Iterator[Any]:
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        yield f"{name}:{value.dtype.str}:{value.shape};".encode()
        yield value.data if value.size else b""
