"""What an array is: its dtype and shape as it travels, and its role. Everything else about it follows from the role."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fedkrso_app.core import quantize

# update: adds to the model.  state: replaces what was there.  key: says what the others belong to (seeds, a bitmap).
# server: stays on the server, beside the ledger.  personal: a part of the model that stays on the node, one copy for
# each partition.
# memory: the same, but no part of the model: it is gone with the run.
Role = Literal["update", "state", "key", "server", "personal", "memory"]

SCALES = ".scales"  # suffix of the array that holds the scales of a quantised one


@dataclass(frozen=True)
class Field:
    """One array. A letter in ``shape`` is one length, the same in every array of its schema.

    The dtypes float16, int8 and int4 are those of float32 arrays that travel quantised (:mod:`core.quantize`);
    bfloat16 numbers, which numpy does not know, travel as their bits.
    ``every``: in how many consecutive entries it occurs at least once. Arrays that take turns (2) are ``optional`` and
    come in their order in the schema.
    """

    dtype: str
    shape: tuple[int | str, ...]
    role: Role = "update"
    optional: bool = False
    every: int = 1


@dataclass(frozen=True)
class Schema:
    """Arrays by name; ``limits`` has the largest length allowed for each letter of their shapes."""

    fields: Mapping[str, Field]
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def span(self) -> int | None:
        """How many of the newest entries bring any copy of the model up to date; None: all since its version."""
        if self.named("update"):
            return None
        return max((f.every for f in self.fields.values() if f.role == "state"), default=1)

    def named(self, *roles: Role) -> list[str]:
        """The names of the arrays in one of ``roles``."""
        return [name for name, f in self.fields.items() if f.role in roles]

    def only(self, names: Iterable[str]) -> "Schema":
        """This schema with the arrays of ``names`` alone."""
        kept = set(names)
        return replace(self, fields={name: f for name, f in self.fields.items() if name in kept})

    @property
    def travelling(self) -> "Schema":
        """The arrays that leave the machine they are made on: none that is always empty, as a frozen head."""
        return self.only(name for name in self.named("update", "state", "key") if 0 not in self.fields[name].shape)

    def filled(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``arrays``, and an empty one for each name that never reaches the server."""
        reaching = {*self.travelling.fields, *self.named("server")}
        return {name: np.zeros(0, np.float32) for name in self.fields if name not in reaching} | dict(arrays)

    @property
    def usual(self) -> list["Schema"]:
        """What an entry after the first, or a reply, holds: one schema, or one for each array that takes turns."""
        always = [name for name, f in self.fields.items() if not f.optional]
        return [self.only([*always, name]) for name in self.in_turn] or [self.only(always)]

    @property
    def in_turn(self) -> list[str]:
        """The names of the arrays that take turns."""
        return [name for name, f in self.fields.items() if f.every > 1]

    @property
    def start(self) -> "Schema":
        """Ledger entry 0: the state at W^0."""
        return self.only(self.named("state"))

    @property
    def older(self) -> "Schema":
        """An entry that travels with newer ones: without the states that those replace (:func:`superseded`)."""
        return replace(
            self, fields={name: replace(f, optional=f.optional or f.role == "state") for name, f in self.fields.items()}
        )

    def encoded(self) -> "Schema":
        """The schema of the arrays that travel: codes under the old name, scales beside them."""
        fields: dict[str, Field] = {}
        limits = dict(self.limits)

        def fewer(length: int | str, parts: int) -> int | str:
            """⌈length / parts⌉, for a letter as a letter of its own."""
            if not isinstance(length, str):
                return -(-length // parts)
            limits[f"{length}/{parts}"] = -(-limits[length] // parts)
            return f"{length}/{parts}"

        for name, f in self.fields.items():
            *rest, n = f.shape
            if f.dtype in quantize.FORMATS:
                scales = (*rest, 1 if f.dtype == "float16" else fewer(n, quantize.BLOCK))
                fields[name + SCALES] = replace(f, dtype="uint16", shape=scales)
            codes = replace(f, dtype="uint8", shape=(*rest, fewer(n, 2)))
            bits = replace(f, dtype="uint16")
            fields[name] = {"int4": codes, "bfloat16": bits}.get(f.dtype, f)
        return Schema(fields, limits)


def superseded(entries: Iterable[Iterable[str]], schema: Schema) -> list[set[str]]:
    """Of each entry (its array names, oldest first) the names that need not be sent with the later ones: the state
    that one of those replaces."""
    state = {name + suffix for name in schema.named("state") for suffix in ("", SCALES)}
    later: set[str] = set()
    dropped: list[set[str]] = []
    for names in reversed([set(names) for names in entries]):
        dropped.append(names & later)
        later |= names & state
    return dropped[::-1]


def differences(arrays: Mapping[str, Any], start: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """``arrays`` with every state as its difference to the one in ``start`` (its first rows, if there are more)."""
    state = schema.named("state")
    return {name: x - start[name][: len(x)] if name in state else x for name, x in arrays.items()}


def sums(differences: Mapping[str, Any], start: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """What :func:`differences` was given."""
    state = schema.named("state")
    return {name: x + start[name][: len(x)] if name in state else x for name, x in differences.items()}
