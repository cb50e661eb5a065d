"""What the rows of a node have spent of their privacy, on the node's own disk.

A book has a line for each client and round, written and synced before the first step is taken:

    {"run", "round", "data", "folder", "rows", "noise", "clip", "rate", "steps", "time"}

``data`` is the digest of the rows, in any order. The events of all lines with the same rows count together; so do those
of one ``folder`` (of data that is not the node's own, with the partition), whatever was in it: rows that stayed are in
both. A round that is done again is a line of its own, with other noise.

A node with data or a bound of its own has one book for all runs, ``<cache>/privacy.jsonl``. Others, as those of a
simulation, have one for each run and partition in ``<cache>/privacy``. Whoever deletes a book deletes what was spent.
"""

import fcntl
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from fedkrso_app.config import cache
from fedkrso_app.core.accounting import Releases, epsilon, rounded_up, shown
from fedkrso_app.federation.discretion import Declined
from fedkrso_app.records import lines

logger = logging.getLogger("flwr")

OWN_DELTA = 1e-5  # at most, of a node's own bound: the run's δ is the server's choice, and a larger one has a smaller ε
OF_THE_RUN = "privacy.max-epsilon"  # a node's reason names it, and so the server knows


@dataclass(frozen=True)
class Event:
    """One client's round: ``steps`` releases of noise ``noise`` × ``clip``, with each of ``rows`` rows in a step with
    probability ``rate``."""

    run: str
    round: int
    data: str
    folder: str
    rows: int
    noise: float
    clip: float
    rate: float
    steps: int

    @property
    def releases(self) -> Releases:
        return Releases(self.noise, self.rate, self.steps)


def book() -> Path:
    """The one of all runs."""
    return cache() / "privacy.jsonl"


def book_of_run(run: str, partition: int) -> Path:
    """One that stays when the run is over, which may be continued with more rounds."""
    return cache() / "privacy" / run / f"{partition}.jsonl"


def digest(examples: datasets.Dataset) -> str:
    """SHA-256 (hex) of the rows, whatever their order."""
    table: Any = examples.with_format("arrow")[:]
    names = sorted(table.column_names)
    columns = [table[name].to_pylist() for name in names]
    rows = sorted(hashlib.sha256(repr(row).encode()).digest() for row in zip(*columns, strict=True))
    return hashlib.sha256(b"".join([repr(names).encode(), *rows])).hexdigest()


def spend(path: Path, event: Event, delta: float, most: float = 0.0, of_the_run: float = 0.0) -> float:
    """Write ``event`` down as spent in the book ``path``; ε of its run so far at ``delta``, this event included.

    ``most`` is the node's own bound on ε over all runs (at most at :data:`OWN_DELTA`), ``of_the_run`` the run's own; 0:
    none. Raises
    :class:`Declined` and writes nothing where the event would exceed one, or where ``delta`` promises nothing.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "a+b", opener=lines.private) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        known = lines.spent(path, handle.read(), _event)
        check(event, known, delta, most, of_the_run)
        lines.append(handle, {**vars(event), "time": int(time.time())})
    return of_run(event, known, delta)


def check(event: Event, known: list[Event], delta: float, most: float, of_the_run: float) -> None:
    """Raise :class:`Declined` where ``event`` must not be added to those ``known``."""
    if delta * event.rows >= 1:
        raise Declined(
            f"privacy.delta = {delta:g} promises nothing to a client of {event.rows} rows: it must be below "
            f"1/{event.rows}."
        )
    if of_the_run and (total := of_run(event, known, delta)) > of_the_run:
        raise Declined(
            f"privacy.max-epsilon = {of_the_run:g} would be exceeded for a client, whose epsilon this round makes "
            f"{reported(total):g}."
        )
    if not most:
        return
    delta = min(delta, OWN_DELTA)
    same = [e for e in known if _shared(e, event)]
    total = epsilon([e.releases for e in [*same, event]], delta)
    if total > most:
        before = epsilon([e.releases for e in same], delta)
        logger.error(
            "These rows have spent an epsilon of %s in all runs, and this round would make it %s (delta = %g); "
            "max-epsilon is %g",
            shown(before),
            shown(total),
            delta,
            most,
        )
        raise Declined("this node's max-epsilon would be exceeded in this round.")


def of_run(event: Event, known: list[Event], delta: float) -> float:
    """ε of the run that ``event`` belongs to, for the event's rows."""
    same = [e for e in known if e.run == event.run and _shared(e, event)]
    return epsilon([e.releases for e in [*same, event]], delta)


def _shared(one: Event, other: Event) -> bool:
    """Whether the two may have had a row in common."""
    return one.data == other.data or bool(other.folder and one.folder == other.folder)


def reported(value: float) -> float:
    """ε as a node reports it: rounded up to 0.1, since it hints at how many rows there are."""
    return rounded_up(value, 1)


def known(path: Path) -> list[Event]:
    """All events in a book."""
    return lines.spent(path, path.read_bytes(), _event) if path.exists() else []


def _event(facts: Mapping[str, Any]) -> Event:
    return Event(**{name: kind(facts[name]) for name, kind in Event.__annotations__.items()})
