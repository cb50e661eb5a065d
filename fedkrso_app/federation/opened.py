"""Which sum of which round a node has helped to open: a round at most once, ever; and for whom it has sealed a round.
The same for tallies, of which each version of the model takes the place of a round.

Training is deterministic, so a round that is done again has the same updates, and two of its sums that differ in one
node give that node's update. Nodes that answer once each do not prevent two such sums where the round has several
rosters: those that answer for one are then others than those that answer for the next. So a round that is sealed again
must have the same nodes, of which some would have to answer twice.

The record is beside the files of runs, not among them: neither the end of a run nor a server that finds these files
to be of another history takes it away. It costs a hundred bytes per run.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager

from fedkrso_app.config import cache
from fedkrso_app.federation.discretion import Declined
from fedkrso_app.records import disk
from fedkrso_app.records.protocol import TRAIN

_AT_ONE_VERSION = 2  # a sum that was opened and could not be published is followed by another, not by a series


class Opened:
    """The record of the node whose first partition is ``partition``, in the run with this id, of what it seals in
    answer to messages of this ``kind``."""

    def __init__(self, run: str, partition: int, kind: str = TRAIN) -> None:
        ending, self._what = ("", "round") if kind == TRAIN else (f"-{kind}", "the tally of version")
        self.path = cache() / "opened" / run / f"{partition}{ending}.json"

    def enter(self, round: int, version: int, who: str, session: str) -> None:
        """Put down, on the disk, that ``round`` (at ``version``) is sealed for the nodes ``who`` in ``session``.

        Raises :class:`Declined` where it may not be opened any more, was sealed for others, or in this session already.
        """
        with self._locked():
            record = self._read()
            self._next(record, round, version)
            before, *sessions = record["sealed"].get(str(round), [who])
            if before != who:
                raise Declined(f"this node has sealed {self._what} {round} for other nodes already.")
            if session in sessions:
                raise Declined("this node has sealed something in this session already.")
            record["sealed"][str(round)] = [who, *sessions, session]
            disk.write(self.path, json.dumps(record))

    def note(self, round: int, version: int, statement: str) -> None:
        """Put down that this ``statement`` (session and survivors) is answered, on the disk before it is. Raises
        :class:`Declined` where another was."""
        with self._locked():
            record = self._read()
            if (record["round"], record["statement"]) == (round, statement):
                return
            times = self._next(record, round, version)
            later = {key: value for key, value in record["sealed"].items() if int(key) > round}
            new = {"round": round, "version": version, "times": times, "statement": statement, "sealed": later}
            disk.write(self.path, json.dumps(new))

    def _next(self, record: dict, round: int, version: int) -> int:
        """How often a sum at ``version`` will have been opened."""
        if round <= record["round"]:
            raise Declined(f"{self._what} {round} is not after {record['round']}, of which this node has opened a sum.")
        if version < record["version"]:
            raise Declined(f"version {version} is before version {record['version']}, of which it has opened a sum.")
        times = record["times"] + 1 if version == record["version"] else 1
        if times > _AT_ONE_VERSION:
            raise Declined(f"version {version} was the start of {_AT_ONE_VERSION} rounds that this node has opened.")
        return times

    def _read(self) -> dict:
        try:
            record = json.loads(self.path.read_text())
            sealed = {str(int(key)): [str(each) for each in value] for key, value in record.get("sealed", {}).items()}
            return {key: record[key] for key in ("round", "version", "times", "statement")} | {"sealed": sealed}
        except FileNotFoundError:
            return {"round": 0, "version": -1, "times": 0, "statement": "", "sealed": {}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise Declined("this node's record of opened rounds cannot be read; see opened/ in its cache.") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two messages that are answered at once see each other's record."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
