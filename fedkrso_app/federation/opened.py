"""Which sum of which round a node has helped to open: a round at most once, ever.

Training is deterministic, so a round that is done again has the same updates, and two of its sums that differ in one
node give that node's update. The record is beside the files of runs, not among them: neither the end of a run nor a
server that finds these files to be of another history takes it away. It costs a hundred bytes per run.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fedkrso_app.config import cache
from fedkrso_app.federation.discretion import Declined

_AT_ONE_VERSION = 2  # a sum that was opened and could not be published is followed by another, not by a series


class Opened:
    """The record of the node whose first partition is ``partition``, in the run with this id."""

    def __init__(self, run: str, partition: int) -> None:
        self.path = cache() / "opened" / run / f"{partition}.json"

    def check(self, round: int, version: int) -> None:
        """Raise :class:`Declined` unless ``round``, trained at ``version``, may still be opened."""
        with self._locked():
            self._next(self._read(), round, version)

    def note(self, round: int, version: int, statement: str) -> None:
        """Put down that this ``statement`` (session and survivors) is answered, on the disk before it is. Raises
        :class:`Declined` where another was."""
        with self._locked():
            record = self._read()
            if (record["round"], record["statement"]) == (round, statement):
                return
            times = self._next(record, round, version)
            new = {"round": round, "version": version, "times": times, "statement": statement}
            temporary = self.path.with_suffix(".tmp")
            with open(temporary, "w") as file:
                json.dump(new, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def _next(self, record: dict, round: int, version: int) -> int:
        """How often a sum at ``version`` will have been opened."""
        if round <= record["round"]:
            raise Declined(f"round {round} is not after round {record['round']}, of which this node has opened a sum.")
        times = record["times"] + 1 if version == record["version"] else 1
        if times > _AT_ONE_VERSION:
            raise Declined(f"version {version} was the start of {_AT_ONE_VERSION} rounds that this node has opened.")
        return times

    def _read(self) -> dict:
        try:
            record = json.loads(self.path.read_text())
            return {key: record[key] for key in ("round", "version", "times", "statement")}
        except FileNotFoundError:
            return {"round": 0, "version": -1, "times": 0, "statement": ""}
        except (OSError, ValueError, KeyError, TypeError):
            raise Declined("this node's record of opened rounds cannot be read; see opened/ in its cache.") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two messages that are answered at once see each other's record."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
