"""W^t in bfloat16: what an entry adds is rounded at random, without bias and alike on every copy."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from helpers import digest, play, replayed
from transformers import AutoModelForSequenceClassification

from fedkrso_app.config import ConfigError
from fedkrso_app.core.rounding import moving, rounded
from fedkrso_app.federation.published import Published
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs import plan
from fedkrso_app.runs.energy import captured
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies import STRATEGIES, make, parse
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes

FEW = {"state-dtype": "bfloat16", "compute-dtype": "bfloat16", "local-steps": 2, "num-server-rounds": 4}
LATE = FEW | {"fraction-train": 0.5}  # two of four nodes per round


def test_the_mean_of_all_roundings_is_the_number_itself():
    """In exact fractions, over every value of the noise."""
    noise = torch.arange(65536, dtype=torch.int32)
    for x in (1.2345678, -0.02718, 3.0e-39, 0.0, -1.0, 0.10009765625):
        exact = torch.tensor(x, dtype=torch.float32)
        results = rounded(exact.expand(65536).contiguous(), noise)
        values, counts = results.unique(return_counts=True)
        assert len(values) <= 2
        mean = sum(Fraction(float(v)) * int(n) for v, n in zip(values, counts, strict=True)) / 65536
        assert mean == Fraction(float(exact))


def test_a_layer_s_rounding_depends_on_seed_version_and_name_alone():
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).bfloat16()

    def moved(*key) -> torch.Tensor:
        mine = W.clone()
        with moving(mine, *key) as exact:
            exact.add_(1e-3)
        return mine

    one = moved(0, 1, "a")
    assert torch.equal(one, moved(0, 1, "a"))
    others = [moved(1, 1, "a"), moved(0, 2, "a"), moved(0, 1, "b")]
    assert not any(torch.equal(one, other) for other in others)
    # nearest rounding loses a small step in most weights; here the mean of the layer moves by it
    added = (one.double() - W.double()).mean().item()
    assert abs(added - 1e-3) < 4 * W.double().abs().mean().item() * 2**-8 / 1200**0.5


@pytest.mark.parametrize("strategy", ["fedkrso", "fr-lora", "decomfl"])
def test_late_nodes_fresh_processes_and_a_resume_lead_to_the_same_bits(run_config, strategy, monkeypatch):
    """By entries; then by weights, which the server sends in place of them."""
    settings = run_config | LATE | {"strategy": strategy}
    whole = play(settings | {"run-name": "whole"})
    assert replayed(whole) == digest(whole)
    state = AutoModelForSequenceClassification.from_pretrained(whole.model, dtype="auto").state_dict()
    assert {v.dtype for k, v in state.items() if "encoder.layer.0.attention.self.query.weight" in k} == {torch.bfloat16}
    assert digest(play(settings | {"run-name": "devices"}, run_id=2, devices=True)) == digest(whole)

    append = Ledger.append
    stop = lambda self, entry: append(self, entry) if entry.version < 2 else 1 / 0  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Ledger, "append", stop)
        play(settings | {"run-name": "stopped"}, run_id=3)
    run = Run(Path(settings["output-dir"]) / "stopped")
    play(settings | {"run-name": "stopped", "resume": str(run.path)}, run_id=4)
    assert digest(run) == digest(whole)

    brought = []

    def smaller(self, *args):
        brought.append(self.version)
        return RecordDict({f"weights-{self.version}": wire.pack(self.weights())})

    monkeypatch.setattr(Published, "catch_up", smaller)
    by_weights = play(settings | {"run-name": "weights"}, run_id=5, devices=True)
    assert max(brought) > 1 and digest(by_weights) == digest(whole)


def test_the_loss_falls_as_with_a_state_in_float32(run_config):
    settings = run_config | FEW | {"local-steps": 8}
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = play(settings | {"state-dtype": dtype, "run-name": dtype}, 2)
        losses[dtype] = [line["eval_loss"] for line in run.metrics()]
    fell = losses["float32"][0] - losses["float32"][-1]
    assert fell > 0.01 and abs(losses["bfloat16"][-1] - losses["float32"][-1]) < 0.3 * fell


def test_weights_that_are_not_finite_are_refused_in_two_bytes_too(run_config):
    from fedkrso_app.records.schema import Field, Schema

    schema = Schema({"weights": Field("bfloat16", (3,), "state")})
    good = torch.tensor([1.0, -2.0, 0.5]).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(wire.unpack(wire.pack({"weights": good}), schema)["weights"], good)
    for bad in (float("nan"), float("inf"), float("-inf")):
        values = torch.tensor([1.0, bad, 0.5]).bfloat16().view(torch.uint16).numpy()
        with pytest.raises(wire.Refused, match="NaN or infinite"):
            wire.unpack(wire.pack({"weights": values}), schema)


def test_what_trains_weights_in_float32_is_refused(run_config):
    for strategy in ("fedfft", "fedblock", "ferret", "separate"):
        with pytest.raises(ConfigError, match="whose clients train the weights themselves"):
            parse(run_config | FEW | {"strategy": strategy})
    with pytest.raises(ConfigError, match="needs compute-dtype = 'bfloat16'"):
        parse(run_config | {"state-dtype": "bfloat16"})


def test_dense_is_said_by_those_halves_whose_optimizers_move_a_layer_s_weight(run_config):
    for strategy in STRATEGIES:
        config = parse(run_config | {"strategy": strategy, "evaluate": "clients"})
        loaded = model.outline(config.model, 2)
        with torch.device("meta"):
            half = make(config, Shapes.of(loaded)).local(loaded)
        weights = {id(layer.weight) for layer in half.targets.values()}
        assert half.dense == any(id(parameter) in weights for parameter in half.optimized()), strategy


def test_a_plan_counts_half_the_weights_and_no_copy_of_them(run_config):
    rows = (plan.plan(run_config | more, ["fedkrso"], clients=2)["rows"][0] for more in ({}, FEW))
    plain, few = (row["memory"]["keep"] for row in rows)
    assert few["weights"] < 0.6 * plain["weights"] and few["aside"] < 0.1 * plain["aside"]


def test_directions_of_rounded_weights_are_not_measured(run_config):
    run = play(run_config | FEW | {"num-server-rounds": 1}, 2)
    with pytest.raises(ConfigError, match="--energy needs a run with state-dtype = 'float32'"):
        captured(run, Ledger(run.ledger))
