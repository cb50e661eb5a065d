"""A task's metric and the evaluation of a model by it.

Classifiers: accuracy, F1 or Matthews correlation; regressions: Pearson correlation. Language models: perplexity, e to
the mean loss of a token; and exact match, the share of rows in which every label is the model's first choice, each
given the true tokens before it (teacher-forced: nothing is generated).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.data.language import IGNORED
from fedkrso_app.training.vocabulary import first_choices, without_logits

LOWER_IS_BETTER = frozenset({"perplexity"})


def best(metric: str, scores: Iterable[float]) -> float:
    """The best of ``scores`` by ``metric``."""
    return min(scores) if metric in LOWER_IS_BETTER else max(scores)


def moments(metric: str, predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """What ``metric`` must know of (n,) predictions and labels, float64; over disjoint examples it simply adds up.

    "accuracy" and "exact-match": how many are right, n. "f1" and "matthews": of each of ``num_labels`` classes how
    often it was predicted rightly, predicted, and true; 3 · num_labels numbers. "pearson": n, Σp, Σl, Σp², Σl², Σpl.
    "perplexity": nothing. Raises ValueError for an unknown metric, for shapes that are not both (n,), and for numbers
    that are not finite.
    """
    if predictions.shape != labels.shape or predictions.ndim != 1:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} are not both (n,)")
    p, l = predictions.astype(np.float64), labels.astype(np.float64)  # noqa: E741
    if not (np.isfinite(p).all() and np.isfinite(l).all()):
        raise ValueError("there are predictions or labels that are not finite")
    if metric == "perplexity":
        return np.zeros(0)
    if metric == "pearson":
        return np.array([len(p), p.sum(), l.sum(), p @ p, l @ l, p @ l])
    if metric in ("accuracy", "exact-match"):
        return np.array([(p == l).sum(), len(p)], np.float64)
    if metric in ("f1", "matthews"):
        counted = [np.bincount(of.astype(np.int64), minlength=num_labels) for of in (p[p == l], p, l)]
        return np.concatenate(counted).astype(np.float64)
    raise ValueError(
        f"unknown metric {metric!r}: it must be one of accuracy, exact-match, f1, matthews, pearson, perplexity"
    )


def tally_size(metric: str, num_labels: int) -> int:
    """The length of :func:`tally`: what one evaluation sends, in numbers of 8 bytes."""
    none = np.zeros(0)
    return 2 + len(moments(metric, none, none, num_labels))


def score(metric: str, of: np.ndarray) -> float:
    """The ``metric`` ("accuracy", "f1", "matthews", "pearson", "exact-match") from :func:`moments`.

    F1 of two classes is that of class 1, as in GLUE; of more, the unweighted mean over the classes that occur among
    labels or predictions (scikit-learn's "macro"). A class that is never predicted rightly has F1 0.0, as has a
    correlation with something constant. Raises ValueError for an unknown name and without examples.
    """
    if metric == "pearson":
        n, p, l, pp, ll, pl = of  # noqa: E741
        variances = n * pp - p * p, n * ll - l * l
        if n < 1:
            raise ValueError("there are no examples")
        if variances[0] <= 1e-12 * n * pp or variances[1] <= 1e-12 * n * ll:
            return 0.0
        return float((n * pl - p * l) / math.sqrt(variances[0] * variances[1]))
    if metric in ("f1", "matthews"):
        hits, predicted, true = of.reshape(3, -1)
        n = true.sum()
        if n < 1:
            raise ValueError("there are no examples")
        if metric == "f1":
            both = predicted + true
            each = 2 * hits / np.maximum(both, 1)
            return float(each[1] if len(each) == 2 else each[both > 0].mean())
        # Gorodkin 2004, eq. 8, of the sums over the confusion matrix
        variances = n * n - predicted @ predicted, n * n - true @ true
        if min(variances) <= 0:
            return 0.0
        return float((n * hits.sum() - predicted @ true) / math.sqrt(variances[0] * variances[1]))
    if metric not in ("accuracy", "exact-match"):
        raise ValueError(f"unknown metric {metric!r}: it has no score")
    if of[1] < 1:
        raise ValueError("there are no examples")
    return float(of[0] / of[1])


def tally(
    model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], metric: str, num_labels: int
) -> np.ndarray:
    """(2 + m,) float64: the sum of the losses, what it is the sum over, and the :func:`moments` of ``batches``.

    The model, in eval mode, takes a batch as keywords and gives ``.loss`` (its mean) and ``.logits``: (b, num_labels)
    of a classifier, where one label means regression, or (b, t, vocabulary) of a language model, where labels of -100
    do not count. The loss is summed over examples, or over predicted tokens. The training modes of its modules are put
    back. Tallies of several nodes add up. No value is read from the model's device before the last batch. Raises
    ValueError where there are no batches or the logits are not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    found: list[tuple[Tensor, ...]] = []  # loss and what it is the mean over; predictions and labels; whether finite
    try:
        model.eval()
        with torch.no_grad(), without_logits(model) as output_layer:
            for batch in batches:
                output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
                logits, truth = output.logits, batch["labels"].to(device)
                count = torch.tensor(len(truth))
                if num_labels == 0:
                    truth = truth[:, 1:]  # what comes after each token
                    count = (truth != IGNORED).sum()
                    predictions = truth.new_ones(len(truth))
                    if metric == "exact-match":
                        chosen = (
                            first_choices(logits[:, :-1], output_layer) if output_layer else logits[:, :-1].argmax(2)
                        )
                        predictions = ((chosen == truth) | (truth == IGNORED)).all(1)
                    truth = truth.new_ones(len(truth))
                else:
                    predictions = logits.float()
                # argmax would make a class of a NaN
                found.append((output.loss, count, predictions, truth, logits.isfinite().all() & output.loss.isfinite()))
    finally:
        for module, training in modes:
            module.training = training
    if not found:
        raise ValueError("there are no batches to evaluate on")
    losses, counts, predictions, truth, finite = (_on_host(part) for part in zip(*found, strict=True))
    if not finite.all():
        raise ValueError("the model's outputs are not finite: the training has diverged")
    if num_labels:
        predictions = predictions[:, 0] if num_labels == 1 else predictions.argmax(1)
    weighted = losses.double() * counts.double()
    sums = torch.stack([weighted.sum(), counts.double().sum()]).numpy()
    return np.concatenate([sums, moments(metric, predictions.numpy(), truth.numpy(), num_labels)])


def _on_host(parts: Sequence[Tensor]) -> Tensor:
    """Numbers, or tensors row under row, as one tensor on the CPU."""
    return (torch.cat(list(parts)) if parts[0].dim() else torch.stack(list(parts))).cpu()


def check(tally: np.ndarray, metric: str, num_labels: int) -> None:
    """Raise ValueError for a :func:`tally` that no evaluation gives (its numbers are finite already)."""
    of = tally[2:]
    counts = np.append(tally[1], of if metric != "pearson" else of[:1])
    squares = of[3:5] if metric == "pearson" else of[:0]
    if (counts < 0).any() or (squares < 0).any() or tally[1] < 1 or (np.abs(tally) > 2.0**53).any():
        raise ValueError("counts or sums are negative, zero or too large")
    if (counts != np.rint(counts)).any():
        raise ValueError("counts are no whole numbers")
    examples, hits = {tally[1]}, False
    if metric == "pearson":
        examples.add(of[0])
    elif metric in ("f1", "matthews"):
        right, predicted, true = of.reshape(3, num_labels)
        examples |= {predicted.sum(), true.sum()}
        hits = bool((right > np.minimum(predicted, true)).any())
    elif metric in ("accuracy", "exact-match"):
        if num_labels:  # a language model's loss is over tokens, and its rows are fewer
            examples.add(of[1])
        hits = bool(of[0] > of[1] or of[1] < 1)
    if len(examples) > 1 or hits:
        raise ValueError("the loss and the metric are of different numbers of examples")


def result(name: str, tally: np.ndarray) -> tuple[float, float]:
    """``(metric, mean loss)`` of a :func:`tally`, or of several added up."""
    loss = float(tally[0] / tally[1])
    return (perplexity(loss) if name == "perplexity" else score(name, tally[2:])), loss


def perplexity(loss: float) -> float:
    """e to the mean loss of a token in nats, at most the largest float."""
    return math.exp(min(loss, 700.0))
