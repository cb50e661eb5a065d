"""A tiny model and corpus on disk, and the settings of runs on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from flwr.supercore.task_identity import TaskIdentity
from helpers import default_config, encoder

from fedkrso_app import data
from fedkrso_app.config import Config
from fedkrso_app.strategies import parse

LONGEST = {"test_contract", "test_deployment"}  # not Flower's engine: beside a deployment its many processes starve


def pytest_collection_modifyitems(items):
    """The longest files first: none of them is begun when the rest is nearly done."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def _quiet_and_single_threaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("FEDKRSO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # no test takes the power away
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return encoder(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """``sst2`` by the hub's column names: a sentence is positive when it has more words below w20 than above."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "sst2").mkdir()
    rng = np.random.default_rng(0)
    for split, rows in [("train", 160), ("validation", 40)]:
        sentences, labels = [], []
        for _ in range(rows):
            words = rng.integers(0, 40, size=int(rng.integers(3, 9)))
            sentences.append(" ".join(f"w{word}" for word in words))
            labels.append(int((words < 20).mean() > 0.5))
        Dataset.from_dict({"sentence": sentences, "label": labels}).to_parquet(folder / "sst2" / f"{split}.parquet")
    return folder


@pytest.fixture
def node_files(tmp_path) -> Path:
    """Where the nodes of a test keep their files."""
    return tmp_path / "cache" / "nodes"


@pytest.fixture
def run_config(model_folder, data_folder, tmp_path) -> dict:
    """Three rounds of four steps on the tiny model; change entries before use."""
    return default_config() | {
        "model": str(model_folder),
        "data-dir": str(data_folder),
        "task": "glue/sst2",
        "num-server-rounds": 3,
        "local-steps": 4,
        "batch-size": 8,
        "output-dir": str(tmp_path / "runs"),
        "run-name": "run",
        "fedkrso.interval": 2,
        "fedkrso.rank": 2,
        "fedkrso.num-seeds": 3,
        "fedkrso.learning-rate": 0.01,
        "lora.rank": 2,
        # A random encoder of width 16 wants larger steps than a pretrained one.
        "fedfft.learning-rate": 0.005,
        "lora.learning-rate": 0.05,
        "ffa-lora.learning-rate": 0.05,
        "rolora.learning-rate": 0.05,
        "fedsvd.learning-rate": 0.03,
        "flexlora.learning-rate": 0.03,
        "hetlora.learning-rate": 0.05,
        "flora.learning-rate": 0.02,
        "fedex-lora.learning-rate": 0.05,
        "lora-fair.learning-rate": 0.05,
        "fed-dare.learning-rate": 0.01,
        "fedsa-lora.learning-rate": 0.05,
        "fr-lora.learning-rate": 0.01,
        "federa.learning-rate": 0.01,
        "fedsrd.learning-rate": 0.01,
        "zeroth.head-learning-rate": 0.05,
        "decomfl.learning-rate": 1e-4,
        "fedkseed.learning-rate": 1e-4,
        "fedkseed.slots": 64,
        "fedmezo.learning-rate": 1e-3,
        "fwdllm.learning-rate": 1e-4,
        "fedblock.learning-rate": 0.01,
        "ferret.learning-rate": 0.01,
        "ferret.directions": 5,
        "separate.learning-rate": 0.01,
        "separate.rank": 3,
    }


@pytest.fixture
def config(run_config) -> Config:
    return parse(run_config)


@pytest.fixture
def sites(run_config, data_folder, tmp_path) -> tuple[dict, list[Path]]:
    """A run on one csv whose rows belong to five sites, a client each; and by client a folder with its rows alone.

    Texts, labels and sites are words, as a user writes them.
    """
    lines = {}
    for split in ("train", "validation"):
        rows = Dataset.from_parquet(str(data_folder / "sst2" / f"{split}.parquet"), cache_dir=str(tmp_path / "hf"))
        named = [(row["sentence"], ("neg", "pos")[row["label"]], "abcde"[i % 11 % 5]) for i, row in enumerate(rows)]
        lines[split] = [f"{text},{label},site {site}\n" for text, label, site in named]

    def write(folder: Path, holds: str = "") -> Path:
        folder.mkdir(parents=True)
        for split, every in lines.items():
            kept = [line for line in every if split == "validation" or holds in line]
            (folder / f"{split}.csv").write_text("text,label,site\n" + "".join(kept))
        return folder

    own = {"task": "text-classification", "partition": "natural", "partition-column": "site", "num-server-rounds": 2}
    settings = run_config | own | {"data-dir": str(write(tmp_path / "whole"))}
    task = data.resolve(parse(settings))
    train = data.load(task, settings["data-dir"], "train")
    shares = data.partition(train, task, 5, "natural", 0.5, settings["seed"])
    of_client = [train["site"][int(rows[0])] for rows in shares]  # the seed decides who is whose
    return settings, [write(tmp_path / "device" / str(i), site) for i, site in enumerate(of_client)]
