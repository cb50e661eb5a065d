"""A task's metric and the evaluation of a model by it.

Classifiers: accuracy, Matthews or Pearson correlation. Language models: perplexity, e to the mean loss of a token; and
exact match, the share of rows in which every label is the model's first choice, each given the true tokens before it
(teacher-forced: nothing is generated).
"""

import math
from collections.abc import Iterable

import numpy as np
import torch

_IGNORED = -100  # of a language model's labels: not asked for
LOWER_IS_BETTER = frozenset({"perplexity"})


def best(metric: str, scores: Iterable[float]) -> float:
    """The best of ``scores`` by ``metric``."""
    return min(scores) if metric in LOWER_IS_BETTER else max(scores)


def moments(predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """What a metric must know of (n,) predictions and labels, float64; over disjoint examples it simply adds up.

    Classes (``num_labels`` > 1): (C², ) how often label i was taken for j, at i·C + j. Regression (1): n, Σp, Σl, Σp²,
    Σl², Σpl. Language models (0), whose predictions are rows right or wrong: as two classes, every label being 1.
    Raises ValueError for shapes that are not both (n,), and for numbers that are not finite.
    """
    if predictions.shape != labels.shape or predictions.ndim != 1:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} are not both (n,)")
    p, l = predictions.astype(np.float64), labels.astype(np.float64)  # noqa: E741
    if not (np.isfinite(p).all() and np.isfinite(l).all()):
        raise ValueError("there are predictions or labels that are not finite")
    if num_labels == 1:
        return np.array([len(p), p.sum(), l.sum(), p @ p, l @ l, p @ l])
    C = num_labels or 2
    return np.bincount((l * C + p).astype(np.int64), minlength=C * C).astype(np.float64)


def moments_size(num_labels: int) -> int:
    """The length of :func:`moments`."""
    return 6 if num_labels == 1 else (num_labels or 2) ** 2


def score(name: str, of: np.ndarray) -> float:
    """The metric ``name`` ("accuracy", "matthews", "pearson", "exact-match") from :func:`moments`.

    A correlation with something constant counts as 0.0. Raises ValueError for an unknown name and without examples.
    """
    if name == "pearson":
        n, p, l, pp, ll, pl = of  # noqa: E741
        variances = n * pp - p * p, n * ll - l * l
        if n < 1:
            raise ValueError("there are no examples")
        if variances[0] <= 1e-12 * n * pp or variances[1] <= 1e-12 * n * ll:
            return 0.0
        return float((n * pl - p * l) / math.sqrt(variances[0] * variances[1]))
    # here, because it takes seconds to import and a client never needs it
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    measures = {"accuracy": accuracy_score, "exact-match": accuracy_score, "matthews": matthews_corrcoef}
    if name not in measures:
        raise ValueError(f"unknown metric {name!r}: it must be one of {', '.join(measures)}, pearson, perplexity")
    seen = np.flatnonzero(of)
    if not len(seen):
        raise ValueError("there are no examples")
    labels, predictions = np.divmod(seen, math.isqrt(len(of)))
    if name == "matthews" and (len(set(labels)) == 1 or len(set(predictions)) == 1):
        return 0.0
    return float(measures[name](labels, predictions, sample_weight=of[seen]))


def tally(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], num_labels: int) -> np.ndarray:
    """(2 + m,) float64: the sum of the losses, what it is the sum over, and the :func:`moments` of ``batches``.

    The model, in eval mode, takes a batch as keywords and gives ``.loss`` (its mean) and ``.logits``: (b, num_labels)
    of a classifier, where one label means regression, or (b, t, vocabulary) of a language model, where labels of -100
    do not count. The loss is summed over examples, or over predicted tokens. The training modes of its modules are put
    back. Tallies of several nodes add up. Raises ValueError where there are no batches or the logits are not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    sums, batch, device = np.zeros(2 + moments_size(num_labels)), None, next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
                logits, truth = output.logits.float().cpu(), batch["labels"].cpu()
                if not logits.isfinite().all():  # argmax would make a class of a NaN
                    raise ValueError("the model's outputs are not finite: the training has diverged")
                count = len(truth)
                if num_labels == 0:
                    truth = truth[:, 1:]  # what comes after each token
                    count = int((truth != _IGNORED).sum())
                    predictions = ((logits[:, :-1].argmax(2) == truth) | (truth == _IGNORED)).all(1)
                    truth = torch.ones(len(truth))
                else:
                    predictions = logits[:, 0] if num_labels == 1 else logits.argmax(1)
                sums[:2] += float(output.loss) * count, count
                sums[2:] += moments(predictions.numpy(), truth.numpy(), num_labels)
    finally:
        for module, training in modes:
            module.training = training
    if batch is None:
        raise ValueError("there are no batches to evaluate on")
    return sums


def check(tally: np.ndarray, num_labels: int) -> None:
    """Raise ValueError for a :func:`tally` that no evaluation gives (its numbers are finite already)."""
    counts = tally[1:] if num_labels != 1 else np.array([tally[1], tally[2], tally[5], tally[6]])
    if (counts < 0).any() or tally[1] < 1 or (np.abs(tally) > 2.0**53).any():
        raise ValueError("counts or sums are negative, zero or too large")
    whole = tally[1:] if num_labels != 1 else tally[1:3]
    if (whole != np.rint(whole)).any():
        raise ValueError("counts are no whole numbers")
    if num_labels and tally[1] != (tally[2] if num_labels == 1 else tally[2:].sum()):
        raise ValueError("the loss and the metric are of different numbers of examples")


def result(name: str, tally: np.ndarray) -> tuple[float, float]:
    """``(metric, mean loss)`` of a :func:`tally`, or of several added up."""
    loss = float(tally[0] / tally[1])
    return (perplexity(loss) if name == "perplexity" else score(name, tally[2:])), loss


def perplexity(loss: float) -> float:
    """e to the mean loss of a token in nats, at most the largest float."""
    return math.exp(min(loss, 700.0))
