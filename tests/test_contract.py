"""The contract: laws that hold for every method in the table.

A method's runs are few, and each serves several laws: ``plain`` (float32, uneven shares), ``partial`` (two of four
nodes per round, at a number format), ``long`` (enough steps for the loss to fall, in float32 and in bfloat16). They are
made when a test first asks for them. The costly laws that depend on nothing but how a method is aggregated and caught
up with run over ``KINDS_OF_METHOD``: one method for each pair of those two properties.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from helpers import MASKS, ON_SERVER, arrays_of, default_config, digest, each_replayed, encoder, play, replayed, replica
from transformers import AutoModelForSequenceClassification, RobertaConfig

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.federation import client
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies import make, parse
from fedkrso_app.training import loop, model
from fedkrso_app.training.loop import TrainingError
from fedkrso_app.training.shapes import Shapes


def kinds_of_method() -> list[str]:
    """The first method of each kind: whether it is linear, and how many entries bring a copy up to date."""
    with tempfile.TemporaryDirectory() as folder:
        RobertaConfig(vocab_size=9, hidden_size=128, num_attention_heads=2).save_pretrained(folder)
        shapes = Shapes.of(model.outline(folder, 2))
    kinds: dict[tuple, str] = {}
    for name in ON_SERVER:
        method = make(parse(default_config() | {"strategy": name}), shapes)
        kinds.setdefault((method.linear, method.entry.span), name)
    return list(kinds.values())


KINDS_OF_METHOD = kinds_of_method()

PLAIN = {"local-steps": 3, "partition": "dirichlet"}
PARTIAL = {"num-server-rounds": 4, "fraction-train": 0.5, "local-steps": 2}
LONG = {"local-steps": 8, "fraction-train": 0.5, "max-grad-norm": 5.0}
# At .05 the loss swings by more than bfloat16 changes it.
SWINGING = ("lora", "ffa-lora", "rolora", "hetlora", "fedex-lora", "lora-fair")
LONG |= dict.fromkeys((*(f"{table}.learning-rate" for table in SWINGING), "zeroth.head-learning-rate"), 0.02)
TIGHT = {"activation-memory": "recompute", "gradient-accumulation": 2, "batch-size": 4}


@dataclass
class Watched:
    """A run, and what was seen of it."""

    run: Run
    settings: dict
    entries: dict[int, dict] = field(default_factory=dict)  # version -> arrays of the ledger's entry, as appended
    states: dict[int, set] = field(default_factory=dict)  # version -> digests of the clients' models after training
    replies: dict[tuple, tuple] = field(default_factory=dict)  # (round, partition) -> arrays, examples
    batches: list = field(default_factory=list)  # token ids, in the order of training
    payload: dict = field(default_factory=lambda: {"up": 0, "down": 0})  # bytes of arrays
    torch_state_kept: bool = False

    @property
    def losses(self) -> list[float]:
        return [line["eval_loss"] for line in self.run.metrics()]


def watch(settings: dict, nodes: int, **options) -> Watched:
    """Play a run and note what the laws ask for."""
    seen = Watched(Run(Path(settings["output-dir"]) / settings["run-name"]), settings)
    draw, append = data.batches, Ledger.append

    def drawn(*args):
        for batch in draw(*args):
            seen.batches.append(batch["input_ids"].tolist())
            yield batch

    def appended(self, entry):
        seen.entries[entry.version] = dict(entry.arrays)
        append(self, entry)

    def look(partition, message, reply):
        asked = message.content["train"]
        place = client.workplace(asked["run"], parse(settings), nodes)
        state = model.state_digest(place.replica.local.plain_state())
        seen.states.setdefault(place.replica.version, set()).add(state)
        arrays, figures = arrays_of(reply), reply.content["metrics"]
        seen.replies[asked["round"], partition] = arrays, figures["num-examples"]
        seen.payload["up"] += sum(value.nbytes for value in arrays.values())
        for record in message.content.array_records.values():
            seen.payload["down"] += sum(array.numpy().nbytes for array in record.values())
        return reply

    torch.manual_seed(5)
    before = torch.random.get_rng_state().clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "batches", drawn)
        patch.setattr(Ledger, "append", appended)
        play(settings, nodes, tamper=look, **options)
    seen.torch_state_kept = torch.equal(torch.random.get_rng_state(), before)
    return seen


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """One layer: no law here is about how many there are (tests/test_families.py and others have two)."""
    return encoder(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(params=ON_SERVER)
def settings(request, run_config) -> dict:
    return run_config | {"strategy": request.param}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., Watched]:
    """Makes a run, or gives the one that an earlier test made with the same settings."""
    folder, runs = tmp_path_factory.mktemp("contract"), {}

    def make(settings: dict, nodes: int) -> Watched:
        key = repr(sorted((settings | {"output-dir": ""}).items())), nodes
        if key not in runs:
            name = f"{settings['strategy']}-{len(runs)}"
            runs[key] = watch(settings | {"output-dir": str(folder), "run-name": name}, nodes, run_id=1000 + len(runs))
        return runs[key]

    return make


@pytest.fixture
def plain(made, settings) -> Watched:
    return made(settings | PLAIN, 3)


@pytest.fixture
def long(made, settings) -> Watched:
    return made(settings | LONG, 4)


@pytest.fixture
def half(made, settings) -> Watched:
    return made(settings | LONG | {"compute-dtype": "bfloat16"}, 4)


# ── One model everywhere ─────────────────────────────────────────────────────────────────────────────────────────────


def kept_versions_agree(seen: Watched) -> None:
    """Every client that was asked in a round has the model that the ledger leads to, and the run ends with the last."""
    led_to = each_replayed(seen.run)
    assert led_to[max(led_to)] == digest(seen.run)
    kept = led_to.keys() & seen.states.keys()
    assert kept and {version: {led_to[version]} for version in kept} == {v: seen.states[v] for v in kept}
    assert all(len(states) == 1 for states in seen.states.values())


def test_the_clients_model_equals_the_servers_and_is_given_back_unchanged(plain):
    kept_versions_agree(plain)
    assert len(plain.states) == 3


def test_partial_participation_catches_up_to_the_same_model(made, settings):
    catches_up(made(settings | PARTIAL | {"wire-dtype": "int8"}, 4))


@pytest.mark.parametrize("settings", KINDS_OF_METHOD, indirect=True)
def test_partial_participation_catches_up_in_int4_too(made, settings):
    catches_up(made(settings | PARTIAL | {"wire-dtype": "int4"}, 4))


def catches_up(seen: Watched) -> None:
    kept_versions_agree(seen)
    lines = seen.run.metrics()[1:]
    assert all(line["clients"] == 2 for line in lines) and len({tuple(line["partitions"]) for line in lines}) > 1


@pytest.mark.parametrize("settings", KINDS_OF_METHOD, indirect=True)
def test_in_float16_and_with_little_memory_too(made, settings):
    kept_versions_agree(made(settings | PARTIAL | {"wire-dtype": "float16"} | TIGHT, 4))


def test_same_seed_same_bits_whatever_the_order_of_arrival(plain, settings):
    """Of three replies: two would add up alike in any order."""
    again = watch(settings | PLAIN | {"num-server-rounds": 1}, 3, order=lambda replies: replies[::-1])
    assert same(again.entries, {version: plain.entries[version] for version in (0, 1)})


SEALED = {
    "fedkrso",
    "fedfft",
    "fedit",
    "ffa-lora",
    "rolora",
    "fedsvd",
    "fr-lora",
    "federa",
    "fedblock",
    "fedmezo",
    "separate",
}


def test_under_masks_the_model_is_the_same_to_the_bit_or_the_method_is_refused(request, settings):
    sealed = settings | PLAIN | MASKS | {"num-server-rounds": 2, "run-name": "sealed"}
    if settings["strategy"] not in SEALED:
        with pytest.raises(ConfigError, match="secure-aggregation does not work with strategy"):
            play(sealed, 3)
        return
    if settings["strategy"] == "fedkrso":
        plain = request.getfixturevalue("made")(sealed | {"secure-aggregation": False}, 3)
    else:
        plain = request.getfixturevalue("plain")
    again = watch_entries(sealed)
    assert same(again, {version: plain.entries[version] for version in (0, 1, 2)})


def watch_entries(settings: dict) -> dict[int, dict]:
    """The ledger's entries of a run whose replies nobody can look into."""
    entries, append = {}, Ledger.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "append", lambda self, e: (entries.update({e.version: dict(e.arrays)}), append(self, e)))
        play(settings, 3)
    return entries


@pytest.mark.parametrize("settings", KINDS_OF_METHOD, indirect=True)
def test_another_seed_gives_other_bits(plain, settings):
    other = watch(settings | PLAIN | {"seed": 1, "num-server-rounds": 1}, 3)
    assert not same({1: other.entries[1]}, {1: plain.entries[1]})


def same(a: dict[int, dict], b: dict[int, dict]) -> bool:
    """Whether ledger entries are the same to the bit."""
    raw = lambda entries: {v: {name: x.tobytes() for name, x in arrays.items()} for v, arrays in entries.items()}  # noqa: E731
    return raw(a) == raw(b)


def test_resume_ends_in_the_same_bits_as_no_interruption(made, settings):
    """In int8, which draws how to round; the second round's entry is lost, what the server keeps of it is not."""
    append = Ledger.append
    stop = lambda self, entry: append(self, entry) if entry.version < 2 else 1 / 0  # noqa: E731
    resumes_to_the_bits_of(made(settings | PARTIAL | {"wire-dtype": "int8"}, 4), 4, settings, Ledger, "append", stop)


@pytest.mark.parametrize("settings", KINDS_OF_METHOD, indirect=True)
def test_resume_between_an_entry_and_its_figures_too(plain, settings):
    add = Run.add_metrics
    stop = lambda self, figures: add(self, figures) if figures["round"] < 2 else 1 / 0  # noqa: E731
    resumes_to_the_bits_of(plain, 3, settings, Run, "add_metrics", stop)


def resumes_to_the_bits_of(whole: Watched, nodes: int, settings: dict, owner: type, method: str, stop) -> None:
    """The run of ``whole`` again, interrupted where ``stop`` raises in place of ``owner.method``, and resumed."""
    settings = whole.settings | {"output-dir": settings["output-dir"], "run-name": "run"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(owner, method, stop)
        play(settings, nodes)
    run = Run(Path(settings["output-dir"]) / "run")
    assert run.status.startswith("failed: ZeroDivisionError")
    play(settings | {"resume": str(run.path)}, nodes, run_id=2)
    assert run.status == "completed" and digest(run) == digest(whole.run)
    assert [line["round"] for line in run.metrics()] == list(range(settings["num-server-rounds"] + 1))
    assert [line["metric"] for line in run.metrics()] == [line["metric"] for line in whole.run.metrics()]


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_loss_falls(long):
    assert long.losses[-1] < long.losses[0] - 0.01


def test_every_method_trains_on_the_same_batches(made, plain, settings):
    assert len(plain.batches) == 3 * 3 * 3
    assert plain.batches == made(settings | PLAIN | {"strategy": "fedkrso"}, 3).batches


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
    rng, trained = np.random.default_rng(0), set()
    for turn in method.turns():
        with local.session(turn, rng) as session:
            loop.train(local.module, iter([batch] * config.local_steps), session, config, rng)
            trained |= {id(parameter) for parameter in session.parameters}
    expected = {name for name, parameter in loaded.module.named_parameters() if id(parameter) in trained}
    assert {name for name in asked if not name.endswith(".B")} == expected  # .B: where FedKRSO's gradients arrive
    moved = {id(parameter) for parameter in local.optimized()}
    assert expected <= {name for name, parameter in loaded.module.named_parameters() if id(parameter) in moved}
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_in_bfloat16_the_host_keeps_float32_and_the_loss_falls_as_it_does_there(long, half):
    exact, losses = long.losses, half.losses
    assert losses[-1] < losses[0] - 0.01 and abs(losses[-1] - exact[-1]) < 0.3 * (exact[0] - exact[-1])
    assert replayed(half.run) == digest(half.run)
    state = AutoModelForSequenceClassification.from_pretrained(half.run.model).state_dict()
    assert {value.dtype for value in state.values()} <= {torch.float32, torch.int64}
    moved = torch.cat([value.flatten() for key, value in state.items() if "encoder" in key or "classifier" in key])
    assert not torch.equal(moved, moved.bfloat16().float())


@pytest.mark.parametrize("settings", KINDS_OF_METHOD, indirect=True)
def test_in_bfloat16_fresh_processes_that_missed_rounds_give_the_bits_of_one_that_did_not(half, settings):
    fresh = watch(settings | LONG | {"compute-dtype": "bfloat16"}, 4, devices=True)
    assert same(fresh.entries, half.entries) and fresh.states == half.states
    asked = [set(line["partitions"]) for line in fresh.run.metrics()[1:]]
    assert asked[2] - asked[1], "nobody has missed an entry"


def test_torch_state_is_left_as_it_was(plain):
    assert plain.torch_state_kept


# ── What a round makes of its replies ────────────────────────────────────────────────────────────────────────────────


def test_a_gradient_that_ends_in_nan_after_the_last_loss_is_no_reply_that_counts(settings, monkeypatch):
    """In int8, where a NaN that nobody looks for becomes a number."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def spoil(parameters, norm):
        steps.append(norm)
        if len(steps) % 2 == 0:
            parameters[0].grad.view(-1)[0] = torch.nan
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    bad = {"max-grad-norm": 1.0, "wire-dtype": "int8", "num-server-rounds": 1, "local-steps": 2}
    with pytest.raises(TrainingError, match="none of 1 rounds published anything"):
        play(settings | bad, nodes=2)
    start, end = Run(Path(settings["output-dir"]) / "run").metrics()
    assert (end["clients"], end["refused"] + end["failed"], end["version"]) == (0, 2, 0)
    assert end["metric"] == start["metric"]


def altered(reply, kind, first, message=None):
    """``reply`` made wrong, as an answer to ``message`` if that is another; ``first`` names an array of it."""
    arrays, metrics, status = arrays_of(reply), dict(reply.content["metrics"]), dict(reply.content["status"])
    floats = next(name for name, value in arrays.items() if value.dtype == np.float32)
    changes = {
        "NaN": lambda: arrays.update({floats: np.full_like(arrays[floats], np.nan)}),
        "infinite": lambda: arrays.update({floats: np.full_like(arrays[floats], -np.inf)}),
        "huge": lambda: arrays.update({floats: np.full_like(arrays[floats], 1e30)}),
        "broadcastable": lambda: arrays.update({floats: arrays[floats].reshape(-1)[:1]}),
        "other dtype": lambda: arrays.update({floats: arrays[floats].astype(np.float64)}),
        "missing array": lambda: arrays.pop(next(iter(arrays))),
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
    return Message(RecordDict(content), reply_to=message or reply_target(reply))


def reply_target(reply):
    """Something a reply can answer, with the metadata of the message that ``reply`` answers."""
    meta = reply.metadata
    target = Message(RecordDict(), meta.src_node_id, meta.message_type, group_id=meta.group_id)
    target.metadata.__dict__["_message_id"] = meta.reply_to_message_id
    return target


KINDS = ["NaN", "infinite", "huge", "broadcastable", "other dtype", "missing array", "extra array", "old version",
         "future version", "no weight", "negative weight", "NaN weight", "NaN loss", "no update", "empty",
         "records swapped", "error", "no reply"]  # fmt: skip


def test_a_reply_that_does_not_count_changes_nothing_but_the_divisor(settings, caplog):
    """Two partitions train; each of the others sends something wrong of one kind, made from what the first sent."""
    good, nodes = 2, 2 + len(KINDS)
    settings = settings | {"num-server-rounds": 2, "local-steps": 2, "round-timeout": 0.1}

    def play_with(kind_of: Callable[[int], str], name: str, run_id: int) -> Run:
        def prepare(grid):
            answer, sent = grid.app, {}

            def app(message, context):
                partition = context.node_config["partition-id"]
                if message.metadata.message_type != "train" or partition < good:
                    reply = answer(message, context)
                    sent[message.metadata.message_type, partition] = reply
                    return reply
                kind, first = kind_of(partition), sent["train", 0]
                if kind in ("error", "no reply"):
                    return Message(Error(code=8, reason="ClientApp stopped responding."), reply_to=message)
                return altered(first, kind, next(iter(first.content["update"])), message)

            grid.app = app

        silent = lambda p, m, reply: None if p >= good and kind_of(p) == "no reply" else reply  # noqa: E731
        return play(settings | {"run-name": name}, nodes, prepare, tamper=silent, run_id=run_id)

    runs = [play_with(lambda partition: KINDS[partition - good], "wrong", 1)]
    if settings["strategy"] in KINDS_OF_METHOD:
        runs.append(play_with(lambda partition: "error", "without", 2))
        assert digest(runs[0]) == digest(runs[1])
    for each in runs:
        counted = [(line["clients"], line["refused"] + line["failed"]) for line in each.metrics()[1:]]
        assert counted == [(good, len(KINDS))] * 2
    for partition in range(good, nodes):  # each with its reason, in both rounds
        assert caplog.text.count(f"partition {partition} ") == 2 * len(runs)


def test_identical_clients_equal_one(settings, monkeypatch):
    """Clients that train on the same rows with the same randomness: their mean is each of them."""
    monkeypatch.setattr(
        "fedkrso_app.federation.workplace.stream", lambda seed, label, round, partition: np.random.default_rng(round)
    )
    monkeypatch.setattr("fedkrso_app.data.partition", lambda train, task, n, *rest: [np.arange(40)] * n)
    settings = settings | {"num-server-rounds": 1, "local-steps": 2}
    one = play(settings | {"run-name": "one"}, nodes=1)
    many = play(settings | {"run-name": "many"}, nodes=3, run_id=2)
    a, b = (replica(run).plain_state() for run in (one, many))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def test_the_head_is_the_mean_of_the_heads(plain):
    heads_add_up(plain, "uniform")


@pytest.mark.parametrize("settings", KINDS_OF_METHOD, indirect=True)
def test_the_head_is_the_mean_of_the_heads_by_examples(settings):
    heads_add_up(watch(settings | PLAIN | {"num-server-rounds": 1, "weighting": "examples"}, 3), "examples")


def heads_add_up(seen: Watched, weighting: str) -> None:
    sent = [(arrays, examples) for (round, _), (arrays, examples) in sorted(seen.replies.items()) if round == 1]
    if "head" not in sent[0][0]:
        pytest.skip("this method sends its head with the rest")
    counts = [examples for _, examples in sent]
    assert len(set(counts)) > 1
    heads = np.array([arrays["head"] for arrays, _ in sent], dtype=np.float64)
    expected = np.average(heads, axis=0, weights=counts if weighting == "examples" else None)
    np.testing.assert_allclose(seen.entries[1]["head"], expected, rtol=1e-6, atol=1e-10)


def test_measured_bytes_equal_the_payload_and_small_headers(plain):
    for way, key in (("up", "uplink_bytes"), ("down", "downlink_bytes")):
        measured = sum(line[key] for line in plain.run.metrics())
        assert plain.payload[way] < measured < plain.payload[way] + 9 * 3000  # 9 messages, a few records each
