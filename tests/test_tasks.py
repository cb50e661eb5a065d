"""The user's own files: columns, labels, broken rows, who holds what, and language models from file to export."""

import json
import math

import datasets
import numpy as np
import pytest
from flwr.app import Context, RecordDict
from helpers import ON_SERVER, WORDS, Grid, default_config, play, text_batch
from test_contract import KINDS_OF_METHOD
from test_families import assert_same, build, write_texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedkrso_app import cli, data, server_app
from fedkrso_app.config import ConfigError
from fedkrso_app.data import files, repository
from fedkrso_app.data import hub as hubs
from fedkrso_app.federation import client
from fedkrso_app.strategies import parse


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for cached in (data.load, data.resolve, hubs.splits, repository.pinned, files.warn):
        cached.cache_clear()


@pytest.fixture
def read(tmp_path):
    """``read(task, train, **keys)``: the task, its training and its validation rows of a file with this content."""

    def reading(task, train, name="train.csv", validation=None, **keys):
        (tmp_path / "d").mkdir(exist_ok=True)
        for file, content in ((name, train), (name.replace("train", "validation"), validation)):
            if content is not None:
                (tmp_path / "d" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        keys = {key.replace("_", "-"): value for key, value in keys.items()}
        config = parse(default_config() | {"task": task, "data-dir": str(tmp_path / "d")} | keys)
        found = data.resolve(config)
        return found, *(data.load(found, config.data_dir, split) for split in ("train", "validation"))

    return reading


def table(*rows, head="text,label"):
    return "".join(line + "\n" for line in (head, *rows))


def jsonl(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


TWENTY = [f"text {i},{'neg' if i % 2 else 'pos'}" for i in range(20)]

# --- metrics ---


@pytest.mark.parametrize(
    ("task", "metric", "choices"),
    [
        ("glue/mrpc", "pearson", "accuracy or f1 or matthews"),
        ("regression", "f1", "pearson"),
        ("causal-lm", "accuracy", "perplexity or exact-match"),
    ],
)
def test_a_metric_that_a_task_does_not_have_is_refused_with_those_that_it_has(read, task, metric, choices):
    with pytest.raises(ConfigError, match=f"metric = '{metric}' does not go with task = '{task}': set it to {choices}"):
        read(task, "a,b\n", metric=metric)


@pytest.mark.parametrize(("labels", "positive"), [("", "'pos', the second"), ("pos,neg", "'neg', the second")])
def test_the_log_names_the_class_that_f1_is_of(read, labels, positive, caplog):
    with caplog.at_level("INFO", "flwr"):
        found, *_ = read("text-classification", table(*TWENTY), metric="f1", labels=labels)
    assert found.metric == "f1" and f"f1 is that of class {positive}" in caplog.text


# --- columns ---


@pytest.mark.parametrize(
    ("task", "head", "row", "columns", "label"),
    [
        ("text-classification", "id,Text,Label", "1,a,{}", ("Text",), "Label"),
        ("text-classification", "review,sentiment", "a,{}", ("review",), "sentiment"),
        ("text-classification", "note,text", "{},a", ("text",), "note"),  # what is left is the label
        ("text-classification", "utterance,label", "a,{}", ("utterance",), "label"),  # the only texts
        ("text-pair", "hypothesis,label,premise", "a,{},b", ("premise", "hypothesis"), "label"),
        ("text-pair", "left,right,class", "a,b,{}", ("left", "right"), "class"),
        ("regression", "sentence1,sentence2,score", "a,b,{}", ("sentence1", "sentence2"), "score"),
        ("regression", "text,rating", "a,{}", ("text",), "rating"),
        ("causal-lm", "id,content", "1,a{}", ("content",), ""),
        ("instruction", "output,input,instruction", "a{},b,c", ("instruction", "input", "output"), ""),
        ("instruction", "question,answer,source", "a{},b,c", ("question", "answer"), ""),
    ],
)
def test_common_column_names_are_guessed(read, task, head, row, columns, label):
    found, _, _ = read(task, table(row.format(0), row.format(1), row.format(1), head=head))
    assert (found.columns, found.label) == (columns, label)


@pytest.mark.parametrize(
    ("task", "head", "row", "message"),
    [
        ("causal-lm", "text,content", "a,b", "text or content may be meant; set text-columns"),
        ("text-classification", "text,label,class", "a,0,1", "the label may be label or class; set label-column"),
        ("text-classification", "x1,x2,label", "a,b,0", "no column looks like it; set text-columns"),
        ("instruction", "q,a", "b,c", "set text-columns, for instance text-columns='q,a'"),  # never by their order
        ("text-pair", "text,label", "a,0", "needs two text columns"),
    ],
)
def test_where_two_columns_would_do_or_none_the_error_lists_them_and_says_what_to_set(read, task, head, row, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(task, table(row, row, head=head))
    assert f"Columns found: {head.replace(',', ', ')}." in str(caught.value)


def test_named_columns_win_over_guesses(read):
    rows = table("a,b,0", "c,d,1", "e,f,1", head="text,content,label")
    found, train, _ = read("text-classification", rows, text_columns="content", label_column="label")
    assert found.columns == ("content",) and train.column_names == ["content", "label"]
    found, train, _ = read("instruction", rows, text_columns="content,text")
    assert found.columns == ("content", "text") and train.column_names == ["content", "text"]


KEYS = {
    "a column that is not there": ({"text_columns": "texts"}, "no column 'texts'; set .*text-columns='text'"),
    "a label that is not there": ({"label_column": "lable"}, "no column 'lable'; set .*label-column='label'"),
    "a group that is not there": ({"partition": "natural", "partition_column": "user"}, "no column 'user'"),
    "two columns for one": (
        {"text_columns": "text,label"},
        "must be one text column; two texts are task = 'text-pair'",
    ),
    "one label": ({"labels": "neg"}, "must be two or more different names"),
    "no folder": ({"data_dir": "", "data-dir": ""}, "reads your own files: set data-dir"),
    "natural by nothing": ({"partition": "natural"}, "needs partition-column"),
    "a label of no use": ({"task": "causal-lm", "label_column": "label"}, "does not go with causal-lm"),
    "labels of no use": ({"task": "regression", "labels": "a,b"}, "does not go with task = 'regression'"),
    "columns of a known task": ({"task": "glue/sst2", "text_columns": "text"}, "whose columns are known"),
    "no labels to go by": ({"task": "causal-lm", "partition": "dirichlet"}, "set partition-column"),
    "a task with a typo": ({"task": "text-clasification"}, "Did you mean 'text-classification'"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_do_not_fit_are_named(read, case):
    keys, message = KEYS[case]
    with pytest.raises(ConfigError, match=message):
        read(**({"task": "text-classification", "train": table(*TWENTY)} | keys))


# --- a dataset of the hub: a folder stands in, which load_dataset reads as it reads a repository ---

STARS = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["two", "one"])})


@pytest.fixture
def hub(tmp_path):
    """``hub(splits, task, **keys)``: a repository with these splits (rows by name), and its task, train, validation."""

    def reading(splits, task="text-classification", features=None, configuration="", **keys):
        folder = tmp_path / "repository"
        (folder / configuration).mkdir(parents=True)
        for split, rows in splits.items():
            rows = datasets.Dataset.from_list(rows, features=features)
            rows.to_parquet(folder / configuration / f"{split}.parquet")
        if configuration:
            card = f"---\nconfigs:\n- config_name: {configuration}\n  data_dir: {configuration}\n---\n"
            (folder / "README.md").write_text(card + "\n")
        name = f"{folder}:{configuration}" if configuration else str(folder)
        keys = {key.replace("_", "-"): value for key, value in keys.items()}
        config = parse(default_config() | {"task": task, "dataset": name} | keys)
        found = data.resolve(config)
        return found, *(data.load(found, config.data_dir, split) for split in ("train", "validation"))

    return reading


def rows_of(count, label=lambda i: i % 2, start=0):
    return [{"text": f"text {i}", "label": label(i)} for i in range(start, start + count)]


def test_a_dataset_is_read_by_the_names_of_its_classes_in_their_order(hub):
    found, train, validation = hub({"train": rows_of(6), "validation": rows_of(2, start=6)}, features=STARS)
    assert found.classes == ("two", "one") and found.num_labels == 2  # the alphabet would turn them round
    assert train["label"][:] == [0, 1, 0, 1, 0, 1] and train["text"][:] == [f"text {i}" for i in range(6)]
    assert validation["text"][:] == ["text 6", "text 7"]


def test_the_users_order_of_labels_wins_over_the_datasets(hub):
    found, train, _ = hub({"train": rows_of(6), "test": rows_of(2)}, features=STARS, labels="one,two")
    assert found.classes == ("one", "two") and train["label"][:] == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("configuration", ["", "small"])
def test_a_dataset_without_declared_classes_is_read_as_files_are(hub, configuration):
    rows = rows_of(6, lambda i: "pos" if i % 2 else "neg")
    found, train, _ = hub({"train": rows, "validation": rows}, configuration=configuration)
    assert found.classes == ("neg", "pos") and train["label"][:] == [0, 1] * 3


def test_the_test_split_stands_in_for_a_missing_validation_split_and_the_log_says_so(hub, caplog):
    _, train, validation = hub({"train": rows_of(6), "test": rows_of(2, start=6)})
    assert len(train) == 6 and validation["text"][:] == ["text 6", "text 7"]
    assert "no split 'validation': 'test' is used instead" in caplog.text


def test_with_neither_a_tenth_of_the_training_rows_stands_in(hub):
    _, train, validation = hub({"train": rows_of(20)})
    assert len(train) == 18 and len(validation) == 2
    assert sorted([*train["text"], *validation["text"]]) == sorted(row["text"] for row in rows_of(20))


def test_rows_that_a_dataset_keeps_the_label_of_are_named(hub):
    with pytest.raises(ConfigError, match=r"\(test\): column 'label' has no value in 2 of 3 rows"):
        hub({"train": rows_of(6), "test": [*rows_of(2, lambda i: -1), *rows_of(1)]}, features=STARS)


def test_a_test_split_without_a_single_label_is_none(hub, caplog):
    _, train, validation = hub({"train": rows_of(20), "test": rows_of(2, lambda i: -1)}, features=STARS)
    assert sorted([*train["text"], *validation["text"]]) == sorted(row["text"] for row in rows_of(20))
    assert "the labels of its split 'test' are not public" in caplog.text


def test_a_language_model_reads_a_dataset_too(hub):
    found, train, _ = hub({"train": rows_of(6), "validation": rows_of(2)}, "causal-lm")
    assert found.columns == ("text",) and train.column_names == ["text"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "causal-lm"}, "set data-dir to a folder with train.csv in it, or dataset to the name of one"),
        ({"data-dir": "d", "dataset": "ag_news"}, "data-dir = 'd' and dataset = 'ag_news' are both set; leave one"),
        ({"task": "glue/sst2", "dataset": "ag_news"}, "dataset = 'ag_news' does not go with task = 'glue/sst2'"),
        ({"dataset": "/nowhere/at/all"}, r"'/nowhere/at/all' could not be loaded \(.*\); check the name"),
    ],
)
def test_a_dataset_that_cannot_be_is_named_in_one_sentence(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        data.resolve(parse(default_config() | {"task": "text-classification"} | keys))
    assert "\n" not in str(caught.value)


def test_without_a_network_the_error_names_the_dataset_and_its_configuration(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nyu-mll/glue:mrpc' could not be loaded \(HF_HUB_OFFLINE is set, and"):
        data.resolve(parse(default_config() | {"task": "text-pair", "dataset": "nyu-mll/glue:mrpc"}))


def test_a_dataset_without_training_rows_says_what_it_has(hub):
    with pytest.raises(ConfigError, match="has no split 'train', only test"):
        hub({"test": rows_of(6)})


def test_clients_share_a_dataset_out_and_the_model_bears_the_names_of_its_classes(hub, run_config, tmp_path):
    hub({"train": rows_of(24), "validation": rows_of(4)}, features=STARS)
    data_keys = {"task": "text-classification", "dataset": str(tmp_path / "repository"), "data-dir": ""}
    run = play(run_config | data_keys | {"num-server-rounds": 1}, nodes=2)
    assert run.metrics()[-1]["clients"] == 2
    assert json.loads((run.model / "config.json").read_text())["id2label"] == {"0": "two", "1": "one"}


# --- labels ---


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        (["10", "9", "9"], ("9", "10")),  # by value
        (["3.0", "", "1.0"], ("1.0", "3.0")),  # beside an empty cell, as pandas writes whole numbers
        (["10.0", "9.0", "9.0"], ("9.0", "10.0")),
        (["True", "False", "True"], ("False", "True")),
        (["01", "1", "2"], ("01", "1", "2")),
    ],
)
def test_labels_become_ids_in_the_order_of_their_names(read, labels, classes):
    rows = table(*(f"text,{label}" for label in labels))
    found, train, held = read("text-classification", rows, validation=rows, bad_rows="skip")
    names = [label for label in labels if label]
    assert (found.classes, found.num_labels) == (classes, len(classes))
    assert train["label"][:] == held["label"][:] == [classes.index(name) for name in names]


def test_labels_of_both_files_count_and_a_named_order_holds(read):
    train, validation = table("a,x", "b,y"), table("c,w", "d,x")
    found, rows, held = read("text-classification", train, validation=validation)
    assert found.classes == ("w", "x", "y") and (rows["label"][:], held["label"][:]) == ([1, 2], [0, 1])
    found, rows, held = read("text-classification", train, labels="y, x,w")
    assert found.classes == ("y", "x", "w") and (rows["label"][:], held["label"][:]) == ([1, 0], [2, 1])


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (
            table("a,x", "b,y"),
            {"labels": "x,z"},
            r"holds 'y' \(.*train\.csv, line 3\), which is not one of labels: x, z",
        ),
        (table("a,x", "b,x"), {}, "has 1 different values and a classifier needs two"),
        (table("a,0.5", "b,1"), {}, "numbers such as 0.5.*task = 'regression'"),
    ],
)
def test_labels_that_cannot_be_are_named(read, content, keys, message):
    with pytest.raises(ConfigError, match=message):
        read("text-classification", content, **keys)


def test_without_files_the_config_must_name_the_labels():
    config = default_config() | {"task": "text-classification", "labels": "neg,pos,mixed"}
    found = data.resolve(parse(config), look=False)
    assert (found.num_labels, found.classes, found.metric) == (3, ("neg", "pos", "mixed"), "accuracy")
    with pytest.raises(ConfigError, match="labels must be set"):
        data.resolve(parse(config | {"labels": ""}), look=False)
    for task, labels in (("causal-lm", 0), ("instruction", 0), ("regression", 1)):
        assert data.resolve(parse(config | {"task": task, "labels": ""}), look=False).num_labels == labels


def test_a_node_that_numbers_its_labels_in_another_way_is_told(run_config, tmp_path):
    for name, labels in (("server", "ab"), ("node", "bc")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(table(*(f"w{i},{labels[i % 2]}" for i in range(20))))
    keys = run_config | {"task": "text-classification", "data-dir": str(tmp_path / "server")}
    client.workplace.cache_clear()
    grid = Grid(keys, 2)
    for context in grid.contexts.values():
        context.node_config |= {"data-dir": str(tmp_path / "node"), "share-errors": True}
    with pytest.raises(ConfigError, match=r"label names \(b, c\), which the key labels settles"):
        server_app.app(grid, Context(1, 1, {}, RecordDict(), keys))


def test_a_run_on_own_files_exports_the_label_names(run_config, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text(table(*(f"w{i} w{i + 9},{'neg' if i % 2 else 'pos'}" for i in range(30))))
    run = play(run_config | {"task": "text-classification", "data-dir": str(tmp_path / "d"), "num-server-rounds": 1})
    assert json.loads((run.model / "config.json").read_text())["id2label"] == {"0": "neg", "1": "pos"}
    assert CliRunner().invoke(cli.app, ["ledger", str(run.path), "--verify"]).exit_code == 0


# --- a tenth of the training rows ---


def test_without_a_validation_file_a_tenth_of_the_rows_stands_in_and_the_log_says_so(read, caplog):
    _, train, held = read("text-classification", table(*TWENTY))
    assert (len(train), len(held)) == (18, 2)
    assert sorted([*train["text"], *held["text"]]) == sorted(f"text {i}" for i in range(20))
    assert "no validation file: 10 % of the training rows are held back instead" in caplog.text


@pytest.mark.parametrize("name", ["val.csv", "dev.jsonl", "Valid.csv", "eval_2024.parquet"])
def test_a_validation_file_by_another_name_is_not_passed_over(read, tmp_path, name):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_text(table("text,pos"))
    fix = rf"d has {name} and no validation file: name it validation\{name[name.rindex('.') :]}, or"
    with pytest.raises(ConfigError, match=fix):
        read("text-classification", table(*TWENTY))
    (tmp_path / "d" / name).rename(tmp_path / "d" / "evaluate.md.csv")
    assert len(read("text-classification", table(*TWENTY))[2]) == 2


def test_labels_of_which_validation_and_training_share_none_are_refused(read):
    with pytest.raises(
        ConfigError, match=r"no training row has one of its classes \('neg', 'pos'\), but ' neg', ' pos'"
    ):
        read("text-classification", table("a b, pos", "c d, neg"), validation=table("a b,pos", "c d,neg"))
    assert len(read("text-classification", table(*TWENTY), validation=table("a,pos", "b,odd"))[2]) == 2


def test_a_sweep_without_a_validation_file_never_sees_the_rows_that_are_reported_on(read, tmp_path):
    found, train, reported = read("text-classification", table(*TWENTY))
    rest, held = (data.load(found, str(tmp_path / "d"), split, 0.5)["text"] for split in ("train", "validation"))
    assert sorted([*rest, *held]) == sorted(train["text"]) and len(held) == 9
    assert not set(reported["text"]) & {*rest, *held}


def test_a_validation_file_is_used_whole(read):
    _, train, held = read("text-classification", table(*TWENTY), validation=table(*TWENTY[:7]))
    assert (len(train), len(held)) == (20, 7)


# --- broken rows ---

GOOD = [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}, {"text": "three", "label": "x"}]
BROKEN = {
    "too many cells": (
        "train.csv",
        table("one,x", "a, b,x", "two,y", "three,x"),
        3,
        "has 3 cells where the header has 2",
    ),
    "too few cells": ("train.csv", table("one,x", "two,y", "a", "three,x"), 4, "has 1 cells"),
    "an open quote": ("train.csv", table("one,x", '"a,x', "two,y", "three,x"), 3, "is not CSV"),
    "an empty text": ("train.csv", table("one,x", "two,y", " ,x", "three,x"), 4, "'text' has no value in 1 of 4 rows"),
    "an empty label": ("train.csv", table('"on\ne",x', "two,y", "a,", "three,x"), 5, "'label' has no value in 1 of 4"),
    "half a line": ("train.jsonl", jsonl(*GOOD[:2], '{"text": "a', GOOD[2]), 3, "is not JSON"),
    "no object": ("train.jsonl", jsonl(GOOD[0], "7", *GOOD[1:]), 2, "is not a JSON object"),
    "no text": ("train.jsonl", jsonl(*GOOD, "", {"label": "x"}), 5, "'text' has no value in 1 of 4 rows"),
    "a null": ("train.jsonl", jsonl({"text": "a", "label": None}, *GOOD), 1, "'label' has no value in 1 of 4 rows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_stops_the_run_by_file_and_line_or_is_left_out_and_counted(read, case, caplog):
    name, content, line, why = BROKEN[case]
    with pytest.raises(ConfigError, match=f"{name}, line {line}") as caught:
        read("text-classification", content, name, validation=content)
    assert why in str(caught.value) and "bad-rows='skip'" in str(caught.value)
    _, train, _ = read("text-classification", content, name, bad_rows="skip")
    assert [text.replace("\n", "") for text in train["text"]] == ["one", "two", "three"]
    assert train["label"][:] == [0, 1, 0]
    said = [record.message for record in caplog.records if f"{name}, line {line}" in record.message]
    assert len(said) == 1 and "left out: 1" in said[0]  # however often the file is read


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_another_encoding_is_named_with_its_line_and_the_fix(read, kind, encoding):
    content = table("a,x", "größe,y") if kind == "csv" else jsonl("", GOOD[0], '{"text": "größe", "label": "y"}')
    with pytest.raises(ConfigError, match=rf"train\.{kind}, line 3: this is not UTF-8 .*'CSV UTF-8'"):
        read("text-classification", content.encode(encoding), f"train.{kind}")


@pytest.mark.parametrize(
    ("name", "content"), [("train.csv", table("a\u2028b,x", "c,y", "d,y")), ("train.jsonl", jsonl(*GOOD))]
)
def test_a_byte_order_mark_and_odd_line_breaks_are_no_harm(read, name, content):
    found, train, _ = read("text-classification", b"\xef\xbb\xbf" + content.encode(), name)
    assert found.classes == ("x", "y") and train.column_names == ["text", "label"] and len(train) == 2


@pytest.mark.parametrize("content", ["", "text,label\n", "\n"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_file_is_named(read, content, split):
    with pytest.raises(ConfigError, match=rf"{split}\.csv: there are no rows; put some in, or remove the file\.$"):
        read("text-classification", **({"train": table(*TWENTY)} | {split: content}))


EXCEL = {
    "semicolons": lambda text: text.replace(",", ";").encode("utf-8-sig"),
    "tabs": lambda text: text.replace(",", "\t").encode(),
    "Unicode text": lambda text: text.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    "its own first line": lambda text: ("sep=;\n" + text.replace(",", ";")).encode("utf-8-sig"),
    "big-endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
}


@pytest.mark.parametrize("case", EXCEL)
def test_a_csv_as_excel_saves_it_has_the_rows_of_the_plain_one(read, case):
    plain = table(*TWENTY, '"größer; oder""so\nwohl",pos')
    marked = EXCEL[case](plain)
    expected = read("text-classification", plain, validation=plain)
    found, train, held = read("text-classification", marked, validation=marked)
    assert found == expected[0]
    assert train.to_list() == expected[1].to_list() or case == "Unicode text"  # whose lines end in another way
    assert held["label"][:] == expected[2]["label"][:]


def test_utf_16_without_its_mark_is_named_with_the_fix(read):
    with pytest.raises(ConfigError, match=r"train\.csv: it holds NUL bytes.*save it as UTF-8"):
        read("text-classification", table(*TWENTY).encode("utf-16-le"))


@pytest.mark.parametrize("given", ["x", ""])
def test_an_empty_input_of_an_instruction_is_no_bad_row(read, given, tokenizer):
    found, train, _ = read("instruction", table("w1,,w2", f"w1,{given},w2", "w1,,w2", head="instruction,input,output"))
    (batch,) = data.evaluation_batches(train, found, tokenizer, 999, 32)
    assert len(batch["labels"]) == len(train) == 2


# --- who holds which rows ---


def by_user(sizes, **columns):
    users = [f"user {i}" for i, size in enumerate(sizes) for _ in range(size)]
    return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(users))], "user": users, **columns})


LANGUAGE = data.Task("causal-lm", ("text",), 0, "perplexity", label="", group="user")


@pytest.mark.parametrize("clients", [1, 3, 7])
def test_natural_clients_hold_whole_groups(clients):
    train = by_user([5, 1, 8, 2, 2, 9, 1])
    parts = data.partition(train, LANGUAGE, clients, "natural", 0.5, seed=1)
    held = [{train["user"][int(row)] for row in part} for part in parts]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(train)))
    assert sum(map(len, held)) == 7  # no user is at two clients
    assert max(map(len, held)) - min(map(len, held)) <= 1
    again = data.partition(train, LANGUAGE, clients, "natural", 0.5, seed=1)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_more_natural_clients_than_values_are_refused():
    with pytest.raises(ConfigError, match="partition-column = 'user' has 2 values for 3 clients"):
        data.partition(by_user([5, 5]), LANGUAGE, 3, "natural", 0.5, seed=0)


def test_dirichlet_goes_by_the_column_where_there_is_one():
    train = by_user([200, 200])
    parts = data.partition(train, LANGUAGE, 4, "dirichlet", 0.05, seed=0)
    shares = [np.mean([train["user"][int(row)] == "user 0" for row in part]) for part in parts]
    assert sorted(np.concatenate(parts).tolist()) == list(range(400)) and np.std(shares) > 0.2


def test_a_label_that_occurs_once_does_not_stop_dirichlet(read):
    found, train, _ = read("text-classification", table(*TWENTY, "last,odd"), validation=table(*TWENTY))
    parts = data.partition(train, found, 3, "dirichlet", 0.5, seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(21))


# --- language models ---


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def ids(tokenizer, words):
    return tokenizer.convert_tokens_to_ids(words.split())


def test_every_token_of_a_text_and_its_end_are_predicted(tokenizer):
    batch = text_batch([["w1 w2 w3", "w4"]], tokenizer, 32)
    assert batch["input_ids"].tolist() == [
        ids(tokenizer, "<s> w1 w2 w3 </s>"),
        ids(tokenizer, "<s> w4 </s> <pad> <pad>"),
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [
        ids(tokenizer, "<s> w1 w2 w3 </s>"),
        [*ids(tokenizer, "<s> w4 </s>"), -100, -100],
    ]


def test_a_very_long_text_is_cut(tokenizer):
    batch = text_batch([["w1 " * 20_000, "w2"]], tokenizer, 8)
    assert batch["input_ids"].shape == (2, 8) and tokenizer.eos_token_id not in batch["input_ids"][0]


def test_only_the_answer_is_predicted(tokenizer):
    batch = text_batch([["w1", "w2"], ["w3", None], ["w4 w5", "w6"]], tokenizer, 32)
    assert batch["input_ids"].tolist() == [
        ids(tokenizer, "<s> w1 w3 w4 w5 </s>"),
        ids(tokenizer, "<s> w2 w6 </s> <pad> <pad>"),
    ]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, *ids(tokenizer, "w4 w5 </s>")],
        [-100, -100, *ids(tokenizer, "w6 </s>"), -100, -100],
    ]


TEMPLATE = (
    "{% for m in messages %}{{ 'w30 ' if m.role == 'user' else 'w31 ' }}{{ m.content }} w32 {% endfor %}"
    "{% if add_generation_prompt %}w31 {% endif %}"
)


@pytest.mark.parametrize("waiting", ["w31 ", "w31 w2 w3 w33 "])  # the prompt of a model that thinks first
def test_a_chat_template_lays_out_question_and_answer(tokenizer, waiting):
    tokenizer.chat_template = TEMPLATE.replace("generation_prompt %}w31 ", "generation_prompt %}" + waiting)
    batch = text_batch([["w1"], ["w2 w3"]], tokenizer, 32)
    assert batch["input_ids"].tolist() == [ids(tokenizer, "w30 w1 w32 w31 w2 w3 w32")]
    assert batch["labels"].tolist() == [[-100] * 4 + ids(tokenizer, "w2 w3 w32")]


@pytest.mark.parametrize(("asked", "answered", "kept"), [(30, 2, 3), (2, 30, 5), (30, 30, 4)])
def test_a_long_question_loses_its_beginning_and_never_its_answer(tokenizer, asked, answered, kept):
    batch = text_batch([["w1 " * asked], ["w2 " * answered]], tokenizer, 8)
    assert batch["input_ids"].shape == (1, 8)
    assert int((batch["labels"] != -100).sum()) == kept


def test_a_batch_without_anything_to_predict_is_an_error_and_no_nan(tokenizer):
    tokenizer.eos_token = None
    tokenizer._tokenizer.post_processor = None
    with pytest.raises(ValueError, match="no token to predict"):
        text_batch([["w1", "w2"]], tokenizer, 8)


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_a_text_far_beyond_what_the_model_can_read_is_cut(task, model_folder, run_config, tmp_path):
    """A decoder of 40 positions, and a tokenizer that knows neither them nor a padding token."""
    folder = build(tmp_path / "m", model_folder, "gpt2", True)
    for name, keys in (("tokenizer_config.json", ["pad_token", "model_max_length"]), ("config.json", ["pad_token_id"])):
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in facts.items() if key not in keys}))
    bare = AutoTokenizer.from_pretrained(folder)
    assert bare.pad_token is None and bare.model_max_length > 40
    (tmp_path / "d").mkdir()
    rows = [{"text": "w1 " * (13_000 if i == 3 else 2 + i % 5), "label": i % 2} for i in range(20)]
    for split in ("train", "validation"):
        (tmp_path / "d" / f"{split}.jsonl").write_text(jsonl(*rows))
    keys = {"task": task, "data-dir": str(tmp_path / "d"), "model": str(folder), "num-server-rounds": 1}
    assert play(run_config | keys, nodes=2).metrics()[-1]["clients"] == 2


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [(strategy, "float32") for strategy in ON_SERVER] + [(kind, "bfloat16") for kind in KINDS_OF_METHOD],
)
def test_every_method_trains_a_language_model_without_a_head(strategy, dtype, model_folder, run_config, tmp_path):
    folder = build(tmp_path / "m", model_folder, "gpt2", True)
    keys = {
        "task": "causal-lm",
        "data-dir": str(write_texts(tmp_path / "d")),
        "model": str(folder),
        "strategy": strategy,
        "compute-dtype": dtype,
    }
    run = play(run_config | keys | {"num-server-rounds": 1}, nodes=2)
    before, after = run.metrics()
    assert after["clients"] == 2 and after["metric"] != before["metric"]
    assert after["metric"] == after["perplexity"] == pytest.approx(math.exp(after["eval_loss"]))
    assert_same(run, AutoModelForCausalLM)


@pytest.mark.parametrize(("family", "template"), [("gpt2", False), ("llama", True)])
def test_a_small_decoder_learns_to_answer(family, template, model_folder, run_config, tmp_path):
    """The answer is the word after the one asked for, of 40; the model that comes out gives the logits of the run's."""
    folder = build(tmp_path / "m", model_folder, family, True, initializer_range=0.5)
    if template:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    (tmp_path / "d").mkdir()
    rows = [{"question": WORDS[i % 8], "answer": WORDS[(i + 1) % 8], "user": i // 16} for i in range(64)]
    for split, part in (("train", rows), ("validation", rows[:8])):
        (tmp_path / "d" / f"{split}.jsonl").write_text(jsonl(*part))
    keys = {
        "task": "instruction", "data-dir": str(tmp_path / "d"), "model": str(folder), "partition": "natural",
        "partition-column": "user", "num-server-rounds": 5, "local-steps": 20, "strategy": "fedkrso",
        "fedkrso.rank": 8, "fedkrso.interval": 10, "fedkrso.learning-rate": 0.05,
    }  # fmt: skip
    run = play(run_config | keys)
    figures = [(line["metric"], line["perplexity"]) for line in run.metrics()]
    assert figures[0][0] <= 1 / 8 and figures[-1][0] >= 7 / 8  # exact match, of 8 questions
    assert figures[-1][1] < figures[1][1] / 1.2 < figures[0][1] / 10  # perplexity, also after the first round
    assert_same(run, AutoModelForCausalLM)
