"""A grid whose replies arrive one at a time, so that the server's memory does not grow with the number of clients."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import Message

_AT_ONCE = 8  # replies that may be in memory together
_PART = 0.02  # of the time since the messages went out that a pause may take


class StreamingGrid:
    """Flower's grid, except that ``send_and_receive`` is a generator."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send all, then yield each reply as it comes; stop when all are there or ``timeout`` seconds have passed."""
        messages = list(messages)  # Flower's HTTP grid iterates twice
        if not messages:
            return
        pending = {id: None for id in self._grid.push_messages(messages) if id}  # a set that keeps its order
        began = time.monotonic()
        end = began + (float("inf") if timeout is None else timeout)
        while pending and time.monotonic() < end:
            for some in _batched(list(pending), _AT_ONCE):
                for reply in self._grid.pull_messages(some):
                    pending.pop(reply.metadata.reply_to_message_id, None)
                    yield reply
            if pending:
                now = time.monotonic()
                time.sleep(min(pause(now - began), max(0.0, end - now)))


def pause(waited: float) -> float:
    """Seconds until the next look, after ``waited`` seconds: a look costs something, and so does a reply that lies
    about."""
    return min(1.0, max(0.02, _PART * waited))


def _batched(items: list[str], size: int) -> Iterator[list[str]]:
    """``items`` in runs of ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))
