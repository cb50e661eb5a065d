"""What a run has guaranteed, under which assumptions, and how much of ε it has spent: read from the run's folder.

config.json has the settings, metrics.jsonl the rounds, ``privacy.jsonl`` what a server that adds noise wrote down
before it released a sum, and ``openings.jsonl`` which sums nodes were asked to open. A guarantee is stated only where
the run has left a trace of it: settings alone protect nothing.
"""

import json
from typing import Any

from fedkrso_app.config import ConfigError
from fedkrso_app.core.accounting import shown
from fedkrso_app.core.shamir import honest, usual_threshold
from fedkrso_app.federation.spending import Spending
from fedkrso_app.records.protocol import TRAIN
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.results import asked_in

ROW = "one training row"
NOT_PRIVATE = "seed: NOT PRIVATE"
SEEDED = "the noise follows from the run's seed, so whoever knows the settings can subtract it"


def epsilons(run: Run) -> dict[int, float]:
    """ε after each round, of a run with differential privacy: by the server's log of spending where there is one, else
    as the nodes told it. Empty for other runs."""
    if (run.path / "privacy.jsonl").is_file():
        return _spent(run, float(run.info["config"]["privacy.delta"]))
    return {line["round"]: line["epsilon"] for line in run.metrics() if line["round"] and "epsilon" in line}


def sentence(run: Run, round: int) -> str:
    """For a model card: what protects the data behind the model after ``round``; "" where nothing was asked for."""
    settings = run.info["config"]
    so_far = [value for number, value in epsilons(run).items() if number <= round]
    if settings.get("privacy.unit", "none") == "none" or not so_far:
        return ""
    unit = "each training row" if settings["privacy.unit"] == "example" else "all data of each client"
    if settings["privacy.randomness"] == "seed":
        return f"none: {SEEDED}"
    return f"ε = {shown(so_far[-1])} at δ = {settings['privacy.delta']:g} for {unit}; the metric above is not covered"


def noise_of(run: Run, rounds: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The guarantee of differential privacy; None where no noise was ever added."""
    settings = run.info["config"]
    unit, by_round = settings.get("privacy.unit", "none"), epsilons(run)
    if unit == "none" or not by_round:
        return None
    delta, most = float(settings["privacy.delta"]), float(settings["privacy.max-epsilon"])
    spent, seeded = max(by_round.values()), settings["privacy.randomness"] == "seed"
    common = {
        "clip": settings["privacy.clip"],
        "noise": settings["privacy.noise"],
        "delta": delta,
        "epsilon_spent": spent,
        "epsilon_left": max(0.0, most - spent) if most else None,
        "epsilon_by_round": {str(number): value for number, value in by_round.items()},
        "randomness": NOT_PRIVATE if seeded else "os",
        "broken": seeded,
    }
    if unit == "client":
        return {
            "name": "differential privacy for each client",
            "unit": "all data of one client",
            "adjacency": "one client's update replaced by zero; that it took part is public",
            "against": "readers of the model and the ledger, and other nodes; not the server, which adds the noise",
            **common,
            "sampling": "none: the draw of clients follows from the public seed (q = 1)",
            "accountant": "closed form of the Gaussian",
            "assumptions": [
                "the server adds the noise and keeps single updates to itself",
                "clients are different people or institutions",
                *_randomness(seeded),
            ],
        }
    B = settings["batch-size"] * settings["gradient-accumulation"]
    lost = sum(asked_in(line) - line["clients"] for line in rounds)
    ended = run.status == "completed"
    return {
        "name": "differential privacy for each example",
        "unit": ROW,
        "adjacency": "one row more or less",
        "against": "the server, other nodes, the network and readers of the model: the noise is added at the node",
        **common,
        "sampling": f"Poisson in each of {settings['local-steps']} steps per round: q = {B} / the client's rows",
        "accountant": f"PLD of dp-accounting {run.info['libraries'].get('dp-accounting', '(version not recorded)')}; "
        "closed form where q = 1",
        "assumptions": [
            "each node runs this app's code and keeps its coins and noise to itself",
            "a person has one row, and at one node only: k rows have about k times epsilon",
            "epsilon is the largest that a client told, rounded up to 0.1; each has its own, by how many rows it holds",
            *([f"{lost} replies did not count: their nodes have spent as well, see their own books"] if lost else []),
            *([] if ended else ["a round that was under way when the run stopped is in the nodes' books, not here"]),
            *_randomness(seeded),
        ],
    }


def _randomness(seeded: bool) -> list[str]:
    return [f"BROKEN: {SEEDED}"] if seeded else ["the operating system's random numbers are secret"]


def sums_of(run: Run, rounds: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The guarantee of secure sums; None where no sum was ever opened."""
    settings, opened = run.info["config"], openings(run, TRAIN)
    if not settings.get("secure-aggregation") or not opened:
        return None
    versions = {line["round"]: line["version"] for line in run.metrics()}
    published = {number for number in versions if number and versions[number] > versions.get(number - 1, -1)}
    asked, sizes = {each["round"] for each in opened}, [len(each["partitions"]) for each in opened]
    n = max((asked_in(line) for line in rounds), default=0) if settings.get("clients-per-node") == 1 else 0
    t = settings["secagg.threshold"] or usual_threshold(n)
    return {
        "name": "secure sums",
        "unit": "the update of one node",
        "against": "the server's operator, its logs and disks, and the network: they see sums only",
        "bits": settings["secagg.bits"],
        "threshold": t if n else settings["secagg.threshold"] or None,
        "min_cohort": settings["secagg.min-cohort"],
        "nodes": n or None,
        "may_be_missing": n - t if n else None,
        "smallest_group": {str(c): honest(n, t, c) for c in dict.fromkeys((0, 1, n // 3))} if n else None,
        "partitions_in_smallest_sum": min(sizes),
        "rounds_opened": len(asked),
        "rounds_opened_without_result": sorted(asked - published),
        "rounds_not_opened": sorted({line["round"] for line in rounds} - asked),
        "keys": "this folder does not record whether they were signed; the server's log warns where they were not",
        "assumptions": [
            "nodes are different parties; in a simulation they are one process, and masks test the code only",
            "against a server that makes up nodes: every node names its peers, and their keys are signed",
            "no second run with the same seed and model: it repeats every update, and two sums can differ in one node",
        ],
    }


def openings(run: Run, kind: str) -> list[dict[str, Any]]:
    """The sums that were opened, or about to be: of updates ("train") or of tallies ("evaluate")."""
    return [line for line in _events(run, "openings.jsonl") if line.get("kind", TRAIN) == kind]


def _events(run: Run, name: str) -> list[dict[str, Any]]:
    """The lines of a log of the run; a last line that was cut short was never acted on."""
    file, found = run.path / name, []
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ConfigError(f"{file}, line {number} cannot be read: restore it from a copy.") from None
    return found


def _spent(run: Run, delta: float) -> dict[int, float]:
    """ε after each round of the client that was asked most; a round that was done again is paid for twice."""
    log, spent = Spending(run.path / "privacy.jsonl", delta), {}
    releases, log.releases = log.releases, []
    for release in releases:
        log.releases.append(release)
        spent[release.round] = log.epsilon()
    return spent
