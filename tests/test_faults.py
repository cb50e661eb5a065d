"""What goes wrong between devices, and what it costs: nodes, disks, servers and replies."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from helpers import arrays_of, digest, play, replayed
from test_contract import KINDS_OF_METHOD, reply_target
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.config import ConfigError
from fedkrso_app.federation.replica import Replica
from fedkrso_app.federation.store import NodeStore
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger, LedgerError
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies import make
from fedkrso_app.strategies.fedkrso import FedKRSO
from fedkrso_app.training import model
from fedkrso_app.training.activations import TrainingError
from fedkrso_app.training.shapes import Shapes

# Nodes


@pytest.mark.parametrize("strategy", ["fedkrso", "fedsrd", "fedit"])
def test_devices_give_the_bits_of_a_simulation(run_config, strategy):
    settings = run_config | {"strategy": strategy, "num-server-rounds": 4}
    warm = play(settings)
    cold = play(settings | {"run-name": "cold"}, devices=True, run_id=2)
    assert digest(cold) == digest(warm)


def files_of(tmp_path, partition):
    """What partition's device has on its disk."""
    return sorted((tmp_path / f"cache-{partition}").glob("nodes/*/*"))


def test_a_nodes_files_stay_few_and_are_gone_after_the_run(run_config, tmp_path):
    seen = []

    def look(partition, message, reply):
        seen.append([path.suffix for path in files_of(tmp_path, partition)])
        return reply

    play(run_config | {"num-server-rounds": 6}, tamper=look, devices=True)
    assert seen[-4:] == [[".weights"]] * 4 and max(map(len, seen)) == 1
    assert not any(files_of(tmp_path, partition) for partition in range(4))


@pytest.mark.parametrize(("strategy", "left"), [("fedkrso", [".weights"]), ("fedit", [".safetensors"] * 2)])
def test_a_long_catch_up_leaves_few_files(run_config, strategy, left):
    """More entries than a node may keep come at once; all are applied before any is removed."""
    run = play(run_config | {"strategy": strategy, "num-server-rounds": 6})
    store, config = NodeStore("0" * 16, keep=2), run.config
    for version in Ledger(run.ledger).versions():
        store.put(Ledger(run.ledger).read(version))
    loaded = model.load(config.model, 2, config.seed)
    method = make(config, Shapes.of(loaded))
    local = method.local(loaded)
    Replica(local, store.entries, method.entry.span, store).advance(6)
    assert [path.suffix for path in sorted(store.folder.iterdir())] == left and store.version == 6
    assert model.state_digest(local.plain_state()) == digest(run)


class Later:
    """Takes node 103 off the grid and brings it back, perhaps as another node, when told to."""

    def __init__(self, grid):
        self.grid, self.context = grid, grid.contexts.pop(103)
        for context in [*grid.contexts.values(), self.context]:  # so that the run does not wait for the fourth
            context.node_config |= {
                "num-partitions": 3 + (context is self.context),
                "data-dir": context.run_config["data-dir"],
            }

    def come(self):
        self.grid.contexts[103] = self.context


@pytest.mark.parametrize("strategy", ["fedkrso", "fedsrd"])
def test_a_node_that_missed_much_gets_the_weights_when_they_are_smaller(run_config, strategy):
    """Partition 3 comes for the first time in round 9: eight entries are more than the tiny model's weights."""
    names, later = {}, []

    def look(partition, message, reply):
        names[message.content["train"]["round"], partition] = list(message.content.array_records)
        if message.content["train"]["round"] == 8:
            later[0].come()
        return reply

    settings = {"num-server-rounds": 10, "fedsrd.download-sparsity": 0.0, "local-steps": 3, "fedkrso.interval": 1}
    settings |= {"strategy": strategy}
    run = play(run_config | settings, tamper=look, prepare=lambda grid: later.append(Later(grid)), devices=True)
    assert names[9, 3] == ["weights-8"] and names[10, 3] == ["entry-9"] and names[9, 0] == ["entry-8"]
    catchup = [line["catchup_bytes"] for line in run.metrics()]
    assert catchup[9] > 0 and sum(catchup) == catchup[9]
    assert [line["clients"] for line in run.metrics()[1:]] == [3] * 8 + [4, 4]
    assert replayed(run) == digest(run)


def test_a_node_that_comes_back_under_another_id_says_what_it_holds(run_config):
    """Without node keys, Flower gives a restarted node a new id. It is not sent again what lies on its disk."""
    sent = {}

    def look(partition, message, reply):
        round = message.content["train"]["round"]
        sent.setdefault(round, {})[partition] = (message.metadata.dst_node_id, list(message.content.array_records))
        if round == 2 and partition == 3:
            grids[0].contexts[203] = grids[0].contexts.pop(103)
        return reply

    grids = []
    run = play(run_config | {"num-server-rounds": 4}, tamper=look, prepare=grids.append, devices=True)
    assert sent[2][3] == (103, ["entry-1"]) and sent[3][3] == (203, ["entry-2"])
    assert [line["clients"] for line in run.metrics()[1:]] == [4, 4, 4, 4]
    assert digest(run) == digest(play(run_config | {"num-server-rounds": 4, "run-name": "calm"}, run_id=2))


@pytest.mark.parametrize("damage", ["nothing left", "cut short", "one bit", "another history"])
def test_a_node_whose_files_are_damaged_costs_its_share_of_few_rounds(run_config, damage, tmp_path):
    forged = play(run_config | {"num-server-rounds": 3, "run-name": "forged", "seed": 5})

    def spoil(partition, message, reply):
        if message.content["train"]["round"] == 3 and partition == 3:
            (path,) = files_of(tmp_path, 3)
            if damage in ("cut short", "one bit"):
                whole = path.read_bytes()
                path.write_bytes(whole[:-50] if damage == "cut short" else whole[:-1] + bytes([whole[-1] ^ 1]))
                return reply
            path.unlink()
            for version in range(4) if damage == "another history" else ():
                Ledger(path.parent).put(Ledger(forged.ledger).read(version))
        return reply

    run = play(run_config | {"num-server-rounds": 6}, tamper=spoil, devices=True, run_id=2)
    clients = [line["clients"] for line in run.metrics()[1:]]
    assert clients[:3] == [4, 4, 4] and clients[3] == 3 and clients[-1] == 4
    assert replayed(run) == digest(run)


def test_a_node_whose_data_is_wrong_is_named_and_takes_part_once_it_is_mended(
    run_config, data_folder, tmp_path, caplog
):
    own = tmp_path / "own" / "sst2"
    own.mkdir(parents=True)
    (own / "train.csv").write_text("sentence,label\nw1 w2,7\n")
    shutil.copy(data_folder / "sst2" / "validation.parquet", own)

    def mend(partition, message, reply):
        if message.content["train"]["round"] == 2:
            (own / "train.csv").write_text("sentence,label\nw1 w2,1\nw30 w31,0\n")
        return reply

    def prepare(grid):
        grid.contexts[102].node_config.update({"data-dir": str(own.parent), "share-errors": True})

    run = play(run_config | {"num-server-rounds": 4}, tamper=mend, prepare=prepare)
    assert [line["partitions"] for line in run.metrics()[1:]] == [[0, 1, 3], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    said = [record.getMessage() for record in caplog.records if "cannot take part" in record.getMessage()]
    assert len(said) == 1 and "partition 2" in said[0] and "train.csv" in said[0]


def test_a_node_with_files_of_its_own_trains_on_all_of_them(run_config, data_folder):
    counts = {}

    def count(partition, message, reply):
        counts[partition] = reply.content["metrics"]["num-examples"]
        return reply

    def prepare(grid):
        grid.contexts[101].node_config["data-dir"] = str(data_folder)

    play(run_config | {"num-server-rounds": 1}, tamper=count, prepare=prepare)
    assert counts == {0: 40, 1: 160, 2: 40, 3: 40}


# The server


def test_a_node_with_an_entry_that_the_server_has_lost_begins_afresh(run_config, monkeypatch):
    """Entry 2 is lost and made again, otherwise; partition 3 has the old one and is back when the server is further."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "add_metrics", stop_after(Run.add_metrics, 3))
        with pytest.raises(KeyboardInterrupt):
            play(run_config | {"num-server-rounds": 6}, devices=True)
    run = Run(Path(run_config["output-dir"]) / "run")
    for version in (2, 3):
        (run.ledger / f"{version:06d}.safetensors").unlink()

    def away(partition, message, reply):
        return None if partition == 0 and message.content["train"]["round"] < 4 else reply

    def late(partition, message, reply):
        if message.content["train"]["round"] == 4:
            later[0].come()
        return away(partition, message, reply)

    later = []
    settings = run_config | {"num-server-rounds": 6, "resume": str(run.path), "round-timeout": 0.3}
    play(settings, tamper=late, prepare=lambda grid: later.append(Later(grid)), devices=True, run_id=2)
    assert [line["partitions"] for line in run.metrics()][-2:] == [[0, 1, 2, 3]] * 2
    assert replayed(run) == digest(run)


@pytest.mark.parametrize("strategy", ["fedkrso", "fedsrd", "fedit"])
def test_a_lost_last_entry_is_made_again_though_the_nodes_have_seen_it(run_config, strategy, monkeypatch, caplog):
    """The server is killed in round 3 and its newest entry is damaged; a node that has it is not left behind."""
    settings = run_config | {"strategy": strategy, "num-server-rounds": 4}
    whole = play(settings | {"run-name": "whole"})
    with monkeypatch.context() as patch:
        patch.setattr(Run, "add_metrics", stop_after(Run.add_metrics, 3))
        with pytest.raises(KeyboardInterrupt):
            play(settings, devices=True)
    run = Run(whole.path.parent / "run")
    newest = run.ledger / "000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    (run.ledger / "000003.safetensors").unlink()
    play(settings | {"resume": str(run.path)}, run_id=2, devices=True)
    assert "set aside as 000002.damaged" in caplog.text
    assert digest(run) == digest(whole)


def stop_after(add_metrics, round):
    def add(self, figures):
        if figures["round"] >= round:
            raise KeyboardInterrupt
        add_metrics(self, figures)

    return add


def test_a_damaged_earlier_entry_is_refused_by_name(run_config):
    run = play(run_config)
    path = run.ledger / "000001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(LedgerError, match=r"entry 1 is damaged: .*000001.safetensors.*restore the file"):
        play(run_config | {"resume": str(run.path), "num-server-rounds": 4})
    path.unlink()
    with pytest.raises(LedgerError, match=r"entry 1 is missing: .*000001.safetensors"):
        play(run_config | {"resume": str(run.path), "num-server-rounds": 4})
    path.write_bytes(whole)
    play(run_config | {"resume": str(run.path), "num-server-rounds": 4})
    assert run.status == "completed" and [line["round"] for line in run.metrics()] == [0, 1, 2, 3, 4]


def test_a_resumed_run_reads_each_entry_once(run_config, monkeypatch):
    run, seen, read = play(run_config), [], Ledger.read

    def counted(self, version):
        seen.extend([version] * (self.folder == run.ledger))
        return read(self, version)

    monkeypatch.setattr(Ledger, "read", counted)
    play(run_config | {"resume": str(run.path)}, run_id=2)  # no round is left
    assert [seen.count(version) for version in (0, 1, 2)] == [1, 1, 1] and digest(run) == replayed(run)


def test_a_full_disk_stops_the_run_with_the_ledger_intact(run_config, monkeypatch):
    whole = play(run_config | {"run-name": "whole"})
    with monkeypatch.context() as patch:
        replace = os.replace

        def full(source, target):
            if str(target).endswith("ledger/000002.safetensors"):
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            play(run_config)
    run = Run(whole.path.parent / "run")
    assert run.status.startswith("failed: OSError") and Ledger(run.ledger).versions() == [0, 1]
    assert not list(run.ledger.glob("*.tmp"))
    play(run_config | {"resume": str(run.path)}, run_id=2)
    assert digest(run) == digest(whole)


def test_a_run_that_is_going_on_cannot_be_resumed_beside_it(run_config):
    refused = []

    def again(partition, message, reply):
        if partition == 0:
            with pytest.raises(ConfigError, match="has not ended"):
                Run(path).lock()
            refused.append(message.content["train"]["round"])
        return reply

    path = Path(run_config["output-dir"]) / "run"
    run = play(run_config, tamper=again)
    assert refused == [1, 2, 3] and run.status == "completed"
    run.lock()  # nobody holds it any more
    run.unlock()


def test_a_copied_folder_verifies_and_exports(run_config, tmp_path):
    run = play(run_config)
    copy = shutil.copytree(run.path, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(run.path)
    runner = CliRunner()
    verified = runner.invoke(cli.app, ["ledger", str(copy), "--verify", "--json"])
    assert verified.exit_code == 0 and json.loads(verified.stdout)["verified"]
    assert runner.invoke(cli.app, ["export", str(copy), str(tmp_path / "model"), "--round", "2"]).exit_code == 0


# Replies


def arrays_changed(change):
    """A forged reply whose update went through ``change`` (of name -> array)."""

    def forge(reply):
        arrays = arrays_of(reply)
        replaced = change(arrays)
        return rebuilt(reply, update=wire.pack(arrays if replaced is None else replaced))

    return forge


def value_changed(name, change):
    return arrays_changed(lambda arrays: arrays.update({name: change(arrays[name])}))


def figures_changed(record, **changes):
    def forge(reply):
        kind = {"metrics": MetricRecord, "status": ConfigRecord}[record]
        return rebuilt(reply, **{record: kind(dict(reply.content[record]) | changes)})

    return forge


def bytes_changed(name, change, stype="numpy.ndarray"):
    """The serialised array ``name`` itself, so that it may be no array at all."""

    def forge(reply):
        update = dict(reply.content["update"].items())
        array = update[name]
        update[name] = Array(array.dtype, array.shape, stype, change(array.data))
        return rebuilt(reply, update=ArrayRecord(update))

    return forge


def rebuilt(reply, **records):
    content = {name: reply.content[name] for name in ("status", "update", "metrics")} | records
    present = {name: record for name, record in content.items() if record is not None}
    return Message(RecordDict(present), reply_to=reply_target(reply))


def set_one(value):
    def change(array):
        array = array.copy()
        array.reshape(-1)[-1] = value
        return array

    return change


def header(text):
    """npy bytes with another header of the same length, so that only what it says changes."""
    old, new = text
    return lambda data: data.replace(old, new, 1)


BAD = {
    "NaN in the accumulators": value_changed("accumulators", set_one(np.nan)),
    "NaN in the head": value_changed("head", set_one(np.nan)),
    "infinity": value_changed("accumulators", set_one(np.inf)),
    "minus infinity": value_changed("head", set_one(-np.inf)),
    "too large to be averaged": value_changed("accumulators", set_one(3e38)),
    "one row too few": value_changed("accumulators", lambda a: a[:-1]),
    "one column too few": value_changed("accumulators", lambda a: a[:, :-1]),
    "one column too many": value_changed("accumulators", lambda a: np.pad(a, ((0, 0), (0, 1)))),
    "transposed": value_changed("accumulators", lambda a: np.ascontiguousarray(a.T)),
    "flattened": value_changed("accumulators", lambda a: a.reshape(-1)),
    "one axis more": value_changed("accumulators", lambda a: a[None]),
    "broadcastable row": value_changed("accumulators", lambda a: a[:1]),
    "broadcastable column": value_changed("accumulators", lambda a: a[:, :1]),
    "a scalar for the head": value_changed("head", lambda a: np.float32(1.0)),
    "a head of one value": value_changed("head", lambda a: a[:1]),
    "an empty head": value_changed("head", lambda a: a[:0]),
    "float64": value_changed("accumulators", lambda a: a.astype(np.float64)),
    "float16": value_changed("head", lambda a: a.astype(np.float16)),
    "integers": value_changed("accumulators", lambda a: a.astype(np.int32)),
    "complex": value_changed("head", lambda a: a.astype(np.complex64)),
    "big-endian": value_changed("accumulators", lambda a: a.astype(">f4")),
    "booleans": value_changed("head", lambda a: a > 0),
    "signed seeds": value_changed("seeds", lambda a: a.view(np.int64)),
    "no seeds": arrays_changed(lambda arrays: arrays.pop("seeds") is None or arrays),
    "no accumulators": arrays_changed(lambda arrays: arrays.pop("accumulators") is None or arrays),
    "no head": arrays_changed(lambda arrays: arrays.pop("head") is None or arrays),
    "one array more": arrays_changed(lambda arrays: arrays.update(extra=np.zeros(2, np.float32))),
    "a name misspelt": arrays_changed(lambda arrays: arrays.update(Head=arrays.pop("head"))),
    "a seed not in the pool": value_changed("seeds", lambda a: a + np.uint64(1)),
    "a seed twice": value_changed("seeds", lambda a: np.repeat(a[:1], len(a))),
    "more seeds than intervals": arrays_changed(
        lambda a: a.update(seeds=np.arange(99, dtype=np.uint64), accumulators=np.repeat(a["accumulators"][:1], 99, 0))
    ),
    "an older version": figures_changed("status", version=-1),
    "a version to come": figures_changed("status", version=10**6),
    "a version that is a float": figures_changed("status", version=1.0),
    "no examples": figures_changed("metrics", **{"num-examples": 0}),
    "negative examples": figures_changed("metrics", **{"num-examples": -5}),
    "NaN examples": figures_changed("metrics", **{"num-examples": float("nan")}),
    "endless examples": figures_changed("metrics", **{"num-examples": 2**60}),
    "a NaN loss": figures_changed("metrics", **{"train-loss": float("nan")}),
    "negative seconds": figures_changed("metrics", **{"train-seconds": -1.0}),
    "a negative peak": figures_changed("metrics", **{"peak-bytes": -1}),
    "truncated": bytes_changed("accumulators", lambda data: data[:-9]),
    "only a header": bytes_changed("head", lambda data: data[:128]),
    "no bytes": bytes_changed("head", lambda data: b""),
    "bytes after the end": bytes_changed("head", lambda data: data + b"\0" * 8),
    "an oversize message": bytes_changed("head", lambda data: data + b"\0" * 10_000_000),
    "a header that claims terabytes": bytes_changed("head", header((b"'shape': (", b"'shape': (99999999999999, "))),
    "an object array": bytes_changed("head", header((b"'<f4'", b"'|O' "))),
    "a pickle": bytes_changed("head", lambda data: b"\x80\x04N."),
    "an open bracket in the header": bytes_changed("head", header((b"'shape': (", b"'shape': [("))),
    "a header without a dtype": bytes_changed("head", header((b"'<f4'", b"()   "))),
    "a foreign format": bytes_changed("head", lambda data: data, stype="torch.tensor"),
    "no update at all": lambda reply: rebuilt(reply, update=None),
    "no metrics": lambda reply: rebuilt(reply, metrics=None),
    "no status": lambda reply: rebuilt(reply, status=None),
    "records of the wrong kind": lambda reply: rebuilt(reply, update=ConfigRecord({"a": 1})),
    "another type for a figure": figures_changed("metrics", **{"num-examples": [1, 2]}),
}


def test_no_bad_reply_changes_more_than_the_divisor(run_config, caplog):
    """Partition 1 sends one bad reply after the other; the result is bit for bit what it is when it is silent."""
    kinds = list(BAD)
    settings = run_config | {
        "num-server-rounds": len(kinds),
        "local-steps": 2,
        "fedkrso.interval": 1,
        "round-timeout": 0.1,
    }

    def wrong(partition, message, reply):
        return BAD[kinds[message.content["train"]["round"] - 1]](reply) if partition == 1 else reply

    run = play(settings, nodes=2, tamper=wrong)
    silent = lambda partition, message, reply: None if partition == 1 else reply  # noqa: E731
    without = play(settings | {"run-name": "without"}, nodes=2, tamper=silent, run_id=2)
    counted = {kind: (line["clients"], line["refused"]) for kind, line in zip(kinds, run.metrics()[1:], strict=True)}
    assert counted == dict.fromkeys(kinds, (1, 1))
    assert digest(run) == digest(without)
    assert caplog.text.count("partition 1 refused: ") == len(kinds)


def test_denormal_values_are_values_like_others(run_config):
    """The smallest numbers fit the schema: they count, and nothing becomes of them that is not finite."""
    tiny = value_changed("accumulators", lambda a: np.full_like(a, 1e-42))
    run = play(run_config, tamper=lambda partition, message, reply: tiny(reply) if partition == 1 else reply)
    assert [line["clients"] for line in run.metrics()[1:]] == [4, 4, 4]
    assert replayed(run) == digest(run)


@pytest.mark.parametrize("strategy", ["fedkrso", "fedfft", "fedit", "fedsrd"])
def test_an_update_beyond_max_update_norm_is_as_if_it_had_not_come(run_config, strategy, caplog):
    settings = run_config | {"strategy": strategy, "max-update-norm": 100.0, "round-timeout": 0.1}

    def grow(partition, message, reply):
        if partition != 1:
            return reply
        names = {"fedkrso": "accumulators", "fedfft": "parameters", "fedit": "B", "fedsrd": "values"}
        return value_changed(names[strategy], lambda a: a + np.float32(1000))(reply)

    run = play(settings, tamper=grow)
    silent = lambda partition, message, reply: None if partition == 1 else reply  # noqa: E731
    assert digest(run) == digest(play(settings | {"run-name": "without"}, tamper=silent, run_id=2))
    assert caplog.text.count("above max-update-norm = 100") == 3


@pytest.mark.parametrize("aggregation", ["median", "trimmed-mean"])
def test_three_hostile_clients_of_ten_do_not_undo_the_training(run_config, aggregation):
    """They send the opposite of what they learned, a hundredfold. One seed a round, so that all clients share it."""
    settings = run_config | {"num-server-rounds": 4, "local-steps": 10, "fedkrso.interval": 10, "fedkrso.num-seeds": 1}

    def hostile(partition, message, reply):
        if partition >= 3:
            return reply
        return arrays_changed(lambda a: a.update(accumulators=-100 * a["accumulators"], head=-100 * a["head"]))(reply)

    run = play(settings | {"aggregation": aggregation}, nodes=10, tamper=hostile)
    plain = play(settings | {"run-name": "plain"}, nodes=10, tamper=hostile, run_id=2)
    losses, undone = ([line["eval_loss"] for line in each.metrics()] for each in (run, plain))
    assert losses[-1] < losses[0] < undone[-1]


@pytest.mark.parametrize("aggregation", ["mean", "median"])
def test_values_too_large_for_a_mean_are_too_large_for_a_robust_one(run_config, aggregation):
    huge = value_changed("accumulators", lambda a: np.full_like(a, 1e20))
    tamper = lambda partition, message, reply: huge(reply) if partition == 1 else reply  # noqa: E731
    run = play(run_config | {"aggregation": aggregation}, tamper=tamper)
    assert [line["refused"] for line in run.metrics()[1:]] == [1, 1, 1]


def test_aggregation_that_a_method_cannot_do_is_refused(run_config):
    with pytest.raises(ConfigError, match="aggregation = 'median' does not go with fedsrd"):
        play(run_config | {"strategy": "fedsrd", "aggregation": "median"})


# Servers without data


@pytest.mark.parametrize("strategy", KINDS_OF_METHOD)
def test_clients_judge_as_the_server_would(run_config, strategy, monkeypatch):
    """Four nodes' validation rows together are all of them: the pooled metric is the server's, and so are the bits."""
    settings = run_config | {"strategy": strategy}
    central = play(settings | {"run-name": "central"})
    loads = []
    load = model.load
    monkeypatch.setattr(model, "load", lambda *args, **kw: loads.append(kw.get("weights", True)) or load(*args, **kw))
    run = play(settings | {"evaluate": "clients"}, run_id=2)
    assert loads[0] is False  # the server's; the others are the client processes'
    assert "metric" not in run.metrics()[0]
    for mine, servers in zip(run.metrics()[1:], central.metrics()[1:], strict=True):
        assert mine["metric"] == pytest.approx(servers["metric"], abs=1e-12)
        assert mine["eval_loss"] == pytest.approx(servers["eval_loss"], rel=1e-5)
        assert mine["uplink_bytes"] > servers["uplink_bytes"]
    assert digest(run) is None and replayed(run) == digest(central)


def test_a_tally_that_does_not_fit_is_left_out(run_config, caplog):
    def wrong(partition, message, reply):
        if partition != 1 or "tally" not in reply.content:
            return reply
        forged = [np.full(4, np.nan), np.zeros(4), np.array([1.0, 4, -2, 4])]
        tally = wire.pack({"tally": forged[reply.content["status"]["version"] - 1]})
        return Message(RecordDict({"status": reply.content["status"], "tally": tally}), reply_to=reply_target(reply))

    run = play(run_config | {"evaluate": "clients"}, tamper=wrong)
    assert caplog.text.count("partition 1 refused") == 3
    assert [line["refused"] for line in run.metrics()[1:]] == [0, 0, 0]  # its updates were good
    assert all(0 <= line["metric"] <= 1 for line in run.metrics()[1:])


def test_without_weights_on_the_server_the_nodes_are_compared_with_each_other(
    run_config, model_folder, tmp_path, caplog
):
    from transformers import AutoModelForMaskedLM

    other = shutil.copytree(model_folder, tmp_path / "other")
    changed = AutoModelForMaskedLM.from_pretrained(other)
    changed.roberta.encoder.layer[0].output.dense.bias.data += 1
    changed.save_pretrained(other)

    def prepare(grid):
        grid.contexts[102].run_config = run_config | {"evaluate": "clients", "model": str(other)}

    run = play(run_config | {"evaluate": "clients"}, prepare=prepare)
    assert [line["partitions"] for line in run.metrics()[1:]] == [[0, 1, 3]] * 3
    assert "partition 2: other weights" in caplog.text and len(run.info["model_digest"]) == 64


def test_rounds_wait_for_nodes_that_are_all_offline(run_config, monkeypatch):
    """Nobody is there at the beginning of round 2; a moment later everybody is again."""
    monkeypatch.setattr("time.sleep", lambda seconds: grids[0].contexts.update(gone))
    gone, grids = {}, []

    def leave(partition, message, reply):
        if message.content["train"]["round"] == 1 and partition == 3:
            gone.update(grids[0].contexts)
            grids[0].contexts.clear()
        return reply

    run = play(run_config, tamper=leave, prepare=grids.append)
    assert [line["clients"] for line in run.metrics()[1:]] == [4, 4, 4]


def test_a_run_without_a_model_on_the_server_resumes_to_the_same_bits(run_config, monkeypatch):
    settings = run_config | {"evaluate": "clients"}
    whole = play(settings | {"run-name": "whole"})
    with monkeypatch.context() as patch:
        patch.setattr(Run, "add_metrics", stop_after(Run.add_metrics, 2))
        with pytest.raises(KeyboardInterrupt):
            play(settings)
    run = Run(whole.path.parent / "run")
    play(settings | {"resume": str(run.path)}, run_id=2)
    assert replayed(run) == replayed(whole)


def test_only_the_nodes_need_have_data(run_config, data_folder, tmp_path):
    """A user's own files, a folder for each node and none for the server."""
    folders = []
    for i in range(3):
        folders.append(tmp_path / f"own{i}")
        folders[i].mkdir()
        shutil.copy(data_folder / "sst2" / "train.parquet", folders[i])

    def own(grid):
        for i, folder in enumerate(folders):
            grid.contexts[100 + i].node_config["data-dir"] = str(folder)

    settings = {"task": "text-classification", "labels": "0,1", "data-dir": "", "evaluate": "clients"}
    run = play(run_config | settings, nodes=3, prepare=own)
    assert [line["clients"] for line in run.metrics()[1:]] == [3, 3, 3] and run.metrics()[-1]["metric"] > 0
    with pytest.raises(ConfigError, match="labels must be set"):
        play(run_config | settings | {"labels": "", "run-name": "open"}, nodes=3, prepare=own)


def test_more_replies_than_nodes_are_asked_are_refused_before_anyone_trains(run_config):
    with pytest.raises(ConfigError, match=r"min-replies = 3 is out of reach: fraction-train = 0.5 of 4 clients are 2"):
        play(run_config | {"fraction-train": 0.5, "min-replies": 3})


def test_exactly_min_replies_are_enough_and_one_less_is_not(run_config):
    silent = lambda partition, message, reply: reply if partition < 2 else None  # noqa: E731
    quick = run_config | {"round-timeout": 0.3, "num-server-rounds": 1}
    assert play(quick | {"min-replies": 2}, tamper=silent).metrics()[-1]["version"] == 1
    with pytest.raises(TrainingError, match="none of 1 rounds published anything"):
        play(quick | {"min-replies": 3, "run-name": "few"}, tamper=silent, run_id=2)


def test_an_average_that_is_not_finite_is_never_published(run_config, monkeypatch, caplog):
    conclude = FedKRSO.conclude

    def broken(self, means, round):
        arrays = conclude(self, means, round)
        return arrays if round != 2 else arrays | {"head": np.full_like(arrays["head"], np.inf)}

    monkeypatch.setattr(FedKRSO, "conclude", broken)
    run = play(run_config)
    assert [line["version"] for line in run.metrics()] == [0, 1, 1, 2]
    assert "the average of head is not finite: nothing is published" in caplog.text


@pytest.mark.parametrize("strategy", ["fedkrso", "fedit"])
def test_max_update_norm_measures_what_a_reply_moves(run_config, strategy, caplog):
    """By another route: the norm of the accumulators as they are, of everything else as a difference to entry 0."""
    replies = []
    settings = run_config | {"strategy": strategy, "num-server-rounds": 1}
    run = play(settings, nodes=2, tamper=lambda partition, message, reply: replies.append(reply) or reply)
    start, norms = Ledger(run.ledger).read(0).arrays, []
    for reply in replies:
        moved = [a - start[n] if n in start else a for n, a in arrays_of(reply).items() if n != "seeds"]
        norms.append(float(np.sqrt(sum(np.square(part.astype(np.float64)).sum() for part in moved))))
    between = settings | {"max-update-norm": sum(norms) / 2, "run-name": "between"}
    line = play(between, nodes=2, run_id=2).metrics()[-1]
    assert (line["clients"], line["refused"], line["partitions"]) == (1, 1, [int(np.argmin(norms))])
    assert f"its update has norm {max(norms):.4g}" in caplog.text
