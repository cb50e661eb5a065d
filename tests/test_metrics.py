"""Metrics against their textbook formulas, and an evaluation that leaves the model as it found it."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn import functional as F

from fedkrso_app.training import metrics
from fedkrso_app.training.metrics import best, moments, perplexity, result, tally


def score(name, predictions, labels, num_labels=2):
    return metrics.score(name, moments(name, predictions, labels, 1 if name == "pearson" else num_labels))


def evaluate(model, batches, name):
    return result(name, tally(model, batches, name, model.labels))


class Classifier(torch.nn.Module):
    """Logits are a linear map of ``input_ids``; dropout shows whether it is in eval mode."""

    def __init__(self, num_labels):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.labels = torch.nn.Linear(4, num_labels), num_labels
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, input_ids, labels):
        assert not torch.is_grad_enabled()
        logits = self.dropout(self.head(input_ids.float()))
        if logits.shape[1] == 1:
            return SimpleNamespace(logits=logits, loss=F.mse_loss(logits.squeeze(1), labels))
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


def examples(n, num_labels):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 9, (n, 4), generator=generator)
    labels = torch.randn(n, generator=generator) if num_labels == 1 else torch.arange(n) % num_labels
    return ids, labels


def cut(ids, labels, sizes):
    return [{"input_ids": i, "labels": y} for i, y in zip(ids.split(sizes), labels.split(sizes), strict=True)]


def test_accuracy_is_the_share_of_hits():
    assert score("accuracy", np.array([0, 1, 2, 1]), np.array([0, 1, 1, 1])) == 0.75


def test_matthews_is_the_formula_over_the_confusion_matrix():
    predictions = np.array([1] * 6 + [0] * 3 + [1] * 2 + [0] * 9)
    labels = np.array([1] * 9 + [0] * 11)
    tp, fn, fp, tn = 6, 3, 2, 9
    expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score("matthews", predictions, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_matthews_of_any_number_of_classes_is_the_librarys(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 200)
    predictions = np.where(rng.random(200) < 0.4, labels, rng.integers(0, classes, 200))
    expected = matthews_corrcoef(labels, predictions)
    assert score("matthews", predictions, labels, classes) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_f1_is_the_librarys_of_class_one_or_the_mean_over_the_classes_that_occur(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, min(classes, 6), 60)  # of seven classes, the last never occurs
    predictions = np.where(rng.random(60) < 0.4, labels, rng.integers(0, min(classes, 6), 60))
    expected = f1_score(labels, predictions, average="binary" if classes == 2 else "macro")
    assert score("f1", predictions, labels, classes) == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_f1_of_a_class_that_nobody_predicts_is_zero_without_warnings():
    zeros, ones = np.zeros(4, int), np.ones(4, int)
    assert score("f1", zeros, zeros) == score("f1", zeros, ones) == 0.0 and score("f1", ones, ones) == 1.0
    assert score("f1", zeros, np.array([0, 0, 1, 1]), 3) == pytest.approx((2 / 3 + 0) / 2)  # class 2 never occurs


@pytest.mark.parametrize(
    ("metric", "labels", "numbers"),
    [
        ("accuracy", 3, 4),
        ("accuracy", 3000, 4),  # what is right, and of how many, whatever the number of classes
        ("f1", 3, 11),
        ("matthews", 2, 8),
        ("matthews", 3000, 9002),  # three counts a class
        ("pearson", 1, 8),
        ("exact-match", 0, 4),
        ("perplexity", 0, 2),
    ],
)
def test_an_evaluation_sends_what_its_metric_needs_and_no_more(metric, labels, numbers):
    assert metrics.tally_size(metric, labels) == numbers


FORGED = {
    "negative": ("accuracy", 3, [1.0, 4, -1, 4]),
    "no examples": ("accuracy", 3, [0.0, 0, 0, 0]),
    "more right than there are": ("accuracy", 3, [1.0, 4, 5, 4]),
    "of other numbers of examples": ("accuracy", 3, [1.0, 4, 2, 3]),
    "half an example": ("accuracy", 3, [1.0, 4, 1.5, 4]),
    "a class more right than it is true": ("matthews", 2, [1.0, 4, 3, 0, 3, 1, 2, 2]),
    "a class of f1 more right than it is predicted": ("f1", 2, [1.0, 4, 3, 0, 2, 2, 3, 1]),
    "classes of other sums": ("matthews", 2, [1.0, 4, 1, 1, 2, 1, 2, 2]),
    "a negative square": ("pearson", 1, [1.0, 4, 4, 1, 1, -1, 1, 1]),
    "correlation of others": ("pearson", 1, [1.0, 4, 5, 1, 1, 1, 1, 1]),
    "rows that are not there": ("exact-match", 0, [1.0, 40, 0, 0]),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_tally_that_no_evaluation_gives_is_refused(case):
    metric, labels, numbers = FORGED[case]
    with pytest.raises(ValueError, match=r"counts|numbers of examples"):
        metrics.check(np.array(numbers), metric, labels)


@pytest.mark.parametrize(("metric", "num_labels"), [("accuracy", 3), ("f1", 3), ("matthews", 2), ("pearson", 1)])
def test_the_tally_of_an_evaluation_passes(metric, num_labels):
    found = tally(Classifier(num_labels), cut(*examples(20, num_labels), [20]), metric, num_labels)
    assert len(found) == metrics.tally_size(metric, num_labels)
    metrics.check(found, metric, num_labels)
    assert not metrics.check(
        tally(Bigram(torch.eye(5)), cut(*language_rows(), [4]), "exact-match", 0), "exact-match", 0
    )


def test_pearson_is_the_correlation_and_ignores_scale_and_shift():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=50)
    predictions = labels + rng.normal(size=50)
    expected = np.corrcoef(predictions, labels)[0, 1]
    assert score("pearson", predictions, labels) == pytest.approx(expected, abs=1e-12)
    assert score("pearson", 1 - 3 * predictions, labels) == pytest.approx(-expected, abs=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", ["matthews", "pearson"])
def test_a_correlation_with_something_constant_is_zero_without_warnings(metric):
    varied, constant = np.array([0, 1, 1, 0]), np.ones(4, dtype=int)
    assert score(metric, constant, varied) == 0.0
    assert score(metric, varied, constant) == 0.0
    assert score(metric, constant, constant) == 0.0
    assert score(metric, varied[:1], varied[:1]) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        score("pearson", np.array([0.0, bad]), np.array([0.0, 1.0]))


def test_shapes_and_names_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        score("accuracy", np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="no examples"):
        score("accuracy", np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="'f2'"):
        score("f2", np.zeros(2), np.zeros(2))


@pytest.mark.parametrize(("metric", "num_labels"), [("accuracy", 3), ("f1", 3), ("matthews", 2), ("pearson", 1)])
def test_tallies_of_several_nodes_add_up_to_that_of_all_their_examples(metric, num_labels):
    model, (ids, labels) = Classifier(num_labels), examples(30, num_labels)
    nodes = [tally(model, [batch], metric, num_labels) for batch in cut(ids, labels, [3, 20, 7])]
    whole = evaluate(model, cut(ids, labels, [30]), metric)
    assert result(metric, sum(nodes)) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(("metric", "num_labels"), [("accuracy", 3), ("f1", 3), ("matthews", 2), ("pearson", 1)])
def test_the_result_does_not_depend_on_how_the_examples_are_cut_into_batches(metric, num_labels):
    model, (ids, labels) = Classifier(num_labels), examples(20, num_labels)
    whole = evaluate(model, cut(ids, labels, [20]), metric)
    uneven = evaluate(model, cut(ids, labels, [7, 7, 5, 1]), metric)
    assert uneven == pytest.approx(whole, abs=1e-6)

    logits = ids.float() @ model.head.weight.T + model.head.bias  # by hand, so without dropout
    if num_labels == 1:
        expected_loss = ((logits[:, 0] - labels) ** 2).mean()
        expected = np.corrcoef(logits[:, 0].detach(), labels)[0, 1]
    else:
        expected_loss = -logits.log_softmax(1)[torch.arange(20), labels].mean()
        macro = functools.partial(f1_score, average="macro")
        library = {"accuracy": accuracy_score, "f1": macro, "matthews": matthews_corrcoef}[metric]
        expected = library(labels.numpy(), logits.argmax(1).numpy())
    assert whole == pytest.approx((expected, expected_loss.item()), abs=1e-5)


def test_each_module_gets_back_the_training_mode_it_had():
    model = Classifier(2)
    model.train()
    model.head.eval()
    evaluate(model, cut(*examples(4, 2), [4]), "accuracy")
    assert (model.training, model.head.training, model.dropout.training) == (True, False, True)
    with pytest.raises(ValueError, match="no batches"):
        evaluate(model, [], "accuracy")
    assert model.training and not model.head.training


def test_a_model_that_diverged_is_named_rather_than_scored():
    model = Classifier(2)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        evaluate(model, cut(*examples(4, 2), [4]), "accuracy")


class Bigram(torch.nn.Module):
    """A language model whose logits depend on the current token alone; its loss is transformers' own."""

    def __init__(self, table):
        super().__init__()
        self.table, self.labels = torch.nn.Parameter(table), 0

    def forward(self, input_ids, labels):
        logits = self.table[input_ids]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return SimpleNamespace(logits=logits, loss=loss)


def language_rows():
    """Rows with one, two and three predicted tokens; token k is followed by k + 1 except in the last row."""
    ids = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 0], [0, 1, 2, 4]])
    asked = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    return ids, ids.where(asked, -100)


@pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 1, 1]])
def test_perplexity_is_e_to_the_mean_loss_of_a_predicted_token_however_cut(sizes):
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    ids, labels = language_rows()
    log_p = table.double().log_softmax(1)
    asked = [(int(ids[i, j - 1]), int(ids[i, j])) for i in range(4) for j in range(1, 4) if labels[i, j] != -100]
    expected = -sum(log_p[one, next] for one, next in asked) / len(asked)
    metric, loss = evaluate(Bigram(table), cut(ids, labels, sizes), "perplexity")
    assert len(asked) == 8 and (metric, loss) == pytest.approx((float(expected.exp()), float(expected)), rel=1e-5)


def test_exact_match_asks_every_label_of_a_row_and_no_other_token():
    successor = 9.0 * torch.eye(5).roll(1, 1)  # k + 1 is always the first choice
    ids, labels = language_rows()
    assert evaluate(Bigram(successor), cut(ids, labels, [3, 1]), "exact-match")[0] == 0.75
    labels[3, 3] = -100  # the wrong token is no longer asked for
    assert evaluate(Bigram(successor), cut(ids, labels, [3, 1]), "exact-match")[0] == 1.0


def test_the_best_perplexity_is_the_lowest_and_of_anything_else_the_highest():
    assert best("perplexity", iter([3.0, 2.0, 5.0])) == 2.0
    assert {best(name, [3.0, 2.0, 5.0]) for name in ("accuracy", "matthews", "pearson", "exact-match")} == {5.0}


def test_a_loss_beyond_all_bounds_still_has_a_perplexity():
    assert np.isfinite(perplexity(1e6))
