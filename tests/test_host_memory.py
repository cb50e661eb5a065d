"""What a process holds of W: once. Counted by the storages that torch makes, and by what the operating system says."""

import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import digest, play, replayed
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    RobertaConfig,
)

from benchmarks.models import loaded
from fedkrso_app.core.projection import stream
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.strategies import make, parse
from fedkrso_app.training import model
from fedkrso_app.training.counting import Counter
from fedkrso_app.training.loop import train
from fedkrso_app.training.shapes import Shapes

TWO_BYTES = {"compute-dtype": "bfloat16", "state-dtype": "bfloat16"}


def local_of(run_config, layers=2, width=64, dtype=torch.float32, **changes):
    """A method and its half beside a classifier with random weights."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": width}
    settings = RobertaConfig(
        vocab_size=50, max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    module = AutoModelForSequenceClassification.from_config(settings).to(dtype)
    config = parse(run_config | changes)
    half = loaded(module)
    method = make(config, Shapes.of(half))
    return method, method.local(half)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def session(method, local):
    batch = {"input_ids": torch.tensor([[0, 7, 8, 2]] * 4), "labels": torch.tensor([0, 1, 0, 1])}
    rng = stream(0, "test")
    with local.session(method.instructions(1), rng) as opened:
        train(local.module, iter([batch] * local.config.local_steps), opened, local.config, rng)
        return opened.update()


def test_steps_beside_w_are_those_of_moving_it_and_no_copy_is_kept(run_config):
    updates, kept = [], []
    for at_rest in (False, True):
        torch.manual_seed(0)
        method, local = local_of(run_config, dtype=torch.float64, **{"weights-at-rest": at_rest})
        W = {name: layer.weight.detach().clone() for name, layer in local.targets.items()}
        replica = Replica(local, Ledger(Path()), span=None)
        with replica.lend() as lent:
            updates.append(session(method, lent))
            same = [torch.equal(layer.weight, W[name]) for name, layer in local.targets.items()]
        assert all(same) if at_rest else not any(same)
        assert all(torch.equal(layer.weight, W[name]) for name, layer in local.targets.items())
        kept.append(bytes_of(replica._kept))
    head = bytes_of(local.head.values())
    assert kept == [head + bytes_of(W.values()), head]
    for name, values in updates[0].items():
        np.testing.assert_allclose(updates[1][name], values, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("strategy", ["fedkrso", "decomfl"])
def test_a_run_at_rest_is_rebuilt_from_its_entries(strategy, run_config):
    run = play(run_config | {"strategy": strategy, "weights-at-rest": True, "num-server-rounds": 1}, 2)
    assert replayed(run) == digest(run)


def test_the_copy_to_compute_with_is_made_tensor_by_tensor(run_config):
    _, local = local_of(run_config, **{"compute-dtype": "bfloat16"})
    parameters = list(local.module.parameters())
    with Counter() as made:
        copied = local.computing(torch.device("cpu"))
    assert made.live == bytes_of(copied.module.parameters()) < 0.6 * bytes_of(parameters)
    assert made.peak == made.live


@pytest.mark.parametrize("kind, share", [("int8", 1.0625), ("nf4", 0.52)])
def test_a_copy_of_few_bits_shares_what_nobody_moves_and_has_so_many_bytes(kind, share, run_config):
    """As float32 on a CPU: the embeddings of the copy are those of W^t, and target layers have no second weight."""
    pytest.importorskip("bitsandbytes", reason="the optional package bitsandbytes is not installed")
    _, local = local_of(run_config, width=128, **{"compute-weights": kind})
    with Counter() as made:
        copied = local.computing(torch.device("cpu"))
    theirs, ours = (half.module.get_parameter("roberta.embeddings.word_embeddings.weight") for half in (copied, local))
    assert theirs.data_ptr() == ours.data_ptr()
    weights = sum(layer.weight.numel() for layer in local.targets.values())
    tables = 2200 * len(local.targets)  # of levels
    assert made.live <= bytes_of(local.head.values()) + share * weights + tables


def test_what_applying_an_entry_takes_beside_w_does_not_grow_with_the_layers(run_config):
    peaks = []
    for layers in (2, 6):
        method, local = local_of(run_config, layers, 128, torch.bfloat16, **TWO_BYTES)
        seeds = np.arange(3, dtype=np.uint64)
        Q = method.shapes.outputs(2)
        arrays = {"seeds": seeds, "accumulators": np.full((3, Q), 1e-3, np.float32)}
        local.version = 1
        tracemalloc.start()
        with Counter() as made:
            local.apply(arrays)
        peaks.append(made.peak + tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one = 4 * 128 * 128  # a layer in float32
    assert peaks[1] < peaks[0] + one / 2 and peaks[0] < 8 * one


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """48 MB in float32."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=2000, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    module.to_empty(device="cpu").save_pretrained(folder)
    return folder


def read(folder: Path, dtype: str):
    """As :func:`model.load` does."""
    settings = AutoConfig.from_pretrained(folder)
    with model.quiet():
        return AutoModelForCausalLM.from_pretrained(folder, config=settings, dtype=dtype, local_files_only=True)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what is mapped")
def test_a_checkpoint_in_its_own_dtype_is_mapped_and_not_read(checkpoint):
    module = read(checkpoint, "float32")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    assert all(any(a <= p.data_ptr() < b for a, b in mapped) for p in module.parameters())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of pages")
def test_a_checkpoint_in_another_dtype_is_in_memory_once(checkpoint):
    """Pages of the process's own; those of the mapped file are the system's to drop."""

    def own() -> int:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * 4096

    before, seen, ended = own(), [], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.append(own())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        module = read(checkpoint, "bfloat16")
    finally:
        ended.set()
        watcher.join()
    assert max(seen) - before < 1.5 * bytes_of(module.parameters())
