"""A model is what its checkpoint says, or it is refused: the figures of plain transformers, text by text."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import play
from safetensors.torch import load_file, save_file
from test_families import build, write_texts
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fedkrso_app.config import ConfigError
from fedkrso_app.data.tasks import task
from fedkrso_app.training import device, model

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11"]


@pytest.fixture
def copy(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


def change(folder, file="config.json", **facts):
    settings = json.loads((folder / file).read_text()) | facts
    (folder / file).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


def rekey(folder, new_name):
    weights = {new_name(key): value for key, value in load_file(folder / "model.safetensors").items()}
    weights.pop(None, None)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def alone(folder):
    """(texts, labels): logits of each text by itself, by plain transformers and without any padding."""
    module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack([module(**words(text, return_tensors="pt")).logits[0] for text in TEXTS])


def together(loaded):
    with torch.no_grad():
        return loaded.module(**loaded.tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def refused(folder, message, labels=2):
    with pytest.raises(ConfigError, match=message):
        model.load(str(folder), labels, 0)


# --- weights ---


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "student.net."])
def test_keys_with_a_prefix_are_refused_by_its_name(copy, prefix):
    rekey(copy, lambda key: prefix + key)
    refused(copy, rf"lacks 37 of 37 tensors of the base model: roberta\.\S+, .* begin with '{re.escape(prefix)}'")


@pytest.mark.parametrize("lost", ["encoder.layer.1.", "embeddings.word_embeddings", "attention.self.query.bias"])
def test_a_checkpoint_that_lacks_a_part_of_the_base_model_is_refused_by_its_keys(copy, lost):
    rekey(copy, lambda key: None if lost in key else key)
    refused(copy, rf"its checkpoint lacks \d+ of 37 tensors of the base model: roberta\.\S*{lost.split('.')[0]}")


def test_a_base_model_of_other_sizes_than_its_config_is_refused(copy):
    refused(change(copy, intermediate_size=32), r"of shape \[24(, 16)?\] and its config\.json says \[32(, 16)?\]")


def test_a_base_model_saved_without_its_own_name_is_complete(model_folder, tmp_path):
    transformers.AutoModel.from_pretrained(model_folder).save_pretrained(tmp_path / "base")
    shutil.copytree(model_folder, tmp_path / "base", dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors"])
    shutil.copy(model_folder / "config.json", tmp_path / "base")
    one, other = (model.load(str(folder), 2, 0).digest() for folder in (model_folder, tmp_path / "base"))
    assert one == other


def test_what_is_new_is_said_in_one_line(copy, caplog):
    model.load(str(copy), 2, 0)
    (line,) = [record.message for record in caplog.records if "begins with a new" in record.message]
    assert line.endswith("classifier.out_proj.weight (306 parameters)")  # 16·16 + 16 + 2·16 + 2


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, "quantized .4-bit bitsandb"),
        (
            {"quantization_config": {"bits": 8, "quant_method": "gptq"}},
            r"quantized \(8-bit gptq\); take the model",
        ),
    ],
)
def test_quantized_weights_are_named(copy, facts, message):
    refused(change(copy, **facts), message)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(copy, file):
    (copy / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(copy, rf"{file} is a git-lfs pointer")


def test_half_a_file_and_an_adapter_are_named(copy):
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "org/secret"}')
    refused(copy, "it is an adapter")
    (copy / "adapter_config.json").unlink()
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(copy, r"model\.safetensors is damaged")
    (copy / "model.safetensors").unlink()
    refused(copy, r"there are no weights: neither model\.safetensors nor pytorch_model\.bin, only config\.json")


class Trap:
    ran = False

    def __reduce__(self):
        return setattr, (Trap, "ran", True)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_more_than_tensors_is_not_opened(copy, zipped):
    (copy / "model.safetensors").unlink()
    torch.save({"x": Trap()}, copy / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(copy, "a pickle that holds more than tensors, and it was not opened")
    assert not Trap.ran


# --- head ---


@pytest.fixture
def three(model_folder, tmp_path):
    """A classifier of contradiction, neutral, entailment."""
    loaded = model.load(str(model_folder), 3, 5, ("contradiction", "neutral", "entailment"))
    model.export(loaded, loaded.module.state_dict(), tmp_path / "three")
    return tmp_path / "three"


@pytest.mark.parametrize("case", [str, str.upper])
def test_a_head_of_the_same_labels_in_another_order_is_put_in_order(three, case, tmp_path):
    change(three, id2label={i: case(label) for i, label in enumerate(("contradiction", "neutral", "entailment"))})
    glue = task("glue/mnli").classes
    loaded = model.load(str(three), 3, 0, glue)
    assert glue == ("entailment", "neutral", "contradiction") and not loaded.new
    torch.testing.assert_close(together(loaded), alone(three)[:, [2, 1, 0]], rtol=0, atol=1e-6)
    model.export(loaded, loaded.module.state_dict(), tmp_path / "out")
    assert tuple(AutoConfig.from_pretrained(tmp_path / "out").id2label.values()) == glue


@pytest.mark.parametrize("classes", [("neg", "pos"), ("a", "b", "c")])
def test_a_head_of_other_labels_is_drawn_anew_and_the_log_says_so(three, classes, caplog):
    one, same, other = (model.load(str(three), len(classes), seed, classes) for seed in (1, 1, 2))
    assert one.new == {"classifier.out_proj.weight", "classifier.out_proj.bias"} and "begins with a new" in caplog.text
    weights = [loaded.module.classifier.out_proj.weight for loaded in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert one.digest() == other.digest()  # of what is not new
    before = load_file(three / "model.safetensors")
    assert torch.equal(one.module.classifier.dense.weight, before["classifier.dense.weight"])


def test_an_exported_model_begins_the_next_run_where_it_ended(sites, model_folder, tmp_path):
    """Its labels pos, neg were set; the next run numbers them by the alphabet."""
    settings, _ = sites
    first = play(settings | {"labels": "pos,neg"}, nodes=3)
    again = play(settings | {"model": str(first.model), "run-name": "again"}, nodes=3)
    assert again.metrics()[0]["metric"] == first.metrics()[-1]["metric"]
    assert AutoConfig.from_pretrained(again.model).id2label == {0: "neg", 1: "pos"}


@pytest.mark.parametrize(("labels", "kind"), [(1, "regression"), (3, "single_label_classification")])
def test_the_loss_is_that_of_the_task_whatever_the_checkpoint_was_trained_for(copy, labels, kind):
    change(copy, problem_type="multi_label_classification")
    loaded = model.load(str(copy), labels, 0)
    truth = torch.tensor([0.5, 1.0, 2.0] if labels == 1 else [0, 2, 1])
    output = loaded.module(**loaded.tokenizer(TEXTS, padding=True, return_tensors="pt"), labels=truth)
    logits = output.logits.double()
    hand = (logits[:, 0] - truth).square().mean() if labels == 1 else -logits.log_softmax(1)[range(3), truth].mean()
    assert loaded.module.config.problem_type == kind
    torch.testing.assert_close(output.loss.double(), hand, rtol=1e-5, atol=0)


# --- tokenizer ---


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_folder_without_a_tokenizer_is_refused(model_folder, tmp_path, family):
    folder = build(tmp_path / "m", model_folder, family, False)
    for file in folder.glob("*token*"):
        file.unlink()
    refused(folder, "has no tokenizer files")
    change(folder, file="config.json").joinpath("tokenizer_config.json").write_text("{}")
    refused(folder, "has no tokenizer files")


def test_a_tokenizer_of_more_ids_than_the_embedding_has_is_refused(model_folder, tmp_path):
    folder = build(tmp_path / "m", model_folder, "llama", False)
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["soup"])
    words.save_pretrained(folder)
    refused(folder, r"1 ids that the model does not embed \(the first: 'soup', id 45; the embedding has 45 rows\)")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [7, None, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bert"])
def test_a_texts_logits_do_not_depend_on_its_neighbours(model_folder, tmp_path, family, pad, side):
    folder = build(tmp_path / "m", model_folder, family, False)
    loaded = model.load(str(folder), 2, 0)
    model.export(loaded, loaded.module.state_dict(), folder)
    change(folder, pad_token_id=pad)  # not the tokenizer's, which is 1
    change(folder, file="tokenizer_config.json", padding_side=side)
    loaded = model.load(str(folder), 2, 0)
    each = [loaded.tokenizer(text, return_tensors="pt") for text in TEXTS]
    with torch.no_grad():
        single = torch.stack([loaded.module(**text).logits[0] for text in each])
    torch.testing.assert_close(together(loaded), single, rtol=0, atol=1e-5)
    model.export(loaded, loaded.module.state_dict(), tmp_path / "out")
    torch.testing.assert_close(alone(tmp_path / "out"), single, rtol=0, atol=1e-6)
    assert AutoConfig.from_pretrained(tmp_path / "out").pad_token_id == 1


def test_roberta_keeps_the_padding_id_that_its_positions_are_counted_from(copy):
    before = alone_of(copy)
    words = AutoTokenizer.from_pretrained(copy)
    words.pad_token = "</s>"
    words.save_pretrained(copy)
    loaded = model.load(str(copy), 2, 0)
    assert loaded.tokenizer.pad_token_id == loaded.module.config.pad_token_id == 1
    torch.testing.assert_close(together(loaded), before, rtol=0, atol=1e-6)


def alone_of(folder):
    loaded = model.load(str(folder), 2, 0)
    with torch.no_grad():
        return torch.stack([loaded.module(**loaded.tokenizer(t, return_tensors="pt")).logits[0] for t in TEXTS])


def test_a_decoder_without_padding_and_end_tokens_is_refused_for_classes_only(model_folder, tmp_path):
    folder = build(tmp_path / "m", model_folder, "llama", True)
    change(folder, pad_token_id=None, eos_token_id=None)
    bare = {"pad_token": None, "eos_token": None, "bos_token": None}
    change(folder, file="tokenizer_config.json", **bare)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    refused(folder, "neither a padding nor an end token")
    assert model.load(str(folder), 0, 0).tokenizer.pad_token_id is None


@pytest.mark.parametrize(("family", "reads"), [("roberta", 38), ("bert", 40), ("distilbert", 40), ("gpt2", 40)])
def test_a_model_reads_as_many_tokens_as_it_has_positions_for(model_folder, tmp_path, family, reads):
    sizes = {"gpt2": {}}.get(family, {"max_position_embeddings": 40})
    folder = build(tmp_path / "m", model_folder, family, False, **sizes)
    change(folder, file="tokenizer_config.json", model_max_length=512)
    loaded = model.load(str(folder), 2, 0)
    assert loaded.tokenizer.model_max_length == model.outline(str(folder), 2).tokenizer.model_max_length == reads
    ids = torch.full((1, reads), 7)
    loaded.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises((IndexError, RuntimeError)):
        loaded.module(input_ids=torch.full((1, reads + 1), 7), attention_mask=torch.ones(1, reads + 1))


def test_a_vocabulary_of_sentencepiece_alone_is_read(model_folder, tmp_path):
    pieces = pytest.importorskip("sentencepiece")
    folder = build(tmp_path / "m", model_folder, "deberta-v2", False)
    for file in folder.glob("*token*"):
        file.unlink()
    (tmp_path / "texts").write_text("\n".join(["the soup was cold", "the bread was fine", "stale tea"] * 9))
    options = {"vocab_size": 22, "minloglevel": 2, "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": 2}
    pieces.SentencePieceTrainer.train(input=str(tmp_path / "texts"), model_prefix=str(folder / "spm"), **options)
    loaded = model.load(str(folder), 2, 0)
    one = loaded.tokenizer("the soup was cold", add_special_tokens=False)["input_ids"]
    own = pieces.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    assert loaded.tokenizer.convert_ids_to_tokens(one) == own.encode("the soup was cold", out_type=str)


# --- device ---


@pytest.mark.parametrize("setting", ["cuda", "mps", "xpu"])
def test_a_device_that_torch_does_not_have_is_refused_by_name(model_folder, setting, run_config):
    if device._has(setting):
        pytest.skip(f"torch has {setting} here")
    with pytest.raises(ConfigError, match=rf"device = '{setting}': torch .* finds none on this machine, only"):
        play(run_config | {"device": setting})


@pytest.mark.parametrize("there", [{"cuda", "mps"}, {"xpu"}, {"mps"}, set()])
def test_auto_takes_an_accelerator_that_is_there_and_the_processor_else(monkeypatch, there):
    for kind in device.AUTO:
        owner = torch.backends.mps if kind == "mps" else getattr(torch, kind)
        monkeypatch.setattr(owner, "is_available", lambda kind=kind: kind in there)
    wanted = next((kind for kind in ("cuda", "xpu", "mps") if kind in there), "cpu")
    assert device.device("auto").type == wanted and device.device("cpu").type == "cpu"


def test_products_of_float32_are_exact_ones_wherever_a_device_was_chosen():
    torch.set_float32_matmul_precision("medium")
    device.device("auto")
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32


def test_what_a_device_cannot_measure_is_measured_of_the_process():
    assert device.peak_bytes(SimpleNamespace(type="cpu")) > 10**7


def test_the_language_model_path_is_held_too(model_folder, run_config, tmp_path):
    folder = build(tmp_path / "m", model_folder, "gpt2", True)
    settings = {"task": "causal-lm", "data-dir": str(write_texts(tmp_path / "d")), "device": "cpu"}
    assert play(run_config | settings | {"model": str(folder)}, nodes=2).metrics()[-1]["clients"] == 2
