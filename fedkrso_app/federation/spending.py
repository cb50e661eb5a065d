"""What a run with client-level DP has spent: a line in its folder for each release, synced before noise is drawn.

``privacy.jsonl`` holds {"round", "unit", "noise", "clip", "asked"}; ``asked`` lists the partitions of the units that
the round asked, those included that it left out. A round that is done again is a line of its own and is paid again,
with other noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkrso_app.core.accounting import Releases, epsilon
from fedkrso_app.records import disk, lines


@dataclass(frozen=True)
class Release:
    """A sum over units that hold the partitions ``asked``, of which each unit moves it by at most ``clip``, with
    Gaussian noise of ``noise`` × ``clip``."""

    round: int
    noise: float
    clip: float
    asked: tuple[int, ...]


class Spending:
    """The releases of a run, in ``file``. Raises :class:`ConfigError` where a line cannot be read."""

    def __init__(self, file: Path, delta: float) -> None:
        self._file, self._delta = file, delta
        self.releases = lines.spent(file, file.read_bytes(), _release) if file.is_file() else []

    def epsilon(self, *more: Release) -> float:
        """ε of the unit that was asked most, after all releases and ``more``.

        Who is asked is public, so the rounds that asked a unit compose without amplification. A unit's rounds are those
        that asked a holder of one of its partitions, also where nodes have exchanged some since.
        """
        spent: dict[int, list[Releases]] = {}
        for release in (*self.releases, *more):
            for partition in set(release.asked):
                spent.setdefault(partition, []).append(Releases(release.noise))
        worst = max(spent.values(), key=lambda own: sum(each.noise**-2 for each in own), default=[])
        return epsilon(worst, self._delta)

    def write(self, release: Release) -> None:
        """Note ``release`` as spent; it is on the disk when this returns."""
        line = {"round": release.round, "unit": "client", "noise": release.noise, "clip": release.clip}
        with open(self._file, "a+b", opener=lines.private) as file:
            lines.append(file, {**line, "asked": release.asked})
        disk.keep_names(self._file.parent)
        self.releases.append(release)


def _release(facts: Mapping[str, Any]) -> Release:
    asked = tuple(map(int, facts["asked"]))
    return Release(int(facts["round"]), float(facts["noise"]), float(facts["clip"]), asked)
