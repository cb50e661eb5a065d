"""Attacks on what differential privacy bounds, and whether its bound holds.

    python -m benchmarks.audit [membership] [canary] [--shadows 8] [--trials 1000] [--json]

membership  Whether a row was trained on, by its loss under the final model of a run: FedKRSO on the embedded task, four
            clients of 64 rows, each of the ``--shadows`` runs with other rows; against the validation rows. "AUC": mean
            and standard deviation over the runs. "TPR": members of all runs found where the false-positive rate is
            0.05, with its 95 % interval (Clopper and Pearson); "bound": what (ε, δ) allows, e^ε · FPR + δ. "against
            the others": an attacker who has the other runs subtracts the mean loss that the row has in those that
            did not train on it (Watson et al. 2021, arXiv:2111.08440). With its progress on stderr.
canary      Runs of one step of the training loop of example-level DP, on eight rows with and without one more, whose
            gradient is along a coordinate of its own; the attacker looks at that coordinate. "proven": the lower bound
            on ε that his hits and false alarms give, at 95 %; "stated": the accountant's. The last row of a pair adds
            no noise: an attack that finds nothing there would prove nothing.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from scipy.stats import beta, rankdata
from torch import Tensor, nn

from benchmarks.models import show
from fedkrso_app import client_app, data, server_app
from fedkrso_app.config import Config
from fedkrso_app.core.accounting import Releases, epsilon, noise_for
from fedkrso_app.core.noise import NoiseStream, fresh_key
from fedkrso_app.data.batching import batch
from fedkrso_app.data.embedded import pretraining
from fedkrso_app.federation.local import LocalGrid, play
from fedkrso_app.runs import replay
from fedkrso_app.runs.compare import settings
from fedkrso_app.strategies import parse
from fedkrso_app.training import model, per_example
from fedkrso_app.training.loop import Session
from fedkrso_app.training.per_example import Mechanism

Row = dict[str, Any]
FPR = 0.05
DELTA = 1e-5
ROWS, CLIENTS, ROUNDS, STEPS, BATCH = 64, 4, 4, 40, 16
NAMES = ("no", "yes")
TOYS = 8  # rows of a canary's run


def interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Of a share, by Clopper and Pearson (1934)."""
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, hits, trials - hits + 1) if hits else 0.0
    high = beta.ppf(1 - tail, hits + 1, trials - hits) if hits < trials else 1.0
    return float(low), float(high)


# Membership


def membership(shadows: int) -> list[Row]:
    """``shadows`` runs without noise, and as many at ε = 3."""
    delta = 1e-3  # below 1 / 64
    task = data.resolve(parse(settings(None, [])))
    rows, count = data.load(task, "", "train"), ROWS * CLIENTS
    drawn = [np.random.default_rng(number).permutation(len(rows))[:count] for number in range(shadows)]
    found = []
    for target in (math.inf, 3.0):
        private: dict[str, Any] = {}
        if target < math.inf:
            noise = noise_for(target, delta, BATCH / ROWS, ROUNDS * STEPS)
            private = {"privacy.unit": "example", "privacy.clip": 1.0, "privacy.noise": noise, "privacy.delta": delta}
        every = []  # of each run the losses of all training rows, then of the others
        for number, own in enumerate(drawn):
            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                changes = [f"{key}={value!r}" for key, value in private.items()]
                every.append(losses(number, rows.select(own), changes, Path(folder)))
            told = f"ε = {target:g}: run {number + 1} of {shadows}, {time.process_time() - began:.0f} CPU seconds"
            auc = judged([(every[-1][own], every[-1][len(rows) :])])["AUC"]
            print(f"{told}, AUC by loss {auc:.3f}", file=sys.stderr, flush=True)
        bound = allowed(target, delta)
        scores = {"loss": every, "against the others": calibrated(every, drawn)} if shadows > 1 else {"loss": every}
        for by, values in scores.items():
            each = [(one[own], one[len(rows) :]) for one, own in zip(values, drawn, strict=True)]
            found.append({"ε": target, "by": by, **judged(each), "bound": bound})
    return found


def calibrated(every: Sequence[np.ndarray], drawn: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each run's losses less the mean of those that a row has in the other runs that did not train on it (all of them,
    where all did)."""
    losses, outside = np.stack(every), np.ones((len(every), every[0].size))
    for i, own in enumerate(drawn):
        outside[i, own] = 0
    found = []
    for i in range(len(every)):
        weights = outside.copy()
        weights[i] = 0
        weights[:, weights.sum(0) == 0] = 1.0
        found.append(losses[i] - (losses * weights).sum(0) / weights.sum(0))
    return found


def allowed(target: float, delta: float) -> float:
    return min(1.0, math.exp(min(target, 50.0)) * FPR + delta)


def judged(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Row:
    """How well low scores tell members from others in each of the ``runs``: AUC over them, and the members found in all
    at the false-positive rate."""
    aucs, hits, rows = [], 0, 0
    for members, others in runs:
        ranks = rankdata(np.concatenate([members, others]))
        aucs.append(1 - (ranks[: len(members)].sum() / len(members) - (len(members) + 1) / 2) / len(others))
        hits, rows = hits + int((members < np.quantile(others, FPR)).sum()), rows + len(members)
    low, high = interval(hits, rows)
    spread = float(np.std(aucs, ddof=1)) if len(aucs) > 1 else math.nan
    told = {"runs": len(aucs), "rows": rows, "AUC": float(np.mean(aucs)), "sd": spread}
    return told | {"TPR": hits / rows, "low": low, "high": high}


def losses(number: int, members: datasets.Dataset, changes: Sequence[str], folder: Path) -> np.ndarray:
    """The final model's loss, after run ``number`` on these ``members``, on each training row of the task and then on
    each validation row, which no run trains on."""
    task = data.resolve(parse(settings(None, [])))
    (folder / "data").mkdir(parents=True)
    for split, rows in {"train": members, "validation": data.load(task, "", "validation")}.items():
        named = {"text": rows["sentence"], "label": [NAMES[label] for label in rows["label"]]}
        datasets.Dataset.from_dict(named).to_parquet(folder / "data" / f"{split}.parquet")
    of_run = [
        f"model='{pretraining.model_path()}'", "task='text-classification'", f"data-dir='{folder / 'data'}'",
        f"labels='{','.join(NAMES)}'", f"output-dir='{folder}'", "run-name='run'", "evaluate='off'",
        f"seed={number}", f"num-server-rounds={ROUNDS}", f"local-steps={STEPS}", f"batch-size={BATCH}",
    ]  # fmt: skip
    given = settings(None, [*of_run, *changes])
    play(server_app.app, LocalGrid(client_app.app, given, CLIENTS), given)
    run, entries = replay.opened(folder / "run")
    loaded, state = replay.replayed(run, entries, entries.version)
    loaded.module.load_state_dict(state)
    return np.concatenate([row_losses(loaded, data.load(task, "", split), task) for split in ("train", "validation")])


@torch.no_grad()
def row_losses(loaded: model.LoadedModel, rows: Any, task: data.Task) -> np.ndarray:
    found = []
    for start in range(0, len(rows), 64):
        chosen = batch(rows, np.arange(start, min(start + 64, len(rows))), task, loaded.tokenizer, 128)
        found.append(per_example.row_losses(loaded.module.eval(), chosen, None).numpy())
    return np.concatenate(found)


# A canary


class Toy(nn.Module):
    """Features -> logits of two labels, as the loops call a model."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.out(features))


def seen(canary: bool, noise: float, drawn: int, config: Config) -> float:
    """What the attacker looks at after one run of one step: how far the canary's coordinate moved, in clips. ``drawn``:
    the mean number of rows in a step."""
    module, rows = Toy(), TOYS + canary
    features = torch.zeros(rows, 4)
    features[:TOYS, :3] = torch.eye(3)[torch.arange(TOYS) % 3]
    if canary:
        features[TOYS, 3] = 100.0  # its gradient is far above the clip
    labels = torch.arange(rows) % 2
    labels[TOYS:] = 0

    def read(chosen: np.ndarray) -> dict[str, Tensor]:
        return {"features": features[chosen], "labels": labels[chosen]}

    session = Session([torch.optim.SGD(module.parameters(), lr=1.0)], dict, constant_rate=True)
    mechanism = Mechanism(rows, drawn, 1.0, noise, NoiseStream(fresh_key()))
    per_example.train(module, read, session, config, np.random.default_rng(0), mechanism)
    moved = module.out.weight.detach()[:, 3] * mechanism.rate * rows  # row 0 rises by C/√2, row 1 falls by as much
    return float(moved[0] - moved[1]) / math.sqrt(2)


def canary(trials: int, deviation: float = 1.0, batches: Sequence[int] = (TOYS + 1, 2)) -> list[Row]:
    """``trials`` runs with it and without, for each mean number of rows in a step."""
    config, found = parse(settings(None, ["local-steps=1", "fedkrso.interval=1"])), []
    for drawn in batches:
        rate = min(1.0, drawn / TOYS)
        stated = epsilon([Releases(deviation, rate, 1)], DELTA)
        for noise in (deviation, 0.0):
            with_it, without = ([seen(there, noise, drawn, config) for _ in range(trials)] for there in (True, False))
            cut = 2 * noise or 0.5  # known before: the intervals below are of one test
            hits, alarms = (sum(value > cut for value in values) for values in (with_it, without))
            found.append(
                {"rate": rate, "noise": noise, "hits": hits, "alarms": alarms, "trials": trials,
                 "proven": proven(hits, alarms, trials), "stated": stated}
            )  # fmt: skip
    return found


def proven(hits: int, alarms: int, trials: int) -> float:
    """The ε that an (ε, δ) mechanism has at least, at 95 %, where ``hits`` and ``alarms`` were seen."""
    tpr, fpr = interval(hits, trials)[0], interval(alarms, trials)[1]
    return max(0.0, math.log((tpr - DELTA) / fpr)) if tpr > DELTA else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["canary", "membership"], help="canary, membership")
    parser.add_argument("--shadows", type=int, default=8, help="runs of membership for each ε")
    parser.add_argument("--trials", type=int, default=1000, help="runs with and without the canary")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    torch.set_num_threads(1)
    for name in a.parts:
        show(name, canary(a.trials) if name == "canary" else membership(a.shadows), a.json)


if __name__ == "__main__":
    main()
