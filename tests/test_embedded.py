"""Invariants of the embedded tasks and of the embedded model's folder."""

import dataclasses
import logging
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict, Value
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from fedkrso_app.config import ConfigError
from fedkrso_app.data.embedded import grammar
from fedkrso_app.data.embedded import pretraining as embedded

PAIRS = ("entailment", "similarity")


@pytest.fixture(scope="module")
def tasks() -> dict[str, DatasetDict]:
    return {name: embedded.load_task(name) for name in embedded.TASKS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDKRSO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return embedded._model_path(steps=3)


def texts(name: str, part: list[dict]) -> list[tuple[str, ...]]:
    columns = ("sentence1", "sentence2") if name in PAIRS else ("sentence",)
    return [tuple(row[column] for column in columns) for row in part]


def unknown_words(rows: list[str]) -> set[str]:
    tokenizer = embedded._tokenizer()
    words = sorted({word for row in rows for word in row.split()})
    ids = tokenizer(words)["input_ids"]
    return {word for word, row in zip(words, ids, strict=True) if tokenizer.unk_token_id in row}


@pytest.mark.parametrize("name", embedded.TASKS)
def test_same_rows_on_every_call(tasks: dict[str, DatasetDict], name: str) -> None:
    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    again = embedded.load_task(name)
    assert {key: again[key].to_list() for key in again} == {k: tasks[name][k].to_list() for k in tasks[name]}


@pytest.mark.parametrize("name", embedded.TASKS)
def test_columns_types_and_sizes_are_as_promised(tasks: dict[str, DatasetDict], name: str) -> None:
    sentences = ("sentence1", "sentence2") if name in PAIRS else ("sentence",)
    features = dict.fromkeys(sentences, Value("string"))
    features["label"] = Value("float32" if name == "similarity" else "int64")
    assert {key: part.features for key, part in tasks[name].items()} == dict.fromkeys(("train", "validation"), features)
    assert {key: len(part) for key, part in tasks[name].items()} == {"train": 6000, "validation": 1000}


@pytest.mark.parametrize("name", embedded.TASKS)
def test_train_and_validation_share_no_row(tasks: dict[str, DatasetDict], name: str) -> None:
    train, validation = (texts(name, tasks[name][key].to_list()) for key in ("train", "validation"))
    assert len(set(train)) == 6000
    assert len(set(validation)) == 1000
    assert not set(train) & set(validation)


@pytest.mark.parametrize("name", [name for name in embedded.TASKS if name != "similarity"])
def test_labels_are_balanced(tasks: dict[str, DatasetDict], name: str) -> None:
    for part in tasks[name].values():
        counts = Counter(part["label"])
        assert set(counts) == set(range(3 if name == "entailment" else 2))
        assert max(counts.values()) < 1.2 * min(counts.values())


def test_similarities_fill_the_range_from_0_to_5(tasks: dict[str, DatasetDict]) -> None:
    labels = np.array(tasks["similarity"]["train"]["label"])
    assert (labels.min(), labels.max()) == (0.0, 5.0)
    assert np.bincount(labels.astype(int), minlength=6).min() > 200


@pytest.mark.parametrize("name", embedded.TASKS)
def test_every_word_is_in_the_vocabulary(tasks: dict[str, DatasetDict], name: str) -> None:
    rows = [" ".join(row) for part in tasks[name].values() for row in texts(name, part.to_list())]
    assert unknown_words(rows) == set()


def test_every_word_of_the_corpus_is_in_the_vocabulary() -> None:
    writer = grammar.Writer(seed=1)
    assert unknown_words([text for _ in range(2000) for text in writer.document()]) == set()


def test_an_unknown_task_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match="acceptability, entailment, similarity"):
        embedded.load_task("entailmemt")


def test_a_weaker_clause_is_weaker_and_a_false_one_is_its_denial() -> None:
    writer = grammar.Writer(seed=2)
    for _ in range(500):
        c = writer.clause(p_modifier=1.0)
        edits = writer.edits(c)
        restrictor_up = c.quantifier in ("the", "some")
        assert ({"adjective": None} in edits["weaker"]) == restrictor_up  # "big dogs run" gives "dogs run"
        assert ({"adverb": None} in edits["weaker"]) == (not c.negated and c.quantifier != "no")
        assert {"quantifier": "every"} not in edits["weaker"]
        assert edits["false"]


def test_both_voices_say_the_same_words() -> None:
    writer = grammar.Writer(seed=3)
    dog, fox = grammar.Noun("A", ("dog",)), grammar.Noun("A", ("fox",))
    chase = grammar.Verb(("chase",), "A", "A")
    c = grammar.Clause(
        quantifier="the", adjective=None, subject=dog, plural=False, relative="", verb=chase, negated=False,
        object_quantifier="some", object_adjective=("old",), object=fox, object_plural=False, adverb=None,
        passive=False,
    )  # fmt: skip
    assert writer.sentence(c) == "the dog chases an old fox"
    assert writer.sentence(dataclasses.replace(c, passive=True)) == "an old fox is chased by the dog"
    assert writer.sentence(dataclasses.replace(c, negated=True, plural=True)) == "the dogs do not chase an old fox"


def test_the_folder_opens_with_the_hubs_classes(folder: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the dog", "a fox")["input_ids"]) == "<s> the dog </s> </s> a fox </s>"
    assert AutoModelForMaskedLM.from_pretrained(folder).config.model_type == "roberta"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    logits = classifier(**tokenizer(["the dog", "a fox"], return_tensors="pt")).logits
    assert logits.shape == (2, 3)
    assert torch.isfinite(logits).all()


def test_a_second_call_does_not_train_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKRSO_CACHE", str(folder.parent))
    monkeypatch.setattr(embedded, "_pretrained", lambda *_: pytest.fail("trained again"))
    assert embedded._model_path(steps=3) == folder


def test_no_half_written_model_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("interrupted")

    monkeypatch.setenv("FEDKRSO_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_pretrained", fails)
    with pytest.raises(RuntimeError, match="interrupted"):
        embedded._model_path(steps=3)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_pretraining_repeats_itself_and_leaves_no_trace_in_torch() -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    tokenizer = embedded._tokenizer()
    first, second = (embedded._pretrained(tokenizer, steps=2).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_pretraining_lowers_the_loss_and_says_how_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="flwr")
    logging.getLogger("flwr").propagate = True
    embedded._pretrained(embedded._tokenizer(), steps=20)
    losses = [record.args[2] for record in caplog.records if "pretraining" in record.message]
    assert len(losses) == 10
    assert min(losses) < losses[0] < math.log(len(grammar.vocabulary())) + 0.5
