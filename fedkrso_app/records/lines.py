"""Logs of JSON lines that must be on the disk before what they tell of is done.

A last line that was cut short was never acted on: readers leave it out, and the next line takes its place.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fedkrso_app.config import ConfigError

T = TypeVar("T")


def append(file: BinaryIO, line: Mapping[str, Any]) -> None:
    """Write ``line`` at the end of ``file`` (open as "a+b"); it is on the disk when this returns."""
    file.seek(0)
    file.truncate(_whole(file.read()))
    file.write(json.dumps(dict(line)).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def spent(path: Path, text: bytes, made: Callable[[Any], T]) -> list[T]:
    """What ``made`` makes of each line of ``text``, which ``path`` holds. Raises :class:`ConfigError` for one that
    cannot be read."""
    found = []
    for number, line in enumerate(text[: _whole(text)].splitlines(), 1):
        try:
            found.append(made(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number} cannot be read ({error}): restore it; it says what was spent of privacy."
            ) from None
    return found


def private(path: str, flags: int) -> int:
    """An opener of files for their owner's eyes alone."""
    return os.open(path, flags, 0o600)


def _whole(text: bytes) -> int:
    """The length of the lines that are complete."""
    return text.rfind(b"\n") + 1
