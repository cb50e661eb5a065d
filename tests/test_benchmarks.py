"""Each benchmark on a tiny model: it runs, counts right, and compares the same work. No time is asserted."""

import functools
import importlib
import itertools
import json
import re
import shutil

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from helpers import play
from recorder import record

from benchmarks import (
    engine,
    growth,
    memory,
    models,
    peer,
    per_example,
    replica,
    secure,
    server,
    simulation,
    step,
)
from fedkrso_app.federation import local
from fedkrso_app.federation.streaming import StreamingGrid
from fedkrso_app.strategies import parse
from fedkrso_app.training.counting import Counter
from fedkrso_app.training.static import Recorder

DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def by_peer(rows):
    return {row["peer"]: row for row in rows}


def test_step_relates_every_peer_to_the_others():
    rows = by_peer(step.rows("tiny", rows=2, tokens=8, repeats=1))
    assert {*models.PEERS, "fedkrso, recompute", "fedkrso, checkpoint"} == set(rows)
    assert all(row["seconds"] > 0 for row in rows.values()) and rows["full"]["÷ full"] == 1


def test_a_step_by_rows_is_beside_the_plain_step_of_each_peer():
    rows = by_peer(per_example.rows("tiny", rows=2, tokens=8, repeats=1))
    assert {*per_example.PEERS} == set(rows) and all(row["noise"] > 0 and row["÷ plain"] > 0 for row in rows.values())


def test_all_peers_compute_the_same_loss_and_move_what_they_say():
    inputs = models.batch(2, 8)
    losses = []
    for name in models.PEERS:
        torch.manual_seed(0)
        module = models.classifier("tiny")
        peer = models.Peer(name, module)
        torch.manual_seed(1)
        losses.append(peer.module(**inputs).loss.item())
        weight = peer.rso.layers["roberta.encoder.layer.0.output.dense"].W if peer.rso else None
        before = [(p, p.detach().clone()) for p in peer.trained() if weight is None or p.ndim == 1]
        start = None if weight is None else weight.clone()
        peer.step(inputs)
        peer.step(inputs)
        if weight is not None:
            assert not torch.equal(weight, start)
        elif name != "full":  # there the unused rows of the embeddings stay
            assert not any(torch.equal(p, old) for p, old in before)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_memory_counts_agree_with_the_hooks_and_fall_with_the_setting():
    rows = by_peer(memory.rows("tiny", rows=4, tokens=16))
    keep, recompute, checkpoint = (rows[f"fedkrso{end}"] for end in ("", ", recompute", ", checkpoint"))
    assert keep["hooks"] == pytest.approx(keep["activations"], rel=0.02)  # two routes to one number
    assert keep["activations"] <= rows["a-frozen"]["activations"] < rows["lora"]["activations"]
    assert keep["activations"] > recompute["activations"] > checkpoint["activations"]
    assert keep["gradients"] < rows["lora"]["gradients"] < rows["full"]["gradients"]
    assert rows["full"]["optimizer"] == pytest.approx(2 * rows["full"]["weights"], rel=0.01)


def test_counts_for_a_gpu_fall_with_the_setting_and_hold_logits_only_where_they_are_made(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    monkeypatch.setitem(models.LLAMAS, "tiny", sizes | {"tie_word_embeddings": True})
    monkeypatch.setitem(models.ON_GPU, "Llama", (lambda: models.llama("tiny"), torch.bfloat16, (2, 16)))

    def count(*peer):
        return memory.count(*models.on_gpu("Llama", "meta", *peer), seeds=2)

    keep, recompute, checkpoint = (count("fedkrso", setting, False) for setting in memory.SETTINGS)
    lora = count("lora", "keep", True)
    assert lora["blocks"] > keep["blocks"] > recompute["blocks"] > checkpoint["blocks"]
    assert keep["TFLOP"] < recompute["TFLOP"] < checkpoint["TFLOP"]
    logits = 2 * 16 * 128256 * 2 / memory.MIB
    assert count("fedkrso", "keep", True)["kept"] - keep["kept"] > logits


def test_storage_counts_a_hand_computed_example():
    with Counter() as storage:
        x = torch.zeros(100)  # 400 bytes
        y = x.view(10, 10) + 1  # another 400; the view is free
        del y
        z = torch.zeros(5, dtype=torch.float64)  # 40
    assert (storage.live, storage.peak) == (440, 800)
    del x, z
    assert storage.live == 0


def test_a_missed_round_costs_one_product_a_layer_over_all_seeds():
    rows = {row["part"]: row for row in replica.rows("tiny", missed=2, repeats=1)}
    targets = 6 * models.SIZES["tiny"]["num_hidden_layers"]
    assert rows["advance"]["products"] == rows["apply"]["products"] == rows["fold"]["products"] == targets


@pytest.mark.parametrize("strategy, dtype", [("fedkrso", "bfloat16"), ("fedfft", "float32")])
def test_each_way_to_train_a_round_is_timed_beside_one_by_one_and_eager(strategy, dtype):
    """Steps are recorded as they are on a GPU, by the tests' own means."""
    recorder = Recorder(record)
    row = engine.row("tiny", strategy, dtype, tuple(engine.WAYS), (2, 6), 2, 3, recorder)
    passes = {"pass", "both"} if strategy == "fedkrso" else set()
    assert {"eager", "captured", *passes} == set(row) & set(engine.WAYS) and recorder.record
    for way in {"captured", *passes}:
        assert row[f"× {way}"] == pytest.approx(row["eager"] / row[way]) and row[way] > 0


def test_what_cannot_be_measured_costs_a_row_that_alone_and_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    def fails(*given):
        raise RuntimeError("no memory\nfor it")

    wanted = engine.cases(["tiny"], ["tiny"], ["fedkrso"], ["float32", "bfloat16"])
    assert wanted == dict.fromkeys(
        [("tiny", "fedkrso", dtype) for dtype in ("float32", "bfloat16")], ("eager", "captured")
    )
    monkeypatch.setitem(engine.WAYS, "pass", (fails, False))
    for dtype in ("float32", "bfloat16"):
        engine.measured(("tiny", "fedkrso", dtype), ("eager", "pass"), (2, 6), 2, 2, tmp_path / "rows.jsonl")
    rows = engine.read(tmp_path / "rows.jsonl")
    assert list(rows) == list(wanted) and all(row["eager"] > 0 for row in rows.values())
    assert {row["failed"] for row in rows.values()} == {"pass: RuntimeError: no memory"}


def test_the_servers_memory_does_not_grow_with_the_replies():
    few, many = server.rows("tiny", [4, 40])
    assert many["peak MiB"] < few["peak MiB"] + 0.2  # the other 36 replies weigh 3.3 MiB


def test_secure_sums_are_timed_and_their_bytes_are_the_words_and_a_few_shares():
    for row in secure.rows([4], [1000], [64, 16]):
        assert row["seal s"] > 0 and row["open s"] > 0 and row["lossy s"] > 0
        assert row["MB up"] * 1e6 == pytest.approx(1000 * row["bits"] / 8, abs=3000)


def test_the_share_of_distinct_seeds_is_that_of_all_possible_draws():
    draws = list(itertools.product(range(3), repeat=4))
    assert growth.distinct_seeds(3, 4) == pytest.approx(sum(len(set(draw)) for draw in draws) / len(draws))


def test_measured_bytes_grow_as_the_formula_says_and_every_panel_is_drawn(tmp_path):
    rows = growth.rows("tiny", repeats=1)
    for row in rows:
        if row["over"] in ("K", "J"):  # headers, a few kB, are not in the formula; draws are random
            assert row["measured"] == pytest.approx(row["formula"], rel=0.1, abs=0.003)
    peaks = [row["measured"] for row in rows if row["over"] == "replies"]
    assert peaks[-1] < peaks[0] + 0.5  # 99 more replies weigh 9 MiB
    growth.draw(rows, "title", tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_time_of_a_simulation_is_shared_out_without_gap_or_overlap():
    def interval(part, process, start, end):
        return {"part": part, "process": process, "start": start, "end": end, "cpu": (end - start) / 2, "thread": 0.5}

    seen = [
        interval("server", 1, 0, 20),
        interval("client", 2, 2, 10),
        interval("rebuild", 2, 2, 3),
        interval("train", 2, 3, 9),
        interval("client", 3, 4, 12),
        interval("train", 3, 5, 11),
        interval("aggregate", 1, 9, 13),  # worker 2 waits from 10, worker 3 from 12: four seconds of two workers
        interval("evaluate", 1, 13, 17),  # both wait
        interval("evaluate", 1, 0, 1),  # before any worker was there
    ]
    rows = {row["part"]: row for row in simulation.account(seen, workers=2)}
    walls = {part: row["wall"] for part, row in rows.items()}
    assert walls.pop("all") == 18 == sum(walls.values())
    expected = {"rebuild": 0.5, "train": 6, "pack": 0, "client, rest": 1.5, "aggregate": 2, "evaluate": 4}
    assert walls == expected | {"transport": 4}
    assert rows["all"]["÷ steps"] == 18 / 3 and rows["aggregate"]["CPU"] == 0.5 and rows["evaluate"]["CPU"] == 2.5


def test_the_peer_trains_the_same_model_on_the_same_batches(run_config, model_folder, tmp_path):
    """The loss before the first update tells; FedFFT trains every parameter as well. Their dropout differs."""
    plain = shutil.copytree(model_folder, tmp_path / "plain")
    shape = json.loads((plain / "config.json").read_text()) | dict.fromkeys(DROPOUT, 0.0)
    (plain / "config.json").write_text(json.dumps(shape))
    settings = (
        run_config
        | {"model": str(plain)}
        | {"strategy": "fedfft", "local-steps": 1, "fedkrso.interval": 1, "num-server-rounds": 1}
    )
    start, losses = peer.pack(peer.build(parse(settings)).module), []
    for partition in range(2):
        node = {"partition-id": partition, "num-partitions": 2}
        content = RecordDict({"arrays": start, "config": ConfigRecord({"server-round": 1})})
        reply = peer.client(Message(content, partition, "train"), Context(1, partition, node, RecordDict(), settings))
        losses.append(reply.content.metric_records["metrics"]["train-loss"])
        record = reply.content.array_records["arrays"]
        assert list(record) == list(start) and record.object_id != start.object_id  # the whole state, moved
    assert play(settings, nodes=2).metrics()[-1]["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_the_peers_server_averages_what_its_clients_send(run_config, caplog):
    """A whole run of it, in this process; and what the simulation puts clocks around is there in both apps."""
    for app in simulation.APPS.values():
        for function in (*app["client_parts"], *app["server_parts"]):
            module, path = function.split(":")
            assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module)))
    settings = run_config | {"num-server-rounds": 2, "local-steps": 2}
    grid = local.LocalGrid(peer.client, settings, 2)
    with caplog.at_level("INFO", "flwr"):
        local.play(peer.server, StreamingGrid(grid), settings)
    losses = re.findall(r"'loss': (0\.\d+)\}", caplog.text)
    assert len(set(losses)) == 3 and "Received 2 results and 0 failures" in caplog.text  # W^0, and after each round


@pytest.mark.slow
def test_a_simulation_is_clocked_in_all_its_processes(run_config, monkeypatch):
    monkeypatch.delenv("TMPDIR")  # Ray's sockets must have short paths
    monkeypatch.setattr("tempfile.tempdir", None)
    rows = simulation.rows(run_config | {"num-server-rounds": 1}, clients=2, workers=1, apps=["fedkrso"])
    parts = {row["part"]: row["wall"] for row in rows}
    assert all(parts[part] > 0 for part in parts)
    assert parts["all"] == pytest.approx(sum(parts.values()) - parts["all"])


def test_json_and_table_print_the_same_rows(capsys):
    rows = [{"peer": "a", "seconds": 0.5}]
    models.show("title", rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == rows
    models.show("title", rows, as_json=False)
    assert "0.5" in capsys.readouterr().out
