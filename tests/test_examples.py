"""The gradient of each row, kept apart, is what that row alone gives to autograd."""

import numpy as np
import pytest
import torch
from test_families import build
from test_together import exact
from torch import nn
from torch.nn import functional

from fedkrso_app.core.examples import NotRows, row_gradients
from fedkrso_app.training.activations import activation_memory
from fedkrso_app.training.together import client_losses

ROWS, TOKENS = 5, 7
MODELS = {  # name -> family, labels, strategy, other settings
    "dense head": ("roberta", 2, "fedkrso", {}),
    "adapters": ("roberta", 2, "fedkrso", {"compute-dtype": "bfloat16"}),
    "a regression's linear head": ("bert", 1, "fedkrso", {"head": "linear"}),
    "Conv1D, a language model": ("gpt2", 0, "fedkrso", {}),
    "a head on every token": ("gpt2", 2, "fedkrso", {}),
    "both factors": ("roberta", 2, "fedit", {}),
    "both factors around Conv1D": ("gpt2", 0, "fedit", {}),
    "one factor": ("roberta", 2, "ffa-lora", {}),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rows_of(labels: int, language: bool) -> dict[str, torch.Tensor]:
    """A batch in which two rows are shorter."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    for row, missing in ((1, 3), (4, 2)):
        ids[row, -missing:], mask[row, -missing:] = 1, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if language:
        return batch | {"labels": torch.where(mask.bool(), ids, -100)}
    if labels == 1:
        return batch | {"labels": torch.rand(ROWS, generator=generator, dtype=torch.float64)}
    return batch | {"labels": torch.randint(0, labels, (ROWS,), generator=generator)}


def losses_of(module, batch):
    """Each row's loss: the mean over what it alone is asked."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    asked = torch.ones(labels.shape, dtype=torch.float64)
    if labels.dim() == 2:
        asked = (labels != -100).double()
        asked[:, 0] = 0
        asked = asked / asked.sum(1, keepdim=True)
    return client_losses(
        module(**inputs).logits, labels.clamp(min=0) if labels.dim() == 2 else labels, asked, len(labels)
    )


def one_by_one(module, parameters, batch):
    """Row by row, cut to its own length: the gradients of autograd, a list of those of a row."""
    gradients = []
    for row in range(len(batch["labels"])):
        length = int(batch["attention_mask"][row].sum())
        alone = {name: v[row : row + 1, :length] if v.dim() > 1 else v[row : row + 1] for name, v in batch.items()}
        logits, labels = module(**{k: v for k, v in alone.items() if k != "labels"}).logits[0], alone["labels"][0]
        if labels.dim():
            loss = functional.cross_entropy(logits[:-1], labels[1:])
        elif labels.is_floating_point():
            loss = functional.mse_loss(logits[0], labels)
        else:
            loss = functional.cross_entropy(logits, labels)
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return gradients


def expected(gradients, clip):
    """Σ min(1, C/‖g_i‖) g_i, and the norms."""
    norms = torch.stack([torch.sqrt(sum(g.square().sum() for g in of_row)) for of_row in gradients])
    scale = (clip / norms).clamp(max=1)
    return norms, [sum(c * g for c, g in zip(scale, of, strict=True)) for of in zip(*gradients, strict=True)]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def check(module, parameters, batch, setting="keep"):
    for parameter in parameters:
        parameter.requires_grad_(True)
    with activation_memory(module, "keep"):
        gradients = one_by_one(module, parameters, batch)
    norms, _ = expected(gradients, 1.0)
    assert norms.min() > 0
    clip = float(norms.median())  # some are shortened, some are not
    _, wanted = expected(gradients, clip)
    with activation_memory(module, setting), row_gradients(module, parameters) as found:
        found.start(len(norms))
        losses_of(module, batch).sum().backward()
        close(found.norms(), norms)
        for sum_, own in zip(found.clipped(clip), wanted, strict=True):
            assert sum_.shape == own.shape
            close(sum_, own)
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("name", MODELS)
def test_rows_norms_and_their_clipped_sum_are_those_of_single_rows(name, model_folder, run_config, tmp_path):
    family, labels, strategy, changes = MODELS[name]
    folder = build(tmp_path, model_folder, family, labels == 0)
    local, instructions, _ = exact(folder, labels, run_config | {"strategy": strategy} | changes)
    with local.session(instructions, np.random.default_rng(0)) as session:
        session.before_step(0)
        session.before_step(2)  # another projection beside the first
        check(local.module, session.parameters, rows_of(labels, labels == 0))


@pytest.mark.parametrize("setting", ["recompute", "checkpoint"])
@pytest.mark.parametrize("strategy", ["fedkrso", "fedit"])
def test_the_same_with_what_backward_computes_again(setting, strategy, model_folder, run_config):
    local, instructions, _ = exact(model_folder, 2, run_config | {"strategy": strategy})
    local.module.train()  # a model checkpoints only then
    with local.session(instructions, np.random.default_rng(0)) as session:
        session.before_step(0)
        check(local.module, session.parameters, rows_of(2, False), setting)


class Toy(nn.Module):
    """Layers by hand, on (b, t, 4) or (b, 4)."""

    def __init__(self, *layers, run=None):
        super().__init__()
        self.layers = nn.ModuleList(layers).double()
        self.run = run or (lambda own, x: nn.Sequential(*own)(x))

    def forward(self, x):
        return self.run(self.layers, x)

    def loss(self, x):
        return self.forward(x).flatten(1).pow(3).sum(1)


def of_toy(toy, x, clip=0.0):
    """Norms and clipped sum by rows, and by one row after the other; the clip is the median norm if none is given."""
    parameters = list(toy.parameters())
    gradients = [torch.autograd.grad(toy.loss(row[None]).sum(), parameters) for row in x]
    norms, _ = expected(gradients, 1.0)
    clip = clip or float(norms.median())
    with row_gradients(toy, parameters) as found:
        found.start(len(x))
        toy.loss(x).sum().backward()
        return (found.norms(), found.clipped(clip)), (norms, expected(gradients, clip)[1])


TWICE = {
    "on one token": (3, 4),
    "on several": (3, 5, 4),
}


@pytest.mark.parametrize("shape", TWICE.values(), ids=TWICE)
def test_a_layer_that_is_used_twice_has_one_gradient(shape):
    toy = Toy(nn.Linear(4, 4), nn.Linear(4, 3), run=lambda own, x: own[1](own[0](torch.tanh(own[0](x)))))
    found, wanted = of_toy(toy, torch.randn(shape, dtype=torch.float64))
    close(found, wanted)


def test_autocast_multiplies_in_bfloat16_and_keeps_rows_in_float32():
    toy, x = Toy(nn.Linear(8, 6), nn.Linear(6, 3)).float(), torch.randn(3, 5, 8)
    _, (wanted, _) = of_toy(toy, x)
    plain = toy.run
    toy.run = lambda own, x: torch.autocast("cpu", torch.bfloat16)(plain)(own, x).float()
    (norms, sums), _ = of_toy(toy, x)
    assert {norms.dtype, *(each.dtype for each in sums)} == {torch.float32}
    torch.testing.assert_close(norms, wanted, rtol=0.05, atol=0)


def test_a_row_that_is_not_finite_is_left_out():
    toy, x = Toy(nn.Linear(4, 3)), torch.randn(3, 5, 4, dtype=torch.float64)
    x[0, 2] = float("nan")
    for rows in (x, x[:, 2]):  # many tokens, one token
        (_, sums), _ = of_toy(toy, rows, clip=2.0)
        _, (_, wanted) = of_toy(toy, rows[1:], clip=2.0)
        close(sums, wanted)


REFUSED = {
    "tokens first": ((nn.Linear(4, 3),), lambda own, x: own[0](x.transpose(0, 1)), "first axis is not the batch"),
    "rows lost": ((nn.Linear(4, 3),), lambda own, x: own[0](x.flatten(0, 1)).view(3, -1), "first axis is not"),
    "a norm": ((nn.Linear(4, 3), nn.LayerNorm(3)), None, "layers.1.weight, which is trained, is not in a linear layer"),
}


@pytest.mark.parametrize("layers, run, message", REFUSED.values(), ids=REFUSED)
def test_what_has_no_rows_is_refused(layers, run, message):
    toy = Toy(*layers, run=run)
    with pytest.raises(NotRows, match=message):
        of_toy(toy, torch.randn(3, 5, 4, dtype=torch.float64))
