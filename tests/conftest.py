"""A tiny model and corpus on disk, a grid that runs the ClientApp in this process, and whole runs on it."""

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from fedkrso_app import client_app, data, server_app
from fedkrso_app.config import Config, resolved_path
from fedkrso_app.federation import client
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Local, Shapes
from fedkrso_app.training import model

ROOT = Path(__file__).parent.parent
WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(autouse=True)
def _quiet_and_single_threaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("FEDKRSO_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A RoBERTa of two layers and width 16 with random weights, and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: id for id, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = RobertaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=40,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
        RobertaForMaskedLM(settings).save_pretrained(folder)
    return folder


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


def default_config() -> dict:
    """The defaults as Flower hands them over: flat, tables joined by a dot."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat = {}
    for key, value in tables.items():
        flat |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


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
        "fedsrd.learning-rate": 0.01,
    }


@pytest.fixture
def config(run_config) -> Config:
    return parse(run_config)


@pytest.fixture
def sites(run_config, data_folder, tmp_path) -> tuple[dict, list[Path]]:
    """A run on one csv whose rows belong to three sites, a client each; and by client a folder with its rows alone.

    Texts, labels and sites are words, as a user writes them.
    """
    lines = {}
    for split in ("train", "validation"):
        rows = Dataset.from_parquet(str(data_folder / "sst2" / f"{split}.parquet"), cache_dir=str(tmp_path / "hf"))
        named = [(row["sentence"], ("neg", "pos")[row["label"]], "abc"[i % 7 % 3]) for i, row in enumerate(rows)]
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
    shares = data.partition(train, task, 3, "natural", 0.5, settings["seed"])
    of_client = [train["site"][int(rows[0])] for rows in shares]  # the seed decides who is whose
    return settings, [write(tmp_path / "device" / str(i), site) for i, site in enumerate(of_client)]


class InProcessGrid:
    """Flower's grid with nodes 100, 101, … that run ``app`` here. ``tamper(partition, message, reply)`` may change,
    replace or drop (None) a reply; ``order`` rearranges those that arrive together. With ``devices``, every node
    has a disk of its own and every message meets a process that knows nothing, as in a deployment."""

    def __init__(
        self,
        app: ClientApp,
        run_config: dict,
        nodes: int,
        tamper: Callable[[int, Message, Message], Message | None] = lambda partition, message, reply: reply,
        order: Callable[[list], list] = list,
        run_id: int = 1,
        devices: bool = False,
    ) -> None:
        self.disks = Path(os.environ["FEDKRSO_CACHE"]) if devices else None
        self.app, self.tamper, self.order, self.sent = app, tamper, order, []
        self.contexts = {
            100 + id: Context(
                run_id=run_id,
                node_id=100 + id,
                node_config={"partition-id": id, "num-partitions": nodes},
                state=RecordDict(),
                run_config=run_config,
            )
            for id in range(nodes)
        }
        self._replies: dict[str, Message] = {}

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            context = self.contexts[message.metadata.dst_node_id]
            partition = context.node_config["partition-id"]
            if self.disks:
                os.environ["FEDKRSO_CACHE"] = f"{self.disks}-{partition}"  # the fixture puts it back
                client.workplace.cache_clear()
            try:
                reply = self.app(message, context)
            except Exception as error:
                reply = Message(Error(code=2, reason=str(error)), reply_to=message)
            asked = message.metadata.message_type in ("train", "evaluate")
            reply = self.tamper(partition, message, reply) if asked else reply
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
        return ids

    def pull_messages(self, ids):
        return self.order([self._replies.pop(id) for id in list(ids) if id in self._replies])


def play(run_config, nodes=4, run_id=1, prepare=lambda grid: None, **options) -> Run:
    """One whole run, on a grid that ``prepare`` may change before; the folder it made."""
    client.workplace.cache_clear()
    grid = InProcessGrid(client_app.app, run_config, nodes, run_id=run_id, **options)
    prepare(grid)
    context = Context(run_id=run_id, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)
    server_app.app(grid, context)
    return Run(resolved_path(run_config["output-dir"]) / run_config["run-name"])


def digest(run: Run) -> str:
    return json.loads((run.path / "result.json").read_text())["digest"]


def replica(run: Run, version: int | None = None) -> Local:
    """The half beside the model at ``version``, from W^0 and the ledger alone."""
    config = run.config
    task = data.resolve(config)
    loaded = model.load(config.model, task.num_labels, config.seed, task.classes, device=config.weights_device)
    method = make(config, Shapes.of(loaded))
    local, ledger = method.local(loaded), Ledger(run.ledger)
    Replica(local, ledger, method.entry.span).advance(ledger.version if version is None else version)
    return local


def replayed(run: Run, version: int | None = None) -> str:
    """The digest of the weights that W^0 and the ledger lead to."""
    return model.state_digest(replica(run, version).plain_state())


def arrays_of(reply: Message) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in reply.content["update"].items()}
