"""What fits into a device: counts against the allocator, passes of several clients, the choice of settings."""

import functools
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import digest, play
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from fedkrso_app import cli, data
from fedkrso_app.config import ConfigError
from fedkrso_app.core.projection import stream
from fedkrso_app.core.stacked import Group, Unstackable
from fedkrso_app.federation import device_memory, memory
from fedkrso_app.federation.device_memory import CONTEXT, GAPS, WORKSPACES
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs import fitting
from fedkrso_app.strategies import make, parse
from fedkrso_app.training import loop, model, together
from fedkrso_app.training.counting import total
from fedkrso_app.training.shapes import Shapes


def half(config, folder, real=False):
    """A method with the half that trains and a batch, on the meta device or real."""
    loaded = model.load(str(folder), 2, 0) if real else model.outline(str(folder), 2)
    method = make(config, Shapes.of(loaded))
    return method, *memory.prepared(method, loaded, data.task("glue/sst2"))


def allocated(work) -> int:
    """The most bytes at any moment of ``work`` beyond those before, as torch's allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["fedkrso", "fedit", "fedfft"])
def test_the_allocator_of_a_real_step_agrees_with_the_plan(strategy, dtype, run_config, model_folder):
    changes = {"strategy": strategy, "compute-dtype": dtype, "batch-size": 32, "max-length": 32, "local-steps": 2}
    config = parse(run_config | changes)
    planned, _ = memory.client_memory(*half(config, model_folder))
    method, local, inputs = half(config, model_folder, real=True)
    for setting in memory.SETTINGS:
        local.config = replace(config, activation_memory=setting)
        weights = total(local.module.parameters())
        replica = Replica(local, Ledger("unused"), span=1)

        def steps(local=local, replica=replica):
            with sdpa_kernel(SDPBackend.MATH), replica.lend() if config.on_device else nullcontext():
                rng = stream(config.seed, "plan")
                with local.session(method.instructions(1), rng) as session:
                    loop.train(local.module, iter([dict(inputs)] * 2), session, local.config, rng)

        later = max(0, planned[setting].later - planned[setting].grown)
        assert weights + allocated(steps) == pytest.approx(planned[setting].total - later, rel=0.05), setting


def together_for_real(method, local, inputs, clients):
    """Two steps of a pass, each client's intervals as they come."""
    config, group = local.config, Group(clients)
    rngs = [stream(config.seed, "plan", client) for client in range(clients)]
    with sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
        halves, stacks = stack.enter_context(local.stacked(group))
        told = {**method.instructions(1), "partition": 0}
        sessions = [stack.enter_context(h.session(told, rng)) for h, rng in zip(halves, rngs, strict=True)]
        more = [iter([dict(inputs)] * 2) for _ in rngs]
        together.train(local.module, more, sessions, group, stacks, config, rngs, ({}, False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["fedkrso", "fedit"])
def test_a_pass_takes_the_weights_and_for_each_client_the_same_again(strategy, dtype, run_config, model_folder):
    changes = {"strategy": strategy, "compute-dtype": dtype, "batch-size": 32, "max-length": 32, "local-steps": 2}
    config = parse(run_config | changes | {"fedkrso.interval": 1, "fedkrso.num-seeds": 2})  # all are open at once
    planned = {n: memory.pass_memory(*half(config, model_folder), n)[0] for n in (1, 2, 4)}
    method, local, inputs = half(config, model_folder, real=True)
    weights = total(local.module.parameters())
    real = weights + allocated(lambda: together_for_real(method, local, inputs, 4))
    assert real == pytest.approx(planned[4], rel=0.05)
    assert planned[4] == pytest.approx(planned[1] + 3 * (planned[2] - planned[1]), rel=0.02)
    alone = memory.client_memory(*half(config, model_folder), settings=["keep"])[0]["keep"]
    beside = alone.peak + alone.gradients + alone.optimizer + alone.later
    assert planned[4] == pytest.approx(weights + 4 * beside, rel=0.1)


def test_clients_that_take_turns_have_no_pass(run_config, model_folder):
    with pytest.raises(Unstackable):
        memory.pass_memory(*half(parse(run_config | {"strategy": "fedfft"}), model_folder), 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["fedkrso", "fedit", "fedfft"])
def test_every_activation_memory_gives_the_same_bits(strategy, dtype, run_config, model_folder):
    """Dropout included, so that "auto" may choose."""
    config = parse(run_config | {"strategy": strategy, "compute-dtype": dtype, "local-steps": 3})
    updates = []
    for setting in memory.SETTINGS:
        method, local, inputs = half(config, model_folder, real=True)
        local.config = replace(config, activation_memory=setting)
        inputs["input_ids"] = torch.arange(inputs["input_ids"].numel()).view_as(inputs["input_ids"]) % 37 + 4
        rng = stream(config.seed, "test")
        with local.session(method.instructions(1), rng) as session:
            loss = loop.train(local.module, iter([dict(inputs)] * 3), session, local.config, rng)
            updates.append({"loss": np.array(loss), **session.update()})
    for found in updates[1:]:
        assert all(np.array_equal(found[name], array) for name, array in updates[0].items())


def fit(run_config, limit, **changes):
    changes = {key.replace("_", "-"): value for key, value in changes.items()}
    return fitting.fitting(run_config | {"local-steps": 2, **changes}, "fedkrso", limit)


def limit_for(budget: int) -> int:
    """A device that has ``budget`` for what is counted, and no more."""
    return int(budget * (1 + GAPS)) + CONTEXT + WORKSPACES


def test_what_fits_is_found_from_the_least_change_to_the_largest(run_config, monkeypatch):
    """Each time the device is as large as the smallest choice of the kind before, less a byte."""
    monkeypatch.setattr(fitting, "_counted", functools.cache(fitting._counted))
    wide = {"batch_size": 2, "max_length": 32}
    facts = fit(run_config, limit_for(2**30), **wide)
    assert facts["choice"] == 0 and facts["rows"][0]["operations"] == 1 and len(facts["rows"]) == 3
    keep, recompute, checkpoint = (row["device"] for row in facts["rows"])
    facts = fit(run_config, limit_for(keep - 1), **wide)
    assert facts["rows"][facts["choice"]]["changes"] == {"activation-memory": "recompute"}
    assert facts["rows"][facts["choice"]]["exactness"] == "same bits"
    facts = fit(run_config, limit_for(checkpoint - 1), **wide)
    smaller = facts["rows"][facts["choice"]]
    assert smaller["exactness"] == "rounding" and smaller["batch"] == [1, 2]
    assert smaller["device"] < checkpoint < recompute < keep
    least = min(row["device"] for row in facts["rows"] if row["compute_dtype"] == "float32")
    facts = fit(run_config, limit_for(least - 1), **wide)
    fewer = facts["rows"][facts["choice"]]
    assert fewer["compute_dtype"] == "bfloat16" and fewer["exactness"] == "other" and fewer["host"] > 0
    assert any("--set compute-dtype=bfloat16" in line for line in fitting.notes(facts))
    facts = fit(run_config, limit_for(1000), **wide)
    assert facts["choice"] is None and any("Nothing of this fits" in line for line in fitting.notes(facts))


def test_operations_are_those_of_the_products_and_double_for_a_forward_pass_run_twice(run_config, model_folder):
    """By hand: each target layer forward and to its input, but to that of the first block nothing flows (q, k, v); two
    products of attention forward, four backward, head and seeds beside."""
    config = parse(run_config | {"batch-size": 4, "max-length": 8, "fedkrso.rank": 1})
    found, _ = memory.client_memory(*half(config, model_folder))
    tokens, block, attention = 4 * 8, 4 * 16 * 16 + 2 * 24 * 16, 2 * 4 * 8 * 8 * 16
    expected = 2 * tokens * (4 * block - 3 * 16 * 16) + 2 * 2 * attention * 3 // 2
    assert found["keep"].passes == pytest.approx(expected, rel=0.25)
    again = found["checkpoint"].passes - found["keep"].passes
    assert again == pytest.approx(2 * tokens * 2 * block + 2 * attention, rel=0.25)
    assert found["keep"].passes < found["recompute"].passes < found["checkpoint"].passes


def test_a_pass_on_a_device_is_as_large_as_fits(run_config):
    changes = {"batch_size": 8, "clients_per_node": 4, "batch_clients": "auto"}
    together = fit(run_config, limit_for(2**30), **changes)["pass"]
    assert together["clients"] == together["asked"] == 4
    few = fit(run_config, limit_for(together["device"] * 95 // 100), **changes)["pass"]
    assert few["clients"] == 3 and few["device"] < together["device"]


@pytest.mark.parametrize("text", ["8", "eight GB", "0GB", "8 KB"])
def test_a_size_has_a_number_and_a_unit(text):
    assert fitting.size("1.5 GiB") == 3 * 2**29 and fitting.size("8GB") == 8 * 10**9
    with pytest.raises(ConfigError, match="write for instance 8GB"):
        fitting.size(text)


def test_the_exit_code_says_whether_settings_must_change(model_folder):
    def code(*arguments):
        changes = [
            part for key in (f"model={model_folder}", "local-steps=2", *arguments[1:]) for part in ("--set", key)
        ]
        return CliRunner().invoke(cli.app, ["plan", "--device-memory", arguments[0], *changes])

    keys = "task=causal-lm", "fedkrso.interval=2", "fedkrso.rank=2"
    enough = code("8GB", *keys)
    assert enough.exit_code == 0 and "It fits as set." in enough.stdout and "a count and no time" in enough.stdout
    assert code("1MB", *keys).exit_code == 3
    assert code("8", *keys).exit_code == 2


def test_auto_keeps_all_on_a_cpu_and_takes_the_first_that_is_free_on_a_gpu(run_config, monkeypatch, caplog):
    config = parse(run_config | {"activation-memory": "auto"})
    task = data.resolve(config)
    assert device_memory.settled(config, task).activation_memory == "keep"
    needs, refused = memory.client_memory(*memory.outlined(config, task), cuda=True)
    monkeypatch.setattr(device_memory, "client_memory", lambda *given, cuda, settings: (needs, refused))
    monkeypatch.setattr(device_memory, "device", lambda setting: torch.device("cuda"))
    for setting in memory.SETTINGS:
        free = int(needs[setting].total * (1 + GAPS)) + WORKSPACES
        monkeypatch.setattr(device_memory, "free_bytes", lambda place, free=free: free)
        with caplog.at_level("INFO", logger="flwr"):
            assert device_memory.settled(config, task).activation_memory == setting
        assert f"activation-memory = 'auto': {setting}" in caplog.text
    monkeypatch.setattr(device_memory, "free_bytes", lambda place: free - 1)
    with pytest.raises(ConfigError, match=r"even 'checkpoint' needs .* `fedkrso plan --device-memory"):
        device_memory.settled(config, task)
    private = {"privacy.unit": "example", "privacy.clip": 1.0, "privacy.noise": 1.0}
    with pytest.raises(ConfigError, match="single rows"):
        device_memory.settled(parse(run_config | private | {"activation-memory": "auto"}), task)


def test_a_run_on_auto_has_the_bits_of_one_that_keeps(run_config):
    kept = digest(play(run_config, nodes=2))
    assert digest(play(run_config | {"activation-memory": "auto", "run-name": "auto"}, nodes=2)) == kept
