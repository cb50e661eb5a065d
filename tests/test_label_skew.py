"""The head's own rate, and the logits adjusted by a client's class shares: by another route, and off means off."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import play, replayed
from torch.nn import functional

from fedkrso_app.config import ConfigError
from fedkrso_app.strategies import STRATEGIES, make, options, parse
from fedkrso_app.strategies.label_skew import log_shares
from fedkrso_app.training import loop
from fedkrso_app.training.model import load
from fedkrso_app.training.shapes import Shapes

METHODS = ["fedkrso", "fedfft", "fedit", "fedblock"]
LABELS = np.array([0, 1, 1, 1, 1])


def trained(run_config, strategy, steps=4, around=lambda module: None, **settings):
    """What a client sends after ``steps`` steps without dropout, and the head that it began with."""
    config = parse(
        run_config | {"strategy": strategy, "local-steps": steps, "warmup": 0.0, "fedkrso.interval": 1} | settings
    )
    loaded = load(str(run_config["model"]), 2, 0)
    for part in loaded.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    method = make(config, Shapes.of(loaded))
    local = method.local(loaded)
    method.observe(0, local.state())
    around(local.module)
    start = {name: parameter.clone() for name, parameter in local.head.items()}
    batch = {"input_ids": torch.tensor([[0, 7, 8, 2], [0, 30, 9, 2]]), "labels": torch.tensor([1, 0])}
    asked = {**method.instructions(1), "partition": 0, "labels": lambda: LABELS}
    with local.session(asked, np.random.default_rng(0)) as session:
        loop.train(local.module, iter([batch] * steps), session, config, np.random.default_rng(0))
        return session.update(), start, {name: parameter.clone() for name, parameter in local.head.items()}


@pytest.mark.parametrize("strategy", METHODS)
def test_the_heads_rate_scales_the_first_step_of_the_head_and_nothing_else(run_config, strategy):
    """Adam's first step has the length of its rate, so the head's becomes a quarter and the rest keeps its bits."""
    (plain, start, whole), (slow, _, quarter) = (
        trained(run_config, strategy, 1, **{"client.head-rate": rate}) for rate in (1.0, 0.25)
    )
    for name, before in start.items():
        torch.testing.assert_close(quarter[name] - before, (whole[name] - before) / 4, rtol=1e-3, atol=2e-8)
    for name in plain.keys() - {"head", "parameters"}:
        np.testing.assert_array_equal(slow[name], plain[name])


@pytest.mark.parametrize("strategy", METHODS)
def test_a_shifted_bias_is_the_loss_with_adjusted_logits(run_config, strategy):
    def adjusted(module):
        plain, shift = module.forward, 0.7 * torch.log(torch.tensor([0.2, 0.8]))

        def forward(labels, **inputs):
            result = plain(**inputs)
            result.loss = functional.cross_entropy(result.logits + shift, labels)
            return result

        module.forward = forward

    expected, _, _ = trained(run_config, strategy, around=adjusted)
    seen, _, _ = trained(run_config, strategy, **{"client.logit-adjustment": 0.7})
    off, _, _ = trained(run_config, strategy)
    # AdamW's decay of the bias is that of the shifted one: 4 steps x rate x 0.01 x shift
    assert seen.keys() == expected.keys()
    for name in seen.keys() - {"seeds"}:
        np.testing.assert_allclose(seen[name], expected[name], rtol=0, atol=3e-3)
    head = "parameters" if strategy == "fedfft" else "head"
    assert np.abs(off[head] - expected[head]).max() > 5e-3


def test_shares_of_classes_by_hand_and_a_missing_class_counts_one():
    torch.testing.assert_close(log_shares(LABELS, 2).exp(), torch.tensor([0.2, 0.8], dtype=torch.float64))
    torch.testing.assert_close(log_shares(np.array([1, 1]), 3).exp(), torch.tensor([0.25, 0.5, 0.25]).double())


def test_both_options_go_with_the_rest_and_replay_to_the_same_bits(run_config):
    more = {"client.logit-adjustment": 1.0, "client.head-rate": 0.5, "client.proximal": 0.1}
    run = play(run_config | more | {"strategy": "fedkrso", "partition": "dirichlet-equal", "dirichlet-alpha": 0.3})
    assert run.status == "completed" and replayed(run)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"client.logit-adjustment": 1.0, "task": "embedded/similarity", "data-dir": ""}, "has no classes"),
        (
            {"client.logit-adjustment": 1.0, "privacy.unit": "example", "privacy.clip": 1.0, "privacy.noise": 1.0},
            "class counts without noise",
        ),
        ({"client.logit-adjustment": -1.0}, "client.logit-adjustment"),
        ({"client.head-rate": 0.0}, "client.head-rate"),
        ({"client.head-rate": 0.5, "strategy": "decomfl"}, "zeroth.head-learning-rate"),
    ],
)
def test_what_the_options_cannot_go_with_is_refused_before_anything_starts(run_config, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(run_config | settings)


def test_an_adjustment_needs_a_bias_that_is_trained(run_config):
    config = parse(run_config | {"client.logit-adjustment": 1.0, "head": "frozen"})
    loaded = load(str(run_config["model"]), 2, 0, head="frozen")
    with pytest.raises(ConfigError, match="whose bias is trained"):
        make(config, Shapes.of(loaded)).local(loaded)


def test_off_is_the_method_itself(config):
    for name in STRATEGIES.keys() - {"fedsa-lora"}:
        assert options.applied(STRATEGIES[name], dataclasses.replace(config, strategy=name)) is STRATEGIES[name]
