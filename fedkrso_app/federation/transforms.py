"""What is done to an update on its way, whatever the method: at the client before it is sent, and to the mean."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedkrso_app.records.schema import differences, sums
from fedkrso_app.strategies import secure
from fedkrso_app.strategies.base import Arrays, Method


class Transform(Protocol):
    """``start`` has the arrays of role "state" that training began with."""

    def update(self, arrays: Arrays, start: Arrays) -> dict[str, np.ndarray]:
        """A client's update, before it is encoded."""

    def reply(self, arrays: Arrays, start: Arrays) -> Arrays:
        """A client's update as the server has it, before the method sees it."""

    def mean(self, arrays: Arrays, start: Arrays) -> dict[str, np.ndarray]:
        """What the method has made of the round, before it is published."""


class Differences:
    """States of a reply travel as differences to the start, so that rounding to few bits costs as little as the update
    is small; the next entry is the newest plus the mean. A method that computes with the values gets the sum reply by
    reply."""

    def __init__(self, method: Method) -> None:
        self.schema, self.values = method.reply, method.from_values

    def update(self, arrays: Arrays, start: Arrays) -> dict[str, np.ndarray]:
        return differences(arrays, start, self.schema)

    def reply(self, arrays: Arrays, start: Arrays) -> Arrays:
        return sums(arrays, start, self.schema) if self.values else arrays

    def mean(self, arrays: Arrays, start: Arrays) -> dict[str, np.ndarray]:
        return dict(arrays) if self.values else sums(arrays, start, self.schema)


def transforms(method: Method) -> Sequence[Transform]:
    """Those of a run, in the order in which a client applies them."""
    return [Differences(method)] if secure.by_difference(method.config) else []
