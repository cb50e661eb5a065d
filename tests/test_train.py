"""The local loop: learning rates, decay, dropout and draws; every setting of activation-memory gives equal weights."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import play
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    get_cosine_schedule_with_warmup,
)

from fedkrso_app.core.rso import RSO
from fedkrso_app.strategies import STRATEGIES, make, parse
from fedkrso_app.training.loop import Session, factor_optimizer, rate_factor, train
from fedkrso_app.training.model import load
from fedkrso_app.training.shapes import Shapes

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "encoder with biases and dropout": RobertaConfig(**SMALL, max_position_embeddings=40, num_labels=2),
    "decoder without biases": LlamaConfig(**SMALL, pad_token_id=0, num_labels=2, attention_dropout=0.1),
}
SAVING = ["recompute", "checkpoint"]


def model(kind):
    torch.manual_seed(0)
    module = AutoModelForSequenceClassification.from_config(MODELS[kind]).double().train()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def batch():
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, 50, (3, 7), generator=generator), "labels": torch.tensor([0, 1, 1])}


@pytest.mark.parametrize("setting", SAVING)
def test_training_ends_at_the_weights_of_the_default_and_leaves_the_model_as_it_was(config, setting):
    ends = []
    for chosen in ("keep", setting):
        module = model("encoder with biases and dropout")
        optimizer = torch.optim.SGD(module.roberta.encoder.parameters(), lr=0.1)
        settings = dataclasses.replace(config, activation_memory=chosen)
        train(module, iter([batch()] * 4), Session([optimizer], dict), settings, np.random.default_rng(0))
        assert not any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
        ends.append(nn.utils.parameters_to_vector(module.parameters()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-12)


def ends_of(config, batches, optimizer=torch.optim.SGD, **settings):
    """The weights after training on ``batches``, without dropout."""
    module = model("encoder with biases and dropout")
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    parameters = list(module.roberta.encoder.parameters())
    settings = {"local_steps": 2, "warmup": 0.0, **settings}
    config = dataclasses.replace(config, **settings)
    session = Session([optimizer(parameters, lr=0.1)], dict, constant_rate=True)
    train(module, iter(batches), session, config, np.random.default_rng(0))
    return nn.utils.parameters_to_vector(parameters)


def test_accumulated_batches_are_one_large_batch(config):
    whole = batch()
    parts = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(3)]
    expected = ends_of(config, [whole] * 2)
    torch.testing.assert_close(ends_of(config, parts * 2, gradient_accumulation=3), expected, rtol=1e-9, atol=1e-12)


def uneven():
    """Eight rows with one to seven predicted tokens, as two batches of four and as eight of one."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 50, (8, 9), generator=generator)
    asked = torch.tensor([1, 7, 2, 1, 7, 7, 3, 1])
    labels = ids.where(torch.arange(9) >= 9 - asked[:, None], -100)
    return [
        [{"input_ids": i, "labels": y} for i, y in zip(ids.split(n), labels.split(n), strict=True)] for n in (8, 4, 1)
    ]


@pytest.mark.parametrize("parts", [1, 2])
def test_answers_of_any_length_accumulate_to_one_batch(config, parts):
    """The step from 8 × 1 and from 2 × 4 rows is that from 1 × 8: each predicted token counts once."""

    def step(batches):
        torch.manual_seed(0)
        module = LlamaForCausalLM(LlamaConfig(**SMALL, pad_token_id=0)).double()
        parameters = list(module.model.layers.parameters())
        start = nn.utils.parameters_to_vector(parameters).detach().clone()
        session = Session([torch.optim.SGD(parameters, lr=1.0)], dict, constant_rate=True)
        settings = {"local_steps": 1, "gradient_accumulation": len(batches), "warmup": 0.0}
        loss = train(module, iter(batches), session, dataclasses.replace(config, **settings), np.random.default_rng(0))
        return nn.utils.parameters_to_vector(parameters) - start, loss

    (whole, loss), (accumulated, mean) = step(uneven()[0]), step(uneven()[parts])
    assert torch.linalg.vector_norm(accumulated - whole) < 1e-6 * torch.linalg.vector_norm(whole)
    assert mean == pytest.approx(loss, rel=1e-6)


def test_a_smaller_batch_of_rows_counts_by_its_rows(config):
    whole = batch()
    parts = [{name: value[i:j] for name, value in whole.items()} for i, j in ((0, 1), (1, 3))]
    expected = ends_of(config, [whole] * 2)
    torch.testing.assert_close(ends_of(config, parts * 2, gradient_accumulation=2), expected, rtol=1e-9, atol=1e-12)


def test_a_step_is_never_longer_than_max_grad_norm_times_the_rate(config):
    start, free = ends_of(config, [], local_steps=0), ends_of(config, [batch()], local_steps=1)
    length = torch.linalg.vector_norm(free - start)
    clipped = ends_of(config, [batch()], local_steps=1, max_grad_norm=0.3 * float(length) / 0.1)
    torch.testing.assert_close(clipped - start, 0.3 * (free - start), rtol=1e-3, atol=1e-12)
    loose = ends_of(config, [batch()], local_steps=1, max_grad_norm=1e6)
    assert torch.equal(loose, free)


STEPS = 20
RATES = {  # all different, so that no method can take another's
    "fedkrso.learning-rate": 1e-3,
    "fedfft.learning-rate": 2e-3,
    "lora.learning-rate": 3e-3,
    "ffa-lora.learning-rate": 4e-3,
    "fedsrd.learning-rate": 5e-3,
    "zeroth.head-learning-rate": 6e-3,
    "decomfl.learning-rate": 1e-5,
    "fedkseed.learning-rate": 2e-5,
    "fedmezo.learning-rate": 3e-5,
    "fwdllm.learning-rate": 4e-5,
    "fedblock.learning-rate": 7e-3,
    "ferret.learning-rate": 8e-3,
    "separate.learning-rate": 9e-3,
    "fedsa-lora.learning-rate": 1.1e-3,
    "fr-lora.learning-rate": 1.2e-3,
    "federa.learning-rate": 1.3e-3,
    "rolora.learning-rate": 2.1e-3,
    "fedsvd.learning-rate": 2.2e-3,
    "flexlora.learning-rate": 2.3e-3,
    "hetlora.learning-rate": 2.4e-3,
    "flora.learning-rate": 2.5e-3,
    "fedex-lora.learning-rate": 2.6e-3,
    "lora-fair.learning-rate": 2.7e-3,
    "fed-dare.learning-rate": 2.8e-3,
}


@pytest.fixture(params=STRATEGIES)
def opened(request, run_config, model_folder):
    """The session of a method, ready for its steps, and the half that it belongs to."""
    config = parse(run_config | RATES | {"strategy": request.param, "local-steps": STEPS, "warmup": 0.25})
    loaded = load(str(model_folder), 2, 0)
    method = make(config, Shapes.of(loaded), judged=False)
    local = method.local(loaded)
    with local.session(method.instructions(1), np.random.default_rng(0)) as session:
        yield local, session


def test_every_step_has_the_papers_learning_rate_and_every_method_its_own(opened):
    """Linear over the first quarter, then half a cosine to 0; FedSRD's and FwdLLM's are constant."""
    local, session = opened
    own = RATES[STRATEGIES[local.config.strategy].learning_rate_key]
    warm = np.arange(5) / 5
    cosine = (1 + np.cos(np.pi * np.arange(15) / 15)) / 2
    constant = local.config.strategy.startswith(("fedsrd", "fwdllm"))
    expected = np.full(STEPS, own) if constant else own * np.append(warm, cosine)
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    batch = {"input_ids": torch.tensor([[0, 7, 8, 2]]), "labels": torch.tensor([1])}
    train(local.module, iter([batch] * STEPS), session, local.config, np.random.default_rng(0))
    hook.remove()
    several = len(session.optimizers)
    for i in range(several):
        head = RATES["zeroth.head-learning-rate"] / own if session.from_losses and i == 0 else 1  # its gradient's
        np.testing.assert_allclose(seen[i::several], head * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(("warmup", "steps", "rising"), [(0.29, 100, 29), (0.05, 50, 2), (0.1, 30, 3), (0.0, 9, 0)])
def test_the_warm_up_takes_its_share_of_the_steps(config, warmup, steps, rising, schedule):
    weight, rates = nn.Parameter(torch.ones(1)), []
    optimizer = torch.optim.SGD([weight], lr=1.0)
    session = Session([optimizer], dict, lambda j: rates.append(optimizer.param_groups[0]["lr"]))
    config = dataclasses.replace(config, warmup=warmup, local_steps=steps, schedule=schedule)
    train(
        Single(weight),
        iter([{"x": torch.ones(1), "labels": torch.zeros(1)}] * steps),
        session,
        config,
        np.random.default_rng(0),
    )
    assert rates.index(max(rates)) == rising
    assert (rates[rising:] == [1.0] * (steps - rising)) == (schedule == "constant")


def test_rates_are_those_of_transformers_to_the_bit(config):
    for warmup, steps, rising in [(0.29, 100, 29), (0.05, 50, 2), (0.0, 9, 0)]:
        config = dataclasses.replace(config, warmup=warmup, local_steps=steps)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        theirs = get_cosine_schedule_with_warmup(optimizer, rising, steps)
        ours = [rate_factor(False, config, j) for j in range(steps + 1)]
        assert ours == [theirs.lr_lambdas[0](j) for j in range(steps + 1)]


class Single(nn.Module):
    """loss = w·x"""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x, labels):
        return SimpleNamespace(loss=(self.weight * x).sum())


def test_only_the_head_decays_but_in_full_fine_tuning(opened):
    local, session = opened
    head = {id(parameter) for parameter in local.head.values()}
    for group in (group for optimizer in session.optimizers for group in optimizer.param_groups):
        for parameter in group["params"]:
            everything = local.config.strategy in ("fedfft", "fedblock")
            assert group.get("weight_decay", 0.0) == (0.01 if everything or id(parameter) in head else 0.0)


def test_dropout_is_on_in_training_and_off_in_judgement(run_config):
    modes = {True: set(), False: set()}  # whether gradients are asked for -> module.training of the dropouts

    def look(part, _):
        if isinstance(part, nn.Dropout):
            modes[torch.is_grad_enabled()].add(part.training)

    hook = register_module_forward_pre_hook(look)
    play(run_config | {"num-server-rounds": 1})
    hook.remove()
    assert modes == {True: {True}, False: {False}}


def test_dropout_differs_between_clients_rounds_and_steps(run_config, monkeypatch):
    """All clients have the same rows in the same order, and no step moves anything: only dropout is left."""
    monkeypatch.setattr("fedkrso_app.data.partition", lambda train, task, n, *rest: [np.arange(8)] * n)
    losses = []
    loss_of = type(load(run_config["model"], 2, 0).module).forward

    def forward(self, **batch):
        output = loss_of(self, **batch)
        if torch.is_grad_enabled():
            losses.append(float(output.loss.detach()))
        return output

    monkeypatch.setattr(type(load(run_config["model"], 2, 0).module), "forward", forward)
    still = {"fedkrso.learning-rate": 1e-30, "batch-size": 8, "num-server-rounds": 2}
    play(run_config | still, nodes=2)
    assert len(losses) == 2 * 2 * 4 and len(set(losses)) == len(losses)


def test_intervals_begin_at_every_jth_step_and_draw_every_seed_alike(config, model_folder, monkeypatch):
    drawn, at = [], []
    monkeypatch.setattr(RSO, "start_interval", lambda self, seed: drawn.append(seed))
    loaded = load(str(model_folder), 2, 0)
    local = make(dataclasses.replace(config, local_steps=6000), Shapes.of(loaded)).local(loaded)
    pool = np.array([11, 22, 33], "<u8")
    with local.session({"seeds": pool.tobytes()}, np.random.default_rng(0)) as session:
        for j in range(6000):
            before = len(drawn)
            session.before_step(j)
            at += [j] * (len(drawn) - before)
    assert at == list(range(0, 6000, 2))
    counts = np.array([drawn.count(seed) for seed in pool.tolist()])
    assert counts.sum() == 3000 and (np.abs(counts - 1000) < 5 * np.sqrt(3000 * 2 / 9)).all()


def test_clients_and_rounds_draw_seeds_of_their_own(run_config):
    drawn = {}

    def keep(partition, message, reply):
        drawn[partition, message.content["train"]["round"]] = reply.content["update"]["seeds"].numpy().tolist()
        return reply

    many = {"fedkrso.num-seeds": 64, "fedkrso.interval": 1, "local-steps": 8, "num-server-rounds": 2}
    play(run_config | many, tamper=keep)
    pools = {round: {seed for (_, r), seeds in drawn.items() if r == round for seed in seeds} for round in (1, 2)}
    assert not pools[1] & pools[2]
    choices = [tuple(seeds) for seeds in drawn.values()]
    assert len(set(choices)) == len(choices) == 8


def test_factors_that_are_moved_together_have_the_bits_of_each_by_itself():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((2, 40), (16, 2), (2, 7), (1, 1))]
    ways = factor_optimizer, lambda factors, lr: torch.optim.AdamW(factors, lr=lr, weight_decay=0.0)
    ends = []
    for way in ways:
        factors = [nn.Parameter(value.clone()) for value in start]
        optimizer, drawn = way(factors, 0.1), torch.Generator().manual_seed(1)
        for step in range(12):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            for factor in factors:
                factor.grad = 0.01 * torch.randn(factor.shape, generator=drawn)
            optimizer.step()
        ends.append(factors)
    assert all(map(torch.equal, *ends))
