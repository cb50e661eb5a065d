"""Names of the hub, on a stand-in: what is read is what the name meant when the run began, or nothing is."""

import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from helpers import default_config, play
from hub import Hub
from transformers import RobertaForMaskedLM

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.data import files, repository
from fedkrso_app.data import hub as reading
from fedkrso_app.federation import client
from fedkrso_app.runs import compare
from fedkrso_app.runs.study import Study
from fedkrso_app.strategies import parse
from fedkrso_app.training import model

CACHED = (data.load, data.resolve, reading.splits, repository.pinned, files.warn, client.workplace)


@pytest.fixture
def hub(tmp_path, monkeypatch, model_folder):
    """A hub with the model org/tiny and the dataset org/news (renamed from news), and empty caches."""
    server = Hub(tmp_path / "hub")
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hf"),
        "HF_HUB_ETAG_TIMEOUT": 1,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.address)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    fresh()
    shutil.copytree(model_folder, server.folder("models", "org/tiny"), dirs_exist_ok=True)
    write_news(server.folder("datasets", "org/news"))
    server.renamed = {"news": "org/news", "tiny": "org/tiny"}
    yield server
    server.close()
    fresh()


def fresh() -> None:
    """As in a new process."""
    for cached in CACHED:
        cached.cache_clear()
    huggingface_hub.HfFileSystem.clear_instance_cache()
    for cached in vars(huggingface_hub.HfFileSystem).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def write_news(folder: Path, word: str = "", rows: int = 24) -> None:
    """Two classes, declared, in the order that is not the alphabet's."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    for split, count in (("train", rows), ("validation", 8)):
        texts = [f"w{i} {word} w{i + 1}" for i in range(count)]
        made = datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(count)]}, features=features)
        made.to_parquet(folder / f"{split}.parquet")


def resolved(**keys):
    keys = {key.replace("_", "-"): value for key, value in keys.items()}
    return parse(default_config() | {"task": "text-classification"} | keys)


def read(config):
    task = data.resolve(config)
    return task, *(data.load(task, config.data_dir, split) for split in ("train", "validation"))


def test_a_model_of_the_hub_is_the_one_of_its_folder(hub, model_folder):
    assert model.load("tiny", 2, 0).digest() == model.load(str(model_folder), 2, 0).digest()


@pytest.mark.parametrize("how", ["org/tiny@v1", "key"])
def test_a_revision_is_another_model(hub, how):
    plain = model.load("org/tiny", 2, 0).digest()
    other = shutil.copytree(hub.folder("models", "org/tiny"), hub.root / "models" / "org/tiny@v1")
    torch.manual_seed(1)
    RobertaForMaskedLM(RobertaForMaskedLM.from_pretrained(other).config).save_pretrained(other)
    config = resolved(model=how) if how != "key" else resolved(model="org/tiny", model_revision="v1")
    assert config.model == "org/tiny@v1"
    assert model.load(config.model, 2, 0).digest() == model.load(str(other), 2, 0).digest() != plain


def test_weights_in_parts_and_weights_that_are_pickles_of_tensors_are_the_same_model(hub, model_folder):
    whole, plain = RobertaForMaskedLM.from_pretrained(model_folder), model.load(str(model_folder), 2, 0).digest()
    for name in ("org/parts", "org/bin"):
        shutil.copytree(model_folder, hub.folder("models", name), dirs_exist_ok=True)
        (hub.folder("models", name) / "model.safetensors").unlink()
    whole.save_pretrained(hub.folder("models", "org/parts"), max_shard_size="4KB")
    torch.save(whole.state_dict(), hub.folder("models", "org/bin") / "pytorch_model.bin")
    assert len(list(hub.folder("models", "org/parts").glob("*.safetensors"))) > 2
    assert {model.load(name, 2, 0).digest() for name in ("org/parts", "org/bin")} == {plain}
    assert not any("discussions" in line for line in hub.asked)  # nobody else is told the model's name


def test_a_dataset_of_the_hub_is_the_rows_of_its_files_by_old_and_new_name(hub):
    for name in ("news", "org/news"):
        task, train, validation = read(resolved(dataset=name))
        fresh()
        assert task.classes == ("pos", "neg") and train["label"][:] == [0, 1] * 12
        assert train["text"][0] == "w0  w1" and len(validation) == 8


def test_glue_comes_from_the_hub_with_both_validation_splits_of_mnli_and_the_names_of_its_labels(hub):
    folder = hub.folder("datasets", "nyu-mll/glue")
    card = "---\nconfigs:\n- config_name: mnli\n  data_files:\n"
    for count, split in enumerate(("train", "validation_matched", "validation_mismatched"), 3):
        rows = {"premise": ["w1"] * count, "hypothesis": ["w2"] * count, "label": [i % 3 for i in range(count)]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / "mnli" / f"{split}.parquet")
        card += f"  - split: {split}\n    path: mnli/{split}.parquet\n"
    (folder / "README.md").write_text(card + "---\n")
    sizes = {name: len(read(resolved(task=name))[2]) for name in ("glue/mnli", "glue/mnli-matched")}
    assert sizes == {"glue/mnli": 5, "glue/mnli-matched": 4}
    assert read(resolved(task="glue/mnli"))[0].classes == ("entailment", "neutral", "contradiction")


def test_a_few_rows_of_a_dataset_say_before_the_download_that_all_of_it_is_read(hub, caplog):
    with caplog.at_level("INFO", "flwr"):
        reading.pinned(resolved(dataset="org/news", rows=6))
    assert "rows = 6 are drawn from all: org/news is downloaded as a whole." in caplog.text
    assert not any("resolve" in line for line in hub.asked)


def test_as_many_rows_as_asked_for_are_drawn_the_same_ones_each_time(hub):
    _, train, validation = read(resolved(dataset="org/news", rows=6))
    whole = read(resolved(dataset="org/news"))[1]
    fresh()
    assert (len(train), len(validation)) == (6, 6) and set(train["text"]) < set(whole["text"])
    assert read(resolved(dataset="org/news", rows=6))[1]["text"][:] == train["text"][:] != whole["text"][:6]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset": "csv"}, "'csv' is a kind of files, not a dataset"),
        ({"dataset": "org/nowhere"}, "none of this name, or it is private.*HF_TOKEN"),
        ({"dataset": "org/news@v9"}, "'org/news@v9' could not be loaded .it has no such revision"),
        ({"dataset": "org/news", "dataset_revision": "v9"}, "'org/news@v9' could not be loaded"),
        ({"dataset": "org/news@v1", "dataset_revision": "v2"}, "'org/news@v1' and dataset-revision = 'v2' differ"),
        ({"dataset_revision": "v1"}, "dataset-revision = 'v1' needs dataset to be a name of the hub"),
        ({"model_revision": "v1"}, "model-revision = 'v1' needs model to be a name of the hub"),
        ({"dataset": "org news"}, "'org news' is not a name of the hub"),
    ],
)
def test_a_name_that_leads_nowhere_says_why(hub, keys, message):
    with pytest.raises(ConfigError, match=message):
        read(resolved(**keys))


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_a_gated_repository_says_so_and_what_is_left_of_it_in_the_cache_is_not_read(hub, kind):
    def read_it():
        return model.load("org/tiny", 2, 0) if kind == "models" else read(resolved(dataset="org/news"))

    read_it()
    fresh()
    hub.gated = {"org/tiny", "org/news"}
    with pytest.raises(ConfigError, match=r"gated.*HF_TOKEN"):
        read_it()


def test_a_token_with_access_reads_what_is_gated_and_another_does_not(hub, run_config, monkeypatch):
    """A whole run, whose nodes find the token where the server does."""
    hub.gated, hub.token = {"org/tiny", "org/news"}, "hf_right"
    settings = run_config | {"model": "org/tiny", "task": "text-classification", "dataset": "org/news", "data-dir": ""}
    settings |= {"num-server-rounds": 1, "local-steps": 2}
    for wrong in ("", "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", wrong)
        with pytest.raises(ConfigError, match=r"model = 'org/tiny': it is gated.*HF_TOKEN"):
            play(settings, nodes=2)
    fresh()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    run = play(settings, nodes=2)
    assert run.status == "completed" and run.metrics()[-1]["clients"] == 2
    assert not [file for file in run.path.rglob("*") if file.is_file() and b"hf_right" in file.read_bytes()]


@pytest.mark.parametrize("kind", ["hub", "datasets"])
def test_a_cache_that_cannot_be_written_is_named_with_the_fix(hub, kind, tmp_path, monkeypatch):
    """A path below a file: chmod would not stop root."""
    (tmp_path / "file").write_text("")
    owner, name = {
        "hub": (huggingface_hub.constants, "HF_HUB_CACHE"),
        "datasets": (datasets.config, "HF_DATASETS_CACHE"),
    }[kind]
    monkeypatch.setattr(owner, name, str(tmp_path / "file" / "cache"))
    said = rf"the cache cannot be written, {tmp_path}/file/cache.* \(Not a directory\): set HF_HOME to a folder"
    with pytest.raises(ConfigError, match=rf"^dataset = 'org/news': {said} that can be\.$"):
        read(resolved(dataset="org/news"))
    if kind == "hub":
        with pytest.raises(ConfigError, match=rf"^model = 'org/tiny': {said} that can be\.$"):
            model.load("org/tiny", 2, 0)


@pytest.mark.parametrize("status", [0, 503])
def test_a_hub_that_does_not_answer_is_named_or_the_cache_is_read_and_named(hub, status, caplog):
    hub.trouble = (".", status)
    with pytest.raises(ConfigError, match=r"(did not answer within 1 s|503).*not in the cache"):
        model.load("tiny", 2, 0)
    hub.trouble = ("", 0)
    before, rows = model.load("tiny", 2, 0).digest(), read(resolved(dataset="news"))[1]["text"][:]
    fresh()
    hub.trouble = (".", status)
    assert model.load("tiny", 2, 0).digest() == before
    assert f"org/tiny is used as the cache has it, commit {hub.commit('models', 'org/tiny')}" in caplog.text
    assert read(resolved(dataset="news"))[1]["text"][:] == rows


def test_a_file_that_was_damaged_on_the_way_is_named(hub, tmp_path):
    model.load("org/tiny", 2, 0)
    weights = next((tmp_path / "hf").rglob("model.safetensors")).resolve()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # still a good safetensors file
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{weights} in the cache \(model.safetensors\) is damaged: remove it"):
        model.load("org/tiny", 2, 0)


def test_a_run_keeps_the_commits_and_its_nodes_read_those_alone(hub, run_config, tmp_path):
    asked = {"model": "tiny", "dataset": "news", "task": "text-classification", "data-dir": ""}
    settings = run_config | asked | {"num-server-rounds": 1}
    commits = {"model": hub.commit("models", "org/tiny"), "dataset": hub.commit("datasets", "org/news")}
    run = play(settings, nodes=2)
    assert json.loads((run.path / "config.json").read_text())["commits"] == {
        "model": f"org/tiny@{commits['model']}",
        "dataset": f"org/news@{commits['dataset']}",
    }
    card = (run.model / "README.md").read_text()
    assert all(commit in card for commit in commits.values()) and "base_model: org/tiny\n" in card
    assert [line.split()[1] for line in hub.asked].count("/org/tiny/resolve/main/model.safetensors") == 0
    fetched = [line for line in hub.asked if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(fetched) == 1  # the server's and its clients'


def test_a_node_whose_rows_would_be_of_another_commit_is_refused(hub, run_config, tmp_path, monkeypatch):
    asked = {"model": "org/tiny", "dataset": "org/news", "task": "text-classification", "data-dir": ""}

    def move_on(grid):
        send = grid.push_messages

        def pushed(messages):
            fresh()
            shutil.rmtree(tmp_path / "datasets")  # the nodes are other machines
            shutil.rmtree(tmp_path / "hf" / "datasets--org--news")
            write_news(hub.folder("datasets", "org/news"), "changed")
            return send(messages)

        grid.push_messages = pushed

    with pytest.raises(ConfigError, match=r"no node can take part: .*org/news@\w{40}' could not be loaded"):
        play(run_config | asked, nodes=2, prepare=move_on)


def test_a_comparison_reads_one_commit_in_all_its_runs_also_those_of_a_later_call(hub, tmp_path):
    def plan(seeds, **keys):
        fresh()
        base = default_config() | {"model": "org/tiny", "task": "text-classification", "dataset": "org/news"} | keys
        arms = {name: {"strategy": name} for name in ("fedkrso", "fedit")}
        made = compare.Comparison(Study(base, {"iid": {}}, arms, tuple(seeds), clients=2), tmp_path / "out", "process")
        made.close()
        return list(made.configs.values())

    model, rows = hub.commit("models", "org/tiny"), hub.commit("datasets", "org/news")
    first = plan([0])
    write_news(hub.folder("datasets", "org/news"), "newer")
    torch.manual_seed(1)
    folder = hub.folder("models", "org/tiny")
    RobertaForMaskedLM(RobertaForMaskedLM.from_pretrained(folder).config).save_pretrained(folder)
    assert (model, rows) != (hub.commit("models", "org/tiny"), hub.commit("datasets", "org/news"))
    for run in (*first, *plan([0, 1])):
        assert (run["model"], run["dataset"]) == (f"org/tiny@{model}", f"org/news@{rows}")
        assert parse(run).model_revision == model
    assert {run["model"] for run in plan([0], model="embedded")} == {"embedded"}  # what was asked for has changed
    assert {run["dataset"] for run in plan([0], dataset="org/news@main")} == {
        f"org/news@{hub.commit('datasets', 'org/news')}"
    }


def test_a_resumed_run_reads_the_commits_that_it_began_with(hub, run_config, tmp_path):
    asked = {"model": "org/tiny", "dataset": "org/news", "task": "text-classification", "data-dir": ""}
    whole = play(run_config | asked | {"num-server-rounds": 2, "run-name": "whole"}, nodes=2)
    begun = play(run_config | asked | {"num-server-rounds": 1}, nodes=2)
    shutil.copytree(hub.root / "datasets/org/news", hub.root / "datasets/org/news@before")
    write_news(hub.folder("datasets", "org/news"), "changed", rows=30)
    fresh()
    again = play(run_config | asked | {"num-server-rounds": 2, "resume": str(begun.path)}, nodes=2)
    assert json.loads((again.path / "result.json").read_text())["digest"] == whole.digest


def test_a_repositorys_own_code_is_never_run_nor_asked_about(hub, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    trace = tmp_path / "ran"
    for place in (hub.folder("models", "org/code"), tmp_path / "code"):
        shutil.copytree(model_folder, place, dirs_exist_ok=True)
        settings = json.loads((place / "config.json").read_text())
        settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
        (place / "config.json").write_text(json.dumps(settings))
        (place / "mine.py").write_text(f"open({str(trace)!r}, 'w')\n")
    for name in ("org/code", str(tmp_path / "code")):
        for load in (lambda name=name: model.load(name, 2, 0), lambda name=name: model.outline(name, 2)):
            with pytest.raises(ConfigError, match=r"needs code of its own .*never run"):
                load()
    assert not trace.exists()
