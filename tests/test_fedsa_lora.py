"""FedSA-LoRA and local heads: what is personal, who judges on which rows, and what remains of FedIT."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import arrays_of, digest, play, replica
from rich.console import Console
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from fedkrso_app import cli, data
from fedkrso_app.config import ConfigError
from fedkrso_app.core.flat import flatten
from fedkrso_app.core.projection import stream
from fedkrso_app.federation import client
from fedkrso_app.federation.store import cache
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs import compare, plan
from fedkrso_app.runs.study import Study
from fedkrso_app.strategies import make, parse
from fedkrso_app.training import loop, model
from fedkrso_app.training.shapes import Shapes

CLIENTS = {"evaluate": "clients", "client-metrics": True}


@pytest.fixture
def settings(run_config):
    return run_config | {"strategy": "fedsa-lora"} | CLIENTS


def owned(run, partition):
    kept = Ledger(cache() / "personal" / run.info["id"] / f"personal-{partition}")
    return kept.read(kept.versions()[-1]).arrays


def ends(run):
    """A at the end, and every partition's own arrays."""
    own = [{name: value.tobytes() for name, value in owned(run, p).items()} for p in range(4)]
    return Ledger(run.ledger).read(3).arrays["A"].tobytes(), own


def test_it_is_the_loop_of_the_paper(settings):
    """Three rounds in memory, without the federation: A is averaged; B and the head are each client's own."""
    run = play(settings)
    config = parse(settings)
    loaded = model.load(config.model, 2, 0)
    local = make(config, Shapes.of(loaded)).local(loaded)
    task = data.resolve(config)
    rows = data.load(task, config.data_dir, "train")
    shares = data.partition(rows, task, 4, "iid", 0.5, 0)
    factors, A = local.tensors, flatten(local.tensors["A"])
    own = [{name: flatten(factors[name]) for name in ("B", "head")} for _ in range(4)]
    for round in (1, 2, 3):
        sent = []
        for p in range(4):
            for name, values in {"A": A, **own[p]}.items():
                for tensor, part in zip(
                    factors[name], np.split(values, np.cumsum([t.numel() for t in factors[name]])[:-1]), strict=True
                ):
                    tensor.data.copy_(torch.from_numpy(part.copy()).view_as(tensor))
            rng = stream(0, "client", round, p)
            batches = data.batches(
                rows.select(shares[p]), task, loaded.tokenizer, config.batch_size, config.max_length, rng
            )
            with local.session({}, rng) as session:
                loop.train(local.module, batches, session, config, rng)
            sent.append(flatten(factors["A"]))
            own[p] = {name: flatten(factors[name]) for name in ("B", "head")}
        A = np.mean(sent, axis=0, dtype=np.float64).astype(np.float32)
    np.testing.assert_allclose(Ledger(run.ledger).read(3).arrays["A"], A, atol=1e-6)
    for p in range(4):
        for name, expected in own[p].items():
            np.testing.assert_allclose(owned(run, p)[name], expected, atol=1e-5)
        assert any(owned(run, p)["B"] != 0)


def test_clients_do_not_see_each_others_part_whatever_the_order_or_the_process(settings):
    run = play(settings)
    assert len({ends["B"] for ends in ends(run)[1]}) == len({ends["head"] for ends in ends(run)[1]}) == 4
    other = play(settings | {"run-name": "other"}, order=lambda replies: replies[::-1], run_id=2)
    assert ends(run) == ends(other)


def test_fresh_processes_give_the_same_run(settings):
    run, other = play(settings), play(settings | {"run-name": "other"}, run_id=2, devices=True)
    per_round = [[line["per_client"][str(p)]["metric"] for p in range(4)] for line in run.metrics()[1:]]
    assert per_round == [[line["per_client"][str(p)]["metric"] for p in range(4)] for line in other.metrics()[1:]]


@pytest.mark.parametrize("after", ["train", "evaluate"])
def test_a_resumed_run_ends_at_the_same_bits(settings, after):
    whole = play(settings | {"fraction-train": 0.5})

    def stop(partition, message, reply):
        if message.metadata.message_type == after and message.metadata.group_id == "3":
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        play(settings | {"fraction-train": 0.5, "run-name": "again"}, tamper=stop, run_id=2)
    resumed = whole.path.parent / "again"
    again = play(settings | {"fraction-train": 0.5, "run-name": "again", "resume": str(resumed)}, run_id=3)
    seen = {p for line in whole.metrics() for p in line["partitions"]}
    assert Ledger(again.ledger).stamp(3) == Ledger(whole.ledger).stamp(3)
    assert all(owned(again, p)["B"].tobytes() == owned(whole, p)["B"].tobytes() for p in seen)


def test_only_A_travels_and_it_is_8A_bytes_both_ways(settings):
    seen = {}

    def look(partition, message, reply):
        for record in (*message.content.array_records.values(), *reply.content.array_records.values()):
            seen.update({name: array.numpy().nbytes for name, array in record.items()})
        return reply

    run = play(settings, tamper=look)
    config = parse(settings)
    shapes = Shapes.of(model.outline(config.model, 2))
    assert seen.keys() == {"A", "tally"} and seen["A"] == 4 * shapes.inputs(2)
    assert make(config, shapes).paper_bytes() == 8 * shapes.inputs(2) == run.metrics()[1]["paper_bytes"] / 4
    shared = settings | {"client.head": "shared"}
    assert make(parse(shared), shapes).paper_bytes() == 8 * (shapes.inputs(2) + shapes.head)


def test_identical_clients_with_one_head_are_those_of_fedit(settings, monkeypatch):
    monkeypatch.setattr("fedkrso_app.federation.workplace.stream", lambda *labels: np.random.default_rng(labels[2]))
    monkeypatch.setattr("fedkrso_app.data.partition", lambda train, task, n, *rest: [np.arange(40)] * n)
    alike = settings | {"client.head": "shared"}
    run = play(alike)
    fedit = play(alike | {"strategy": "fedit", "run-name": "fedit", "lora.learning-rate": 0.05}, run_id=2)
    end = Ledger(fedit.ledger).read(3).arrays
    assert Ledger(run.ledger).read(3).arrays["A"].tobytes() == end["A"].tobytes()
    kept = Ledger(cache() / "personal" / run.info["id"] / "personal-3")
    np.testing.assert_allclose(kept.read(3).arrays["B"], end["B"], atol=1e-7)


@pytest.mark.parametrize("strategy", ["fedkrso", "fedit", "ffa-lora", "fedsrd"])
def test_any_method_with_a_head_can_leave_it_to_its_clients(run_config, strategy):
    names = set()

    def look(partition, message, reply):
        for record in (*message.content.array_records.values(), *reply.content.array_records.values()):
            names.update(record)
        return reply

    settings = run_config | {"strategy": strategy, "client.head": "local", "fraction-train": 0.5} | CLIENTS
    run = play(settings, tamper=look)
    assert "head" not in names and len(names) > 1
    seen = {p for line in run.metrics() for p in line["partitions"]}
    assert len({owned(run, p)["head"].tobytes() for p in seen}) == len(seen) > 1
    other = play(settings | {"run-name": "other"}, run_id=2, devices=True)
    assert Ledger(other.ledger).stamp(3) == Ledger(run.ledger).stamp(3)


def test_a_method_that_sends_its_head_with_the_rest_cannot(run_config):
    with pytest.raises(ConfigError, match="sends its head with the rest"):
        play(run_config | {"strategy": "fedfft", "client.head": "local"} | CLIENTS)


def test_the_server_does_not_judge_alone(settings):
    with pytest.raises(ConfigError, match="leaves a part of the model at each client"):
        play(settings | {"evaluate": "server"})


def test_a_message_that_comes_twice_gives_the_same_reply(settings):
    def twice(partition, message, reply):
        if message.metadata.message_type == "train":
            again = twice.grid.app(message, twice.grid.contexts[message.metadata.dst_node_id])
            assert arrays_of(again)["A"].tobytes() == arrays_of(reply)["A"].tobytes()
        return reply

    play(settings, tamper=twice, prepare=lambda grid: setattr(twice, "grid", grid))


def test_a_client_is_judged_with_its_own_part_on_its_own_rows(settings, tmp_path):
    """The exported model of partition 2, by transformers alone, scores what the client said of itself."""
    settings = settings | {"partition": "dirichlet", "dirichlet-alpha": 1.0}
    run = play(settings)
    answer = CliRunner().invoke(cli.app, ["export", str(run.path), str(tmp_path / "out"), "--partition", "2"])
    assert answer.exit_code == 0, answer.output
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    config, task = parse(settings), data.resolve(parse(settings))
    place = client.Workplace(run.info["id"], config, 4)
    rows = place.share("validation", 2)
    batches = data.evaluation_batches(rows, task, place.model.tokenizer, 64, config.max_length)
    right = 0
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            right += int((exported(**batch).logits.argmax(-1) == labels).sum())
    assert run.metrics()[-1]["per_client"]["2"]["metric"] == pytest.approx(right / len(rows))


def test_the_spread_over_clients_is_reported(settings):
    line = play(settings).metrics()[-1]
    own = [line["per_client"][str(p)]["metric"] for p in range(4)]
    expected = {"mean": np.mean(own), "sd": np.std(own, ddof=1), "min": min(own), "max": max(own)}
    assert line["client_metric"] == pytest.approx(expected)


# Validation rows that follow the training rows


def rows_of(labels):
    return Dataset.from_dict({"sentence": ["w"] * len(labels), "label": labels})


def test_validation_shares_follow_the_training_rows_label_by_label():
    rng = np.random.default_rng(0)
    train, held = rows_of(rng.integers(0, 2, 400).tolist()), rows_of(rng.integers(0, 2, 100).tolist())
    task = data.task("glue/sst2")
    shares = data.partition(train, task, 5, "dirichlet", 0.5, 3)
    found = data.following(shares, train, held, task, 3)
    assert sorted(np.concatenate(found).tolist()) == list(range(100))
    known, asked = np.array(train["label"]), np.array(held["label"])
    for share, rows in zip(shares, found, strict=True):
        for label in (0, 1):
            part = (known[share] == label).sum() / (known == label).sum() * (asked == label).sum()
            assert abs((asked[rows] == label).sum() - part) <= 1
    again = data.following(shares, train, held, task, 3)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_regressions_rows_follow_by_fifths():
    task = data.task("glue/stsb")
    scores = np.linspace(0, 5, 100)
    rows = Dataset.from_dict({"sentence1": ["w"] * 100, "sentence2": ["w"] * 100, "label": scores.tolist()})
    shares = [np.arange(50), np.arange(50, 100)]  # low scores, high scores
    low, high = data.following(shares, rows, rows, task, 0)
    assert scores[low].mean() < 1.5 and scores[high].mean() > 3.5


def test_a_client_without_validation_rows_is_refused_before_round_1():
    train, task = rows_of([0] * 30 + [1] * 30), data.task("glue/sst2")
    shares = [np.arange(29), np.array([29]), np.arange(30, 60)]
    with pytest.raises(ConfigError, match="1 of 3 clients have no validation rows"):
        data.following(shares, train, rows_of([0, 1] * 4), task, 0)


def test_evaluation_of_one_model_does_not_depend_on_who_holds_which_rows(run_config):
    """Every validation row is in one share, so FedIT scores at its clients what it scores at the server."""
    uneven = run_config | {"strategy": "fedit", "partition": "dirichlet", "dirichlet-alpha": 1.0}
    server, clients = play(uneven), play(uneven | CLIENTS | {"run-name": "clients"}, run_id=2)
    for one, other in zip(server.metrics()[1:], clients.metrics()[1:], strict=True):
        assert one["metric"] == pytest.approx(other["metric"])
    assert (
        digest(server) and flatten(replica(server).shared()).tobytes() == flatten(replica(clients).shared()).tobytes()
    )


def test_a_comparison_on_clients_rows_has_both_with_local_heads(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_play", lambda config, clients, engine: (play(config, nodes=2) for _ in "1"))
    own = CLIENTS | {"client.head": "local", "num-server-rounds": 1}
    arms = {name: {"strategy": name} for name in ("fedit", "fedsa-lora")}
    made = compare.Comparison(Study(run_config | own, {"iid": {}}, arms, (0,), clients=2), tmp_path / "out", "process")
    assert not made.make(Console(quiet=True))
    rows = {row["strategy"]: row for row in made.save("test")["rows"]}
    assert rows["fedsa-lora"]["uplink_mb"] < rows["fedit"]["uplink_mb"] and rows["fedit"]["metric"] is not None


@pytest.mark.parametrize("strategy", ["fedsa-lora", "fedkrso", "fr-lora"])
def test_small_numbers_travel_where_the_seed_gives_the_start(run_config, strategy):
    """A server without a model: nothing that travels has a start of the model's own. Fresh processes agree."""
    small = run_config | CLIENTS | {"strategy": strategy, "client.head": "local", "wire-dtype": "int8"}
    run, other = play(small), play(small | {"run-name": "other"}, run_id=2, devices=True)
    exact = play(small | {"wire-dtype": "float32", "run-name": "exact"}, run_id=3)
    assert Ledger(run.ledger).stamp(3) == Ledger(other.ledger).stamp(3)
    a, b = (flatten(replica(each).shared()) for each in (run, exact))
    start = flatten(replica(exact, 0).shared()) if strategy != "fedsa-lora" else start_of(small)
    assert 0 < np.linalg.norm(a - b) < 0.3 * np.linalg.norm(b - start)
    less = exact.metrics()[-1]["uplink_bytes"] - run.metrics()[-1]["uplink_bytes"]
    assert less > 4 * 416  # four clients, at least one byte less for each value of A


def start_of(settings):
    config = parse(settings)
    loaded = model.load(config.model, 2, 0)
    return flatten(make(config, Shapes.of(loaded)).local(loaded).shared())


@pytest.mark.parametrize("head", ["shared", "local"])
def test_the_start_of_the_factors_is_that_of_the_model(run_config, head):
    config = parse(run_config | {"strategy": "fedit", "client.head": head, "evaluate": "clients"})
    loaded = model.load(config.model, 2, 0)
    method = make(config, Shapes.of(loaded))
    state = method.local(loaded).state()
    assert {name: state[name].tobytes() for name in "AB"} == {k: v.tobytes() for k, v in method.known_start().items()}


def test_small_numbers_are_refused_where_the_server_knows_no_start(run_config):
    with pytest.raises(ConfigError, match="needs evaluate = 'server': head would be rounded"):
        play(run_config | CLIENTS | {"strategy": "fedit", "wire-dtype": "int8"})


def test_in_bfloat16_fresh_processes_give_the_bits_of_warm_ones(settings):
    half = settings | {"compute-dtype": "bfloat16", "fraction-train": 0.5}
    run, other = play(half), play(half | {"run-name": "other"}, run_id=2, devices=True)
    assert Ledger(run.ledger).stamp(3) == Ledger(other.ledger).stamp(3)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_it_is_planned_to_the_byte(settings, fraction):
    settings = settings | {"fraction-train": fraction, "num-server-rounds": 6}
    row = plan.plan(settings | {"evaluate": "server"}, ["fedsa-lora"], 4)["rows"][0]
    lines = [line for line in play(settings).metrics() if line["round"]]
    asked = sum(line["clients"] for line in lines)
    up, down = (sum(line[key] for line in lines) / asked for key in ("uplink_bytes", "downlink_bytes"))
    assert (row["up"], row["down"]) == pytest.approx((up, down), rel=0.02 if fraction == 1 else 0.1)


def test_a_partition_whose_part_is_lost_begins_with_that_of_the_start(settings):
    whole = play(settings)

    def lose(partition, message, reply):
        if partition == 3 and message.metadata.message_type == "evaluate":
            for folder in (cache() / "nodes").glob("*/personal-0"):
                shutil.rmtree(folder)
        return reply

    run = play(settings | {"run-name": "lost"}, tamper=lose, run_id=2)
    assert run.status == "completed" and run.metrics()[-1]["failed"] == 0
    assert owned_or_none(run, 0) is None and owned(run, 1)["B"].shape == owned(whole, 1)["B"].shape


def owned_or_none(run, partition) -> Path | None:
    folder = cache() / "personal" / run.info["id"] / f"personal-{partition}"
    return folder if folder.exists() else None
