"""``fedkrso privacy``: what each party saw in a run, what was guaranteed, what went in clear, what is not covered.

All of it is read from the run's folder, also of an interrupted run.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fedkrso_app.core.accounting import shown
from fedkrso_app.records.protocol import EVALUATE
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.privacy import ROW, SEEDED, noise_of, openings, sums_of
from fedkrso_app.runs.results import measures

_SILENT = ("name", "assumptions", "broken")


def facts(run: Run) -> dict[str, Any]:
    """Everything that ``fedkrso privacy`` says, as JSON would hold it. Raises :class:`ConfigError` where ``run`` is no
    run's folder."""
    settings, rounds = run.info["config"], [line for line in run.metrics() if line["round"]]
    sums, noise = sums_of(run, rounds), noise_of(run, rounds)
    covered = noise and not noise["broken"]
    return {
        "run": str(run.path),
        "status": run.status,
        "strategy": settings["strategy"],
        "rounds": len(rounds),
        "summary": _summary(sums, noise, rounds, settings),
        "saw": {
            "server": [*_server(run, sums, noise, rounds), *(_alone(settings, rounds) if sums and not covered else [])],
            "other nodes": _nodes(settings, noise, rounds),
            "network": [
                "Without TLS: all that the server and the nodes see. With TLS: sizes and times of messages. This "
                "folder does not record which it was."
            ],
            "readers of the model": [
                "The weights after the last round; whoever has this folder's ledger/, the mean of every round as well."
                + (" Both are covered by epsilon." if covered else "")
            ],
        },
        "guarantees": [each for each in (noise, sums) if each],
        "clear": list(_clear(run, sums, noise, rounds)),
        "not_covered": list(_not_covered(settings, noise)),
    }


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The same for a reader."""
    yield f"{facts['run']}: {facts['status']}, {facts['strategy']}, {facts['rounds']} rounds"
    yield f"\n{facts['summary']}"
    yield "\nWho saw what"
    yield from (f"- {who}: {what}" for who, seen in facts["saw"].items() for what in seen)
    for each in facts["guarantees"]:
        yield f"\nGuarantee: {each['name']}"
        known = {key: value for key, value in each.items() if key not in _SILENT}
        yield from (f"- {key.replace('_', ' ')}: {_shown(value, key)}" for key, value in known.items())
        yield from (f"- assumed: {assumption}" for assumption in each["assumptions"])
    yield "\nIn clear: what the server learns beside updates"
    yield from (f"- {each}" for each in facts["clear"])
    yield "\nNot covered by any guarantee"
    yield from (f"- {each}" for each in facts["not_covered"])


def _shown(value: Any, of: str) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(each, of)}" for key, each in value.items())
    if of in ("epsilon_spent", "epsilon_by_round"):
        return shown(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)


def _summary(
    sums: Mapping[str, Any] | None, noise: Mapping[str, Any] | None, rounds: list[dict[str, Any]], settings: Any
) -> str:
    if not rounds:
        return "No round is recorded: this folder cannot say what was sent."
    parts = []
    if noise and noise["broken"]:
        parts.append(f"NOT PRIVATE: noise was added, but {SEEDED}.")
    elif noise:
        parts.append(
            f"For {noise['unit']} epsilon is {shown(noise['epsilon_spent'])} at delta = {noise['delta']:g}, against "
            f"{noise['against']}."
        )
    elif settings.get("privacy.unit", "none") != "none":
        parts.append(f"privacy.unit = {settings['privacy.unit']!r} left no trace of noise: it has protected nothing.")
    if sums:
        parts.append(
            f"The server saw no update alone, but sums of {sums['partitions_in_smallest_sum']} partitions or more."
        )
    if not noise and sums:
        parts.append("Nothing bounds what sums and model tell about a training row.")
    if not noise and not sums:
        parts.append(
            "Nothing is protected: the server could read the update of every client in every round, and nothing bounds "
            "what updates and model tell about a training row."
        )
    return " ".join(parts)


def _server(run: Run, sums: Any, noise: Any, rounds: list[dict[str, Any]]) -> list[str]:
    replies, unit = sum(line["clients"] for line in rounds), noise and noise["unit"]
    size = f"{measures(run)['uplink_mb']:.3f} MB each"
    if sums:
        return [
            f"{sums['rounds_opened']} sums of updates, each of {sums['partitions_in_smallest_sum']} partitions or more."
        ]
    if unit == ROW:
        what = "with noise for every row in it" + (", which it can subtract" if noise["broken"] else "")
    else:
        bare = "as they are: labels and words behind them can be inferred, see docs/privacy.md"
        what = "before it added noise" if noise else bare
    return [f"{replies} updates of single clients ({size}), {what}."]


def _nodes(settings: Mapping[str, Any], noise: Any, rounds: list[dict[str, Any]]) -> list[str]:
    """What everyone who takes part receives."""
    counts = [line["clients"] for line in rounds if line["clients"]]
    if not counts:
        return ["No mean was published."]
    covered = noise and not noise["broken"]
    size = f"{min(counts)}" + (f" to {max(counts)}" if min(counts) < max(counts) else "")
    found = [f"The mean of each round, of {size} clients" + (", with noise." if noise else ".")]
    if min(counts) == 1 and not covered:
        found.append("A mean of one client is its update.")
    if 2 in counts and not covered:
        found.append("Of two clients each can subtract its own update and has the other's.")
    return [*found, *([] if covered else _alone(settings, rounds))]


def _alone(settings: Mapping[str, Any], rounds: list[dict[str, Any]]) -> list[str]:
    """Where FedKRSO's clients draw seeds by themselves, sums and means along a seed may be of one client."""
    counts = [line["clients"] for line in rounds if line["clients"]]
    if settings["strategy"] != "fedkrso" or settings.get("fedkrso.draw", "own") != "own" or not counts:
        return []
    K, n = settings["fedkrso.num-seeds"], min(counts)
    drawn = 1 - (1 - 1 / K) ** math.ceil(settings["local-steps"] / settings["fedkrso.interval"])
    lone = K * n * drawn * (1 - drawn) ** (n - 1)
    return [
        f"About {lone:.1f} of {K} seeds per round are drawn by one of {n} clients alone,"
        " and everybody can tell which: sum and mean along such a seed are that client's own accumulator. "
        "fedkrso.draw = 'each' avoids it."
    ]


def _clear(run: Run, sums: Any, noise: Any, rounds: list[dict[str, Any]]) -> Iterator[str]:
    """What the server learns beside updates, of each client and round."""
    settings = run.info["config"]
    by_row = bool(noise) and noise["unit"] == ROW
    yield "who was asked, who took part, when each reply came, and its size"
    if not sums:
        yield "the number of the client's training rows"
        if settings["strategy"] == "fedkrso":
            yield "which seeds it drew (from the run's seed: nothing of its data)"
    if not by_row and any(line["train_loss"] is not None for line in rounds):
        yield "the mean training loss over all clients" if sums else "its training loss"
    yield "seconds of training" + (", up to the next 10" if by_row or sums else " and peak memory")
    if by_row:
        yield "its epsilon, rounded up to 0.1: a hint at the number of its rows"
    if settings.get("evaluate") == "clients":
        yield from _judged(run, sums)
    if settings.get("client-metrics"):
        yield "client-metrics = true: these figures of every client are in metrics.jsonl"
    yield "texts of errors, which may quote a cell or a path, from nodes without a data-dir of their own"


def _judged(run: Run, sums: Any) -> Iterator[str]:
    what = "counts of right and wrong answers by class, or a sum of losses"
    if not sums:
        yield f"how its validation rows were judged: {what}"
    elif opened := [tuple(line["partitions"]) for line in openings(run, EVALUATE)]:
        yield (
            f"{len(opened)} sums of how validation rows were judged, each of {min(map(len, opened))} partitions or "
            f"more: {what}"
        )
        if (sets := len(set(opened))) > 1:
            yield (
                f"these sums are over {sets} different sets of nodes: where two sets differ in one node, their "
                "difference is its number of validation rows, of each label too where the metric counts them, and "
                "nearly how its rows were judged"
            )


def _not_covered(settings: Mapping[str, Any], noise: Any) -> Iterator[str]:
    if settings.get("evaluate") != "off":
        whose = "the clients'" if settings.get("evaluate") == "clients" else "the server's"
        yield f"the metric of each round, computed on {whose} validation rows"
    yield "the choice of settings: every run that was made to choose them has told something of its own"
    yield "other runs on the same data" + (
        ": each spends its own epsilon; a node bounds the sum by max-epsilon in its node config" if noise else ""
    )
    yield "the app's code: it comes with the run, and whoever writes it can send anything"
