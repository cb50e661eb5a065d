"""A node that holds several partitions: each is a client, as if it had a node of its own."""

import pytest
from datasets import Dataset
from helpers import digest, play, replayed
from test_contract import KINDS_OF_METHOD

from fedkrso_app.config import ConfigError
from fedkrso_app.federation import client
from fedkrso_app.federation.nodes import named
from fedkrso_app.records import protocol
from fedkrso_app.records.protocol import Answer, Instructions
from fedkrso_app.records.wire import Refused
from fedkrso_app.runs.folder import Run

COUNTED = (
    "uplink_bytes",
    "downlink_bytes",
    "catchup_bytes",
    "clients",
    "refused",
    "failed",
    "partitions",
    "train_loss",
)


def figures(run: Run) -> list[dict]:
    return [{key: line.get(key) for key in (*COUNTED, "train_loss", "metric", "eval_loss")} for line in run.metrics()]


@pytest.mark.parametrize("strategy", KINDS_OF_METHOD)
def test_how_many_clients_a_node_holds_changes_neither_bits_nor_bytes(run_config, strategy):
    """So the contract holds for all of them. Half of six clients per round: a node is caught up for all that it holds,
    each is metered by itself, and the order in which nodes answer does not count."""
    few = {
        "num-server-rounds": 2,
        "fraction-train": 0.5,
        "local-steps": 1,
        "fedkrso.interval": 1,
        "batch-size": 4,
        "wire-dtype": "int8",
    }
    settings, back = run_config | few | {"strategy": strategy}, lambda replies: replies[::-1]
    runs = [
        play(settings | {"run-name": f"by {each}", "clients-per-node": each}, 6, run_id=each, order=order)
        for each, order in ((1, list), (2, back), (3, back))
    ]
    assert len({digest(run) for run in runs}) == 1 and replayed(runs[2]) == digest(runs[0])
    assert figures(runs[0]) == figures(runs[1]) == figures(runs[2])


def test_clients_of_one_node_judge_and_are_told_apart(run_config):
    settings = run_config | {"evaluate": "clients", "client-metrics": True}
    runs = [play(settings | {"run-name": f"by {each}", "clients-per-node": each}, run_id=each) for each in (1, 4)]
    assert figures(runs[0]) == figures(runs[1])
    own = ("metric", "eval_loss", "train_loss", "uplink_bytes")
    kept = [
        {partition: [client[key] for key in own] for partition, client in run.metrics()[-1]["per_client"].items()}
        for run in runs
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 4


def test_a_client_that_fails_costs_its_node_no_other_reply(run_config, monkeypatch, caplog):
    train = client.Workplace._train

    def failing(self, partition, instructions):
        if partition == 2:
            raise ValueError("its rows are on strike")
        return train(self, partition, instructions)

    monkeypatch.setattr(client.Workplace, "_train", failing)
    run = play(run_config | {"clients-per-node": 4, "num-server-rounds": 1})
    assert run.metrics()[-1]["partitions"] == [0, 1, 3] and run.metrics()[-1]["failed"] == 1
    assert "partition 2 failed: its rows are on strike" in caplog.text


@pytest.mark.parametrize(
    ("node", "each", "held", "total"),
    [
        ({"partition-id": 1, "num-partitions": 3}, 1, (1,), 3),
        ({"partition-id": 1, "num-partitions": 3}, 4, (4, 5, 6, 7), 12),
        ({"partitions": "0-2", "num-partitions": 5}, 1, (0, 1, 2), 5),
        ({"partitions": "4,0-1", "num-partitions": 5}, 9, (0, 1, 4), 5),
        ({"partitions": 3, "num-partitions": 5}, 1, (3,), 5),
    ],
)
def test_a_node_knows_its_partitions(node, each, held, total):
    assert client.identity(node, {"clients-per-node": each}) == (held, total)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"partitions": "0-4"}, "num-partitions"),
        ({"num-partitions": 4}, "partition-id"),
        ({"partition-id": 4, "num-partitions": 4}, "partition 4 is not below the federation's 4"),
        ({"partitions": "2-9", "num-partitions": 4}, "is not below the federation's 4"),
        ({"partitions": "1-2,2", "num-partitions": 4}, "twice or none"),
        ({"partitions": "3-1", "num-partitions": 4}, "twice or none"),
        ({"partitions": "a few", "num-partitions": 4}, "no list of partition ids"),
        ({"partitions": "", "num-partitions": 4}, "no list of partition ids"),
        ({"partition-id": 0, "num-partitions": 1, "share-errors": "yes"}, "neither true nor false"),
    ],
)
def test_a_node_that_does_not_know_its_partitions_says_what_to_write(node, reason):
    with pytest.raises(ConfigError, match=reason):
        client.identity(node, {"clients-per-node": 1})


def test_partition_ids_are_named_in_few_letters():
    assert named((0, 1, 2, 4, 7, 8)) == "0-2, 4, 7-8" and named((5,)) == "5" and named(()) == ""


@pytest.mark.parametrize("ids", [[0, 0], [5], [-1], ["1"], [True], 1, None])
def test_an_answer_that_names_impossible_partitions_is_refused(ids):
    content = Answer((0,), 5, model="m", stamp="s").content()
    assert Answer.read(content).partitions == (0,)
    if ids is None:
        del content["join"]["partitions"]
    else:
        content["join"]["partitions"] = ids
    with pytest.raises(Refused, match=r"no list of partition ids below 5"):
        Answer.read(content)


def test_a_message_names_partitions_only_where_a_node_has_several():
    plain = Instructions("run", 1, "stamp", round=1)
    assert "partitions" not in plain.record()
    some = Instructions("run", 1, "stamp", round=1, partitions=(3, 1))
    content = protocol.RecordDict({"train": some.record()})
    assert Instructions.read(content, "train") == some


def wards(data_folder, tmp_path, sizes: list[int]) -> str:
    """A folder of its own for each partition, with the first rows of the corpus; the pattern of their names."""
    for partition, size in enumerate(sizes):
        folder = tmp_path / f"ward-{partition}" / "sst2"
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            rows = Dataset.from_parquet(str(data_folder / "sst2" / f"{split}.parquet"))
            rows.select(range(min(size, len(rows)))).to_parquet(folder / f"{split}.parquet")
    return str(tmp_path / "ward-{partition}")


def test_each_partition_of_a_node_with_files_of_its_own_trains_on_its_own(run_config, data_folder, tmp_path):
    pattern, seen = wards(data_folder, tmp_path, [20, 30]), {}

    def mine(grid):
        grid.contexts[100].node_config.update({"data-dir": pattern, "partitions": "0-1", "num-partitions": 2})

    def look(_, message, reply):
        seen.update({name: record["num-examples"] for name, record in reply.content.metric_records.items()})
        return reply

    run = play(run_config | {"num-server-rounds": 1}, nodes=1, prepare=mine, tamper=look)
    assert seen == {"metrics-0": 20, "metrics-1": 30} and run.metrics()[-1]["clients"] == 2


def test_one_folder_for_several_partitions_is_refused(run_config, data_folder):
    def mine(grid):
        own = {"data-dir": str(data_folder), "partitions": "0-1", "num-partitions": 2, "share-errors": True}
        grid.contexts[100].node_config.update(own)

    with pytest.raises(ConfigError, match=r"holds 2 partitions and one data-dir .*write \{partition\}"):
        play(run_config, nodes=1, prepare=mine)


def test_partitions_whose_files_make_different_tasks_are_refused(run_config, data_folder, tmp_path):
    pattern = str(tmp_path / "ward-{partition}")
    for partition, names in enumerate([("no", "yes"), ("ja", "nein")]):
        (tmp_path / f"ward-{partition}").mkdir()
        for split in ("train", "validation"):
            lines = [f"w{i} w{i + 1},{names[i % 2]}" for i in range(8)]
            (tmp_path / f"ward-{partition}" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))

    def mine(grid):
        own = {"data-dir": pattern, "partitions": "0-1", "num-partitions": 2, "share-errors": True}
        grid.contexts[100].node_config.update(own)

    settings = run_config | {"task": "text-classification", "data-dir": pattern.format(partition=0)}
    with pytest.raises(ConfigError, match=r"partition 1's files .* another task .*set the key labels"):
        play(settings, nodes=1, prepare=mine)
