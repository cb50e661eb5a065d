"""The attacks of benchmarks/ on tiny models: they find what is in clear, less in sums, and no more than ε allows."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks import attacks, audit
from fedkrso_app import data
from fedkrso_app.core.projection import projection
from fedkrso_app.core.subspace import matrix
from fedkrso_app.runs.compare import settings
from fedkrso_app.strategies import make, parse
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes


@pytest.fixture
def changes(run_config) -> list[str]:
    return [f"{key}={run_config[key]!r}" for key in ("model", "data-dir", "task")]


def test_the_word_of_an_update_is_found_and_a_sum_does_not_say_whose_it_is(changes):
    rows = {row["seen"]: row for row in attacks.tokens(8, changes)}
    assert rows["fedfft: one update"]["first"] == 1
    assert rows["fedfft: sum of 5, anybody's"]["first"] == 1  # that somebody has it is in the sum
    for strategy in ("fedfft", "fedkrso"):
        assert rows[f"{strategy}: sum of 5, a member's"]["first"] < 0.6


def test_accumulators_of_plain_steps_leave_no_residual_for_their_own_word(changes):
    """B = Σ_τ dY_τ (P x_τ)ᵀ with any dY; x_τ by the model's own forward pass, one word at a time."""
    config = parse(settings(None, ["fedkrso.num-seeds=1", *changes]))
    loaded = model.of_run(config, data.resolve(config))
    words, word, generator = list(range(5, 45)), 17, torch.Generator().manual_seed(0)
    seed, blocks, given = int(make(config, Shapes.of(loaded)).pool(1)[0]), [], {}
    for name, layer in loaded.targets.items():
        layer.register_forward_hook(lambda _, x, y, name=name: given.__setitem__(name, x[0][0]))
    with torch.no_grad():
        loaded.module.eval()(**attacks.word_batch(loaded, word))
        for name, x in {name: given[name] for name in loaded.targets}.items():
            P = torch.from_numpy(projection(seed, name, 4, x.shape[1], "gaussian"))
            dY = torch.randn(3, matrix(loaded.targets[name]).shape[0], generator=generator)
            blocks.append((dY.T @ (x @ P.T)).flatten())
    scores = attacks.residual_scores(loaded, config, words)({"accumulators": torch.cat(blocks).numpy()[None]})
    assert words[int(scores.argmax())] == word and scores.max() > -1e-6 > -1e-2 > np.sort(scores)[-2]


def test_a_sum_is_that_of_its_members():
    updates = [{"x": np.full(3, float(i))} for i in range(4)]
    assert [total["x"][0] for total in attacks.sums(updates, [[0, 3], [1, 2, 3]])] == [3.0, 6.0]


def test_a_line_through_the_others_finds_shares_that_are_on_one():
    x = np.linspace(-1, 1, 9)
    row = attacks.line("", x, 0.5 + 0.4 * x)
    assert row["ρ"] == pytest.approx(1) and row["error"] < 1e-9 < 0.1 < row["guess"]


def test_what_a_canary_proves_is_below_the_stated_epsilon_and_above_it_without_noise():
    """The loop of example-level DP itself: clip, coins, noise, and what it is divided by."""
    noisy, bare = audit.canary(60, deviation=2.0, batches=[audit.TOYS + 1])
    assert bare["hits"] == bare["trials"] and bare["alarms"] == 0
    assert noisy["proven"] <= noisy["stated"] < bare["proven"]


def test_intervals_are_those_of_scipy_and_auc_is_mann_whitneys():
    for hits, trials in ((0, 20), (3, 20), (20, 20)):
        exact = scipy.stats.binomtest(hits, trials).proportion_ci(0.95, "exact")
        assert audit.interval(hits, trials) == pytest.approx((exact.low, exact.high))
    rng = np.random.default_rng(0)
    members, others = rng.normal(0, 1, 30), rng.normal(0.7, 1, 50)
    pairs = np.mean([[m < o for o in others] for m in members])
    row = audit.judged([(members, others), (others, members)])
    assert row["AUC"] == pytest.approx(0.5) and row["sd"] == pytest.approx(abs(pairs - 0.5) * math.sqrt(2))
    assert audit.allowed(math.inf, 1e-5) == 1.0


def test_what_shadow_runs_say_of_a_row_is_taken_off_and_never_by_a_run_that_trained_on_it():
    hard = np.array([5.0, 0.0, 3.0])  # what each row costs whoever has not trained on it
    drawn = [np.array([0]), np.array([1]), np.array([0, 1]), np.array([], int)]
    every = [hard.copy() for _ in drawn]
    for losses, own in zip(every, drawn, strict=True):
        losses[own] -= 2
    found = audit.calibrated(every, drawn)
    assert [losses.tolist() for losses in found] == [[-2, 0, 0], [0, -2, 0], [-2, -2, 0], [0, 0, 0]]
