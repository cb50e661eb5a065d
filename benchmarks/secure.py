"""Secure sums: bytes and CPU seconds of one round at a node and at the server, over nodes and values.

    python -m benchmarks.secure [--nodes 3 10 100] [--values 100000 1255682 3909890] [--bits 64 32 16] [--json]

3,909,890 values are FedKRSO's at RoBERTa-base, K = 10 and r = 4, 1,255,682 those of FedIT. Times are of one thread:

seal      a node: masks for every other node, shares of all secrets, encryption; training apart
add       the server: one node's vector
answer    a node: its shares for the opening
open      the server, everybody there: the secrets from t answers, checks, keystreams taken off
lossy     the same with as many nodes lost after sealing as the threshold allows

"up" has the words, shares and answer of one node, "opening" what the server sends it to open. A round of more than 128
nodes is refused.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import RecordDict

from benchmarks.models import show
from fedkrso_app.core import ring, shamir
from fedkrso_app.federation import sealing
from fedkrso_app.federation.opening import Opening
from fedkrso_app.records import wire
from fedkrso_app.records.sealed import SESSION, TAIL, Party, Roster, Sealed, Shares, Unmask


class Round:
    """``n`` nodes that have sealed; the vectors of all but the first are of one word."""

    def __init__(self, n: int) -> None:
        self.keys = [sealing.new_key() for _ in range(n)]
        parties = tuple(Party(2**60 + i, (i,), sealing.public(key)) for i, key in enumerate(self.keys))
        self.roster = Roster(os.urandom(SESSION), parties, shamir.usual_threshold(n))
        self.ctx = sealing.context(self.roster, 1)
        self.sealed = [self.seal(u, 1, 64) for u in range(n)]

    def seal(self, u: int, values: int, bits: int) -> Sealed:
        vector, tail = np.zeros(values, ring.word(bits)), np.zeros(TAIL, "<u8")
        return sealing.seal(vector, tail, self.keys[u], u, self.roster, self.ctx)

    def answer(self, w: int, survivors: list[int]) -> list[bytes]:
        bundles = {u: self.sealed[u].bundles[w] for u in survivors}
        return sealing.answer(survivors, bundles, self.keys[w], w, self.roster.keys, self.ctx)

    def opening(self, lost: int) -> tuple[Opening, dict[int, list[bytes]]]:
        """With the first nodes lost; and the answers of the rest."""
        survivors = list(range(lost, len(self.keys)))
        checks = {u: self.sealed[u].checks for u in survivors}
        opening = Opening(len(self.keys), self.roster.threshold, self.ctx, checks)
        return opening, {w: self.answer(w, survivors) for w in survivors[: self.roster.threshold]}


def rows(nodes: list[int], values: list[int], bits: list[int]) -> list[dict[str, Any]]:
    """One row per setting."""
    table = []
    for n in nodes:
        made = Round(n)
        everybody, answers = made.opening(0)
        lossy, some = made.opening(n - made.roster.threshold)
        answer = _seconds(lambda made=made, n=n: made.answer(0, list(range(n))))
        shares = Shares(bytes(SESSION), answers[0]).content()
        question = Unmask(bytes(SESSION), list(range(n)), made.sealed[0].bundles).content()
        for count in values:
            for width in bits:
                sealed, total = made.seal(0, count, width), np.zeros(count, ring.word(width))
                up = wire.measured_bytes(RecordDict(sealed.records())) + wire.measured_bytes(shares)
                row = {"nodes": n, "threshold": made.roster.threshold, "values": count, "bits": width}
                row |= {"MB up": up / 1e6, "kB opening": wire.measured_bytes(question) / 1e3}
                row["seal s"] = _seconds(lambda made=made, count=count, width=width: made.seal(0, count, width))
                row["add s"] = _seconds(lambda total=total, sealed=sealed: np.add(total, sealed.vector, out=total))
                row["answer s"] = answer
                row["open s"], row["lossy s"] = _open(everybody, answers, total), _open(lossy, some, total)
                table.append(row)
    return table


def _open(opening: Opening, answers: dict[int, list[bytes]], total: np.ndarray) -> float:
    begun = time.process_time()
    fresh = Opening(opening.n, opening.threshold, opening.ctx, opening.checks)
    if not [fresh.add(w, answer) for w, answer in answers.items()][-1]:
        raise RuntimeError("the sum did not open")
    fresh.unmask(total, np.zeros(TAIL, "<u8"))
    return time.process_time() - begun


def _seconds(call: Callable[[], Any]) -> float:
    """The least of three, of this thread."""
    times = []
    for _ in range(3):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 10, 100])
    parser.add_argument("--values", type=int, nargs="+", default=[100_000, 1_255_682, 3_909_890])
    parser.add_argument("--bits", type=int, nargs="+", default=[64, 32, 16], choices=ring.BITS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    show("Secure sums, one thread", rows(a.nodes, a.values, a.bits), a.json)


if __name__ == "__main__":
    main()
