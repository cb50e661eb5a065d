"""Target layers by structure, the head, and the way out to the hub's format."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
)

from fedkrso_app import model
from fedkrso_app.config import ConfigError
from fedkrso_app.strategies.base import Shapes

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
FAMILIES = {  # config, target layers in each of two blocks
    "roberta": (RobertaConfig(**SMALL), 6),
    "bert": (BertConfig(**SMALL), 6),
    "deberta": (DebertaV2Config(**SMALL), 6),
    "modernbert": (
        ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        4,
    ),
    "llama": (LlamaConfig(**SMALL, pad_token_id=0, num_key_value_heads=2), 7),
    "distilbert": (DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=24), 6),
    "gpt2": (GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0), 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_all_linear_maps_of_the_blocks_and_nothing_else(family):
    settings, count = FAMILIES[family]
    module = AutoModelForSequenceClassification.from_config(settings)
    targets = model.find_targets(module)
    assert len(targets) == 2 * count
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.LayerNorm)}
    assert not embeddings & {id(layer.weight) for layer in targets.values()}
    assert not any(name.startswith(("classifier", "score", "head")) for name in targets)


def test_tied_weights_are_never_targets():
    block = nn.Module()
    block.stack = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    block.outside = nn.Linear(4, 4)
    block.outside.weight = block.stack[0].weight
    assert list(model.find_targets(block)) == ["stack.1"]


@pytest.mark.parametrize(
    ("size", "Q", "h", "layers"), [("base", 331_776, 592_130, 72), ("large", 884_736, 1_051_650, 144)]
)
def test_roberta_has_the_papers_sizes(size, Q, h, layers):
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    settings = RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **(large if size == "large" else {})
    )
    with torch.device("meta"):
        module = AutoModelForSequenceClassification.from_config(settings)
    head = {name: p for name, p in module.named_parameters() if not name.startswith("roberta.")}
    shapes = Shapes.of(module, model.find_targets(module), head)
    assert (shapes.outputs(4), shapes.inputs(4), shapes.head, len(shapes.targets)) == (Q, Q, h, layers)


def test_a_saved_model_gives_the_same_logits(model_folder, tmp_path):
    loaded = model.load(str(model_folder), 3, 7)
    model.export(loaded, loaded.module.state_dict(), tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = loaded.tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**batch).logits, loaded.module(**batch).logits, rtol=0, atol=0)


def test_the_head_follows_the_seed_and_the_digest_does_not(model_folder):
    one, same, other = (model.load(str(model_folder), 2, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.head.values(), same.head.values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.head.values(), other.head.values(), strict=True))
    assert one.digest == same.digest == other.digest


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere/at/all", "no-such-owner/no-such-model"])
def test_a_model_that_is_not_there_is_named_with_the_ways_out(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="model = "):
        model.load(name, 2, 0)
