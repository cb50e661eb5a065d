"""Tallies under masks: the metric of the plain run, no client's own, and no version judged twice."""

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from helpers import MASKS, killed, play

from fedkrso_app.core import ring
from fedkrso_app.federation import round as rounds
from fedkrso_app.federation import tallies
from fedkrso_app.federation.sealed_sum import SealedSum
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.protocol import EVALUATE, TRAIN
from fedkrso_app.records.sealed import UNMASK
from fedkrso_app.runs.exposure import facts
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.plan import plan


@pytest.fixture
def settings(run_config) -> dict:
    """Two rounds of two steps, each along a seed of its own."""
    steps = {"num-server-rounds": 2, "local-steps": 2, "fedkrso.interval": 1}
    return run_config | steps | {"evaluate": "clients", "fedkrso.draw": "each", "fedkrso.num-seeds": 2}


def failing(node: int, kind: str, numbers: set[int]):
    """Prepares a grid whose ``node`` fails at these of the messages of ``kind`` that it gets, counted from 1."""

    def prepare(grid):
        answer, seen = grid.app, []

        def app(message, context):
            if message.metadata.message_type == kind and context.node_id == node:
                seen.append(1)
                if len(seen) in numbers:
                    return Message(Error(code=2, reason="broken"), reply_to=message)
            return answer(message, context)

        grid.app = app

    return prepare


def judged(run: Run) -> list[float | None]:
    return [line.get("metric") for line in run.metrics()[1:]]


# ── The same metric ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("strategy", "metric"), [("fedkrso", "accuracy"), ("fedsa-lora", "matthews")], ids=["shared", "personal"]
)
def test_the_metric_is_that_of_the_plain_run_on_nodes_of_two_partitions_in_any_order(settings, strategy, metric):
    settings |= {"strategy": strategy, "metric": metric, "partition": "dirichlet", "clients-per-node": 2}
    plain = play(settings | {"run-name": "plain"}, 6)
    sealed = play(settings | MASKS | {"run-name": "sealed"}, 6, order=lambda replies: replies[::-1], run_id=2)
    assert judged(sealed) == judged(plain) and None not in judged(plain)
    for a, b in zip(plain.metrics()[1:], sealed.metrics()[1:], strict=True):
        assert b["eval_loss"] == pytest.approx(a["eval_loss"], abs=1e-5)
        assert "client_metric" in a and "client_metric" not in b
    a, b = (Ledger(run.ledger).read(2).arrays for run in (plain, sealed))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_fresh_processes_with_heads_of_their_own_agree_and_the_log_says_what_sums_over_other_nodes_tell(
    settings, caplog
):
    settings |= {"client.head": "local", "fraction-train": 0.75}
    plain = play(settings | {"run-name": "plain"}, 4)
    sealed = play(settings | MASKS | {"run-name": "sealed"}, 4, run_id=2, devices=True)
    assert judged(sealed) == judged(plain) and None not in judged(plain)
    assert "sums of tallies over other nodes in each round tell how many validation rows a node has" in caplog.text


def test_sums_of_a_regression_and_of_losses_are_exact_to_a_step_and_counts_to_the_bit():
    rng = np.random.default_rng(0)
    each = [np.round(rng.normal(0, 100, 8), 3) for _ in range(5)]
    for tally in each:
        tally[1:3] = rng.integers(0, 2**30, 2)
    vector, tail = tallies.summed(iter(each))
    assert vector.dtype == ring.word(64) and ring.signed(tail).tolist() == [0, 0, 5]
    found, exact = ring.signed(vector) / tallies.STEPS, np.sum(each, axis=0)
    assert np.abs(found - exact).max() <= 5 * 0.5 / tallies.STEPS and (found[1:3] == exact[1:3]).all()
    with pytest.raises(OverflowError, match="too large to be added up under masks"):
        tallies.summed([np.full(8, 2.0**34)])


def test_without_a_node_that_is_not_judged_it_is_the_metric_of_the_others_and_a_silent_one_is_in_it(settings):
    """Four nodes, of which three open: 101 judges nothing in round 1, and 102 sends no shares of round 2's tallies."""
    plain = play(settings | {"run-name": "plain"}, 4, failing(101, EVALUATE, {1}))

    def prepare(grid):
        failing(101, EVALUATE, {1})(grid)
        failing(102, UNMASK, {4})(grid)

    sealed = play(settings | MASKS | {"run-name": "sealed"}, 4, prepare, run_id=2)
    assert judged(sealed) == judged(plain)


def test_a_sum_of_too_few_stays_closed_and_the_next_round_is_judged(settings, caplog):
    def prepare(grid):
        for node in (100, 103):
            failing(node, EVALUATE, {1})(grid)

    run = play(settings | MASKS, 4, prepare)
    first, second = judged(run)
    assert first is None and second is not None
    assert "The model is not judged in round 1: 2 sealed replies have come" in caplog.text
    assert [line["version"] for line in run.metrics()] == [0, 1, 2]


def test_those_judge_whose_updates_count(settings):
    """Of four nodes one does not train in round 1; the three others make a roster of their own, which opens."""
    run = play(settings | MASKS, 4, failing(100, TRAIN, {1}))
    opened = [json.loads(line) for line in (run.path / "openings.jsonl").read_text().splitlines()]
    assert [(line["round"], line["kind"], line["partitions"]) for line in opened] == [
        (1, TRAIN, [1, 2, 3]),
        (1, EVALUATE, [1, 2, 3]),
        (2, TRAIN, [0, 1, 2, 3]),
        (2, EVALUATE, [0, 1, 2, 3]),
    ]
    assert None not in judged(run)


def test_garbage_in_the_sum_is_no_metric(settings, caplog):
    def tamper(partition, message, reply):
        if partition == 2 and message.metadata.message_type == EVALUATE:
            words = reply.content["sealed"]
            words["vector"] = type(words["vector"])(words["vector"].numpy()[::-1].copy())
        return reply

    run = play(settings | MASKS | {"num-server-rounds": 1}, 4, tamper=tamper)
    assert judged(run) == [None] and "none that honest nodes add up to" in caplog.text


# ── Never twice ──────────────────────────────────────────────────────────────────────────────────────────────────────

INSTANTS = {  # what is interrupted, and at which call
    "before anybody is asked": (rounds.Round, "configure_evaluate", 2),
    "before the opening is put down": (Run, "add_opening", 4),
    "after it, before anybody answers": (SealedSum, "_ask", 4),
    "before the figures": (Run, "add_metrics", 3),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_resumed_run_judges_no_version_again(settings, instant):
    owner, name, call = INSTANTS[instant]
    settings |= MASKS | {"num-server-rounds": 3}
    with killed(owner, name, call):
        play(settings, 4)
    run = Run(Path(settings["output-dir"]) / "run")
    play(settings | {"resume": str(run.path)}, 4, run_id=2)
    assert run.status == "completed" and [line["version"] for line in run.metrics()] == [0, 1, 2, 3]
    opened = [json.loads(line) for line in (run.path / "openings.jsonl").read_text().splitlines()]
    times = [(line["kind"], line["round"]) for line in opened]
    assert len(set(times)) == len(times) and ("evaluate", 3) in times
    first, second, third = judged(run)
    assert first is not None and second is None and third is not None


def test_a_node_opens_the_tally_of_a_version_once_whatever_round_and_session_it_is_told(settings):
    answers, first = [], []

    def prepare(grid):
        answer = grid.app

        def forged(message, context, kind, content):
            made = Message(content, message.metadata.dst_node_id, kind)
            made.metadata.__dict__["_message_id"] = "forged"
            try:
                answers.append(str(answer(made, context).content))
            except Exception as error:
                answers.append(str(error))

        def app(message, context):
            kind, true = message.metadata.message_type, answer(message, context)
            if context.node_id == 100 and kind == EVALUATE:
                first[:] = [message.content]
                bare = {name: record for name, record in message.content.items() if name != "roster"}
                forged(message, context, EVALUATE, RecordDict(bare))
            elif context.node_id == 100 and kind == UNMASK and first:
                unmask = dict(message.content["unmask"])
                fewer = {"survivors": unmask["survivors"][:-1], "bundles": unmask["bundles"][:-1]}
                forged(
                    message, context, UNMASK, RecordDict({"unmask": type(message.content["unmask"])(unmask | fewer)})
                )
                roster = type(first[0]["roster"])({**first[0]["roster"], "session": bytes(16)})
                told = type(first[0]["evaluate"])({**first[0]["evaluate"], "round": 7})
                forged(message, context, EVALUATE, RecordDict({**first[0], "roster": roster, "evaluate": told}))
            return true

        grid.app = app

    play(settings | MASKS | {"num-server-rounds": 1}, 4, prepare)
    reasons = ["'roster' is missing", "the tally of version 1 is not after 1", "the tally of version 1 is not after 1"]
    assert len(answers) == len(reasons)
    for told, reason in zip(answers, reasons, strict=True):
        assert reason in told


def test_a_run_whose_server_judges_gets_no_tally_from_a_node(settings):
    answers = []

    def prepare(grid):
        answer = grid.app

        def app(message, context):
            if message.metadata.message_type == TRAIN and context.node_id == 100:
                content = RecordDict({**message.content, "evaluate": message.content["train"]})
                made = Message(content, 100, EVALUATE)
                made.metadata.__dict__["_message_id"] = "forged"
                try:
                    answers.append(answer(made, context))
                except Exception as error:
                    answers.append(str(error))
            return answer(message, context)

        grid.app = app

    play(settings | MASKS | {"evaluate": "server", "num-server-rounds": 1}, 4, prepare)
    assert answers == ["this node judges no model in this run: evaluate is not 'clients'."]


# ── What is seen, and what it costs ──────────────────────────────────────────────────────────────────────────────────


def test_a_node_s_reply_is_of_one_size_and_holds_no_tally_and_the_report_says_what_the_sums_tell(settings):
    replies = []

    def tamper(partition, message, reply):
        if message.metadata.message_type == EVALUATE and not reply.has_error():
            replies.append(reply.content)
        return reply

    run = play(settings | MASKS | {"partition": "dirichlet"}, 4, failing(101, EVALUATE, {1}), tamper=tamper)
    assert len(replies) == 7
    for reply in replies:
        assert set(reply) == {"status", "sealed", "shares"} and reply["shares"]["train-seconds"] == 0
    shapes = [[array.numpy().shape for array in reply["sealed"].values()] for reply in replies]
    assert all(shape == shapes[0] for shape in shapes)
    told = facts(run)
    assert any(
        "2 sums of how validation rows were judged, each of 3 partitions or more" in each for each in told["clear"]
    )
    assert any("2 different sets of nodes" in each for each in told["clear"])


@pytest.mark.parametrize("strategy", ["fedkrso", "fedsa-lora"])
def test_a_plan_foretells_the_bytes_with_tallies_to_a_hundredth(settings, strategy):
    settings |= MASKS | {"strategy": strategy}
    (row,) = plan(settings, [strategy], 5)["rows"]
    lines = play(settings, 5).metrics()[1:]
    assert row["up"] == pytest.approx(np.mean([line["uplink_bytes"] / 5 for line in lines]), rel=0.01)
    assert row["down"] == pytest.approx(np.mean([line["downlink_bytes"] / 5 for line in lines]), rel=0.1)
