"""The model card, read back by huggingface_hub: what it says is what the run's folder says, and no path is told."""

import json
import re
import sys

import pytest
from helpers import play
from huggingface_hub import ModelCard
from test_cli import call
from transformers import RobertaForSequenceClassification

from fedkrso_app.data import tasks
from fedkrso_app.runs import card
from fedkrso_app.strategies import STRATEGIES

FACT = re.compile(r"^\| ([^|]+) \| ([^|]*) \|$", re.MULTILINE)


def read(folder) -> tuple[ModelCard, dict[str, str]]:
    loaded = ModelCard.load(folder / "README.md")
    return loaded, dict(FACT.findall(loaded.text))


@pytest.fixture
def run(run_config):
    return play(run_config, nodes=2)


def test_the_card_of_a_run_says_what_its_folder_says(run, run_config):
    loaded, facts = read(run.model)
    last = run.metrics()[-1]
    (result,) = loaded.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", last["metric"])
    assert (result.dataset_name, result.dataset_split) == ("glue/sst2", "validation")
    assert loaded.data.pipeline_tag == "text-classification" and loaded.data.model_name == "run"
    assert loaded.data.base_model is None  # a folder of one's own is no name on the hub
    sent = sum(line["uplink_bytes"] for line in run.metrics()) / 6 / 1e6  # three rounds of two clients
    assert facts["Sent per client and round, on average"].startswith(f"{sent:.3f} MB;")
    assert facts["Clients"] == "2 took part; 6 of 6 replies were counted"
    assert facts["Accuracy"].startswith(f"{last['metric']:.4f} (loss {last['eval_loss']:.4f}), by the server")
    assert "arxiv.org/abs/2602.03019" in facts["Method"] and "flwr" in facts["Libraries"]
    assert set(run_config) <= set(facts) and facts["fedkrso.num-seeds"] == "3"


def test_no_folder_of_the_user_is_told(run, tmp_path, model_folder, data_folder):
    text = (run.model / "README.md").read_text()
    for folder in (tmp_path, model_folder.parent, data_folder.parent):
        assert str(folder) not in text
    _, facts = read(run.model)
    assert facts["data-dir"] == data_folder.name and facts["model"] == model_folder.name
    assert facts["output-dir"] == "runs"


def test_the_cards_own_lines_load_the_model(run, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (run.model / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(run.model)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["model"], RobertaForSequenceClassification)
    assert names["model"](**names["tokenizer"]("w1 w2", return_tensors="pt")).logits.shape == (1, 2)


def test_an_exported_round_has_the_metric_of_that_round(run, tmp_path):
    scores = {line["round"]: line["metric"] for line in run.metrics()}
    for round in (0, 2):
        assert call("export", run.path, "--round", round, tmp_path / str(round)).exit_code == 0
        loaded, facts = read(tmp_path / str(round))
        assert loaded.data.eval_results[0].metric_value == scores[round]
        assert loaded.text.lstrip().startswith(f"# run, round {round}\n")
        assert ("Clients" in facts) == (round > 0)


def test_a_round_without_a_metric_has_none_in_its_card(run_config, tmp_path):
    run = play(run_config | {"evaluate": "off", "num-server-rounds": 1}, nodes=2)
    assert not run.model.exists()
    assert call("export", run.path, tmp_path / "out").exit_code == 0
    loaded, facts = read(tmp_path / "out")
    assert loaded.data.eval_results is None and "Accuracy" not in facts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate": "clients"}, "by the clients, each on its share, on the split validation"),
        ({"holdout": 0.25}, "by the server, on 0.25 of the training rows, which were held back"),
    ],
)
def test_the_card_says_who_measured_on_which_rows(run_config, tmp_path, changes, said):
    run = play(run_config | {"num-server-rounds": 1, **changes}, nodes=2)
    assert call("export", run.path, tmp_path / "out").exit_code == 0
    assert read(tmp_path / "out")[1]["Accuracy"].endswith(said)


def test_a_hub_model_and_a_hub_dataset_are_linked_and_bars_do_not_break_the_table(run, run_config, tmp_path):
    changed = run_config | {"model": "roberta-base", "data-dir": "", "labels": "a|b<i>"}
    (run.path / "config.json").write_text(json.dumps(run.info | {"config": changed}))
    card.write(run, tasks.task("glue/sst2"), 3, tmp_path)
    loaded, facts = read(tmp_path)
    assert loaded.data.base_model == "roberta-base" and loaded.data.datasets == ["nyu-mll/glue"]
    assert loaded.data.eval_results[0].dataset_type == "nyu-mll/glue"
    assert loaded.data.eval_results[0].dataset_config == "sst2"
    assert facts["labels"] == "a&#124;b&lt;i&gt;"


@pytest.mark.parametrize(
    ("dataset", "linked", "configuration", "said"),
    [
        ("someone/reviews", "someone/reviews", None, "someone/reviews on the hub"),
        ("someone/reviews:small", "someone/reviews", "small", "someone/reviews small on the hub"),
        ("{}/reviews", None, None, "files in a folder `reviews`"),
    ],
)
def test_a_dataset_of_the_users_choice_is_linked_or_told_without_its_folder(
    run, run_config, tmp_path, dataset, linked, configuration, said
):
    dataset = dataset.format(tmp_path)
    changed = run_config | {"data-dir": "", "dataset": dataset, "task": "text-classification"}
    (run.path / "config.json").write_text(json.dumps(run.info | {"config": changed}))
    card.write(run, tasks.declared(run.config), 3, tmp_path)
    loaded, facts = read(tmp_path)
    assert loaded.data.datasets == ([linked] if linked else None)
    assert loaded.data.eval_results[0].dataset_type == (linked or "text-classification")
    assert loaded.data.eval_results[0].dataset_config == configuration
    assert facts["Data"].startswith(said) and "test" in facts["Accuracy"]
    assert facts["dataset"] == (dataset if linked else "reviews") and str(tmp_path) not in loaded.content


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_paper_of_a_method_is_the_one_that_its_file_cites(name):
    strategy = STRATEGIES[name]
    assert strategy.citation()[0] in sys.modules[strategy.__module__].__doc__
