"""Target layers by structure, the head, and the way out to the hub's format."""

import shutil

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, RobertaConfig

from fedkrso_app.config import ConfigError
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes


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
    shapes = Shapes.of(model.LoadedModel(module, None, model.find_targets(module), head, (), frozenset()))
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
    assert one.digest() == same.digest() == other.digest()


def test_label_names_are_in_the_exported_model_and_in_the_digest(model_folder, tmp_path):
    loaded = model.load(str(model_folder), 2, 0, ("neg", "pos"))
    model.export(loaded, loaded.module.state_dict(), tmp_path / "out")
    settings = AutoConfig.from_pretrained(tmp_path / "out")
    assert settings.id2label == {0: "neg", 1: "pos"} and settings.label2id == {"neg": 0, "pos": 1}
    digests = {model.load(str(model_folder), 2, 0, names).digest() for names in [(), ("neg", "pos"), ("pos", "neg")]}
    assert loaded.digest() in digests and len(digests) == 3


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere/at/all", "no-such-owner/no-such-model"])
def test_a_model_that_is_not_there_is_named_with_the_ways_out(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="model = "):
        model.load(name, 2, 0)


def test_a_file_that_holds_no_weights_is_an_error_that_names_the_model(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "pointer")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConfigError, match=r"model\.safetensors is a git-lfs pointer"):
        model.load(str(folder), 2, 0)
