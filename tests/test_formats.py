"""The same rows give the same task, rows, classes and clients from csv, jsonl, parquet and the hub, or one refusal."""

import csv
import decimal
import io
import json
import re
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import default_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.data import files
from fedkrso_app.strategies import parse

FORMATS = ["csv", "jsonl", "json", "parquet"]


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for cached in (data.load, data.resolve, files.warn):
        cached.cache_clear()


def write(path, columns, rows):
    """``rows`` of Python values, written as a user's program would: csv by the csv module, the rest by its library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text).writerows([columns, *rows])
        path.write_bytes(text.getvalue().encode())
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], ensure_ascii=False))
    else:
        pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), path)


def read(folder, task="text-classification", clients=0, **keys):
    """What a run would get: the task, and the rows of both splits; with ``clients`` who holds which too."""
    keys = {key.replace("_", "-"): value for key, value in keys.items()}
    config = parse(default_config() | {"task": task, "data-dir": str(folder)} | keys)
    found = data.resolve(config)
    train, held = (data.load(found, config.data_dir, split) for split in ("train", "validation"))
    shares = data.partition(train, found, clients, config.partition, 0.5, 0) if clients else []
    return found, train.to_list(), held.to_list(), [share.tolist() for share in shares]


def from_all(tmp_path, columns, train, held, task="text-classification", formats=FORMATS, **keys):
    """:func:`read` of each format."""
    results = []
    for kind in formats:
        for split, rows in (("train", train), ("validation", held)):
            write(tmp_path / kind / f"{split}.{kind}", columns, rows)
        results.append(read(tmp_path / kind, task, **keys))
    return results


# --- text is text ---

NAMES = {
    "truth values and another word": (["True", "False", "True"], ["True", "Unknown"], ("False", "True", "Unknown")),
    "lower-case truth values": (["true", "false", "true"], ["true", "TRUE"], ("TRUE", "false", "true")),
    "leading zeros": (["001", "1", "01"], ["1", "001"], ("001", "01", "1")),
    "words for nothing": (["null", "NA", "nan"], ["None", "NA"], ("NA", "None", "nan", "null")),
    "dates": (["2024-01-02", "2024-1-2"], ["2024-01-02"], ("2024-01-02", "2024-1-2")),
    "long numbers": (["12345678901234567890123", "1"], ["1"], ("1", "12345678901234567890123")),
    "exponents": (["1e3", "1000"], ["1e3"], ("1000", "1e3")),
    "white space": (["pos", " pos"], ["pos"], (" pos", "pos")),
    "numbers in one file and a word in the other": (["1", "0"], ["1", "none"], ("0", "1", "none")),
}


@pytest.mark.parametrize("case", NAMES)
def test_labels_are_the_text_that_is_written(tmp_path, case):
    train, held, classes = NAMES[case]
    rows = [[[f"text {i}", label] for i, label in enumerate(labels)] for labels in (train, held)]
    for found, trained, judged, _ in from_all(tmp_path, ["text", "label"], *rows):
        assert found.classes == classes
        assert [classes[row["label"]] for row in trained] == train
        assert [classes[row["label"]] for row in judged] == held


@pytest.mark.parametrize(
    "values", [[True, False], [3, 10], [3.0, 10.0], [decimal.Decimal("3.00"), decimal.Decimal("10.00")]]
)
def test_labels_that_are_no_texts_are_those_that_csv_has(tmp_path, values):
    rows = [[f"text {i}", values[i % 2]] for i in range(6)]
    formats = [kind for kind in FORMATS if "json" not in kind or not isinstance(values[0], decimal.Decimal)]
    first, *others = from_all(tmp_path, ["text", "label"], rows, rows, formats=formats)
    assert sorted(first[0].classes, key=lambda name: str(values).index(name)) == [str(value) for value in values]
    assert all(other == first for other in others)


def test_sites_are_text_too(tmp_path):
    rows = [[f"text {i}", "ab"[i % 2], ["07", "7", "007"][i % 3]] for i in range(12)]
    keys = {"partition": "natural", "partition_column": "site", "clients": 3}
    first, *others = from_all(tmp_path, ["text", "label", "site"], rows, rows, **keys)
    assert all(other == first for other in others)
    held = [{rows[row][2] for row in share} for share in first[3]]
    assert sorted(map(tuple, held)) == [("007",), ("07",), ("7",)]
    with pytest.raises(ConfigError, match="has 3 values for 4 clients"):
        read(tmp_path / "csv", partition="natural", partition_column="site", clients=4)


def test_scores_are_numbers_in_every_format(tmp_path):
    values = [0.1, 2.5, 1e-3, 4.0, 3.0, 5.0]
    rows = [[f"text {i}", value] for i, value in enumerate(values)]
    keys = {"task": "regression", "partition": "dirichlet", "clients": 2}
    first, *others = from_all(tmp_path, ["text", "score"], rows, rows, **keys)
    assert all(other == first for other in others)
    assert [row["score"] for row in first[1]] == values


TYPES = {
    "decimal": pa.array([decimal.Decimal("0.50"), decimal.Decimal("2.25"), decimal.Decimal("4.00")]),
    "float16": pa.array(np.array([0.5, 2.25, 4.0], np.float16)),
    "float32": pa.array([0.5, 2.25, 4.0], pa.float32()),
    "dictionary": pa.array([0.5, 2.25, 4.0]).dictionary_encode(),
    "string": pa.array(["0.5", " +2.25", "4e0"]),
    "string_view": pa.array(["0.5", "2.25", "4"], pa.string_view()),
}


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_of_any_type_are_scores(tmp_path, kind):
    table = pa.table({"text": ["a", "b", "c"], "score": TYPES[kind]})
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    assert [row["score"] for row in read(tmp_path, "regression")[1]] == [0.5, 2.25, 4.0]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_texts_of_any_type_are_texts_and_names(tmp_path, kind):
    columns = {"text": ["a", "b", "c"], "label": ["x", "y", "x"]}
    table = pa.table({name: pa.array(values, pa.string()).cast(kind) for name, values in columns.items()})
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    found, train, _, _ = read(tmp_path)
    assert found.classes == ("x", "y") and [row["label"] for row in train] == [0, 1, 0]


@pytest.mark.parametrize("score", ["4,5", "abc", "1_000", "nan", "inf", "0x10", "1 2"])
def test_what_is_no_number_is_named_by_its_row(tmp_path, score):
    rows = [["a", "1"], ["b", score], ["c", "3"]]
    for kind in FORMATS:
        write(tmp_path / kind / f"train.{kind}", ["text", "score"], rows)
        write(tmp_path / kind / f"validation.{kind}", ["text", "score"], rows[:1])
        where = {"csv": r"train\.csv, line 3", "jsonl": r"train\.jsonl, line 2", "json": "row 2", "parquet": "row 2"}[
            kind
        ]
        message = f"holds {re.escape(repr(score))}, which is not a finite number, in 1 of 3 rows .*{where}"
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / kind, "regression")
        assert [row["score"] for row in read(tmp_path / kind, "regression", bad_rows="skip")[1]] == [1.0, 3.0]


# --- names of classes that a parquet file has ---


def test_a_parquet_of_the_datasets_library_keeps_its_names_and_minus_one_is_no_label(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["two", "one"])})
    for split, labels in (("train", [0, 1, 0, 1]), ("validation", [1, -1, 0])):
        rows = {"text": [f"{split} {i}" for i in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ConfigError, match=r"validation\.parquet: column 'label' has no value in 1 of 3 rows"):
        read(tmp_path)
    found, train, held, _ = read(tmp_path, bad_rows="skip")
    assert found.classes == ("two", "one") and [row["label"] for row in train] == [0, 1, 0, 1]
    assert held == [{"text": "validation 0", "label": 1}, {"text": "validation 2", "label": 0}]
    hub = parse(default_config() | {"task": "text-classification", "dataset": str(tmp_path), "bad-rows": "skip"})
    task = data.resolve(hub)
    assert (task.classes, data.load(task, "", "validation").to_list()) == (found.classes, held)


def test_shards_whose_names_differ_are_refused(tmp_path):
    for i, names in enumerate((["a", "b"], ["b", "a"])):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
        rows.to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
    with pytest.raises(ConfigError, match="these files differ in the type of a column"):
        read(tmp_path)


# --- what the log says of classes ---


@pytest.mark.parametrize("kind", FORMATS)
def test_the_log_says_which_classes_only_validation_has_and_which_may_be_one(tmp_path, caplog, kind):
    write(
        tmp_path / f"train.{kind}",
        ["text", "label"],
        [["a", "pos"], ["b", "Pos "], ["c", "neg"], ["d", "1"], ["e", "01"]],
    )
    write(tmp_path / f"validation.{kind}", ["text", "label"], [["a", "pos"], ["b", "Unknown"], ["c", "none"]])
    read(tmp_path)
    said = [record.message for record in caplog.records if "classes that" in record.message]
    assert len(said) == 2
    assert said[0].endswith(f"validation.{kind}: classes that no training row has: 'Unknown', 'none'")
    assert "train." in said[1] and said[1].endswith("alone: '01' and '1', 'Pos ' and 'pos'")


def test_named_labels_are_compared_too(tmp_path, caplog):
    write(tmp_path / "train.csv", ["text", "label"], [["a", "x"], ["b", "y"]])
    write(tmp_path / "validation.csv", ["text", "label"], [["a", "z"]])
    assert read(tmp_path, labels="x,y,z")[0].classes == ("x", "y", "z")
    assert "classes that no training row has: 'z'" in caplog.text


# --- columns that nobody reads ---

NOTES = {
    "numbers and then a word": [*range(50), "a word"],
    "a half of a character": ["\ud83d", *["x"] * 50],
    "lists and texts": [[1, 2], "x", *[None] * 49],
    "objects of all kinds": [{"a": 1}, {"a": "b"}, 7, *["x"] * 48],
}


@pytest.mark.parametrize("case", NOTES)
def test_a_column_that_nobody_reads_decides_nothing(tmp_path, case):
    rows = [[f"text {i}", "ab"[i % 2], note] for i, note in enumerate(NOTES[case])]
    for kind in ("jsonl", "csv"):
        for split in ("train", "validation"):
            if kind == "csv":
                written = [[*row[:2], str(row[2]).encode("utf-8", "surrogatepass").decode("latin-1")] for row in rows]
                write(tmp_path / kind / f"{split}.csv", ["text", "label", "note"], written)
                content = (tmp_path / kind / f"{split}.csv").read_text()
                (tmp_path / kind / f"{split}.csv").write_bytes(
                    content.encode("latin-1")
                )  # with bytes that are no UTF-8
            else:
                write(tmp_path / kind / f"{split}.{kind}", ["text", "label", "note"], rows)
    first, second = (read(tmp_path / kind) for kind in ("jsonl", "csv"))
    assert first == second and [row["text"] for row in first[1]] == [row[0] for row in rows]


@pytest.mark.parametrize("kind", ["csv", "a csv that was read and written again", "parquet"])
def test_the_index_that_pandas_writes_is_no_label_and_no_text(tmp_path, kind):
    frame = pandas.DataFrame(
        {"utterance": ["good soup", "bad tea", "old tea"], "kind": ["pos", "neg", "neg"]}, [5, 3, 4]
    )
    for split in ("train", "validation"):
        if kind == "parquet":
            frame.to_parquet(tmp_path / f"{split}.parquet")
            continue
        frame.to_csv(tmp_path / f"{split}.csv")
        if "again" in kind:
            pandas.read_csv(tmp_path / f"{split}.csv").to_csv(tmp_path / f"{split}.csv")
    found, train, _, _ = read(tmp_path, text_columns="utterance")
    assert (found.label, [row["utterance"] for row in train]) == ("kind", list(frame["utterance"]))
    assert read(tmp_path, label_column="kind")[0].columns == ("utterance",)


def test_a_column_that_is_there_twice_is_refused_only_where_it_is_read(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.csv", ["text", "label", "note", "note"], [["a", "x", 1, 2], ["b", "y", 3, 4]])
    assert read(tmp_path)[0].label == "label"
    with pytest.raises(ConfigError, match="column 'note' is there 2 times; rename all but one"):
        read(tmp_path, label_column="note")


def test_validation_rows_need_no_partition_column(tmp_path):
    rows = [[f"text {i}", "ab"[i % 2], f"site {i % 3}"] for i in range(9)]
    for kind in FORMATS:
        write(tmp_path / kind / f"train.{kind}", ["text", "label", "site"], rows)
        write(tmp_path / kind / f"validation.{kind}", ["text", "label"], [row[:2] for row in rows])
        keys = {"partition": "natural", "partition_column": "site"}
        found, _, held, shares = read(tmp_path / kind, clients=3, **keys)
        assert len(held) == 9 and [len(share) for share in shares] == [3, 3, 3]
        validation = data.load(found, str(tmp_path / kind), "validation")
        parts = data.partition(validation, found, 4, "iid", 0.5, 0)  # how clients share it out
        assert sorted(np.concatenate(parts).tolist()) == list(range(9))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("lacks", ["text", "label"])
def test_a_column_that_validation_lacks_is_named(tmp_path, kind, lacks):
    rows = [["a", "x"], ["b", "y"]]
    write(tmp_path / f"train.{kind}", ["text", "label"], rows)
    write(tmp_path / f"validation.{kind}", ["label" if lacks == "text" else "text"], [row[:1] for row in rows])
    with pytest.raises(ConfigError, match=rf"validation\.{kind}: column '{lacks}' .*is missing"):
        read(tmp_path, text_columns="text", label_column="label", labels="x,y,a,b")


BYTES = {"bytes": pa.binary(), "many bytes": pa.large_binary(), "a fixed number of bytes": pa.binary(2)}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_are_no_names(tmp_path, kind):
    table = pa.table({"text": ["a", "b"], "label": pa.array([b"xx", b"yy"], BYTES[kind])})
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(ConfigError, match=r"column 'label' holds .*binary.*, not texts or numbers"):
        read(tmp_path)


# --- lines that are JSON and no rows ---

LINES = {
    "half of a character": (
        r'{"text": "a \ud83d b", "label": "x"}',
        r"'text' holds '\\ud83d', one half of a character",
    ),
    "half in the label": (r'{"text": "a", "label": "\udc00"}', "'label' holds .* one half of a character"),
    "a number for a text": ('{"text": 5, "label": "x"}', "'text' holds 5, not a text"),
    "a truth value for a text": ('{"text": true, "label": "x"}', "'text' holds True, not a text"),
    "a list for a text": ('{"text": ["a"], "label": "x"}', "'text' holds a list where the lines before hold texts"),
    "a list for a label": ('{"text": "a", "label": ["x"]}', "'label' holds a list or an object"),
    "an object for a label": ('{"text": "a", "label": {"name": "x"}}', "'label' holds a list or an object"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_is_json_and_no_row_is_named_or_left_out(tmp_path, case):
    line, why = LINES[case]
    good = ['{"text": "one", "label": "x"}', '{"text": "two 😀", "label": "y"}']
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join([good[0], line, good[1]]))
    with pytest.raises(ConfigError, match=rf"train\.jsonl, line 2: {why}.*bad-rows='skip'"):
        read(tmp_path)
    assert [row["text"] for row in read(tmp_path, bad_rows="skip")[1]] == ["one", "two 😀"]


# --- how many classes ---


def test_three_thousand_classes_are_fine_and_twelve_thousand_are_asked_about(tmp_path):
    for name, count in (("fine", 3000), ("asked", 12000)):
        rows = [[f"text {i}", f"class {i}"] for i in range(count)]
        for split in ("train", "validation"):
            write(tmp_path / name / f"{split}.csv", ["text", "label"], rows)
    assert read(tmp_path / "fine")[0].num_labels == 3000
    with pytest.raises(ConfigError, match=r"has 12000 different values in 12000 training rows: is 'label' really the"):
        read(tmp_path / "asked")


@pytest.mark.parametrize("kind", FORMATS)
def test_an_id_is_not_taken_for_the_label(tmp_path, kind):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.{kind}", ["id", "text"], [[i, f"text {i}"] for i in range(20)])
    with pytest.raises(ConfigError, match="is 'id' really the label"):
        read(tmp_path)


# --- every format, at random ---

ODD = [
    "a",
    "A",
    "a ",
    "01",
    "1",
    "1.0",
    "True",
    "true",
    "nan",
    "null",
    "NA",
    "x;y",
    '"',
    "a,b",
    "é",
    "two\nlines",
    "\u2028",
]
TEXTS = st.sampled_from(ODD) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
NUMBERS = st.sampled_from(["0.5", "1", "-3", "1e3", " 2 ", "+4", "0.1", "1e-7", "123456789.25"])
VOID = st.sampled_from([None, "", " ", "\t"])


@st.composite
def tables(draw, label, fields=3):
    """Rows of texts, the second drawn by ``label``; in one table of three a few cells are of another kind."""
    spoiled = draw(st.integers(0, 2)) == 0
    any_cell = VOID | TEXTS | NUMBERS
    kinds = [label if i == 1 else TEXTS.filter(str.strip) for i in range(fields)]
    if spoiled:
        kinds = [st.integers(0, 5).flatmap(lambda n, kind=kind: any_cell if n == 0 else kind) for kind in kinds]
    return draw(st.lists(st.tuples(*kinds), min_size=4, max_size=8))


@st.composite
def cases(draw):
    """The keys of a run on columns in any order, its training and its validation rows."""
    task = draw(st.sampled_from(["text-classification", "text-pair", "regression", "causal-lm", "instruction"]))
    keys = {"task": task, "bad_rows": draw(st.sampled_from(["stop", "skip"]))}
    if draw(st.booleans()):
        keys |= {"partition": "natural", "partition_column": "other"}
    if task in ("text-pair", "instruction"):
        keys["text_columns"] = "text,other"
    names = draw(st.lists(TEXTS.filter(str.strip), min_size=2, max_size=3, unique=True))
    rows = tables(NUMBERS if task == "regression" else st.sampled_from(names))
    order = draw(st.permutations(range(3)))
    train, held = ([[row[i] for i in order] for row in draw(rows)] for _ in range(2))
    return keys, [("text", "label", "other")[i] for i in order], train, held


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cases())
def test_any_small_table_is_the_same_from_every_format_or_refused_in_the_same_words(case):
    keys, columns, train, held = case
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            here = Path(folder) / kind
            for split, rows in (("train", train), ("validation", held)):
                write(here / f"{split}.{kind}", columns, rows)
            try:
                outcomes.append(read(here, **keys, clients=2))
            except ConfigError as error:
                file = rf"{re.escape(str(here))}/(train|validation)\.{kind}"
                outcomes.append(re.sub(rf"{file}(, (line|row) \d+)?|row \d+", "…", str(error)))
    assert all(outcome == outcomes[0] for outcome in outcomes)
