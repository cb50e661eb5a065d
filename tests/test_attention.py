"""Masks: the host, which has a batch, says what a model would have to ask its device."""

from collections import Counter

import numpy as np
import pytest
import torch
from recorder import HOST
from test_families import DECODERS, FAMILIES, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from fedkrso_app.strategies import parse
from fedkrso_app.training import attention, loop, model
from fedkrso_app.training.loop import Session


class Reads(TorchDispatchMode):
    """Counts what makes a host wait for its device."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count[operation.overloadpacket.__name__] += operation.overloadpacket.__name__ in HOST - {"lift_fresh"}
        return operation(*args, **(kwargs or {}))


def batch(hidden: int, language: bool) -> dict[str, torch.Tensor]:
    """Three rows, of which the first lacks the last ``hidden`` of seven tokens."""
    ids = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7 - hidden :], ids[0, 7 - hidden :] = 0, 1
    labels = torch.where(mask.bool(), ids, -100) if language else torch.tensor([0, 1, 1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_told_computes_the_bits_of_one_that_looks_and_looks_at_nothing(family, model_folder, tmp_path):
    language = family in DECODERS
    folder = build(tmp_path / "m", model_folder, family, language)
    module, before = model.load(str(folder), 0 if language else 2, 0).module, masking_utils.is_tracing
    for hidden in (0, 2):
        given = batch(hidden, language)
        told = attention.told(given)
        assert ("attention_mask" in told) == (hidden > 0) and given["attention_mask"] is not None
        logits = module(**given).logits
        inputs = {name: value for name, value in told.items() if name != "labels"}
        with attention.unread(module), Reads() as reads:
            found = module(**inputs).logits
        assert torch.equal(found, logits)
        assert not reads.count.total() or family.startswith("deberta")
    assert masking_utils.is_tracing is before


@pytest.mark.parametrize("hidden", [0, 2])
def test_the_loop_reads_its_losses_once_and_nothing_in_a_step(hidden, model_folder, run_config, monkeypatch):
    """So a GPU never waits for its host, which is ahead of it by whole steps. What the host asks itself counts for
    nothing: the mask of a batch, and the seed of a dropout that is its own."""
    given = batch(hidden, False)
    told, counts = attention.told(given), []
    monkeypatch.setattr(attention, "told", lambda batch: told)
    for steps in (2, 5):
        module = model.load(str(model_folder), 2, 0).module.requires_grad_(False)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        session = Session([torch.optim.SGD(module.classifier.parameters(), lr=0.1)], dict)
        config = parse(run_config | {"local-steps": steps, "max-grad-norm": 1.0, "fedkrso.interval": 1})
        with Reads() as reads:
            loop.train(module, iter([given] * steps), session, config, np.random.default_rng(0))
        counts.append(reads.count.total())
    assert counts[0] == counts[1] <= 4
