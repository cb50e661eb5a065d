"""Weights of few bits: a client computes with them, and W^t itself, its entries and its figures know nothing of it."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MASKS, digest, play, replayed
from scipy.stats import norm
from test_families import build, write_texts
from test_host_memory import local_of
from torch import nn

from fedkrso_app.config import ConfigError
from fedkrso_app.core.few_bits import KINDS, FewBits, in_full, pack, unpack
from fedkrso_app.core.rso import RSO
from fedkrso_app.core.subspace import AdapterLinear, attached
from fedkrso_app.federation import workplace
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.strategies import STRATEGIES, parse
from fedkrso_app.training import few_bits


@pytest.fixture
def library():
    pytest.importorskip("bitsandbytes", reason="the optional package bitsandbytes is not installed")


def quantized(layer: nn.Linear, kind: str, dtype=torch.float32) -> FewBits:
    return FewBits(layer.weight.detach(), layer.bias, kind, dtype, torch.device("cpu"))


def levels(kind: str) -> np.ndarray:
    """Multiples of 1/127; quantiles of a normal distribution, 8 up to 0 and 9 from 0 on (QLoRA, section 3)."""
    if kind == "int8":
        return np.arange(-127, 128) / 127
    end = (1 / 32 + 1 / 30) / 2  # the share that is left out at either end
    halves = [norm.ppf(np.linspace(0.5, 1 - end, count)) for count in (8, 9)]
    return np.unique(np.concatenate([-halves[0], halves[1]])) / halves[1].max()


@pytest.mark.parametrize("kind", KINDS)
def test_each_value_is_the_nearest_level_of_its_block(kind, library):
    W = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    blocks = W.double().numpy().reshape(-1, 64)
    scales = np.abs(blocks).max(1, keepdims=True)
    least = np.abs(blocks[..., None] - levels(kind) * scales[..., None]).min(-1)
    got = unpack(pack(W, kind), kind).double().numpy().reshape(-1, 64)
    tolerance = {"int8": 1e-4, "nf4": 0.02}[kind]  # nf4's scales have 8 bits themselves
    assert (np.abs(got - blocks) <= least + tolerance * scales).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_few_bits_has_the_gradients_of_a_plain_one_with_its_matrix(kind, library):
    torch.manual_seed(0)
    layer = nn.Linear(80, 48)
    few, plain = quantized(layer, kind), copy.deepcopy(layer)
    plain.weight.data = few.dense()
    results = []
    for one in (few, plain):
        x = torch.randn(2, 5, 80, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = one(x)
        y.pow(2).sum().backward()
        results.append((y, x.grad, one.bias.grad))
        one.bias.grad = None
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_model_computes_with_the_place_of_a_weight_unnoticed(library):
    few = FewBits(torch.ones(4, 6), None, "nf4", torch.bfloat16, torch.device("cpu"))
    assert few.weight.shape == (4, 6) and few.weight.dtype == torch.bfloat16
    assert few.weight.untyped_storage().nbytes() == 2 and few.weight.isnan().all()
    with in_full([few]):
        assert torch.equal(few.dense(), torch.ones(4, 6).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_accumulators_are_those_of_a_plain_layer_with_that_matrix(kind, library):
    accumulators = []
    for plain in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)
        for name in ("0", "2"):
            few = quantized(net.get_submodule(name), kind)
            if plain:
                net.get_submodule(name).weight.data = few.dense()
            else:
                net.set_submodule(name, few)
        with attached(net, {"0": net[0], "2": net[2]}, 2, AdapterLinear) as layers:
            rso = RSO(layers, 0.05)
            for j in range(8):
                if j % 4 == 0:
                    rso.start_interval(j)
                x = torch.randn(10, 6, generator=torch.Generator().manual_seed(j))
                (net(x) - x[:, :3]).pow(2).mean().backward()
                rso.step()
                rso.zero_grad()
        accumulators.append(rso.accumulators)
    assert accumulators[0].keys() == {0, 4}
    assert all(torch.equal(accumulators[0][seed], accumulators[1][seed]) for seed in (0, 4))


def short(run_config, **changes):
    return run_config | {"num-server-rounds": 2, "local-steps": 2, "compute-weights": "nf4"} | changes


def entries(run) -> list[dict]:
    ledger = Ledger(run.ledger)
    return [dict(ledger.read(version).arrays) for version in range(1, ledger.version + 1)]


@pytest.mark.parametrize("strategy", ["fedkrso", "fedit", "fr-lora", "decomfl"])
def test_the_model_is_made_of_entries_alone_and_judged_in_full(strategy, run_config, library):
    settings = short(run_config, **{"strategy": strategy})
    run = play(settings, 2)
    assert replayed(run) == digest(run)
    exact = play(settings | {"compute-weights": "float", "run-name": "exact"}, 2, run_id=2)
    assert digest(run) != digest(exact)  # clients did compute with other weights
    assert run.metrics()[0]["eval_loss"] == exact.metrics()[0]["eval_loss"]


def test_fresh_processes_on_two_bytes_give_the_bits_of_warm_ones(run_config, library):
    settings = short(run_config, **{"compute-dtype": "bfloat16", "state-dtype": "bfloat16", "compute-weights": "int8"})
    warm = play(settings, 2)
    fresh = play(settings | {"run-name": "fresh"}, 2, run_id=2, devices=True)
    assert digest(warm) == digest(fresh) == replayed(warm)


def test_secure_sums_of_clients_with_few_bits_are_opened(run_config, library):
    run = play(short(run_config, **MASKS, **{"local-steps": 4, "num-server-rounds": 1}), 3)
    assert run.metrics()[-1]["clients"] == 3 and replayed(run) == digest(run)


@pytest.mark.parametrize("strategy", ["fedkrso", "fedit"])
def test_what_clients_judge_is_w_in_full_with_their_own_part_beside_it(strategy, run_config, library):
    _, local = local_of(run_config, **{"strategy": strategy, "compute-weights": "nf4"})
    replica, ids = Replica(local, Ledger(Path()), span=None), torch.tensor([[0, 7, 8, 2]])
    with torch.no_grad(), replica.judged({}) as judged, replica.lend() as lent:
        assert judged is lent  # one copy
        exact = local.module(ids).logits
        assert torch.equal(judged.module(ids).logits, exact)
    with torch.no_grad(), replica.lend() as lent:
        assert not torch.equal(lent.module(ids).logits, exact)


def test_clients_that_keep_a_part_to_themselves_train_and_judge_with_few_bits(run_config, library):
    run = play(short(run_config, **{"strategy": "fedsa-lora", "evaluate": "clients"}), 2)
    assert np.isfinite(run.metrics()[-1]["eval_loss"]) and run.metrics()[-1]["clients"] == 2


@pytest.mark.parametrize("family, strategy", [("gpt2", "fedkrso"), ("llama-tied", "fedit"), ("deberta-v2", "fedkrso")])
def test_other_families_train_with_few_bits(family, strategy, run_config, model_folder, tmp_path, library):
    language = family != "deberta-v2"
    changes = {"model": str(build(tmp_path / "model", model_folder, family, language)), "strategy": strategy}
    if language:
        changes |= {"task": "causal-lm", "data-dir": str(write_texts(tmp_path / "texts"))}
    run = play(short(run_config, **changes, **{"num-server-rounds": 1, "activation-memory": "recompute"}), 2)
    assert replayed(run) == digest(run) and run.metrics()[-1]["clients"] == 2


@pytest.mark.parametrize("strategy", ["fedkrso", "fedit"])
def test_clients_in_one_pass_send_what_they_send_alone(strategy, run_config, model_folder, tmp_path, library):
    """In a model without dropout, whose masks are others in one pass."""
    model = {"model": str(build(tmp_path / "model", model_folder, "llama", True)), "strategy": strategy}
    run_config |= model | {"task": "causal-lm", "data-dir": str(write_texts(tmp_path / "texts"))}
    one, both = (
        entries(play(short(run_config, **{"num-server-rounds": 1}, **changes), 2, run_id=id))
        for id, changes in enumerate(
            ({"run-name": "one"}, {"run-name": "both", "clients-per-node": 2, "batch-clients": "2"}), 1
        )
    )
    for name, values in one[0].items():
        np.testing.assert_allclose(both[0][name], values, rtol=2e-3, atol=1e-6)


def test_without_the_library_a_node_says_how_to_get_it_before_anything_starts(run_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    config = parse(short(run_config))
    with pytest.raises(ConfigError, match=r"needs bitsandbytes \(.*\): pip install 'bitsandbytes"):
        workplace.Workplace("0" * 16, config, 2)


def test_a_device_that_the_library_does_not_serve_is_named(run_config, monkeypatch):
    monkeypatch.setattr(few_bits, "probe", lambda kind, place: (_ for _ in ()).throw(RuntimeError("no kernel")))
    with pytest.raises(ConfigError, match=r"does not work on this cpu \(RuntimeError: no kernel\)"):
        few_bits.check(parse(short(run_config)))


def test_methods_that_train_the_weights_themselves_are_refused(run_config):
    for strategy, method in STRATEGIES.items():
        if method.half.dense:
            for change in ({"compute-weights": "int8"}, {"weights-at-rest": True}):
                with pytest.raises(ConfigError, match="whose clients train the weights themselves"):
                    parse(run_config | change | {"strategy": strategy})
    with pytest.raises(ConfigError, match="captured-steps = 'on' does not go with compute-weights = 'nf4'"):
        parse(short(run_config, **{"captured-steps": "on"}))
