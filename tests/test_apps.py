"""Both apps on an in-process grid: what a run leaves, determinism, resume, and replies that fail or do not fit."""

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flwr.app import Context, RecordDict
from helpers import Grid, arrays_of, digest, play, replayed
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedkrso_app import server_app
from fedkrso_app.config import ConfigError
from fedkrso_app.federation import client
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.folder import Run
from fedkrso_app.training import model
from fedkrso_app.training.loop import TrainingError


def test_a_run_leaves_what_a_user_expects(run_config, node_files):
    run = play(run_config)
    assert run.status == "completed"
    assert [line["round"] for line in run.metrics()] == [0, 1, 2, 3]
    expected = {
        "round", "version", "metric", "eval_loss", "train_loss", "uplink_bytes", "downlink_bytes", "paper_bytes",
        "clients", "refused", "seconds",
    }  # fmt: skip
    assert expected <= set(run.metrics()[-1])
    assert run.info["config"] == run_config and run.info["libraries"]["flwr"]
    plain = AutoModelForSequenceClassification.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert plain(**tokenizer("w1 w2", return_tensors="pt")).logits.shape == (1, 2)
    assert model.state_digest(plain.state_dict()) == digest(run)
    assert not list(node_files.iterdir())


def test_f1_is_scikit_learns_of_the_final_model_text_by_text_whoever_evaluates(run_config, data_folder):
    sizes = set()

    def look(partition, message, reply):
        if "tally" in reply.content:
            sizes.add(reply.content["tally"]["tally"].numpy().nbytes)
        return reply

    settings = run_config | {"metric": "f1", "strategy": "fedfft", "num-server-rounds": 1}
    settings |= {"local-steps": 100, "fedfft.learning-rate": 0.01}  # enough to predict both classes
    run = play(settings, nodes=2)
    shared = play(settings | {"run-name": "shared", "evaluate": "clients"}, nodes=2, run_id=2, tamper=look)
    plain = AutoModelForSequenceClassification.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    rows = pd.read_parquet(data_folder / "sst2" / "validation.parquet")
    found = [int(plain(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in rows["sentence"]]
    expected = pytest.approx(f1_score(rows["label"], found))
    assert len(set(found)) == 2 and [line.metrics()[-1]["metric"] for line in (run, shared)] == [expected] * 2
    assert sizes == {8 * (2 + 3 * 2)}


def test_resume_with_other_settings_is_refused_by_name(run_config):
    run = play(run_config | {"num-server-rounds": 1})
    with pytest.raises(ConfigError, match=r"fedkrso.rank = 2, now it is 3"):
        play(run_config | {"resume": str(run.path), "fedkrso.rank": 3})


def test_a_second_run_never_shares_a_folder(run_config):
    run = play(run_config | {"num-server-rounds": 1})
    before = digest(run)
    with pytest.raises(ConfigError, match="already exists"):
        play(run_config)
    assert digest(run) == before and run.status == "completed"


def test_a_reply_that_comes_twice_counts_once(run_config):
    once = play(run_config)
    twice = play(
        run_config | {"run-name": "twice"}, order=lambda replies: [r for r in replies for _ in range(2)], run_id=2
    )
    assert digest(once) == digest(twice)


def test_below_min_replies_nothing_is_published_and_the_run_goes_on(run_config, caplog):
    def only_in_round_two(partition, message, reply):
        return reply if message.content["train"]["round"] == 2 or partition == 0 else None

    run = play(run_config | {"min-replies": 2, "round-timeout": 0.3}, tamper=only_in_round_two)
    assert [line["version"] for line in run.metrics()] == [0, 0, 1, 1]
    assert caplog.text.count("nothing is published") == 2
    assert re.search(r"rounds without an update +│ 2: too few good replies", caplog.text)
    assert replayed(run) == digest(run)


def test_a_run_whose_every_round_fails_has_failed_and_can_go_on(run_config):
    with pytest.raises(TrainingError, match="none of 3 rounds published anything"):
        play(run_config | {"round-timeout": 0.3}, tamper=lambda partition, message, reply: None)
    run = Run(Path(run_config["output-dir"]) / "run")
    assert run.status.startswith("failed: none of 3 rounds") and not (run.path / "result.json").exists()
    play(run_config | {"resume": str(run.path)}, run_id=2)
    assert run.status == "completed" and run.metrics()[-1]["version"] == 3


def test_a_node_that_lost_its_entries_is_resynchronised_and_costs_one_share(run_config, node_files):
    def lose(partition, message, reply):
        if partition == 3 and message.content["train"]["round"] == 2:
            shutil.rmtree(node_files)
            client.workplace.cache_clear()
        return reply

    run = play(run_config | {"num-server-rounds": 5}, tamper=lose)
    clients = [line["clients"] for line in run.metrics()[1:]]
    assert clients[:2] == [4, 4] and clients[2] < 4 and clients[3:] == [4, 4]
    assert replayed(run) == digest(run)


def test_example_weights_equal_a_hand_computation(run_config):
    replies = {}

    def keep(partition, message, reply):
        replies[partition] = reply
        return reply

    run = play(
        run_config
        | {"weighting": "examples", "partition": "dirichlet", "dirichlet-alpha": 0.3, "num-server-rounds": 1},
        tamper=keep,
    )
    counts = {partition: reply.content["metrics"]["num-examples"] for partition, reply in replies.items()}
    assert len(set(counts.values())) > 1
    entry = Ledger(run.ledger).read(1)
    for seed, mean in zip(entry.arrays["seeds"], entry.arrays["accumulators"], strict=True):
        expected = np.zeros_like(mean, dtype=np.float64)
        for partition, reply in replies.items():
            arrays = arrays_of(reply)
            for k, B in zip(arrays["seeds"], arrays["accumulators"], strict=True):
                expected += B.astype(np.float64) * counts[partition] * (k == seed)
        np.testing.assert_allclose(mean, expected / sum(counts.values()), rtol=1e-5, atol=1e-10)


def test_nodes_that_cannot_take_part_say_why(run_config):
    with pytest.raises(ConfigError, match=r"no node can take part: .*num-partitions"):
        client.workplace.cache_clear()
        grid = Grid(run_config, 2)
        for context in grid.contexts.values():
            context.node_config = {"partition-id": 0}
        server_app.app(grid, Context(1, 1, {}, RecordDict(), run_config))


def test_evaluate_off_writes_rounds_without_a_metric(run_config):
    run = play(run_config | {"evaluate": "off", "num-server-rounds": 1})
    assert "metric" not in run.metrics()[-1] and run.status == "completed"


@pytest.mark.parametrize(
    ("strategy", "key"), [("fedkrso", "fedkrso.rank"), ("fedit", "lora.rank"), ("fedsrd", "lora.rank")]
)
def test_a_rank_as_wide_as_a_layer_is_refused_before_there_is_a_folder(run_config, strategy, key, tmp_path):
    with pytest.raises(ConfigError, match=f"{key} = 16 is impossible: it must be below 16"):
        play(run_config | {"strategy": strategy, key: 16})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data-dir": "/nowhere"}, "data-dir = '/nowhere' is not a folder"),
        ({"task": "glue/sst3"}, "task = 'glue/sst3'.*Did you mean 'glue/sst2'"),
        ({"model": "/nowhere"}, "model = '/nowhere'.*config.json"),
        ({"resume": "/nowhere"}, "/nowhere is not a run's folder"),
        ({"output-dir": "/dev/null/runs"}, "output-dir = '/dev/null/runs'"),
    ],
)
def test_a_missing_input_fails_before_round_one_with_one_sentence(run_config, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        play(run_config | changes)


def test_a_full_disk_leaves_no_folder_that_takes_the_name_of_the_next_run(run_config, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"output-dir = .*: nothing can be written \(No space left on device\)"):
            play(run_config)
    assert play(run_config | {"num-server-rounds": 1}).status == "completed"


def test_a_run_is_running_only_while_someone_writes_it(tmp_path):
    folder = Run(tmp_path)
    folder.set_status("running")
    assert folder.status == "interrupted"
    folder.lock()
    assert folder.status == Run(tmp_path).status == "running"
    folder.unlock()
    assert folder.status == "interrupted"


def test_a_file_that_a_full_disk_cut_short_is_as_it_was(tmp_path, monkeypatch):
    folder = Run(tmp_path)
    folder.set_status("running")
    monkeypatch.setattr(os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.set_status("completed")
    assert folder.status == "interrupted" and [path.name for path in tmp_path.iterdir()] == ["status"]


def test_clients_without_validation_rows_to_judge_on_are_found_before_round_one(run_config):
    """40 validation rows: enough for the server, too few for 41 clients."""
    with pytest.raises(ConfigError, match=r"evaluate = 'clients' reads validation rows .* = 41 must be 1 to 40"):
        play(run_config | {"evaluate": "clients"}, nodes=41)
    short = {"run-name": "b", "num-server-rounds": 1, "local-steps": 1, "fedkrso.interval": 1}
    assert play(run_config | short, nodes=41, run_id=2).status == "completed"


def test_more_clients_than_rows_fail_with_the_reason_of_the_clients(run_config, monkeypatch):
    monkeypatch.setattr("fedkrso_app.federation.nodes._GATHERING", 0)  # 498 more would be waited for
    with pytest.raises(ConfigError, match="no node can take part: partition 0: num-supernodes = 500 must be 1 to 160"):
        client.workplace.cache_clear()
        grid = Grid(run_config, 2)
        for context in grid.contexts.values():
            context.node_config = {"partition-id": 0, "num-partitions": 500}
        server_app.app(grid, Context(1, 1, {}, RecordDict(), run_config))


def failing(monkeypatch, run_config, longest: int) -> None:
    """Have the model raise an error of its own for labelled texts of more than ``longest`` tokens."""
    kind = type(model.load(run_config["model"], 2, 0).module)
    forward = kind.forward

    def short_alone(self, input_ids, labels=None, **rest):
        if labels is not None and input_ids.shape[1] > longest:
            raise IndexError(f"no position for {input_ids.shape[1]} tokens")
        return forward(self, input_ids=input_ids, labels=labels, **rest)

    monkeypatch.setattr(kind, "forward", short_alone)


def test_what_fails_on_the_longest_rows_fails_on_the_server_before_there_is_a_folder(run_config, monkeypatch):
    failing(monkeypatch, run_config, 9)  # the texts have five to ten tokens
    with pytest.raises(ConfigError, match=r"fails on the longest train rows .IndexError: no position for 10 tokens"):
        play(run_config)
    assert not Path(run_config["output-dir"]).exists()


def test_what_fails_on_a_nodes_longest_rows_fails_at_its_join(run_config, monkeypatch):
    failing(monkeypatch, run_config, 9)
    with pytest.raises(ConfigError, match=r"no node can take part: partition 0: model = .* fails on the longest train"):
        play(run_config | {"evaluate": "clients"})


def test_a_node_that_cannot_write_its_files_says_so_at_its_join(run_config, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("FEDKRSO_CACHE", str(tmp_path / "taken"))
    with pytest.raises(ConfigError, match=r"cannot be written .*set FEDKRSO_CACHE to a folder"):
        play(run_config)
