"""A head of its own at each client, for any method that has one: laid over its two halves, as the options are.

What such a method sends has no head. FedSA-LoRA comes with it; the key ``client.head`` gives FedIT local heads too, so
that the two differ in nothing but B.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.flat import flatten, storage
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.strategies.base import Arrays, Local, Method
from fedkrso_app.training.loop import Session
from fedkrso_app.training.shapes import Shapes


class LocalHeadLocal(Local):
    """Client half: the head is an array of role "personal"; entries pass it by."""

    def personal(self) -> dict[str, list[Tensor]]:
        own = {"head": [parameter.detach() for parameter in self.head.values()]} if self.head else {}
        return {**super().personal(), **own}

    def shared(self) -> list[Tensor]:
        own = {storage(parameter) for parameter in self.head.values()}
        return [tensor for tensor in super().shared() if storage(tensor) not in own]

    def state(self) -> dict[str, np.ndarray]:
        return {**super().state(), "head": np.zeros(0, np.float32)}  # type: ignore[safe-super]

    def apply(self, arrays: Arrays) -> None:
        super().apply({**arrays, "head": flatten(self.head.values())})  # type: ignore[safe-super]

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        with super().session(instructions, rng) as session:  # type: ignore[safe-super]
            plain = session.update
            yield replace(session, update=lambda: {**plain(), "head": flatten(self.head.values())})


class LocalHead(Method):
    """Server half: that of the method for a model without a head."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, replace(shapes, head=0))
        self.own_head = shapes.head
        if "head" not in super().reply.fields:  # type: ignore[safe-super]
            raise ConfigError(
                f"client.head = 'local' does not go with {config.strategy}, which sends its head with the rest: "
                "set it to 'shared'."
            )

    @property
    def reply(self) -> Schema:
        reply = super().reply  # type: ignore[safe-super]
        own = {"head": Field("float32", (self.own_head,), "personal")} if self.own_head else {}
        return replace(reply, fields={**reply.fields, **own})

    @property
    def entry(self) -> Schema:
        entry = super().entry
        return replace(entry, fields={**entry.fields, "head": Field("float32", (0,), "state")})
