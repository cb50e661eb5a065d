"""The contract: laws that hold for every method in the table."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from helpers import arrays_of, digest, play, replayed
from transformers import AutoModelForSequenceClassification

from fedkrso_app import data
from fedkrso_app.federation import client
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies import STRATEGIES, make, parse
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.training import loop, model
from fedkrso_app.training.loop import TrainingError


@pytest.fixture(params=STRATEGIES)
def settings(request, run_config) -> dict:
    return run_config | {"strategy": request.param}


@pytest.fixture(params=["float32", "float16", "int8", "int4"])
def at_any_dtype(request, settings) -> dict:
    return settings | {"wire-dtype": request.param}


@pytest.fixture
def arrays_in_a_reply(settings) -> list[str]:
    config = parse(settings)
    loaded = model.load(config.model, 2, 0)
    return list(make(config, Shapes.of(loaded)).reply.fields)


def test_the_loss_falls(settings):
    run = play(settings | {"num-server-rounds": 6, "local-steps": 10})
    losses = [line["eval_loss"] for line in run.metrics()]
    assert losses[-1] < losses[0] - 0.01


def test_every_method_trains_on_the_same_batches(run_config, monkeypatch):
    seen: dict[str, list] = {}
    draw = data.batches

    def watched(*args):
        for batch in draw(*args):
            seen.setdefault(strategy, []).append(batch["input_ids"].tolist())
            yield batch

    monkeypatch.setattr(data, "batches", watched)
    for run_id, strategy in enumerate(STRATEGIES, start=1):
        play(run_config | {"strategy": strategy, "run-name": strategy, "num-server-rounds": 2}, run_id=run_id)
    assert len(seen["fedkrso"]) == 2 * 4 * 4 and all(batches == seen["fedkrso"] for batches in seen.values())


def test_the_ledger_replays_to_the_servers_model(settings):
    run = play(settings)
    assert replayed(run) == digest(run)


def test_the_clients_model_equals_the_servers_and_is_given_back_unchanged(at_any_dtype):
    settings, seen = at_any_dtype, {}

    def look(partition, message, reply):
        place = client.workplace(message.content["train"]["run"], parse(settings), 4)
        seen.setdefault(place.replica.version, set()).add(model.state_digest(place.replica.local.plain_state()))
        return reply

    run = play(settings, tamper=look)
    assert replayed(run) == digest(run)
    kept = set(Ledger(run.ledger).versions()) & set(seen)
    assert kept and {version: {replayed(run, version)} for version in kept} == {v: seen[v] for v in kept}
    assert len(seen) == 3 and all(len(states) == 1 for states in seen.values())


def test_only_what_an_optimizer_trains_asks_for_gradients(settings, monkeypatch):
    config, asked = parse(settings), set()
    loaded = model.load(config.model, 2, 0)
    method = make(config, Shapes.of(loaded))
    local = method.local(loaded)
    forward = type(loaded.module).forward

    def watch(self, *args, **kwargs):
        asked.update(name for name, parameter in self.named_parameters() if parameter.requires_grad)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(loaded.module), "forward", watch)
    batch = {"input_ids": torch.tensor([[0, 7, 8, 2]]), "labels": torch.tensor([1])}
    rng = np.random.default_rng(0)
    with local.session(method.instructions(1), rng) as session:
        loop.train(local.module, iter([batch] * config.local_steps), session, config, rng)
        trained = {id(parameter) for parameter in session.parameters}
    expected = {name for name, parameter in loaded.module.named_parameters() if id(parameter) in trained}
    assert {name for name in asked if not name.endswith(".B")} == expected  # .B: where FedKRSO's gradients arrive
    moved = {id(parameter) for parameter in local.optimized()}
    assert expected <= {name for name, parameter in loaded.module.named_parameters() if id(parameter) in moved}
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_partial_participation_catches_up_to_the_same_model(settings, dtype):
    seen = {}

    def look(partition, message, reply):
        place = client.workplace(message.content["train"]["run"], parse(partial), 4)
        seen[message.content["train"]["version"]] = model.state_digest(place.replica.local.plain_state())
        return reply

    partial = settings | {"fraction-train": 0.5, "num-server-rounds": 5, "wire-dtype": dtype}
    run = play(partial, tamper=look)
    assert all(line["clients"] == 2 for line in run.metrics()[1:])
    assert len({tuple(line["partitions"]) for line in run.metrics()[1:]}) > 1
    kept = set(Ledger(run.ledger).versions()) & set(seen)
    assert kept and all(replayed(run, version) == seen[version] for version in kept)


def test_in_bfloat16_the_host_keeps_float32_and_the_loss_falls_as_it_does_there(settings):
    settings = settings | {"num-server-rounds": 6, "local-steps": 10}
    settings |= {"lora.learning-rate": 0.02}  # at .05 FedIT's loss swings by more than bfloat16 does to it
    settings |= {"zeroth.head-learning-rate": 0.02}  # likewise FwdLLM's, whose rate is constant
    exact = [line["eval_loss"] for line in play(settings).metrics()]
    run = play(settings | {"compute-dtype": "bfloat16", "run-name": "half"}, run_id=2)
    losses = [line["eval_loss"] for line in run.metrics()]
    assert losses[-1] < losses[0] - 0.01 and abs(losses[-1] - exact[-1]) < 0.3 * (exact[0] - exact[-1])
    assert replayed(run) == digest(run)
    state = AutoModelForSequenceClassification.from_pretrained(run.model).state_dict()
    assert {value.dtype for value in state.values()} <= {torch.float32, torch.int64}
    moved = torch.cat([value.flatten() for key, value in state.items() if "encoder" in key or "classifier" in key])
    assert not torch.equal(moved, moved.bfloat16().float())


def test_in_bfloat16_fresh_processes_that_missed_rounds_give_the_bits_of_one_that_did_not(settings):
    settings = settings | {"compute-dtype": "bfloat16", "fraction-train": 0.5, "num-server-rounds": 4, "local-steps": 2}
    settings |= {"wire-dtype": "int8", "activation-memory": "recompute", "gradient-accumulation": 2}
    settings |= {"max-grad-norm": 0.5, "batch-size": 64}  # more than the 40 rows of a client
    warm = play(settings)
    assert [(line["clients"], line["failed"]) for line in warm.metrics()[1:]] == [(2, 0)] * 4
    fresh = play(settings | {"run-name": "fresh"}, devices=True, run_id=2)
    assert digest(fresh) == digest(warm) == replayed(warm)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_gradient_that_ends_in_nan_after_the_last_loss_is_no_reply_that_counts(settings, dtype, monkeypatch):
    clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def spoil(parameters, norm):
        if next(steps) % settings["local-steps"] == 0:
            parameters[0].grad.view(-1)[0] = torch.nan
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    with pytest.raises(TrainingError, match="none of 1 rounds published anything"):
        play(settings | {"max-grad-norm": 1.0, "wire-dtype": dtype, "num-server-rounds": 1}, nodes=2)
    start, end = Run(Path(settings["output-dir"]) / "run").metrics()
    assert (end["clients"], end["refused"] + end["failed"], end["version"]) == (0, 2, 0)
    assert end["metric"] == start["metric"]


def test_same_seed_same_bits_whatever_the_order_of_arrival(settings):
    first = play(settings)
    second = play(settings | {"run-name": "reversed"}, order=lambda replies: replies[::-1], run_id=2)
    other = play(settings | {"run-name": "other", "seed": 1}, run_id=3)
    assert digest(first) == digest(second) != digest(other)


@pytest.mark.parametrize(
    ("instant", "dtype"),
    [("before the entry", "float32"), ("after the entry", "float32"), ("before the entry", "int8")],
)
def test_resume_ends_in_the_same_bits_as_no_interruption(settings, instant, dtype, monkeypatch):
    settings = settings | {"wire-dtype": dtype}
    whole = play(settings | {"run-name": "whole"})
    with monkeypatch.context() as patch:
        if instant == "before the entry":
            append = Ledger.append
            patch.setattr(Ledger, "append", lambda self, e: append(self, e) if e.version < 2 else 1 / 0)
        else:
            add = Run.add_metrics
            patch.setattr(Run, "add_metrics", lambda self, f: add(self, f) if f["round"] < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            play(settings)
    run = Run(whole.path.parent / "run")
    assert run.status.startswith("failed: ZeroDivisionError")
    play(settings | {"resume": str(run.path)}, run_id=2)
    assert run.status == "completed" and digest(run) == digest(whole)
    assert [line["round"] for line in run.metrics()] == [0, 1, 2, 3]
    assert [line["metric"] for line in run.metrics()] == [line["metric"] for line in whole.metrics()]


def altered(reply, kind, first):
    """``reply`` made wrong; ``first`` names an array of it."""
    arrays, metrics, status = arrays_of(reply), dict(reply.content["metrics"]), dict(reply.content["status"])
    floats = next(name for name, value in arrays.items() if value.dtype == np.float32)
    changes = {
        "NaN": lambda: arrays.update({floats: np.full_like(arrays[floats], np.nan)}),
        "infinite": lambda: arrays.update({floats: np.full_like(arrays[floats], -np.inf)}),
        "huge": lambda: arrays.update({floats: np.full_like(arrays[floats], 1e30)}),
        "broadcastable": lambda: arrays.update({floats: arrays[floats].reshape(-1)[:1]}),
        "other dtype": lambda: arrays.update({floats: arrays[floats].astype(np.float64)}),
        "missing array": lambda: arrays.pop(first),
        "extra array": lambda: arrays.update({"extra": np.zeros(3, np.float32)}),
        "old version": lambda: status.update(version=status["version"] - 1),
        "future version": lambda: status.update(version=status["version"] + 1),
        "no weight": lambda: metrics.update({"num-examples": 0}),
        "negative weight": lambda: metrics.update({"num-examples": -3}),
        "NaN weight": lambda: metrics.update({"num-examples": float("nan")}),
        "NaN loss": lambda: metrics.update({"train-loss": float("nan")}),
    }
    if kind in changes:
        changes[kind]()
    content = {"status": ConfigRecord(status), "update": wire.pack(arrays), "metrics": MetricRecord(metrics)}
    if kind == "no update":
        content.pop("update")
    elif kind == "empty":
        content = {}
    elif kind == "records swapped":
        content["status"], content["update"] = content["update"], content["status"]
    return Message(RecordDict(content), reply_to=reply_target(reply))


def reply_target(reply):
    """Something a reply can answer, with the metadata of the message that ``reply`` answers."""
    meta = reply.metadata
    target = Message(RecordDict(), meta.src_node_id, meta.message_type, group_id=meta.group_id)
    target.metadata.__dict__["_message_id"] = meta.reply_to_message_id
    return target


KINDS = ["NaN", "infinite", "huge", "broadcastable", "other dtype", "missing array", "extra array", "old version",
         "future version", "no weight", "negative weight", "NaN weight", "NaN loss", "no update", "empty",
         "records swapped", "error", "no reply"]  # fmt: skip


def test_a_reply_that_does_not_count_changes_nothing_but_the_divisor(settings, arrays_in_a_reply, caplog):
    """Partition 2 sends something wrong in every round, of another kind each time; the result is that without it."""
    rounds = settings | {"num-server-rounds": len(KINDS), "local-steps": 2, "round-timeout": 0.3}

    def wrong(partition, message, reply):
        kind = KINDS[message.content["train"]["round"] - 1]
        if partition != 2:
            return reply
        if kind == "error":
            return Message(Error(code=8, reason="ClientApp stopped responding."), reply_to=message)
        return None if kind == "no reply" else altered(reply, kind, arrays_in_a_reply[0])

    run = play(rounds, nodes=3, tamper=wrong)
    silent = lambda partition, message, reply: None if partition == 2 else reply  # noqa: E731
    without = play(rounds | {"run-name": "without"}, nodes=3, tamper=silent, run_id=2)
    assert digest(run) == digest(without)
    counted = [(line["clients"], line["refused"] + line["failed"]) for line in run.metrics()[1:]]
    assert counted == [(2, 1)] * len(KINDS)
    assert caplog.text.count("partition 2") == 2 * len(KINDS)  # each with its reason, in both runs


@pytest.mark.parametrize("count", [2, 5])
def test_identical_clients_equal_one(settings, count, monkeypatch):
    """Clients that train on the same rows with the same randomness: their mean is each of them."""
    monkeypatch.setattr("fedkrso_app.federation.client.stream", lambda seed, label, round, partition: _rng(round))
    monkeypatch.setattr("fedkrso_app.data.partition", lambda train, task, n, *rest: [np.arange(40)] * n)
    one = play(settings | {"run-name": "one", "num-server-rounds": 1}, nodes=1)
    many = play(settings | {"run-name": "many", "num-server-rounds": 1}, nodes=count, run_id=2)
    a, b = (Ledger(run.ledger).read(1).arrays for run in (one, many))
    for name in a:
        np.testing.assert_allclose(a[name].astype(np.float64), b[name].astype(np.float64), rtol=0, atol=1e-6)


def _rng(round):
    return np.random.default_rng(round)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_head_is_the_weighted_mean_of_the_heads(settings, arrays_in_a_reply, weighting):
    if "head" not in arrays_in_a_reply:
        pytest.skip("this method sends its head with the rest")
    replies = {}

    def keep(partition, message, reply):
        replies[partition] = reply
        return reply

    uneven = {"partition": "dirichlet", "dirichlet-alpha": 0.3, "num-server-rounds": 1, "weighting": weighting}
    run = play(settings | uneven, tamper=keep)
    counts = [replies[p].content["metrics"]["num-examples"] for p in range(4)]
    assert len(set(counts)) > 1
    heads = np.array([arrays_of(replies[p])["head"] for p in range(4)], dtype=np.float64)
    expected = np.average(heads, axis=0, weights=counts if weighting == "examples" else None)
    np.testing.assert_allclose(Ledger(run.ledger).read(1).arrays["head"], expected, rtol=1e-6, atol=1e-10)


def test_measured_bytes_equal_the_payload_and_small_headers(settings):
    payloads = {"up": 0, "down": 0}

    def add(partition, message, reply):
        payloads["up"] += sum(value.nbytes for value in arrays_of(reply).values())
        for record in message.content.array_records.values():
            payloads["down"] += sum(array.numpy().nbytes for array in record.values())
        return reply

    run = play(settings, tamper=add)
    for way, key in (("up", "uplink_bytes"), ("down", "downlink_bytes")):
        measured = sum(line[key] for line in run.metrics())
        assert payloads[way] < measured < payloads[way] + 12 * 3000  # 12 messages, a few records each


def test_torch_state_is_left_as_it_was(settings):
    torch.manual_seed(5)
    before = torch.random.get_rng_state().clone()
    play(settings | {"num-server-rounds": 1})
    assert torch.equal(torch.random.get_rng_state(), before)
