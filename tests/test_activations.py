"""What is kept for the backward pass: every setting gives the default's gradients; our dropout is dropout."""

import numpy as np
import pytest
import torch
from test_train import MODELS, SAVING, batch, model
from torch import nn

from fedkrso_app.core.subspace import AdapterLinear, SubspaceLinear, attached
from fedkrso_app.training.activations import TrainingError, activation_memory
from fedkrso_app.training.model import find_targets


def gradients(kind, setting, form):
    """G_B of every layer, and torch's next random number: the same masks leave the same generator behind."""
    module = model(kind)
    with attached(module, find_targets(module), 2, form) as layers, activation_memory(module, setting):
        for number, layer in enumerate(layers.values()):
            generator = torch.Generator().manual_seed(number)
            P = torch.randn(2, layer.W.shape[1], dtype=torch.float64, generator=generator)
            layer.follow(number, P, torch.full_like(layer.B, 0.01))
        torch.manual_seed(2)
        module(**batch()).loss.backward()
        return [layer.B.grad for layer in layers.values()], torch.rand(())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("setting", SAVING)
@pytest.mark.parametrize("form", [SubspaceLinear, AdapterLinear])
def test_gradients_and_dropout_masks_are_those_of_the_default(kind, setting, form):
    expected, random = gradients(kind, "keep", form)
    found, same = gradients(kind, setting, form)
    assert any(gradient.abs().max() > 0 for gradient in expected) and random == same
    for mine, default in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, default, rtol=1e-10, atol=1e-14)


def test_recompute_runs_no_narrow_layer_twice_and_every_wide_one(monkeypatch):
    module, calls = model("encoder with biases and dropout"), {"narrow": 0, "wide": 0}
    linear = nn.functional.linear

    def count(x, weight, bias=None):
        calls["wide" if weight.shape[0] > weight.shape[1] else "narrow"] += 1
        return linear(x, weight, bias)

    module.classifier.requires_grad_(True)
    module.get_input_embeddings().register_forward_hook(lambda layer, args, output: output.requires_grad_())
    with activation_memory(module, "recompute"):
        monkeypatch.setattr(nn.functional, "linear", count)
        module(**batch()).loss.backward()
    assert calls == {"narrow": 2 * 5 + 2, "wide": 2 * 2}  # two blocks; dense and out_proj of the head are outside


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def test_recompute_refuses_a_model_that_changes_a_kept_product_in_place():
    module = model("encoder with biases and dropout")
    after = module.roberta.encoder.layer[0].attention.output
    after.dropout = InPlace()
    after.dense.bias.requires_grad_(True)
    with activation_memory(module, "recompute"), pytest.raises(TrainingError, match="changes what a linear layer gave"):
        module(**batch()).loss.backward()


def test_a_model_without_checkpoints_is_refused_by_name():
    with pytest.raises(TrainingError, match="activation-memory = 'checkpoint' is not possible"):  # noqa: SIM117
        with activation_memory(nn.Linear(2, 2), "checkpoint"):
            pass


def dropped(x, p, seed=0):
    module = nn.Sequential(nn.Dropout(p), nn.Linear(1, 1)).train()
    torch.manual_seed(seed)
    with activation_memory(module, "keep"):
        return module[0](x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_each_value_with_probability_one_minus_p_and_the_mean(p):
    y = dropped(torch.ones(200_003), p)
    kept = y[y != 0]
    share = len(kept) / len(y)
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / len(y)) ** 0.5 + 2**-16
    assert torch.unique(kept).item() == pytest.approx(1 / (1 - round(p * 2**16) / 2**16))
    halves = (y != 0).float()[:200_000].view(-1, 2)
    assert abs(np.corrcoef(halves.T)[0, 1]) < 4 / len(halves) ** 0.5  # neighbours know nothing of each other


def test_a_dropout_of_nearly_all_is_finite():
    assert dropped(torch.ones(100_000), 0.9999999).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_of_dropout_is_its_mask_and_scale(dtype):
    x = torch.randn(7, 5, dtype=dtype).requires_grad_()
    y = dropped(x.T, 0.4)
    y.sum().backward()
    expected = (y != 0).to(dtype) * (1 / (1 - round(0.4 * 2**16) / 2**16))
    assert 0 < (y == 0).sum() < 35 and torch.equal(x.grad, expected.T)


def test_dropout_is_drawn_from_torchs_generator():
    x = torch.ones(1000)
    assert torch.equal(dropped(x, 0.5, seed=1), dropped(x, 0.5, seed=1))
    assert not torch.equal(dropped(x, 0.5, seed=1), dropped(x, 0.5, seed=2))


def test_outside_of_training_and_afterwards_dropout_is_torchs_own():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3))
    with activation_memory(module, "keep"):
        assert "forward" in vars(module[0])
        module.eval()
        assert torch.equal(module[0](torch.ones(3)), torch.ones(3))
    assert "forward" not in vars(module[0])
