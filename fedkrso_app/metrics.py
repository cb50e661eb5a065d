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


def score(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """The metric ``name`` of (n,) class ids ("accuracy", "matthews"), values ("pearson") or truths ("exact-match").

    A correlation with something constant counts as 0.0. Raises ValueError for an unknown name, for shapes
    that are not both (n,) with n >= 1, and for numbers that are not finite.
    """
    # here, because together they take seconds to import and a client never needs them
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} are not both (n,), n >= 1")
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        raise ValueError("there are predictions or labels that are not finite")
    if name in ("accuracy", "exact-match"):
        return float(accuracy_score(labels, predictions))
    if name not in ("matthews", "pearson"):
        raise ValueError(f"unknown metric {name!r}: it must be accuracy, exact-match, matthews or pearson")
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    if name == "matthews":
        return float(matthews_corrcoef(labels, predictions))
    return float(pearsonr(predictions.astype(np.float64), labels.astype(np.float64)).statistic)


def evaluate(
    model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], task_metric: str, device: torch.device
) -> tuple[float, float]:
    """``(metric, mean loss)`` of a model on ``batches``, in eval mode; the loss per example, or per predicted token.

    The model takes a batch as keywords and gives ``.loss`` (its mean) and ``.logits``: (b, num_labels) of a classifier,
    where one label means regression, or (b, t, vocabulary) of a language model, where labels of -100 do not count. Its
    modules' training modes are put back. Raises ValueError where there are no batches or the logits are not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    total, counted, predictions, labels = 0.0, 0, [], []
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
                logits = output.logits.float()
                if not logits.isfinite().all():  # argmax would make a class of a NaN
                    raise ValueError("the model's outputs are not finite: the training has diverged")
                truth = batch["labels"]
                if logits.ndim == 3:
                    truth = truth[:, 1:]  # what comes after each token
                    right = (logits[:, :-1].argmax(2).cpu() == truth) | (truth == _IGNORED)
                    predictions.append(right.all(1))
                    labels.append(torch.ones(len(truth), dtype=torch.bool))
                    count = int((truth != _IGNORED).sum())
                else:
                    predictions.append((logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)).cpu())
                    labels.append(truth.cpu())
                    count = len(truth)
                total += float(output.loss) * count
                counted += count
    finally:
        for module, training in modes:
            module.training = training
    if not labels:
        raise ValueError("there are no batches to evaluate on")
    loss = total / counted
    if task_metric == "perplexity":
        return perplexity(loss), loss
    return score(task_metric, torch.cat(predictions).numpy(), torch.cat(labels).numpy()), loss


def perplexity(loss: float) -> float:
    """e to the mean loss of a token in nats, at most the largest float."""
    return math.exp(min(loss, 700.0))
