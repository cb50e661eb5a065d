"""``head``: what is trained of a classifier's head, for all methods alike; the rest is neither trained nor sent."""

import json

import numpy as np
import pytest
import torch
from helpers import ON_SERVER, arrays_of, digest, play, replayed, replica
from test_contract import KINDS_OF_METHOD
from test_families import build
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.config import ConfigError
from fedkrso_app.core.flat import flatten
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs import plan
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes

SMALL = ["linear", "frozen"]
OUTPUT = ["classifier.out_proj.bias", "classifier.out_proj.weight"]
DENSE = ["classifier.dense.bias", "classifier.dense.weight"]


def heads(run, version=None):
    state = replica(run, version).plain_state()
    return {name: state[name].clone() for name in (*OUTPUT, *DENSE)}


@pytest.mark.parametrize(
    ("strategy", "head"),
    [(strategy, "frozen") for strategy in ON_SERVER] + [(kind, "linear") for kind in (*KINDS_OF_METHOD, "fwdllm")],
)
def test_what_is_frozen_is_neither_trained_nor_sent(run_config, strategy, head):
    sent = {}

    def look(partition, message, reply):
        for name, array in arrays_of(reply).items():
            sent[name] = array.size
        for record in message.content.array_records.values():
            sent.update({name: array.numpy().size for name, array in record.items() if name in ("head", "parameters")})
        return reply

    settings = run_config | {"strategy": strategy, "head": head, "num-server-rounds": 2, "local-steps": 2}
    run = play(settings, nodes=2, tamper=look)
    assert replayed(run) == digest(run)
    start = {name: value for name, value in model_of(run_config, head).module.state_dict().items()}
    end = AutoModelForSequenceClassification.from_pretrained(run.model).state_dict()
    still = DENSE + (OUTPUT if head == "frozen" else [])
    assert all(torch.equal(end[name].cpu(), start[name].cpu()) for name in still)
    assert any(not torch.equal(end[name].cpu(), start[name].cpu()) for name in end)
    if "parameters" in sent:
        frozen = sum(start[name].numel() for name in still)
        assert sent["parameters"] == sum(value.numel() for value in end.values()) - frozen
    elif head == "frozen":
        assert "head" not in sent
    else:
        assert sent["head"] == 2 * 16 + 2 and any(
            not torch.equal(end[name].cpu(), start[name].cpu()) for name in OUTPUT
        )


def model_of(run_config, head):
    return model.load(run_config["model"], 2, 0, head=head)


@pytest.mark.parametrize("strategy", (*KINDS_OF_METHOD, "fedsrd", "decomfl"))
def test_a_frozen_head_goes_with_small_numbers_and_missed_rounds(run_config, strategy):
    settings = run_config | {"strategy": strategy, "head": "frozen", "wire-dtype": "int8", "fraction-train": 0.5}
    run = play(settings | {"fedkrso.interval": 1})
    assert replayed(run) == digest(run) and [line["clients"] for line in run.metrics()[1:]] == [2, 2, 2]


def test_a_linear_head_is_linear_in_the_activation_of_the_last_state(run_config):
    """out_proj(tanh(h)) for the first token's last state h, by hand."""
    module = model_of(run_config, "linear").module
    ids = torch.tensor([[0, 7, 8, 2], [0, 9, 11, 2]])
    with torch.no_grad():
        h = module.roberta(input_ids=ids).last_hidden_state[:, 0]
        expected = torch.tanh(h) @ module.classifier.out_proj.weight.T + module.classifier.out_proj.bias
        torch.testing.assert_close(module(input_ids=ids).logits, expected)


def test_a_linear_head_is_drawn_from_the_seed_and_said_once(run_config, caplog):
    drawn = [flatten(model.load(run_config["model"], 2, seed, head="linear").head.values()) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    model.checkpoint.say.cache_clear()
    caplog.clear()
    model.load(run_config["model"], 2, 0, head="linear")
    said = [record.getMessage() for record in caplog.records if "head = 'linear'" in record.getMessage()]
    assert len(said) == 1 and "34 parameters are trained" in said[0] and "the identity: classifier.dense" in said[0]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "deberta-v2", "gpt2", "llama"])
@pytest.mark.parametrize("head", SMALL)
def test_every_family_has_a_small_head(kind, head, model_folder, tmp_path):
    folder = build(tmp_path / kind, model_folder, kind, False)
    loaded, outlined = model.load(str(folder), 3, 0, head=head), model.outline(str(folder), 3, head=head)
    assert list(loaded.head) == list(outlined.head)
    shapes = {name: tuple(parameter.shape) for name, parameter in loaded.head.items()}
    assert {shape[0] for shape in shapes.values()} == ({3} if head == "linear" else set())
    dense = model.load(str(folder), 3, 0)
    assert loaded.head.keys() | loaded.frozen == dense.head.keys()


def test_what_the_checkpoint_has_of_the_head_stays_as_it_is(run_config, tmp_path):
    torch.manual_seed(1)
    settings = RobertaConfig.from_pretrained(run_config["model"], num_labels=2)
    before = AutoModelForSequenceClassification.from_config(settings)
    before.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(run_config["model"]).save_pretrained(tmp_path / "tuned")
    loaded = model.load(str(tmp_path / "tuned"), 2, 0, head="linear")
    assert torch.equal(loaded.module.classifier.dense.weight.cpu(), before.classifier.dense.weight)
    assert list(loaded.head) == OUTPUT and loaded.frozen == set(DENSE)


def test_nodes_with_another_frozen_head_have_other_weights(run_config):
    """Nothing of a frozen head travels, so that of all machines must be the same; a trained one comes with entry 0."""
    frozen, linear = (
        {model.load(run_config["model"], 2, seed, head=h).digest() for seed in (0, 1)} for h in SMALL[::-1]
    )
    assert len(frozen) == 2 and len(linear) == 1


def test_plan_result_card_and_report_name_the_head(run_config, tmp_path):
    run = play(run_config | {"head": "linear", "num-server-rounds": 1})
    assert json.loads((run.path / "result.json").read_text())["head"] == "linear"
    assert "its output layer trained" in (run.model / "README.md").read_text()
    page = tmp_path / "page.html"
    assert CliRunner().invoke(cli.app, ["report", str(run.path), "--output", str(page)]).exit_code == 0
    assert "head linear" in page.read_text()
    sizes = {h: plan.plan(run_config | {"head": h}, ["fedit"], 4) for h in ("dense", *SMALL)}
    assert [facts["head"] for facts in sizes.values()] == list(sizes)
    rows = {h: facts["rows"][0] for h, facts in sizes.items()}
    assert rows["dense"]["trained"] - rows["linear"]["trained"] == 16 * 16 + 16
    assert rows["linear"]["trained"] - rows["frozen"]["trained"] == 2 * 16 + 2
    assert rows["dense"]["up"] - rows["linear"]["up"] == 4 * (16 * 16 + 16)
    assert rows["linear"]["up"] - rows["frozen"]["up"] > 4 * (2 * 16 + 2)  # and the headers


def test_the_model_exported_is_the_one_that_was_evaluated(run_config, tmp_path):
    run = play(run_config | {"head": "linear", "strategy": "fedit"})
    folder = tmp_path / "exported"
    assert CliRunner().invoke(cli.app, ["export", str(run.path), str(folder)]).exit_code == 0
    exported = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(exported[name], value.cpu()) for name, value in heads(run).items())
    assert torch.equal(exported["classifier.dense.weight"], torch.eye(16))


def test_a_language_model_has_no_head_to_freeze(model_folder, tmp_path):
    folder = build(tmp_path / "decoder", model_folder, "gpt2", True)
    with pytest.raises(ConfigError, match="is for classifiers"):
        model.load(str(folder), 0, 0, head="frozen")


def test_shapes_count_what_is_left_of_the_head(run_config):
    dense, linear, frozen = (Shapes.of(model_of(run_config, head)) for head in ("dense", *SMALL))
    assert (dense.head, linear.head, frozen.head) == (306, 34, 0)
    assert (dense.frozen, linear.frozen, frozen.frozen) == (0, 272, 306)
    assert dense.parameters == linear.parameters == frozen.parameters


def test_no_head_is_left_in_the_ledger(run_config):
    run = play(run_config | {"strategy": "ffa-lora", "head": "frozen", "num-server-rounds": 1})
    assert [set(Ledger(run.ledger).read(version).arrays) for version in (0, 1)] == [{"B"}, {"B"}]
