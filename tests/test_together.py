"""Several clients in one pass: the training of each is what it would be alone."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import digest, play, replayed
from test_families import DECODERS, FAMILIES, build
from torch import nn

from fedkrso_app.core import projection
from fedkrso_app.core.rso import RSO
from fedkrso_app.core.stacked import Group, Stack, StackedLinear, Unstackable
from fedkrso_app.federation.workplace import Workplace
from fedkrso_app.strategies import STRATEGIES, make, parse
from fedkrso_app.strategies.base import Local
from fedkrso_app.training import loop, model, together
from fedkrso_app.training.shapes import Shapes

BATCHING = [n for n, m in STRATEGIES.items() if m.half.stacked is not Local.stacked and not m.zeroth_order]
IN_ONE = {"batch-clients": "9"}
CLIENTS, STEPS = 3, 5
SIZES = [(4, 7), (2, 9), (4, 5)]  # rows and tokens of each client's batches


def exact(folder, labels: int, settings: dict):
    """A method's half beside a float64 model without dropout, and instructions for a round."""
    config = parse(settings)
    loaded = model.load(str(folder), labels, 0, head=config.head)
    method = make(config, Shapes.of(loaded), judged=False)
    local = method.local(loaded)
    local.module.double()
    for part in local.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():  # no factor at rest at 0, which would hide the other one
        for parameter in local.optimized():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return local, method.instructions(1), config


def batches_of(client: int, labels: int, right: int = 1):
    """Batches without end; each client's are as long as its own."""
    rows, tokens = SIZES[client]
    generator = torch.Generator().manual_seed(client)
    while True:
        ids = torch.randint(5, 40, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        ids[0, -2:], mask[0, -2:] = right, 0  # a shorter row
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels == 0:
            yield batch | {"labels": torch.where(mask.bool(), ids, -100)}
        elif labels == 1:
            yield batch | {"labels": torch.rand(rows, generator=generator, dtype=torch.float64)}
        else:
            yield batch | {"labels": torch.randint(0, labels, (rows,), generator=generator)}


def ends(session) -> list[torch.Tensor]:
    """What a session's optimizers have moved, exactly."""
    found = []
    for optimizer in session.optimizers:
        if isinstance(optimizer, RSO):
            found += [optimizer.accumulators[seed] for seed in sorted(optimizer.accumulators)]
        else:
            found += [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return found


def alone(local, instructions, config, labels):
    losses, moved = [], []
    for client in range(CLIENTS):
        before = [tensor.clone() for tensor in local.trained()]
        rng = np.random.Generator(np.random.Philox(client))
        with local.session(instructions, rng) as session:
            losses.append(loop.train(local.module, batches_of(client, labels), session, config, rng))
            moved.append(ends(session))
        with torch.no_grad():
            for tensor, old in zip(local.trained(), before, strict=True):
                tensor.copy_(old)
    return losses, moved


def in_one_pass(local, instructions, config, labels, batches=batches_of):
    group, rngs = Group(CLIENTS), [np.random.Generator(np.random.Philox(client)) for client in range(CLIENTS)]
    with local.stacked(group) as (halves, stacks), ExitStack() as contexts:
        sessions = [
            contexts.enter_context(half.session(instructions, rng)) for half, rng in zip(halves, rngs, strict=True)
        ]
        each = [batches(client, labels) for client in range(CLIENTS)]
        padding = {"input_ids": 1}, False
        losses = together.train(local.module, each, sessions, group, stacks, config, rngs, padding)
        return (
            losses,
            [ends(session) for session in sessions],
            [session.update() if own.isfinite().all() else {} for session, own in zip(sessions, losses, strict=True)],
        )


def check(folder, labels, settings, **changes):
    local, instructions, config = exact(folder, labels, settings | {"local-steps": STEPS, "fedkrso.interval": 2})
    config = local.config = replace(config, **changes)
    before = {name: type(part) for name, part in local.module.named_modules()}
    expected_losses, expected = alone(local, instructions, config, labels)
    start = [tensor.clone() for tensor in local.shared()]
    losses, moved, _ = in_one_pass(local, instructions, config, labels)
    np.testing.assert_allclose(losses.double().mean(1), expected_losses, rtol=1e-5)  # the losses are kept as float32
    for one, other in zip(expected, moved, strict=True):
        for wanted, found in zip(one, other, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    assert {name: type(part) for name, part in local.module.named_modules()} == before
    assert all(map(torch.equal, local.shared(), start))


@pytest.fixture
def float64_throughout(monkeypatch):
    """No softmax, norm or loss of transformers rounds to float32, whose last bits depend on the CPU and the batch."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor if tensor.is_floating_point() else tensor.double())
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda input, dim=None, dtype=None, **_: softmax(input, dim=dim)
    )


@pytest.mark.parametrize("strategy", BATCHING)
def test_a_pass_trains_each_client_as_it_would_train_alone(strategy, model_folder, run_config):
    """Float64, no dropout: batches of unequal size and length, other seeds, every client's own gradient norm."""
    check(model_folder, 2, run_config | {"strategy": strategy}, gradient_accumulation=2, max_grad_norm=0.3)


@pytest.mark.parametrize("option", [{"client.proximal": 0.5}, {"client.correction": "scaffold"}, {"head": "linear"}])
def test_options_hold_for_each_client_of_a_pass(option, model_folder, run_config):
    for strategy in ["fedit", "fedkrso"] if "client.correction" not in option else ["fedit"]:
        check(model_folder, 2, run_config | {"strategy": strategy} | option)


@pytest.mark.parametrize(
    "family, strategy", [*((f, "fedkrso") for f in FAMILIES), ("bert", "fedit"), ("gpt2", "fedit")]
)
def test_every_family_computes_several_clients_or_says_why_not(
    family, strategy, model_folder, run_config, tmp_path, float64_throughout
):
    folder = build(tmp_path / "m", model_folder, family, False)
    try:
        check(folder, 2, run_config | {"strategy": strategy})
    except Unstackable as reason:
        assert family in ("deberta", "deberta-v2", "modernbert"), reason


@pytest.mark.parametrize("family, strategy", [*((f, "fedkrso") for f in DECODERS), ("gemma2", "fedit")])
def test_language_models_too(family, strategy, model_folder, run_config, tmp_path, float64_throughout):
    check(build(tmp_path / "m", model_folder, family, True), 0, run_config | {"strategy": strategy})


@pytest.mark.parametrize("setting", ["recompute", "checkpoint"])
def test_and_regressions_at_every_setting_of_activation_memory(setting, model_folder, run_config):
    check(model_folder, 1, run_config, activation_memory=setting)


@pytest.mark.parametrize("strategy", ["fedkrso", "fedit", "flora"])
def test_the_nan_of_one_client_changes_no_bit_of_the_others(strategy, model_folder, run_config):
    settings = run_config | {"strategy": strategy, "local-steps": STEPS}

    def trained(*sick: int):
        local, instructions, config = exact(model_folder, 1, settings)

        def batches(client: int, labels: int):
            for batch in batches_of(client, labels):
                yield batch | {"labels": batch["labels"] * (float("nan") if client in sick else 1)}

        return in_one_pass(local, instructions, config, 1, batches)

    (sound, moved, updates), (sick, beside, others) = trained(), trained(1)
    assert torch.isfinite(sound).all() and not torch.isfinite(sick[1]).any()
    for client in (0, 2):
        assert torch.equal(sick[client], sound[client])
        assert all(map(torch.equal, beside[client], moved[client]))
        assert all(np.array_equal(others[client][name], value) for name, value in updates[client].items())


def test_a_client_whose_loss_is_not_finite_is_told_apart_in_a_run(run_config, caplog, monkeypatch):
    losses_of = together.client_losses

    def broken(logits, labels, weights, clients):
        return losses_of(logits, labels, weights, clients) * torch.tensor([1.0, 1.0, float("nan"), 1.0])

    monkeypatch.setattr(together, "client_losses", broken)
    run = play(run_config | {"clients-per-node": 4, "num-server-rounds": 1} | IN_ONE)
    assert run.metrics()[-1]["partitions"] == [0, 1, 3]
    assert "partition 2 failed: the loss is nan at step 1: lower fedkrso's learning-rate" in caplog.text
    assert replayed(run) == digest(run)


@pytest.mark.parametrize("strategy", ["fedkrso", "fedit"])
def test_the_same_passes_give_the_same_bits(strategy, run_config):
    """Simulation and devices, resumed or not, whoever stands first: what counts is who shares a pass."""
    settings = run_config | IN_ONE | {"strategy": strategy, "clients-per-node": 2, "num-server-rounds": 2}
    whole = play(settings)
    devices = play(settings | {"run-name": "devices"}, devices=True, run_id=2, order=lambda replies: replies[::-1])
    half = play(settings | {"run-name": "half", "num-server-rounds": 1}, run_id=3)
    play(settings | {"run-name": "half", "resume": str(half.path)}, run_id=4)
    assert digest(whole) == digest(devices) == digest(half) == replayed(whole)


def test_batch_clients_says_how_many_share_a_pass(run_config, monkeypatch):
    sizes, train = [], together.train

    def counted(module, batches, *args):
        sizes.append(len(batches))
        return train(module, batches, *args)

    monkeypatch.setattr(together, "train", counted)
    settings = run_config | {"num-server-rounds": 1, "clients-per-node": 5}
    for run_id, (batch, expected) in enumerate({"auto": [], "3": [3, 2], "2": [2, 2], "9": [5]}.items()):
        sizes.clear()
        run = play(settings | {"batch-clients": batch, "run-name": batch}, nodes=5, run_id=run_id + 1)
        assert sizes == expected and run.metrics()[-1]["clients"] == 5


def test_a_pass_that_does_not_fit_into_memory_is_halved(run_config, monkeypatch, caplog):
    train = together.train

    def scarce(module, batches, *args):
        if len(batches) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return train(module, batches, *args)

    monkeypatch.setattr(together, "train", scarce)
    settings = run_config | {"num-server-rounds": 1, "clients-per-node": 5}
    run = play(settings | IN_ONE, nodes=5)
    assert "5 clients do not fit into memory: 2 at once from now on" in caplog.text
    monkeypatch.setattr(together, "train", train)
    twos = play(settings | {"batch-clients": "2", "run-name": "twos"}, nodes=5, run_id=2)
    assert digest(run) == digest(twos)


def test_a_client_that_breaks_a_pass_fails_alone(run_config, monkeypatch, caplog):
    own = Workplace._own

    def broken(self, partition, round):
        if partition == 1:
            raise ValueError("its own part is damaged")
        return own(self, partition, round)

    monkeypatch.setattr(Workplace, "_own", broken)
    run = play(run_config | IN_ONE | {"clients-per-node": 4, "num-server-rounds": 1})
    assert run.metrics()[-1]["partitions"] == [0, 2, 3] and "partition 1 failed: its own part is damaged" in caplog.text


def test_methods_whose_clients_train_everything_take_turns(run_config, caplog):
    settings = run_config | {"strategy": "fedfft", "num-server-rounds": 2}
    turns = play(settings | IN_ONE | {"clients-per-node": 4})
    assert caplog.text.count("Clients train one after another: each of its clients trains the whole model") == 1
    assert digest(turns) == digest(play(settings | {"run-name": "alone"}, run_id=2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_draws_each_projection_once_however_many_clients_follow_it(dtype, model_folder, run_config, monkeypatch):
    drawn, draw = [], projection.kept
    monkeypatch.setattr(
        projection, "kept", lambda seed, name, *rest: drawn.append((seed, name)) or draw(seed, name, *rest)
    )
    changes = {"local-steps": 6, "fedkrso.interval": 1, "fedkrso.num-seeds": 2, "compute-dtype": dtype}
    local, instructions, config = exact(model_folder, 2, run_config | changes)
    in_one_pass(local, instructions, config, 2)
    assert len(drawn) == len(set(drawn)) == 2 * len(local.targets)
    if dtype == "bfloat16":  # alone, the projections stay beside W too
        drawn.clear()
        alone(local, instructions, config, 2)
        assert len(drawn) == len(set(drawn)) * CLIENTS == 2 * CLIENTS * len(local.targets)


def test_layers_refuse_rows_that_are_no_clients():
    group = Group(2)
    group.rows = 3
    layer = StackedLinear(Stack(torch.zeros(2, 4), 2).whole, None, group)
    assert layer(torch.zeros(6, 5, 4)).shape == (6, 5, 2)
    for shape in ((5, 4), (1, 6, 4), (4,), (12, 4)):
        with pytest.raises(Unstackable, match="not the batch's rows"):
            layer(torch.zeros(shape))
