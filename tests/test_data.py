"""Data: every row reaches exactly one client and one batch of a pass, and bad input is named before training."""

import collections
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from flwr_datasets.partitioner import IidPartitioner
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.data import batching, partitions
from fedkrso_app.federation import client

GLUE = Path(__file__).parents[2] / "shared" / "glue"
SST2, STSB, MNLI = data.task("glue/sst2"), data.task("glue/stsb"), data.task("glue/mnli")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data.load.cache_clear()


@pytest.fixture
def tokenizer():
    """Words are their own ids: "w7" is token 10; the special tokens are 0 to 2."""
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i + 3 for i in range(2000)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def sentences(n, seed=0):
    """Row i is the word ``w<i>`` once or up to 30 times, so that a batch tells which rows it holds."""
    repeats = np.random.default_rng(seed).integers(1, 31, n)
    texts = [" ".join([f"w{i}"] * k) for i, k in enumerate(repeats)]
    return datasets.Dataset.from_dict({"sentence": texts, "label": [i % 2 for i in range(n)]})


def pairs(scores):
    texts = [f"w{i}" for i in range(len(scores))]
    return datasets.Dataset.from_dict({"sentence1": texts, "sentence2": texts, "label": scores})


def rows_in(batch):
    return (batch["input_ids"][:, 1] - 3).tolist()


def write(path, rows, kind="jsonl"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        path.write_text("\n".join(",".join(map(str, line)) for line in [rows[0], *(r.values() for r in rows)]))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


ROWS = [{"idx": i, "sentence": f"text {i}", "label": i % 2} for i in range(5)]


# --- tasks ---


def test_the_tasks_of_the_glue_benchmark_have_its_columns_classes_and_metrics():
    expected = {  # from the benchmark's own description, not from the table under test
        "cola": ("sentence", 2, "matthews"),
        "sst2": ("sentence", 2, "accuracy"),
        "mrpc": ("sentence1 sentence2", 2, "accuracy"),
        "qqp": ("question1 question2", 2, "accuracy"),
        "stsb": ("sentence1 sentence2", 1, "pearson"),
        "mnli": ("premise hypothesis", 3, "accuracy"),
        "qnli": ("question sentence", 2, "accuracy"),
        "rte": ("sentence1 sentence2", 2, "accuracy"),
    }
    for name, (columns, classes, metric) in expected.items():
        task = data.task(f"glue/{name}")
        assert (" ".join(task.columns), task.num_labels, task.metric) == (columns, classes, metric)
        assert task.regression == (name == "stsb")
        assert task.validation == ("validation_mismatched" if name == "mnli" else "validation")


def test_an_unknown_task_is_refused_with_the_likely_one():
    with pytest.raises(ConfigError, match=r"'glue/sst' .*glue/rte.*Did you mean 'glue/sst2'"):
        data.task("glue/sst")


# --- loading ---


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "json"])
@pytest.mark.parametrize("folder", ["sst2", "."])
def test_a_local_file_gives_its_texts_and_labels_in_order(tmp_path, kind, folder):
    write(tmp_path / "d" / folder / f"train.{kind}", ROWS, kind)
    loaded = data.load(SST2, str(tmp_path / "d"), "train")
    assert loaded.to_list() == [{"sentence": f"text {i}", "label": i % 2} for i in range(5)]


def test_loading_leaves_the_data_folder_as_it_was(tmp_path):
    write(tmp_path / "d" / "sst2" / "train.parquet", ROWS, "parquet")
    before = sorted(tmp_path.joinpath("d").rglob("*"))
    data.load(SST2, str(tmp_path / "d"), "train")
    assert sorted(tmp_path.joinpath("d").rglob("*")) == before


def test_the_home_folder_and_odd_characters_in_a_path_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / ".my [data]*" / "sst2" / "train.jsonl", ROWS)
    assert len(data.load(SST2, "~/.my [data]*", "train")) == 5


def test_a_changed_file_is_read_anew_by_a_later_process(tmp_path):
    path = tmp_path / "sst2" / "train.jsonl"
    write(path, ROWS)
    assert len(data.load(SST2, str(tmp_path), "train")) == 5
    write(path, ROWS[:3])
    os.utime(path, (1, 1))
    data.load.cache_clear()  # as in a new process
    assert len(data.load(SST2, str(tmp_path), "train")) == 3


def test_words_that_csv_readers_take_for_missing_are_texts(tmp_path):
    (tmp_path / "train.csv").write_text("sentence,label\nnull,0\nNA,1\nnan,0\n")
    assert data.load(SST2, str(tmp_path), "train")["sentence"][:] == ["null", "NA", "nan"]


def pair_rows(n):
    return [{"premise": "a", "hypothesis": "b", "label": 0}] * n


def test_each_split_takes_its_own_file_among_similar_names(tmp_path):
    write(tmp_path / "mnli" / "validation_mismatched_1k.jsonl", pair_rows(1))
    write(tmp_path / "mnli" / "validation_matched.jsonl", pair_rows(2))
    write(tmp_path / "mnli" / "validation.jsonl", pair_rows(3))
    write(tmp_path / "mnli" / "training_notes.jsonl", pair_rows(4))
    assert len(data.load(MNLI, str(tmp_path), "validation")) == 1
    with pytest.raises(ConfigError, match=r"mnli/train\*\.parquet"):
        data.load(MNLI, str(tmp_path), "train")

    write(tmp_path / "sst2" / "validation_mismatched.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"sst2/validation\*\.parquet"):
        data.load(SST2, str(tmp_path), "validation")


def test_shards_are_read_together_and_an_incomplete_set_is_refused(tmp_path):
    for i in (0, 1):
        write(tmp_path / "sst2" / f"train-0000{i}-of-00002.jsonl", ROWS)
    assert len(data.load(SST2, str(tmp_path), "train")) == 10
    (tmp_path / "sst2" / "train-00001-of-00002.jsonl").unlink()
    data.load.cache_clear()
    with pytest.raises(ConfigError, match="one full set of shards"):
        data.load(SST2, str(tmp_path), "train")


def test_two_candidates_for_a_split_are_refused_and_the_exact_name_wins(tmp_path):
    write(tmp_path / "train_a.jsonl", ROWS)
    write(tmp_path / "train_b.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"train_a\.jsonl, train_b\.jsonl"):
        data.load(SST2, str(tmp_path), "train")
    write(tmp_path / "train.jsonl", ROWS[:2])
    assert len(data.load(SST2, str(tmp_path), "train")) == 2


def changed(**values):
    return [*ROWS, {**ROWS[0], **values}]


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (
            changed(label=2),
            "parquet",
            r"'label' holds 2, which is not a class from 0 to 1, in 1 of 6 rows \(the first: row 6\)",
        ),
        (changed(label=-1), "jsonl", r"'label' holds '-1', .*jsonl, line 6\)"),
        (changed(label=None), "parquet", r"'label' has no value in 1 of 6 rows"),
        (changed(label=float("nan")), "csv", r"'label' holds 'nan', which is not a class"),
        (changed(label=0.5), "csv", r"'label' holds '0\.5', .*csv, line 7\)"),
        (changed(label=""), "csv", r"'label' has no value in 1 of 6 rows"),
        (changed(sentence=None), "parquet", r"'sentence' has no value in 1 of 6 rows"),
        (changed(sentence=""), "csv", r"'sentence' has no value in 1 of 6 rows"),
        ([{"sentence": 1, "label": 0}], "parquet", r"'sentence' does not hold texts"),
        ([{"sentence": "a", "label": "good"}], "parquet", r"'label' holds 'good', which is not a class"),
        ([{"text": "a", "label": 0}], "csv", r"'sentence' .*missing.*found: text, label\."),
        ([{"sentence": "a"}], "jsonl", r"'label' .*missing.*found: sentence\."),
    ],
)
def test_unusable_rows_are_refused_naming_file_column_and_columns_found(tmp_path, rows, kind, message):
    write(tmp_path / "sst2" / f"train.{kind}", rows, kind)
    with pytest.raises(ConfigError, match=message) as caught:
        data.load(SST2, str(tmp_path), "train")
    assert str(tmp_path / "sst2" / f"train.{kind}") in str(caught.value)
    assert "Columns found: " in str(caught.value)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None])
def test_a_regression_target_must_be_a_finite_number(tmp_path, score):
    datasets.Dataset.from_list(pairs([0.0, 5.0, score]).to_list()).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="'label'"):
        data.load(STSB, str(tmp_path), "train")


@pytest.mark.parametrize(("name", "content"), [("csv", "sentence,label\n"), ("csv", ""), ("jsonl", ""), ("json", "[")])
def test_a_file_without_rows_is_refused_by_name(tmp_path, name, content):
    (tmp_path / f"train.{name}").write_text(content)
    with pytest.raises(ConfigError, match=rf"train\.{name}"):
        data.load(SST2, str(tmp_path), "train")


def test_a_parquet_file_without_rows_is_refused_by_name(tmp_path):
    sentences(2).select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r"train\.parquet: there are no rows; put some in"):
        data.load(SST2, str(tmp_path), "train")


def test_a_missing_folder_or_file_is_named_with_what_is_there(tmp_path):
    with pytest.raises(ConfigError, match="nowhere' is not a folder"):
        data.load(SST2, str(tmp_path / "nowhere"), "train")
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ConfigError, match=r"sst2/train\*\.parquet.*holds: readme\.txt"):
        data.load(SST2, str(tmp_path), "train")


def test_held_out_rows_and_the_rest_are_the_training_rows_and_the_validation_file_is_not_needed(tmp_path):
    write(tmp_path / "sst2" / "train.jsonl", [{"sentence": f"text {i}", "label": i % 2} for i in range(20)])
    rest, held = (data.load(SST2, str(tmp_path), split, 0.25)["sentence"] for split in ("train", "validation"))
    assert (len(rest), len(held)) == (15, 5)
    assert sorted([*rest, *held]) == sorted(f"text {i}" for i in range(20))


def test_without_the_hub_the_error_names_the_ways_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"glue/mnli .*HF_HUB_OFFLINE is set.*data-dir.*embedded/"):
        data.load(MNLI, "", "validation")


# --- partitions ---


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "dirichlet-equal"])
@pytest.mark.parametrize("task", [SST2, STSB], ids=lambda task: task.name)
@pytest.mark.parametrize(("rows", "clients"), [(97, 10), (1000, 7), (5, 1)])
def test_every_row_belongs_to_exactly_one_client_and_no_client_is_empty(scheme, task, rows, clients):
    train = pairs(np.linspace(0, 5, rows)) if task.regression else sentences(rows)
    parts = data.partition(train, task, clients, scheme, 0.5, seed=3)
    assert len(parts) == clients and min(map(len, parts)) > 0
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "dirichlet-equal"])
def test_partitions_follow_the_seed_alone(scheme):
    train, seeds = sentences(300), (0, 0, 1)
    a, b, c = (data.partition(train, SST2, 4, scheme, 0.5, seed) for seed in seeds)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


def test_iid_parts_have_equal_sizes_and_a_mix_of_a_sorted_file():
    train = sentences(1000).select([*range(0, 1000, 2), *range(1, 1000, 2)])  # label 0 first
    parts = data.partition(train, SST2, 10, "iid", 0.5, seed=0)
    assert {len(part) for part in parts} == {100}
    ones = np.array([np.mean(train[part]["label"]) for part in parts])
    assert abs(ones - 0.5).max() < 0.2  # four standard deviations of a fair draw; unshuffled it would be 0.5


def test_iid_parts_are_those_of_flowers_own_partitioner():
    order = np.random.default_rng(3).permutation(97)
    theirs = IidPartitioner(10)
    theirs.dataset = datasets.Dataset.from_dict({"row": order})
    ours = data.partition(sentences(97), SST2, 10, "iid", 0.5, seed=3)
    assert [part.tolist() for part in ours] == [sorted(theirs.load_partition(i)["row"]) for i in range(10)]


def test_a_small_alpha_is_uneven_in_labels_and_a_large_one_even():
    def spread(alpha):
        """The standard deviation over clients of their share of label 1, in the mean of five seeds."""
        draws = [data.partition(train, SST2, 5, "dirichlet", alpha, seed) for seed in range(5)]
        return np.mean([np.std([np.mean(train[part]["label"]) for part in parts]) for parts in draws])

    train = sentences(2000)
    assert spread(0.1) > 0.2
    assert spread(1e4) < 0.02


def test_dirichlet_mixes_the_neighbours_of_a_file_within_a_label():
    """A file sorted by where its texts come from must not give each client one source."""
    parts = data.partition(sentences(2000), SST2, 2, "dirichlet", 1e6, seed=0)
    assert abs(np.mean(parts[0]) - 999.5) < 60  # three standard errors; contiguous runs would differ by 500


def test_regression_targets_are_uneven_by_size_and_stay_as_they_are():
    train = pairs(np.repeat(np.linspace(0, 5, 500), 2))
    parts = data.partition(train, STSB, 4, "dirichlet", 0.1, seed=2)
    means = [np.mean(train[part]["label"]) for part in parts]
    assert max(means) - min(means) > 1  # an even draw of 250 would differ by about 0.3
    assert train["label"][:] == np.repeat(np.linspace(0, 5, 500), 2).tolist()


def test_a_target_that_is_nearly_constant_can_be_partitioned():
    assert len(data.partition(pairs([0.0] * 50 + [1.0]), STSB, 3, "dirichlet", 1.0, seed=0)) == 3


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 1e6])
def test_equal_dirichlet_clients_have_equal_sizes_whatever_alpha(alpha):
    sizes = [len(part) for part in data.partition(sentences(103), SST2, 10, "dirichlet-equal", alpha, seed=0)]
    assert sizes == [11] * 3 + [10] * 7


def test_the_shares_of_an_equal_dirichlet_client_have_the_mean_and_the_variance_of_the_law():
    """Of two labels a share is Beta(α, α): mean 1/2, variance v = 1/(4(2α + 1)); counting n rows adds (1/4 − v)/n."""
    alpha, rows, labels, rng = 0.5, 20, np.arange(400) % 2, np.random.default_rng(0)
    first = [
        partitions.equal_shares(labels, 20, alpha, rng)[0] for _ in range(2000)
    ]  # nothing has run out for the first
    shares = np.array([labels[part].mean() for part in first])
    v = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 0.03  # four standard errors
    assert shares.var() == pytest.approx(v + (0.25 - v) / rows, rel=0.08)


def test_where_a_label_runs_out_the_others_fill_the_client():
    labels = np.array([0] * 2 + [1] * 9 + [2] * 9)
    for seed in range(50):
        parts = partitions.equal_shares(labels, 2, 1e-4, np.random.default_rng(seed))
        assert sorted(np.concatenate(parts).tolist()) == list(range(20)) and [len(part) for part in parts] == [10, 10]


def test_the_partition_seed_draws_the_partition_and_nothing_else(config, monkeypatch):
    """-1 is the run's own seed; another one leaves the model's head as it is."""
    by = {draw: client.Workplace("0" * 16, replace(config, seed=3, partition_seed=draw), 4) for draw in (-1, 3, 5)}
    rows = {draw: [part.tolist() for part in place._shares("train")] for draw, place in by.items()}
    assert rows[-1] == rows[3] != rows[5]
    assert by[-1].model.digest() == by[5].model.digest()


@pytest.mark.parametrize("scheme", ["iid", "dirichlet"])
@pytest.mark.parametrize("clients", [6, 0])
def test_more_clients_than_rows_or_none_are_refused(scheme, clients):
    with pytest.raises(ConfigError, match=rf"num-supernodes = {clients} .*1 to 5"):
        data.partition(sentences(5), SST2, clients, scheme, 0.5, seed=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("alpha", [1e-3, 1e308])
def test_an_alpha_that_leaves_clients_empty_is_refused_without_warnings(alpha):
    with pytest.raises(ConfigError, match=r"dirichlet-alpha = .*num-supernodes"):
        data.partition(sentences(60), SST2, 50, "dirichlet", alpha, seed=0)


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (7, 16), (16, 16), (64, 16), (103, 16), (5, 1)])
def test_each_pass_holds_every_example_once_in_batches_of_the_size_asked(tokenizer, rows, size):
    stream = data.batches(sentences(rows), SST2, tokenizer, size, 128, np.random.default_rng(0))
    per_pass = -(-rows // size)
    for _ in range(3):
        batches = list(itertools.islice(stream, per_pass))
        assert sorted(itertools.chain(*map(rows_in, batches))) == list(range(rows))
        sizes = collections.Counter(len(batch["labels"]) for batch in batches)
        assert sizes == collections.Counter([size] * (rows // size) + ([rows % size] if rows % size else []))


def test_batches_carry_the_ids_masks_and_labels_of_their_rows(tokenizer):
    train = sentences(40)
    for batch in itertools.islice(data.batches(train, SST2, tokenizer, 8, 128, np.random.default_rng(0)), 5):
        for i, row in enumerate(rows_in(batch)):
            words = train[row]["sentence"].split()
            ids = [1, *[row + 3] * len(words), 2]
            pad = batch["input_ids"].shape[1] - len(ids)
            assert batch["input_ids"][i].tolist() == ids + [0] * pad
            assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * pad
            assert batch["labels"][i] == row % 2
        assert batch["attention_mask"].any(0).all()  # no column of padding alone
        assert {t.dtype for t in batch.values()} == {torch.int64}


def test_pairs_and_regression_give_token_types_and_float_labels(tokenizer):
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    (batch,) = data.evaluation_batches(pairs([0.5, 4.25]), STSB, tokenizer, 10, 128)
    assert batch["input_ids"].tolist() == [[1, 3, 2, 3, 2], [1, 4, 2, 4, 2]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]] * 2
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [0.5, 4.25]


def test_long_texts_are_cut_to_the_length_asked(tokenizer):
    for batch in itertools.islice(data.batches(sentences(64), SST2, tokenizer, 8, 6, np.random.default_rng(0)), 8):
        assert batch["input_ids"].shape[1] <= 6


def test_the_order_follows_the_generator_and_differs_from_pass_to_pass(tokenizer):
    def order(seed):
        stream = data.batches(train, SST2, tokenizer, 8, 128, np.random.default_rng(seed))
        return [rows_in(batch) for batch in itertools.islice(stream, 12)]

    texts = [" ".join([f"w{i}"] * (i + 20)) for i in range(48)]  # no two of one length
    train = datasets.Dataset.from_dict({"sentence": texts, "label": [0] * 48})
    assert order(0) == order(0) != order(1)
    passes = [{frozenset(batch) for batch in half} for half in (order(0)[:6], order(0)[6:])]
    assert passes[0] != passes[1]  # other batches, not the same ones in another order


def test_grouping_by_length_pads_less_than_half_as_much_as_chance(tokenizer):
    def padding(batches):
        return sum(int((1 - batch["attention_mask"]).sum()) for batch in batches)

    train, rng = sentences(800), np.random.default_rng(0)
    grouped = list(itertools.islice(data.batches(train, SST2, tokenizer, 16, 128, rng), 50))
    drawn = [batching.batch(train, rows, SST2, tokenizer, 128) for rows in rng.permutation(800).reshape(50, 16)]
    assert padding(grouped) < padding(drawn) / 2
    assert padding(data.evaluation_batches(train, SST2, tokenizer, 512, 128)) <= padding(grouped)
    means = [batch["attention_mask"].sum(1).float().mean() for batch in grouped]
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.5  # and the batches are not in order of length


def test_only_the_rows_of_a_batch_are_tokenized(tokenizer):
    seen = []

    def counting(*texts, **kwargs):
        seen.append(len(texts[0]))
        return tokenizer(*texts, **kwargs)

    counting.padding_side, counting.pad_token_id = "right", tokenizer.pad_token_id
    train = sentences(40)
    stream = data.batches(train, SST2, counting, 16, 128, np.random.default_rng(0))
    first = next(stream)
    assert sum(seen) == len(first["labels"])
    for _ in range(20):
        next(stream)
    assert sum(seen) == 40  # each row once, whoever asks
    next(data.batches(train, SST2, counting, 8, 128, np.random.default_rng(1)))
    assert sum(seen) == 40
    next(data.batches(train, SST2, counting, 8, 6, np.random.default_rng(1)))
    assert sum(seen) > 40  # cut at another length they are others


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("most", [10**9, 0])
def test_rows_that_were_kept_make_the_batches_that_the_tokenizer_makes(tokenizer, side, most, monkeypatch):
    """Pairs of unequal length, token types, texts that are cut; with memory for them or without."""
    monkeypatch.setattr(batching, "_MOST", most)
    tokenizer.padding_side = side
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = [{"sentence1": "w1 " * (i % 7 + 1), "sentence2": "w2 " * (i % 3 + 1), "label": i / 4} for i in range(20)]
    train = datasets.Dataset.from_list(rows)
    for chosen in (np.arange(8), np.array([3, 3, 19, 0]), np.arange(20)[::-1], np.array([5])):
        found = batching.batch(train, chosen, STSB, tokenizer, 9)
        texts = [[rows[i][column] for i in chosen] for column in STSB.columns]
        wanted = tokenizer(*texts, truncation=True, max_length=9, padding=True, return_tensors="pt")
        assert found.pop("labels").tolist() == [rows[i]["label"] for i in chosen]
        assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_clients_selection_of_rows_is_batched_as_it_stands(tokenizer):
    chosen = sentences(100).select([5, 17, 40, 99])
    batch = next(data.batches(chosen, SST2, tokenizer, 16, 128, np.random.default_rng(0)))
    assert sorted(rows_in(batch)) == [5, 17, 40, 99]


@pytest.mark.parametrize("tokens", [1, 60, 10**6])
def test_evaluation_batches_hold_every_example_once_and_no_more_tokens_than_they_may(tokenizer, tokens, monkeypatch):
    monkeypatch.setattr(batching, "_LOOK", 20)
    batches = list(data.evaluation_batches(sentences(37), SST2, tokenizer, tokens, 128))
    assert sorted(itertools.chain(*map(rows_in, batches))) == list(range(37))
    assert all(batch["input_ids"].numel() <= tokens or len(batch["input_ids"]) == 1 for batch in batches)
    assert tokens < 10**6 or len(batches) == 2
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches]
    assert all(of == sorted(of, reverse=True) for of in lengths)


def test_no_examples_means_an_error_and_not_an_endless_wait(tokenizer):
    with pytest.raises(ValueError, match="no examples"):
        next(data.batches(sentences(3).select([]), SST2, tokenizer, 8, 128, np.random.default_rng(0)))


# --- the real thing ---


@pytest.mark.skipif(not GLUE.is_dir(), reason="the GLUE files of ../shared/glue are not here")
@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("cola", "train", 8551),
        ("cola", "validation", 1043),
        ("sst2", "train", 67349),
        ("sst2", "validation", 872),
        ("mrpc", "train", 3668),
        ("mrpc", "validation", 408),
        ("stsb", "train", 5749),
        ("stsb", "validation", 1500),
        ("mnli", "train", 15130),
        ("mnli", "validation", 1000),
    ],
)
def test_the_real_glue_files_load_with_their_known_sizes(name, split, rows):
    task = data.task(f"glue/{name}")
    loaded = data.load(task, str(GLUE), split)
    assert loaded.column_names == [*task.columns, "label"] and len(loaded) == rows
    if split == "train":
        parts = data.partition(loaded, task, 10, "dirichlet", 0.5, seed=0)
        assert sum(map(len, parts)) == rows


def test_uneven_clients_of_a_regression_share_out_fifths_of_the_scores():
    """With a tiny alpha nearly every fifth is at one client: the rows of a client are whole fifths of the scale."""
    rows = datasets.Dataset.from_dict({"text": ["x"] * 1000, "label": np.random.default_rng(0).permutation(1000) / 10})
    task = data.Task("regression", ("text",), 1, "pearson", label="label")
    shares = data.partition(rows, task, 3, "dirichlet", 1e-3, 0)
    held = [{int(score // 20) for score in np.array(rows["label"])[share]} for share in shares]
    assert sum(map(len, held)) <= 7 and set().union(*held) == set(range(5))
