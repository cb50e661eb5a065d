"""What tests share: the default settings, whole runs in this process, and what can be asked of a run afterwards."""

import copy
import json
import os
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from fedkrso_app import client_app, data, server_app
from fedkrso_app.config import resolved_path
from fedkrso_app.data import batching, language
from fedkrso_app.federation import client, evaluation, local
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.replay import exportable
from fedkrso_app.strategies import STRATEGIES, make
from fedkrso_app.strategies.base import Local
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes

ON_SERVER = [name for name, method in STRATEGIES.items() if not method.local_head]  # whose model a server can judge
ROOT = Path(__file__).parent.parent
# Secure sums on run_config, in whose two intervals each client then takes both seeds.
MASKS = {"secure-aggregation": True, "fedkrso.draw": "each", "fedkrso.num-seeds": 2}
WORDS = [f"w{number}" for number in range(40)]


def default_config() -> dict:
    """The defaults as Flower hands them over: flat, tables joined by a dot."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat = {}
    for key, value in tables.items():
        flat |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def encoder(folder: Path, layers: int) -> Path:
    """A RoBERTa of width 16 with random weights, and a word-level tokenizer."""
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
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=40,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
        RobertaForMaskedLM(settings).save_pretrained(folder)
    return folder


class Grid(local.LocalGrid):
    """The engine in this process, with what can go wrong.

    ``tamper(partition, message, reply)`` may change, replace or drop (None) the reply to a train or evaluate message;
    ``order`` rearranges the replies that arrive together. With ``devices``, every node has a disk of its own and every
    message meets a process that knows nothing, as in a deployment.
    """

    def __init__(
        self,
        run_config: dict,
        nodes: int,
        tamper: Callable[[int, Message, Message], Message | None] = lambda partition, message, reply: reply,
        order: Callable[[list], list] = list,
        run_id: int = 1,
        devices: bool = False,
    ) -> None:
        super().__init__(client_app.app, run_config, nodes, run_id)
        self.tamper, self.order = tamper, order
        self.disks = Path(os.environ["FEDKRSO_CACHE"]) if devices else None

    def pull_messages(self, ids):
        return self.order(super().pull_messages(list(ids)))

    def reply(self, message):
        partition = self.contexts[message.metadata.dst_node_id].node_config["partition-id"]
        if self.disks:
            os.environ["FEDKRSO_CACHE"] = f"{self.disks}-{partition}"  # the fixture puts it back
            client.workplace.cache_clear()
        reply = super().reply(message)
        asked = message.metadata.message_type in ("train", "evaluate")
        return self.tamper(partition, message, reply) if asked else reply


def play(run_config: dict, nodes: int = 4, prepare: Callable[[Grid], None] = lambda grid: None, **options) -> Run:
    """One whole run, on a grid with these ``options`` that ``prepare`` may change before; the folder it made."""
    client.workplace.cache_clear()
    grid = Grid(run_config, nodes, **options)
    prepare(grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load", _once(model.load))
        patch.setattr(evaluation, "trial", _tried_once(evaluation.trial))
        local.play(server_app.app, grid, run_config)
    return Run(resolved_path(run_config["output-dir"]) / run_config["run-name"])


_LOADED: dict[str, model.LoadedModel] = {}


def _once(load: Callable[..., model.LoadedModel]) -> Callable[..., model.LoadedModel]:
    """``load``, but a copy of what it gave before where neither its arguments nor the folder's files have changed."""

    def loaded(name: str, *args, **kwargs) -> model.LoadedModel:
        folder = Path(name)
        if not folder.is_dir():
            return load(name, *args, **kwargs)
        files = sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in folder.iterdir())
        key = repr((load, name, args, kwargs, files))
        if key not in _LOADED:
            _LOADED[key] = load(name, *args, **kwargs)
        return copy.deepcopy(_LOADED[key])

    return loaded


_TRIED: set[tuple] = set()


def _tried_once(trial: Callable[..., None]) -> Callable[..., None]:
    """``trial``, but nothing where the same rows have been through the same model without an error before."""

    def tried(loaded, examples, task, config, split):
        what = type(loaded.module).forward, task, split, examples._fingerprint
        key = (trial, config.model, config.compute_dtype, config.max_length, *what)
        if key not in _TRIED:
            trial(loaded, examples, task, config, split)
            _TRIED.add(key)

    return tried


def digest(run: Run) -> str:
    return json.loads((run.path / "result.json").read_text())["digest"]


def replica(run: Run, version: int | None = None) -> Local:
    """The half beside the model at ``version``, from W^0 and the ledger alone."""
    ledger = Ledger(run.ledger)
    return fresh(run, ledger, ledger.version if version is None else version).local


def fresh(run: Run, ledger: Ledger, version: int) -> Replica:
    """One that has come from W^0 to ``version``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load", _once(model.load))
        loaded = model.of_run(run.config, data.resolve(run.config))
    method = make(run.config, Shapes.of(loaded))
    made = Replica(method.local(loaded), ledger, method.entry.span)
    made.advance(version)
    return made


def versions(run: Run) -> set[int]:
    """The versions that the entries on disk lead to."""
    return set(exportable(run, Ledger(run.ledger)).values())


def each_replayed(run: Run) -> dict[int, str]:
    """By version, the digests of the weights that W^0 and the ledger lead to, of all versions that they lead to."""
    found, ledger = {}, Ledger(run.ledger)
    first, *later = sorted(versions(run))
    made = fresh(run, ledger, first)
    for version in (first, *later):
        made.advance(version)
        found[version] = model.state_digest(made.local.plain_state())
    return found


def replayed(run: Run, version: int | None = None) -> str:
    """The digest of the weights that W^0 and the ledger lead to."""
    return model.state_digest(replica(run, version).plain_state())


def text_batch(columns, tokenizer, max_length: int) -> dict:
    """A language model's batch of the rows in ``columns``."""
    values, in_front = batching.padding(data.task("causal-lm"), tokenizer)
    rows = language.laid_out(columns, tokenizer, max_length).items()
    arrays = {name: batching.padded([np.array(row) for row in of], values.get(name, 0), in_front) for name, of in rows}
    return language.checked(arrays)


def arrays_of(reply: Message) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in reply.content["update"].items()}


def expire(keys: Path, days: int) -> None:
    """Sign the server's certificate of deploy/keys.sh anew, with an end ``days`` from now."""
    names = ["-subj", "/CN=near", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(["openssl", "req", "-new", "-key", "server.key", "-out", "csr", *names], cwd=keys, check=True)
    sign = ["openssl", "x509", "-req", "-in", "csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-copy_extensions", "copy"]
    subprocess.run([*sign, "-days", str(days), "-out", "server.pem"], cwd=keys, check=True, capture_output=True)


@contextmanager
def killed(owner: Any, name: str, call: int) -> Iterator[None]:
    """Inside, something is done that the ``call``-th call of ``owner``'s function ``name`` ends, as SIGKILL would."""
    calls, original = [], getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise ZeroDivisionError
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(owner, name, counted)
        yield
