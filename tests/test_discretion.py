"""A device with data of its own: nothing of a marked cell leaves its folder, also when the run fails on that cell."""

import logging
import os
import shutil
import stat
from pathlib import Path

import datasets
import pytest
from flwr.common.serde import message_to_proto
from helpers import Grid, play

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.federation import client
from fedkrso_app.strategies import parse
from fedkrso_app.training import loop

MARK = "zebrafish"
NODE = 2  # the partition id of the node that holds the mark


class Watch:
    """What the server and the network see of a run, what the marked node logs, and where else its disk has the mark."""

    def __init__(self, root: Path, own: Path) -> None:
        self.root, self.own, self.here = root, own, False
        self.sent: list[bytes] = []
        self.server_log: list[str] = []
        self.node_log: list[str] = []
        self.strays: set[str] = set()

    def install(self, grid: Grid) -> None:
        """Around the ClientApp. The logs of nodes and server share one process; who is at work tells them apart."""
        app = grid.app

        def watched(message, context):
            self.here = True
            try:
                reply = app(message, context)
            finally:
                self.here = False
                self.look()
            self.sent += [message_to_proto(each).SerializeToString() for each in (message, reply)]
            return reply

        grid.app = watched

    def emit(self, record: logging.LogRecord) -> None:
        said = logging.Formatter().format(record)
        (self.node_log if self.here else self.server_log).append(said)

    def look(self) -> None:
        """Search all files of the test but the node's data and its own folder."""
        for path in self.root.rglob("*"):
            inside = path.relative_to(self.root).parts
            if path.is_relative_to(self.own) or inside[0] == f"cache-{NODE}" or not path.is_file():
                continue
            if MARK.encode() in path.read_bytes():
                self.strays.add(str(path))

    def left_by_the_node(self) -> list[Path]:
        return [
            path
            for path in (self.root / f"cache-{NODE}").rglob("*")
            if path.is_file() and MARK.encode() in path.read_bytes()
        ]


@pytest.fixture
def watch(tmp_path, monkeypatch):
    own = tmp_path / "own"
    watch = Watch(tmp_path, own)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    data.load.cache_clear()
    data.resolve.cache_clear()
    handler = logging.Handler(logging.DEBUG)
    handler.emit = watch.emit
    logging.getLogger("flwr").addHandler(handler)
    yield watch
    logging.getLogger("flwr").removeHandler(handler)


def device(watch: Watch, data_folder: Path, train: str, validation: str | None = None) -> Path:
    """A folder of the marked node's own, the mark in its path."""
    own = watch.own / MARK
    own.mkdir(parents=True)
    (own / "train.csv").write_text(train)
    if validation is None:
        shutil.copy(data_folder / "sst2" / "validation.parquet", own)
    else:
        (own / "validation.csv").write_text(validation)
    return own


def attempt(watch, run_config, own, **node_config):
    """A run of three nodes, of which one has files of its own; its outcome."""

    def prepare(grid):
        grid.contexts[100 + NODE].node_config.update({"data-dir": str(own)} | node_config)
        watch.install(grid)

    try:
        return play(run_config | {"num-server-rounds": 2}, nodes=3, prepare=prepare, devices=True)
    finally:
        watch.look()


ROWS = "".join(f"w{i} w{i + 1},{i % 2}\n" for i in range(9))
GOOD = f"sentence,label\n{MARK} w1,1\n{ROWS}"
BAD = {  # what is wrong: (train.csv, validation.csv, what the server is told)
    "a label that is none": (f"sentence,label\nw1 w2,{MARK}\n{ROWS}", None, "its data"),
    "a broken line": (f'sentence,label\n{ROWS}w1 "{MARK},x,1\n', None, "its data"),
    "a column that is missing": (f"{MARK},label\n{ROWS}", None, "its data"),
    "no rows": ("sentence,label\n", None, "its data"),
    "not UTF-8": (None, None, "its data"),
    "rows for evaluation": (GOOD, f"sentence,label\nw1 w2,{MARK}\n{ROWS}", "its data"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_node_that_cannot_join_tells_the_kind_and_keeps_the_text(case, watch, run_config, data_folder):
    train, validation, kind = BAD[case]
    own = device(watch, data_folder, train or "", validation)
    if train is None:
        (own / "train.csv").write_bytes(GOOD.encode() + b"\xff,1\n")
    run = attempt(watch, run_config | {"evaluate": "clients"}, own)
    assert run.metrics()[-1]["partitions"] == [0, 1]
    told = f"partition {NODE}: something is wrong with {kind}; the node's own log says what"
    assert any(told in line for line in watch.server_log)
    assert any(MARK in line for line in watch.node_log)
    nothing_left_the_node(watch)


def test_a_node_that_fails_in_training_tells_the_kind_and_keeps_the_text(watch, run_config, data_folder, monkeypatch):
    real = loop.train

    def fails(module, batches, *rest):
        watch.look()
        texts = [row["sentence"] for row in rows() if MARK in row["sentence"]]
        if texts:
            raise ValueError(f"cannot digest {texts[0]!r}")
        return real(module, batches, *rest)

    def rows():
        place = client.workplace(*asked[-1])
        return data.load(place.task, place.config.data_dir, "train")

    asked, workplace = [], client.workplace

    def remember(*arguments):
        asked.append(arguments)
        return workplace(*arguments)

    remember.cache_clear = workplace.cache_clear
    monkeypatch.setattr(client, "workplace", remember)
    monkeypatch.setattr(loop, "train", fails)
    run = attempt(watch, run_config, device(watch, data_folder, GOOD))
    assert run.metrics()[-1]["partitions"] == [0, 1] and run.metrics()[-1]["failed"] == 1
    told = f"partition {NODE} failed: something is wrong with its work (ValueError); the node's own log says what"
    assert any(told in line for line in watch.server_log)
    assert any(f"cannot digest '{MARK}" in line for line in watch.node_log)
    nothing_left_the_node(watch)


def test_a_run_that_goes_well_leaves_nothing_either(watch, run_config, data_folder):
    run = attempt(watch, run_config | {"evaluate": "clients"}, device(watch, data_folder, GOOD))
    assert run.metrics()[-1]["partitions"] == [0, 1, 2]
    nothing_left_the_node(watch)


def nothing_left_the_node(watch):
    assert watch.sent and not [message for message in watch.sent if MARK.encode() in message]
    assert not [line for line in watch.server_log if MARK in line]
    assert not watch.strays
    assert not watch.left_by_the_node()


@pytest.mark.parametrize(
    "own, share, whole", [(True, True, True), (True, False, False), (False, None, True), (False, False, False)]
)
def test_the_node_decides_whether_texts_leave_it(own, share, whole, watch, run_config, data_folder):
    folder = device(watch, data_folder, f"sentence,label\nw1 w2,{MARK}\n{ROWS}")
    chosen = {} if share is None else {"share-errors": share}
    if own:
        attempt(watch, run_config, folder, **chosen)
    else:  # all data is the run's: a simulation, or a device where the run's data-dir is a folder of its own

        def prepare(grid):
            watch.install(grid)
            for context in grid.contexts.values():
                context.node_config.update(chosen)

        with pytest.raises(ConfigError):
            play(run_config | {"data-dir": str(folder), "evaluate": "off"}, nodes=2, prepare=prepare)
    assert any(MARK in line for line in watch.server_log) is whole


def test_share_errors_is_true_or_false(watch, run_config, data_folder):
    attempt(watch, run_config, device(watch, data_folder, GOOD), **{"share-errors": "yes"})
    assert any(f"partition {NODE}" not in line and "its settings" in line for line in watch.server_log)
    assert any("share-errors = 'yes' is neither true nor false" in line for line in watch.node_log)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_files_of_every_format_are_read_without_a_copy_on_the_disk(kind, watch, run_config, tmp_path):
    task = data.resolve(parse(run_config))
    watch.own.mkdir()
    rows = {"sentence": [f"{MARK} w1", "w2 w3"] * 5, "label": [0, 1] * 5}
    file = str(watch.own / f"train.{kind}")
    if kind in ("csv", "parquet"):
        getattr(datasets.Dataset.from_dict(rows), f"to_{kind}")(file)
    else:
        datasets.Dataset.from_dict(rows).to_json(file, lines=kind == "jsonl")
    there = set(tmp_path.rglob("*"))
    assert data.load(task, str(watch.own), "train")[0]["sentence"] == f"{MARK} w1"
    assert set(tmp_path.rglob("*")) == there  # the library's cache and temporary folder are in here too


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_folders_of_a_run_are_for_their_owner_alone_whatever_the_umask(mask, run_config, tmp_path):
    modes = set()

    def look(partition, message, reply):
        modes.update(stat.S_IMODE(folder.stat().st_mode) for folder in tmp_path.glob("cache/nodes/*"))
        return reply

    old = os.umask(mask)
    try:
        run = play(run_config | {"num-server-rounds": 1}, tamper=look)
    finally:
        os.umask(old)
    assert modes == {0o700}
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
