"""Secure sums in whole runs: the same model as without, whoever is missing; and what is refused, by server and node."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from helpers import digest, killed, play

from fedkrso_app.config import ConfigError
from fedkrso_app.core.rso import RSO
from fedkrso_app.federation import masked, masks
from fedkrso_app.federation.masked import Masked
from fedkrso_app.federation.opened import Opened
from fedkrso_app.federation.sealed_sum import SealedSum
from fedkrso_app.federation.workplace import Workplace
from fedkrso_app.records.history import History
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.protocol import Instructions
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.sealed import Roster
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.plan import plan
from fedkrso_app.strategies import parse
from fedkrso_app.training.loop import TrainingError

ON = {"secure-aggregation": True}


@pytest.fixture
def settings(run_config) -> dict:
    """Two rounds of two steps, each along a seed of its own."""
    steps = {"num-server-rounds": 2, "local-steps": 2, "fedkrso.interval": 1}
    return run_config | steps | {"fedkrso.draw": "each", "fedkrso.num-seeds": 2}


def error_to(message: Message) -> Message:
    return Message(Error(code=2, reason="broken"), reply_to=message)


def breaking(kind: str, node: int, when=lambda number: True):
    """Prepares a grid whose ``node`` fails at messages of ``kind``, at those whose number ``when`` picks."""

    def prepare(grid):
        answer, seen = grid.app, []

        def app(message, context):
            if message.metadata.message_type == kind and context.node_id == node:
                seen.append(1)
                if when(len(seen)):
                    return error_to(message)
            return answer(message, context)

        grid.app = app

    return prepare


# ── The same model ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_by_examples_on_nodes_of_two_partitions_in_any_order_the_model_is_that_of_the_plain_run(settings):
    settings |= {"partition": "dirichlet", "weighting": "examples", "clients-per-node": 2, "wire-dtype": "int8"}
    plain = play(settings | {"run-name": "plain"}, 6)
    sealed = play(settings | ON | {"run-name": "sealed"}, 6, order=lambda replies: replies[::-1], run_id=2)
    assert digest(sealed) == digest(plain)
    for a, b in zip(plain.metrics()[1:], sealed.metrics()[1:], strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-5)
        assert (a["clients"], a["partitions"], a["metric"]) == (b["clients"], b["partitions"], b["metric"])


def test_without_a_node_that_fails_and_with_one_that_is_silent_later_it_is_the_plain_run_without_the_first(settings):
    """Four nodes, of which three open: in round 1 node 101 does not train, in round 2 node 102 sends no shares."""
    plain = play(settings | {"run-name": "plain"}, 4, breaking("train", 101, lambda number: number == 1))

    def prepare(grid):
        breaking("train", 101, lambda number: number == 1)(grid)
        breaking("query.unmask", 102, lambda number: number == 2)(grid)

    sealed = play(settings | ON | {"run-name": "sealed"}, 4, prepare, run_id=2)
    assert digest(sealed) == digest(plain)
    assert [line["clients"] for line in sealed.metrics()[1:]] == [3, 4]


def test_below_the_threshold_nothing_is_published_and_the_next_round_works(settings, caplog):
    def prepare(grid):
        for node in (100, 103):
            breaking("train", node, lambda number: number == 1)(grid)

    run = play(settings | ON, 4, prepare)
    assert [line["version"] for line in run.metrics()] == [0, 0, 1]
    assert "2 sealed replies have come; a sum of fewer than 3 stays closed" in caplog.text


@pytest.mark.parametrize("what", ["session", "version", "size", "bundles", "noise"])
def test_a_reply_of_another_session_version_or_shape_is_left_out_and_noise_is_seen(settings, what, caplog):
    def tamper(partition, message, reply):
        if partition != 2 or message.content["train"]["round"] != 1:
            return reply
        words, shares = reply.content["sealed"], reply.content["shares"]
        if what == "session":
            shares["session"] = bytes(16)
        elif what == "version":
            reply.content["status"]["version"] = 1
        elif what == "size":
            words["vector"] = type(words["vector"])(words["vector"].numpy()[:-1])
        elif what == "bundles":
            shares["bundles"] = shares["bundles"][:-1]
        else:  # as of a node that was told another story
            words["vector"] = type(words["vector"])(words["vector"].numpy()[::-1].copy())
        return reply

    sealed = play(settings | ON | {"run-name": "sealed"}, 4, tamper=tamper)
    if what == "noise":
        assert [line["version"] for line in sealed.metrics()] == [0, 0, 1]
        assert "none that honest nodes add up to" in caplog.text
    else:
        plain = play(settings | {"run-name": "plain"}, 4, breaking("train", 102, lambda number: number == 1), run_id=2)
        assert digest(sealed) == digest(plain)


def test_a_partition_that_fails_beside_others_is_left_out_by_its_node(settings, monkeypatch):
    settings |= {"clients-per-node": 2}
    train = Workplace._train

    def failing(self, partition, instructions):
        if partition == 3:
            raise RuntimeError("a broken row")
        return train(self, partition, instructions)

    monkeypatch.setattr(Workplace, "_train", failing)
    plain = play(settings | {"run-name": "plain"}, 6)
    sealed = play(settings | ON | {"run-name": "sealed"}, 6, run_id=2)
    assert digest(sealed) == digest(plain)
    assert [line["clients"] for line in sealed.metrics()[1:]] == [5, 5]


@pytest.mark.parametrize(("bits", "error"), [(32, 1e-6), (16, 2e-2)])
@pytest.mark.parametrize("strategy", ["fedkrso", "fedsvd"])
def test_at_fewer_bits_the_mean_is_near_and_bytes_are_fewer(settings, bits, error, strategy):
    """FedSVD computes with the values of its states, which here travel as differences all the same."""
    settings |= {"strategy": strategy, "num-server-rounds": 1}
    plain = play(settings | ON | {"run-name": "plain"}, 3)
    near = play(settings | ON | {"run-name": "near", "secagg.bits": bits}, 3, run_id=2)
    a, b = (Ledger(run.ledger).read(1).arrays for run in (plain, near))
    assert a.keys() == b.keys()
    for name in a:
        if a[name].dtype == np.float32:
            moved = np.abs(a[name] - (Ledger(plain.ledger).read(0).arrays.get(name, np.float32(0)))).max()
            assert np.abs(a[name] - b[name]).max() <= error * max(moved, 1e-3), name
    up = [run.metrics()[-1]["uplink_bytes"] for run in (plain, near)]
    assert up[1] < up[0] * (bits / 64 + 0.25)


def test_each_client_takes_every_seed_once_in_an_order_of_its_own(settings, monkeypatch):
    begin, taken = RSO.start_interval, []
    monkeypatch.setattr(RSO, "start_interval", lambda self, seed: (taken.append(seed), begin(self, seed))[1])
    play(settings | {"num-server-rounds": 1}, 6)
    orders = [tuple(taken[i : i + 2]) for i in range(0, 12, 2)]
    assert {frozenset(order) for order in orders} == {frozenset(taken)} and len(set(taken)) == 2 == len(set(orders))
    with pytest.raises(ConfigError, match=r"fedkrso\.num-seeds = 5 is impossible: it must be 2 with fedkrso.draw"):
        parse(settings | {"fedkrso.num-seeds": 5})


@pytest.mark.parametrize("strategy", ["fedkrso", "rolora"])
def test_fresh_processes_that_missed_rounds_agree_with_a_server_without_the_model(settings, strategy):
    """Whose masks depend on every entry: those that come late get another selection of them."""
    settings |= {"strategy": strategy, "evaluate": "off", "num-server-rounds": 3, "fraction-train": 0.75}
    plain = play(settings | {"run-name": "plain"}, 4)
    sealed = play(settings | ON | {"run-name": "sealed"}, 4, run_id=2, devices=True)
    a, b = (Ledger(run.ledger).read(3).arrays for run in (plain, sealed))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ── Interruptions ────────────────────────────────────────────────────────────────────────────────────────────────────

INSTANTS = {  # what is interrupted, and at which call -> whether the round is done again
    "before anybody trains": (masked, "roster_of", 2, True),
    "amid the replies": (Masked, "accept", 6, True),
    "before the opening is put down": (Run, "add_opening", 2, True),
    "after it, before anybody is asked": (SealedSum, "_ask", 2, False),
    "before the entry": (Ledger, "append", 3, False),
    "after the entry": (Run, "add_metrics", 3, True),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_run_that_is_killed_continues_with_the_same_bits_or_leaves_out_the_round_that_was_opened(
    settings, instant, caplog
):
    owner, name, call, again = INSTANTS[instant]
    settings |= {"num-server-rounds": 3}
    plain = play(settings | {"run-name": "plain"}, 4)
    with killed(owner, name, call):
        play(settings | ON, 4, run_id=2)
    run = Run(Path(settings["output-dir"]) / "run")
    play(settings | ON | {"resume": str(run.path)}, 4, run_id=3)
    assert run.status == "completed"
    assert (digest(run) == digest(plain)) is again
    assert ("Round 2 was opened and has no entry" in caplog.text) is not again
    opened = [json.loads(line)["round"] for line in (run.path / "openings.jsonl").read_text().splitlines()]
    assert len(set(opened)) == len(opened)
    assert [line["version"] for line in run.metrics()][-1] == (3 if again else 2)


def test_a_node_that_has_lost_its_key_says_so_and_takes_part_in_the_next_round(settings):
    def prepare(grid):
        answer, rounds = grid.app, []

        def app(message, context):
            if message.metadata.message_type == "train" and context.node_id == 101:
                rounds.append(1)
                if len(rounds) == 2:
                    context.state.clear()  # the SuperNode was started anew
            return answer(message, context)

        grid.app = app

    run = play(settings | ON | {"num-server-rounds": 3}, 4, prepare)
    assert [line["partitions"] for line in run.metrics()[1:]] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]


def test_a_node_of_several_partitions_has_one_record_of_what_it_opened(settings, monkeypatch):
    """Or a server could ask it for a round again, by another of its partitions."""
    asked = []
    enter = Opened.enter
    monkeypatch.setattr(Opened, "enter", lambda self, *args: (asked.append(self.path.name), enter(self, *args))[1])
    play(settings | ON | {"clients-per-node": 3, "fraction-train": 0.5}, 12)
    assert set(asked) <= {"0.json", "3.json", "6.json", "9.json"} and len(asked) >= 6


# ── What nobody is told ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_node_s_messages_hold_no_count_loss_or_seed_and_are_of_the_same_size_for_all(settings):
    settings |= {"partition": "dirichlet", "weighting": "examples"}
    replies = []
    play(settings | ON, 4, tamper=lambda partition, message, reply: replies.append(reply) or reply)
    assert len(replies) == 8
    for reply in replies:
        assert set(reply.content) == {"status", "sealed", "shares"}
        assert set(reply.content["shares"]) == {"session", "bundles", "checks", "train-seconds"}
        assert reply.content["shares"]["train-seconds"] % 10 == 0
        assert set(reply.content["status"]) == {"version"}
    shapes = [[array.numpy().shape for array in reply.content["sealed"].values()] for reply in replies]
    assert all(shape == shapes[0] for shape in shapes)


def answers_to(settings, forge) -> list[Message]:
    """What node 100 answers to what ``forge`` makes of each of its messages, which arrive beside the true ones."""
    answers = []

    def prepare(grid):
        answer = grid.app

        def app(message, context):
            true = answer(message, context)
            if context.node_id == 100:
                for forged in forge(message):
                    try:
                        answers.append(str(answer(forged, context).content))
                    except Exception as error:
                        answers.append(str(error))
            return true

        grid.app = app

    play(settings | ON, 4, prepare)
    return answers


def like(message: Message, kind: str, content) -> Message:
    made = Message(content, message.metadata.dst_node_id, kind)
    made.metadata.__dict__["_message_id"] = "forged"
    return made


def test_a_node_answers_one_statement_per_round_and_trains_for_no_old_round_or_plain_update(settings):
    first: list[Message] = []

    def forge(message):
        kind, content = message.metadata.message_type, message.content
        if kind == "query.unmask":
            record = dict(content["unmask"])
            fewer = {"survivors": record["survivors"][:-1], "bundles": record["bundles"][:-1]}
            yield like(message, kind, RecordDict({"unmask": ConfigRecord(record | fewer)}))
            yield like(message, kind, content)  # the same again
            yield first[0]  # the round that was opened just now
            other = RecordDict({**first[0].content})
            other["roster"] = ConfigRecord({**first[0].content["roster"], "session": bytes(16)})
            yield like(message, "train", other)
        elif kind == "train":
            first[:] = [message]
            yield like(message, kind, RecordDict({name: r for name, r in content.items() if name != "roster"}))
            yield like(message, "evaluate", RecordDict({**content, "evaluate": content["train"]}))
            yield message  # the same session again

    answers = answers_to(settings | {"num-server-rounds": 1}, forge)
    reasons = [
        "record 'roster' is missing",
        "this node judges no model in this run",
        "sealed something in this session already",
        "round 1 is not after 1",
        "shares",
        "round 1 is not after 1",
        "round 1 is not after 1",
    ]
    assert len(answers) == len(reasons)
    for answer, reason in zip(answers, reasons, strict=True):
        assert reason in answer


def test_a_node_seals_a_round_for_no_other_nodes_and_never_twice_in_a_session(settings):
    """Rosters of one round that differ would give sums that differ in a few nodes, each opened by others."""

    def forge(message):
        if message.metadata.message_type == "train":
            roster = Roster.read(message.content)
            fewer = Roster(bytes(16), roster.parties[:3], 3)
            again = Roster(bytes([1] * 16), roster.parties, 3)
            for each in (fewer, again, roster):
                yield like(message, "train", RecordDict({**message.content, "roster": each.record()}))

    answers = answers_to(settings | {"num-server-rounds": 1}, forge)
    assert "sealed round 1 for other nodes" in answers[0]
    assert "bundles" in answers[1]
    assert "in this session already" in answers[2]


def test_files_of_another_start_are_not_trained_on_though_the_entries_are_the_same(settings, tmp_path, caplog):
    """Or a server lets one node start a run at a model, and all of them continue it at one that learns nothing."""

    def prepare(grid):
        answer = grid.app

        def app(message, context):
            if message.metadata.message_type == "train" and message.content["train"]["round"] == 2:
                for file in (tmp_path / "cache" / "nodes").glob("*/begin"):
                    file.write_text("the digest of another model")
            return answer(message, context)

        grid.app = app

    run = play(settings | ON | {"num-server-rounds": 3}, 4, prepare)
    assert [line["version"] for line in run.metrics()] == [0, 1, 1, 2]
    assert "asks to be brought up to date" in caplog.text


def test_a_node_that_is_told_another_folder_shares_no_mask(settings):
    """A server that has all the others train on rows that it knows would read this node's update off the sum."""
    told = Instructions("0" * 16, 0, "stamp", round=1)
    one, other = (masks.story_of(told, "", "", parse(settings | ON | more)) for more in ({}, {"data-dir": "elsewhere"}))
    assert one != other


def test_a_node_that_is_told_another_learning_rate_keeps_the_sum_closed(settings, caplog):
    """A server that has all the others train to nothing would read this node's update off the sum."""

    def prepare(grid):
        grid.contexts[102].run_config["fedkrso.learning-rate"] = 1e-9

    with pytest.raises(TrainingError):
        play(settings | ON | {"num-server-rounds": 1}, 4, prepare)
    assert "the shares of the node at place 2 were not made for this round" in caplog.text


def test_histories_differ_by_any_entry_that_counts_and_not_by_states_that_a_later_one_replaced():
    schema = Schema({"B": Field("float32", (2,)), "head": Field("float32", (1,), "state")})
    entry = lambda b, head: {"B": np.full(2, b, np.float32), "head": np.full(1, head, np.float32)}  # noqa: E731

    def digest_of(*entries):
        history = History(schema)
        for version, arrays in enumerate(entries):
            history = History(schema, json.loads(json.dumps(history.record)))  # as a fresh process finds it
            history.follow(version, arrays)
        return history.digest

    whole = [{"head": np.ones(1, np.float32)}, entry(1, 5), entry(2, 6)]
    assert digest_of(*whole) == digest_of({}, {"B": whole[1]["B"]}, whole[2])  # as a node gets them that comes late
    assert digest_of(*whole) != digest_of(whole[0], entry(9, 5), whole[2])
    assert digest_of(*whole) != digest_of(*whole[:2], entry(2, 7))
    with pytest.raises(ValueError, match="entry 2 does not follow entry 0"):
        history = History(schema)
        history.follow(0, whole[0])
        history.follow(2, whole[2])


@pytest.mark.parametrize("strategy", ["fedkrso", "rolora"])
def test_a_plan_foretells_the_bytes_of_a_round_to_a_hundredth(settings, strategy):
    settings |= ON | {"strategy": strategy, "secagg.bits": 32}
    (row,) = plan(settings, [strategy], 5)["rows"]
    lines = play(settings, 5).metrics()[1:]
    assert row["up"] == pytest.approx(np.mean([line["uplink_bytes"] / 5 for line in lines]), rel=0.01)
    exact = 0.1 if strategy == "fedkrso" else 0.01
    assert row["down"] == pytest.approx(np.mean([line["downlink_bytes"] / 5 for line in lines]), rel=exact)
    assert row["masks"] == {"nodes": 5, "threshold": 4, "missing": 1, "honest": {0: 4, 1: 3}}


# ── A node's own policy ──────────────────────────────────────────────────────────────────────────────────────────────


def configured(**own):
    """Prepares a grid whose nodes all have ``own`` in their node config."""

    def prepare(grid):
        for context in grid.contexts.values():
            context.node_config |= {name.replace("_", "-"): value for name, value in own.items()}

    return prepare


@pytest.mark.parametrize(
    ("own", "run", "reason"),
    [
        ({"require": "secure-aggregation"}, {}, "this node only sends sealed updates; set secure-aggregation = true"),
        ({"min_cohort": 3}, {}, "this node only sends sealed updates"),
        ({"min_cohort": 5}, ON, "sums of at least 5 nodes; set secagg.min-cohort = 5"),
        ({"require": "secure-agregation"}, ON, "'secure-agregation' in this node's config is none of the"),
        ({"requires": "secure-aggregation"}, {}, "unknown key 'requires'; did you mean 'require'?"),
        ({"min_cohort": "5"}, ON, "min-cohort in this node's config is of the wrong type"),
        ({"key": "/nowhere"}, ON, "key in this node's config cannot be read"),
    ],
)
def test_a_node_takes_part_in_no_run_that_its_own_config_rules_out(settings, own, run, reason):
    trained = []
    with pytest.raises(ConfigError, match=f"no node can take part.*{reason}"):
        play(settings | run, 4, configured(**own), tamper=lambda *args: trained.append(1))
    assert not trained


def test_keys_that_peers_sign_are_taken_and_others_are_not(settings, tmp_path, caplog):
    def key(name: str) -> Path:
        path = tmp_path / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", path], check=True)
        return path

    keys = [key(f"node{i}") for i in range(4)]
    peers = tmp_path / "peers"
    peers.write_text("".join(path.with_suffix(".pub").read_text() for path in keys))

    def prepare(owners):
        def own(grid):
            for context, owner in zip(grid.contexts.values(), owners, strict=True):
                context.node_config |= {"key": str(keys[owner]), "peers": str(peers)}

        return own

    run = play(settings | ON, 4, prepare([0, 1, 2, 3]))
    assert run.status == "completed" and "keys are not signed" not in caplog.text
    for owners, reason in (([0, 1, 2, 2], "signed by the same peer as another's"),):
        with pytest.raises(TrainingError):
            play(settings | ON | {"run-name": "other"}, 4, prepare(owners), run_id=2)
        assert reason in caplog.text
    peers.write_text("".join(path.with_suffix(".pub").read_text() for path in keys[:3]))
    with pytest.raises(TrainingError):
        play(settings | ON | {"run-name": "third"}, 4, prepare([0, 1, 2, 3]), run_id=3)
    assert "partition 3's key is not signed by a key in peers" in caplog.text


# ── Refused before round 1 ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": "fedsrd"}, "strategy = 'fedsrd': its server needs each client's reply"),
        ({"strategy": "flora"}, "strategy = 'flora'"),
        ({"strategy": "fed-dare"}, "of a value that one client alone keeps"),
        ({"fedkrso.draw": "own"}, "set it, and fedkrso.num-seeds = 2"),
        ({"strategy": "flexlora"}, "strategy = 'flexlora'"),
        ({"aggregation": "median"}, "aggregation = 'median'"),
        ({"client-metrics": True}, "client-metrics = True"),
        ({"max-update-norm": 1.0}, "max-update-norm = 1.0"),
        ({"secagg.bits": 48}, "secagg.bits = 48 is impossible: it must be 64, 32 or 16"),
        ({"secagg.bits": 32, "weighting": "examples"}, "secagg.bits = 32 needs weighting = 'uniform'"),
        ({"secagg.bits": 16, "evaluate": "off"}, "secagg.bits = 16 needs evaluate = 'server'"),
        ({"secagg.min-cohort": 2}, "secagg.min-cohort = 2 is impossible"),
    ],
)
def test_settings_that_masks_rule_out_are_refused(settings, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(settings | ON | changes)


@pytest.mark.parametrize(
    ("nodes", "changes", "reason"),
    [
        (2, {}, "at least 3 nodes per round; fraction-train = 1 of 2 nodes is 2"),
        (6, {"fraction-train": 0.3}, "at least 3 nodes per round; fraction-train = 0.3 of 6 nodes is 2"),
        (5, {"secagg.min-cohort": 6}, "at least 6 nodes per round"),
        (6, {"secagg.threshold": 4}, "secagg.threshold = 4 is below 5, the least for 6 nodes"),
        (4, {"secagg.threshold": 5}, "secagg.threshold = 5 is above 4"),
    ],
)
def test_federations_that_are_too_small_are_refused_before_anybody_trains(settings, nodes, changes, reason):
    trained = []
    with pytest.raises(ConfigError, match=reason):
        play(settings | ON | changes, nodes, tamper=lambda *args: trained.append(1))
    assert not trained
