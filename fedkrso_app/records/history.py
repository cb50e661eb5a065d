"""What a model was made of, as one digest: two nodes that were given different ledger entries differ in it.

The stamp of the newest entry is not enough: where entries add to the model, it says nothing of those before. Of states
only the newest count, since those that a later entry replaces do not reach every node.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedkrso_app.records.ledger import digest
from fedkrso_app.records.schema import SCALES, Schema


class History:
    """That of a model whose entries have this ``schema``; ``record`` is what :attr:`record` gave."""

    def __init__(self, schema: Schema, record: Mapping[str, Any] | None = None) -> None:
        self._states, self.span = set(schema.named("state")), schema.span
        known = record or {"version": -1, "chain": "", "states": {}}
        self.version, self._chain, self._newest = known["version"], known["chain"], dict(known["states"])

    @property
    def record(self) -> dict[str, Any]:
        """JSON."""
        return {"version": self.version, "chain": self._chain, "states": self._newest}

    @property
    def digest(self) -> str:
        """SHA-256 (hex)."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    def follow(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Take note of an entry, with its ``arrays`` as they travel; of one that is known already, nothing.

        Raises ValueError where one before it is missing and counts.
        """
        if version <= self.version:
            return
        if self.span is None and version != self.version + 1:
            raise ValueError(f"entry {version} does not follow entry {self.version}")
        added = {name: value for name, value in arrays.items() if name.removesuffix(SCALES) not in self._states}
        self._newest |= {name: digest({name: value}) for name, value in arrays.items() if name not in added}
        if self.span is None:
            self._chain = hashlib.sha256(f"{self._chain}:{version}:{digest(added)}".encode()).hexdigest()
        self.version = version
