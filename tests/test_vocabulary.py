"""A language model's loss without its logits: value, gradients and choices are those of the whole."""

import numpy as np
import pytest
import torch
from test_families import DECODERS, build
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from fedkrso_app.training import metrics, vocabulary
from fedkrso_app.training.vocabulary import first_choices, losses, without_logits


@pytest.fixture(autouse=True)
def _few_at_a_time(monkeypatch):
    monkeypatch.setattr(vocabulary, "_VALUES", 150)  # three tokens of a vocabulary of 50


def example(vocabulary_size=50, clients=2, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 7, 6, generator=generator, dtype=torch.float64)
    head = nn.Linear(6, vocabulary_size, bias=bias, dtype=torch.float64)
    labels = torch.randint(0, vocabulary_size, (4, 7), generator=generator)
    weights = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    labels[0, 3:], weights[0, 3:] = -100, 0
    return hidden, head, labels, weights


def whole(hidden, head, labels, weights, parts):
    logits = head(hidden[:, :-1]).flatten(0, 1)
    each = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none") * weights[:, 1:].flatten()
    return each.view(parts, -1).sum(1)


@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_all_gradients_are_those_of_the_whole(bias):
    hidden, head, labels, weights = example(bias=bias)
    found, expected = [], []
    for ways, function in ((found, losses), (expected, whole)):
        states = hidden.clone().requires_grad_(True)
        value = function(states, head, labels, weights, 1).squeeze(0)
        trained = [states, *head.parameters()]
        ways += [value, *torch.autograd.grad(3 * value, trained)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_each_client_has_its_own_loss_and_gradient():
    hidden, head, labels, weights = example()
    head.requires_grad_(False)
    scale = torch.tensor([2.0, -0.5], dtype=torch.float64)
    found, expected = [], []
    for ways, function in ((found, losses), (expected, whole)):
        states = hidden.clone().requires_grad_(True)
        each = function(states, head, labels, weights, 2)
        ways += [each, *torch.autograd.grad((each * scale).sum(), states)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_no_token_asked_for_is_no_loss():
    hidden, head, labels, weights = example()
    states = hidden.requires_grad_(True)
    value = losses(states, head, labels, weights * 0)
    assert value.tolist() == [0.0] and not torch.autograd.grad(value.sum(), states)[0].any()


def batch(rows=3, tokens=6):
    ids = torch.randint(5, 45, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("family", DECODERS)
def test_a_model_of_every_family_has_the_loss_that_it_has_with_logits(family, model_folder, tmp_path):
    """All parameters get their gradients, tied embeddings too; a model that caps its logits keeps them."""
    module = AutoModelForCausalLM.from_pretrained(build(tmp_path / "m", model_folder, family, True)).eval()
    ends = []
    for narrow in (False, True):
        module.zero_grad()
        if narrow:
            with without_logits(module) as head:
                output = module(**batch())
        else:
            output = module(**batch())
        output.loss.backward()
        grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        ends.append((output.loss.detach(), grads))
    assert (head is None) == (family == "gemma2")
    assert output.logits.shape[-1] == (16 if head is not None else module.config.vocab_size)
    assert ends[0][1].keys() == ends[1][1].keys()
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)
    assert type(module.get_output_embeddings()) is nn.Linear and "_loss_function" not in vars(module)


def test_classifiers_and_models_without_an_output_layer_are_as_ever(config, model_folder):
    from fedkrso_app.training import model

    with without_logits(model.load(str(model_folder), 2, 0).module) as head:
        assert head is None
    with without_logits(nn.Linear(2, 2)) as head:
        assert head is None


def test_first_choices_are_those_of_the_whole():
    hidden, head, *_ = example()
    assert torch.equal(first_choices(hidden, head), head(hidden).argmax(-1))


@pytest.mark.parametrize("metric", ["perplexity", "exact-match"])
def test_an_evaluation_finds_the_same_with_and_without_logits(metric, model_folder, tmp_path, monkeypatch):
    folder = build(tmp_path / "m", model_folder, "llama", True)
    module = AutoModelForCausalLM.from_pretrained(folder)
    rows = [batch(), batch(2, 4)]
    found = metrics.tally(module, rows, metric, 0)
    monkeypatch.setattr(vocabulary, "can", lambda module: False)
    np.testing.assert_allclose(found, metrics.tally(module, rows, metric, 0), rtol=1e-6)


class Largest(TorchDispatchMode):
    """The largest tensor that is made inside, in values."""

    size = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return made


def test_no_tensor_of_tokens_by_vocabulary_is_made(monkeypatch):
    monkeypatch.setattr(vocabulary, "_VALUES", 4000)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    settings = LlamaConfig(vocab_size=1000, tie_word_embeddings=False, pad_token_id=0, **sizes)
    module = AutoModelForCausalLM.from_config(settings).requires_grad_(False)
    module.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    inputs = {name: value.repeat(4, 4) for name, value in batch().items()}  # 288 tokens
    with without_logits(module), Largest() as seen:
        module(**inputs).loss.backward()
    assert seen.size < 12_000 < 288 * 1000  # the embeddings' 8 000, and a few tokens' logits
    with Largest() as seen:
        module(**inputs).loss.backward()
    assert seen.size >= 288 * 1000
