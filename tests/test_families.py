"""Every family of models goes through one round: as itself, and out again for plain transformers."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from helpers import WORDS, digest, play, replica
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedkrso_app.config import ConfigError
from fedkrso_app.strategies.lora import LoraLocal
from fedkrso_app.training import model

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = SMALL | {"num_key_value_heads": 1}
HEADS = GROUPED | {"head_dim": 8}
NAMES = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
# name of the configuration, its settings, target layers of one block, whether input and output embeddings are tied
ENCODERS = {
    "roberta": ("RobertaConfig", SMALL, 6),
    "bert": ("BertConfig", SMALL, 6),
    "deberta": ("DebertaConfig", SMALL | DEBERTA, 6),
    "deberta-v2": ("DebertaV2Config", SMALL | DEBERTA | {"share_att_key": True, "position_buckets": 8}, 6),
    "distilbert": ("DistilBertConfig", NAMES, 6),
    "modernbert": ("ModernBertConfig", SMALL | {"cls_token_id": 0, "sep_token_id": 2}, 4),
}
DECODERS = {
    "gpt2": ("GPT2Config", GPT2, 4, True),
    "llama": ("LlamaConfig", SMALL, 7, False),
    "llama-tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}, 7, True),
    "qwen2": ("Qwen2Config", GROUPED, 7, False),
    "qwen3": ("Qwen3Config", HEADS, 7, False),
    "mistral": ("MistralConfig", HEADS, 7, False),
    "gemma": ("GemmaConfig", HEADS | {"tie_word_embeddings": True}, 7, True),
    "gemma2": ("Gemma2Config", HEADS | {"tie_word_embeddings": True}, 7, True),
    "gemma3": ("Gemma3TextConfig", HEADS | {"tie_word_embeddings": True}, 7, True),
}
FAMILIES = {name: row[:3] for name, row in (ENCODERS | DECODERS).items()}


def build(folder: Path, tokenizer: Path, family: str, language: bool, **changes) -> Path:
    """A checkpoint with random weights, of the base model or with a language model's output layer."""
    return Path(
        shutil.copytree(
            _built(tokenizer, family, language, tuple(sorted(changes.items()))).name, folder, dirs_exist_ok=True
        )
    )


@functools.cache
def _built(tokenizer: Path, family: str, language: bool, changes: tuple) -> tempfile.TemporaryDirectory:
    (kind, sizes, _), folder = FAMILIES[family], tempfile.TemporaryDirectory(dir=tokenizer.parent)
    words = AutoTokenizer.from_pretrained(tokenizer)
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "vocab_size": len(words)}
    settings = getattr(transformers, kind)(**special, **sizes, **dict(changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = (AutoModelForCausalLM if language else transformers.AutoModel).from_config(settings)
    made.save_pretrained(folder.name)
    words.save_pretrained(folder.name)
    return folder


def write_texts(folder: Path, rows: int = 48) -> Path:
    """Texts in which a word is always followed by the next one."""
    folder.mkdir(exist_ok=True)
    for split, count in (("train", rows), ("validation", 8)):
        texts = [" ".join(WORDS[(start + i) % 40] for i in range(3 + start % 4)) for start in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def one_round(run_config, folder):
    run = play(run_config | {"model": str(folder), "num-server-rounds": 1}, nodes=2)
    assert run.metrics()[-1]["clients"] == 2
    return run


def assert_same(run, architecture):
    """What was exported, the server's own model and a replay of the ledger are one and the same; returns the first.

    The logits are equal to the bit, or to rounding where the replayed model still has its factors beside W.
    """
    plain = architecture.from_pretrained(run.model).eval()
    method = replica(run)
    assert digest(run) == model.state_digest(method.plain_state()) == model.state_digest(plain.state_dict())
    batch = AutoTokenizer.from_pretrained(run.model)(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    atol = 1e-6 if isinstance(method, LoraLocal) else 0
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, method.module.eval().cpu()(**batch).logits, rtol=0, atol=atol)
    return plain


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_linear_layers_of_the_blocks(family, model_folder, tmp_path):
    count = FAMILIES[family][2]
    loaded = model.load(str(build(tmp_path / "m", model_folder, family, False)), 2, 0)
    assert len(loaded.targets) == 2 * count
    aside = {id(m.weight) for m in loaded.module.modules() if isinstance(m, nn.Embedding) or "Norm" in type(m).__name__}
    assert not aside & {id(layer.weight) for layer in loaded.targets.values()}
    assert loaded.head and not any(name.startswith(tuple(loaded.targets)) for name in loaded.head)
    assert not aside & {id(parameter) for name, parameter in loaded.head.items() if "norm" not in name.lower()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_of_every_family_trains_and_comes_out(family, model_folder, run_config, tmp_path):
    folder = build(tmp_path / "m", model_folder, family, False)
    assert_same(one_round(run_config, folder), AutoModelForSequenceClassification)


@pytest.mark.parametrize("family", DECODERS)
def test_a_language_model_of_every_family_trains_and_comes_out(family, model_folder, run_config, tmp_path):
    folder = build(tmp_path / "m", model_folder, family, True)
    data = {"task": "causal-lm", "data-dir": str(write_texts(tmp_path / "d"))}
    after = assert_same(one_round(run_config | data, folder), AutoModelForCausalLM)
    before = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(after.get_output_embeddings().weight, before.get_output_embeddings().weight)
    assert torch.equal(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    tied = DECODERS[family][3]
    assert torch.equal(after.get_output_embeddings().weight, after.get_input_embeddings().weight) == tied
    assert model.state_digest(after.state_dict()) != model.state_digest(before.state_dict())


def test_an_encoder_that_sees_the_next_word_is_no_language_model(model_folder):
    with pytest.raises(ConfigError, match="sees the words that it would have to predict"):
        model.load(str(model_folder), 0, 0)


def test_an_output_layer_that_the_checkpoint_lacks_is_trained_as_the_head(model_folder, run_config, tmp_path):
    folder = build(tmp_path / "m", model_folder, "llama", False)
    assert list(model.load(str(folder), 0, 0).head) == ["lm_head.weight"]
    one_round(run_config | {"task": "causal-lm", "data-dir": str(write_texts(tmp_path / "d"))}, folder)
