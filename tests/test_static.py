"""A step that knows nothing of its host: recorded once and repeated, it trains as ever."""

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from helpers import digest, play, replayed
from recorder import record
from test_families import DECODERS, FAMILIES, build
from test_together import CLIENTS, STEPS, alone, batches_of, ends, exact, in_one_pass

from fedkrso_app.config import ConfigError
from fedkrso_app.core.stacked import Group
from fedkrso_app.strategies import make, parse
from fedkrso_app.training import graphs, model, static
from fedkrso_app.training.shapes import Shapes
from fedkrso_app.training.static import Recorder

LONGEST = 16
PADDING = {"input_ids": 1}, False


def trained(local, instructions, config, labels, recorder=None, clients=1):
    """Losses and what moved: of one client by itself, or of several in one pass."""
    rngs = [np.random.Generator(np.random.Philox(client)) for client in range(clients)]
    group = Group(clients)
    with ExitStack() as context:
        halves, stacks = context.enter_context(local.stacked(group)) if clients > 1 else ([local], [])
        sessions = [
            context.enter_context(half.session({**instructions, "partition": client}, rngs[client]))
            for client, half in enumerate(halves)
        ]
        each = [batches_of(client, labels) for client in range(clients)]
        losses = static.train(
            local.module, each, sessions, group, stacks, config, rngs, PADDING, LONGEST, recorder or Recorder()
        )
        return losses, [ends(session) for session in sessions], [session.update() for session in sessions]


def agrees(found, wanted):
    for one, other in zip(wanted, found, strict=True):
        for expected, value in zip(one, other, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)


def of_settings(folder, labels, run_config, **changes):
    settings = run_config | {"local-steps": STEPS, "fedkrso.interval": 2, "batch-size": 4}
    local, instructions, config = exact(folder, labels, settings | changes)
    return local, {**instructions, "partition": 0}, config


@pytest.mark.parametrize("strategy", ["fedkrso", "fedit", "fedfft", "fedblock"])
def test_static_steps_train_one_client_as_the_loop_does(strategy, model_folder, run_config):
    """Float64, no dropout: padded rows and tokens, accumulation, clipping, two projections and one of them twice."""
    changes = {"strategy": strategy, "gradient-accumulation": 2, "max-grad-norm": 0.3, "fedkrso.num-seeds": 2}
    local, instructions, config = of_settings(model_folder, 2, run_config, **changes)
    other = copy.deepcopy(local)
    losses, moved, _ = trained(local, instructions, config, 2)
    expected_losses, expected = alone(other, instructions, config, 2)
    np.testing.assert_allclose(float(losses.double().mean()), expected_losses[0], rtol=1e-5)
    agrees(moved, expected[:1])
    assert not any(p.requires_grad or p.grad is not None for p in local.module.parameters())


@pytest.mark.parametrize("option", [{}, {"client.proximal": 0.5}], ids=["plain", "proximal"])
@pytest.mark.parametrize("strategy", ["fedkrso", "fedit"])
def test_and_several_in_one_pass(strategy, option, model_folder, run_config):
    local, instructions, config = of_settings(model_folder, 2, run_config, strategy=strategy, **option)
    other = copy.deepcopy(local)
    losses, moved, _ = trained(local, instructions, config, 2, clients=CLIENTS)
    expected_losses, expected, _ = in_one_pass(other, instructions, config, 2)
    np.testing.assert_allclose(losses.double(), expected_losses.double(), rtol=1e-5)
    agrees(moved, expected)


@pytest.mark.parametrize("labels, family", [(1, None), (0, "llama")], ids=["regression", "language"])
def test_regressions_and_language_models_too(labels, family, model_folder, run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # transformers' loss would round to float32
    folder = build(tmp_path / "m", model_folder, family, True) if family else model_folder
    local, instructions, config = of_settings(folder, labels, run_config)
    other = copy.deepcopy(local)
    _, moved, _ = trained(local, instructions, config, labels)
    agrees(moved, alone(other, instructions, config, labels)[1][:1])


def same(one, other):
    (a, moved_a, update_a), (b, moved_b, update_b) = one, other
    assert torch.equal(a, b)
    for x, y in zip(moved_a, moved_b, strict=True):
        assert all(map(torch.equal, x, y))
    for x, y in zip(update_a, update_b, strict=True):
        assert all(np.array_equal(x[name], y[name]) for name in x)


def real(folder, labels, run_config, place, **changes):
    """As in a run: float32 or bfloat16, with dropout."""
    config = parse(run_config | {"local-steps": 7, "fedkrso.interval": 2, "batch-size": 4} | changes)
    loaded = model.load(str(folder), labels, 0, head=config.head)
    method = make(config, Shapes.of(loaded), judged=False)
    local = method.local(loaded)
    if config.on_device:
        local.module.to(place)
    else:
        local = local.computing(place)
    return local, method.instructions(1), config


def repeats(folder, labels, run_config, clients=1, place=None, recorder=None, **changes):
    """What is recorded has the bits of what is not, and each part of a step is recorded once."""
    local, instructions, config = real(folder, labels, run_config, place or torch.device("cpu"), **changes)
    other, noted, recorder = copy.deepcopy(local), [], recorder or Recorder(record)
    plain = trained(other, instructions, config, labels, clients=clients)
    recorder.record = lambda call, take=recorder.record: noted.append(call) or take(call)
    same(trained(local, instructions, config, labels, recorder, clients), plain)
    assert len(noted) == 2 and recorder.record, "a length or the update was not recorded"


RUNS = [("fedkrso", "float32"), ("fedkrso", "bfloat16"), ("fedit", "bfloat16"), ("fedfft", "float32")]


@pytest.mark.parametrize("strategy, dtype", RUNS)
def test_a_step_that_was_recorded_once_gives_the_bits_of_one_that_is_done_anew(
    strategy, dtype, model_folder, run_config
):
    """Learning rates, bias corrections, dropout, accumulators and intervals go on: nothing of the host is baked in."""
    repeats(model_folder, 2, run_config, strategy=strategy, **{"compute-dtype": dtype, "max-grad-norm": 1.0})


@pytest.mark.parametrize("strategy, dtype", RUNS[:3])
def test_so_does_one_of_a_whole_pass(strategy, dtype, model_folder, run_config):
    changes = {"compute-dtype": dtype, "max-grad-norm": 1.0, "gradient-accumulation": 2}
    repeats(model_folder, 2, run_config, CLIENTS, strategy=strategy, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_recorded_or_asks_its_host(family, model_folder, run_config, tmp_path, caplog):
    language = family in DECODERS
    folder = build(tmp_path / "m", model_folder, family, language)
    changes = {"local-steps": 4, "strategy": "fedkrso"}
    if family in ("deberta", "deberta-v2"):  # constants that are made on the host in each forward pass
        with pytest.raises(AssertionError):
            repeats(folder, 2, run_config, **changes)
        assert caplog.text.count("The steps of this model are not captured: a step asks its host: aten.lift_fresh") == 1
    else:
        repeats(folder, 0 if language else 2, run_config, **changes)


def test_a_model_that_cannot_be_recorded_trains_to_the_same_bits_and_says_so_once(model_folder, run_config, caplog):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    local, instructions, config = real(model_folder, 2, run_config, torch.device("cpu"))
    other, recorder = copy.deepcopy(local), Recorder(refuse)
    plain = trained(other, instructions, config, 2)
    same(trained(local, instructions, config, 2, recorder), plain)
    trained(local, instructions, config, 2, recorder)
    assert caplog.text.count("are not captured: operation not permitted when stream is capturing") == 1


def test_memory_that_is_out_is_no_reason_to_record_nothing(model_folder, run_config):
    def scarce(call):
        raise torch.OutOfMemoryError("out of memory")

    local, instructions, config = real(model_folder, 2, run_config, torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        trained(local, instructions, config, 2, Recorder(scarce))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"strategy": "decomfl"}, "takes its steps from losses"),
        ({"strategy": "fedit", "client.correction": "scaffold"}, "corrects each step on the host"),
    ],
)
def test_what_needs_the_host_is_trained_as_ever(changes, reason, run_config, monkeypatch, caplog):
    run = play(run_config | changes | {"num-server-rounds": 1}, nodes=2)
    monkeypatch.setattr(graphs, "recorder", lambda config: Recorder(record))
    again = play(run_config | changes | {"num-server-rounds": 1, "run-name": "again"}, nodes=2, run_id=2)
    assert digest(run) == digest(again) and caplog.text.count(reason) == 1


def test_nodes_train_by_recorded_steps_alone_and_in_passes(run_config, monkeypatch):
    runs = {}
    for name, how in (("plain", Recorder()), ("recorded", Recorder(record))):
        monkeypatch.setattr(graphs, "recorder", lambda config, how=how: how)
        for each in ("1", "3"):
            settings = run_config | {"clients-per-node": 3, "batch-clients": each, "num-server-rounds": 2}
            run = play(settings | {"run-name": name + each}, nodes=3, run_id=len(runs) + 1)
            assert run.metrics()[-1]["clients"] == 3 and replayed(run) == digest(run)
            runs[name, each] = digest(run)
    assert runs["plain", "1"] == runs["recorded", "1"] and runs["plain", "3"] == runs["recorded", "3"]


def test_captured_steps_without_cuda_are_refused_before_round_1(run_config):
    with pytest.raises(ConfigError, match=r"captured-steps = 'on' needs a CUDA device.* set it to 'off'"):
        play(run_config | {"captured-steps": "on", "device": "cpu"})
    assert graphs.recorder(parse(run_config)) is None and graphs.recorder(parse(run_config | {"device": "cpu"})) is None


@pytest.mark.parametrize("longest", [4, 16, 100, 128, 512])
def test_batches_are_padded_to_few_lengths_that_hold_them(longest):
    lengths = [static.padded(length, longest) for length in range(1, longest + 1)]
    assert all(length <= found <= longest for length, found in enumerate(lengths, 1))
    assert lengths == sorted(lengths) and len(set(lengths)) <= static.LENGTHS
