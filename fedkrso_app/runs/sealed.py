"""What secure sums cost, and how much they hide, from shapes alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedkrso_app.core import shamir
from fedkrso_app.federation.layout import Layout
from fedkrso_app.federation.masked import check_nodes
from fedkrso_app.federation.nodes import sampled
from fedkrso_app.federation.opening import Opening
from fedkrso_app.federation.sealing import CHECK, bundle_size
from fedkrso_app.records import wire
from fedkrso_app.records.protocol import Status
from fedkrso_app.records.sealed import KEY, ROSTER, SESSION, TAIL, Party, Roster, Sealed, Shares, Unmask
from fedkrso_app.strategies.base import Method


def with_masks(costs: Mapping[str, float], method: Method, clients: int, tally: int) -> dict[str, Any]:
    """The ``costs`` of a plan's row, per client, with sealed replies in the place of those in clear. ``tally``: the
    length of that of an evaluation, where clients judge. Nobody is missing. Raises ConfigError where a round has too
    few nodes.
    """
    config, each = method.config, method.config.clients_per_node
    asked = sampled(config.fraction_train, clients)
    n = max(1, round(asked / each))
    t = check_nodes(n, config, about=f"{clients} clients, {each} per node, are {n} of them")
    sealed, opening = _of_a_node(method, n, t, tally)
    up, down = sealed / each, costs["down"] + opening / each
    # By colluding nodes, the honest ones in the smallest sum that a lying server can open.
    honest = {c: shamir.honest(n, t, c) for c in sorted({0, 1, n // 3})}
    masks = {"nodes": n, "threshold": t, "missing": n - t, "honest": honest}
    return {**costs, "up": up, "down": down, "run": config.num_server_rounds * asked * (up + down), "masks": masks}


def _of_a_node(method: Method, n: int, t: int, tally: int) -> tuple[float, int]:
    """Bytes per node and round, of ``n`` of which ``t`` open a sum: up in sealed replies and for the openings, and down
    in rosters and for the openings."""
    each = method.config.clients_per_node
    parties = tuple(Party(2**60 + i, tuple(range(i * each, (i + 1) * each)), _own(i, KEY)) for i in range(n))
    roster = Roster(bytes(SESSION), parties, t)
    layouts = [Layout(method, 1, instructions, roster.partitions) for instructions in method.turns()]
    words = sum(layout.size for layout in layouts) / len(layouts)
    bundles = [_own(i, bundle_size(n)) for i in range(n)]
    one = Sealed(np.zeros(1, layouts[0].dtype), np.zeros(TAIL, "<u8"), bundles, bytes(CHECK * n), bytes(SESSION), 10)
    reply = wire.measured_bytes(RecordDict({"status": Status(1).record(), **one.records()}))
    opening = Opening(n, t, b"", dict.fromkeys(range(n), b""))
    answer = wire.measured_bytes(Shares(bytes(SESSION), [_own(i, opening.size) for i in range(n)]).content())
    sums = 2 if tally else 1
    vectors = words * layouts[0].dtype.itemsize + 8 * tally
    down = wire.measured_bytes(RecordDict({ROSTER: roster.record()})) - wire.measured_bytes(RecordDict())
    down += wire.measured_bytes(Unmask(bytes(SESSION), list(range(n)), bundles).content())
    shares = answer * t / n  # t answers open
    return sums * (reply + shares - layouts[0].dtype.itemsize) + vectors, sums * down


def _own(i: int, size: int) -> bytes:
    """Bytes that are no one else's, since records are counted once."""
    return i.to_bytes(4) + bytes(size - 4)
