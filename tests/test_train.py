"""The local loop: every setting of activation-memory gives the gradients and the weights of the default."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, RobertaConfig

from fedkrso_app.training.loop import Session, train

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
