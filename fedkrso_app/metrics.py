"""A task's metric (accuracy, Matthews or Pearson correlation) and the evaluation of a model by it."""

from collections.abc import Iterable

import numpy as np
import torch


def score(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """The metric ``name`` of (n,) class ids ("accuracy", "matthews") or (n,) values ("pearson").

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
    if name == "accuracy":
        return float(accuracy_score(labels, predictions))
    if name not in ("matthews", "pearson"):
        raise ValueError(f"unknown metric {name!r}: it must be accuracy, matthews or pearson")
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    if name == "matthews":
        return float(matthews_corrcoef(labels, predictions))
    return float(pearsonr(predictions.astype(np.float64), labels.astype(np.float64)).statistic)


def evaluate(
    model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], task_metric: str, device: torch.device
) -> tuple[float, float]:
    """``(metric, mean loss per example)`` of a sequence classifier on ``batches``, in eval mode.

    The model takes a batch as keywords and gives ``.loss`` (its mean) and (b, num_labels) ``.logits``, where
    one label means regression; its modules' training modes are put back. Raises ValueError where there are
    no batches or the logits are not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    total, predictions, labels = 0.0, [], []
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
                logits = output.logits.float()
                if not logits.isfinite().all():  # argmax would make a class of a NaN
                    raise ValueError("the model's outputs are not finite: the training has diverged")
                predictions.append((logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)).cpu())
                labels.append(batch["labels"].cpu())
                total += float(output.loss) * len(batch["labels"])
    finally:
        for module, training in modes:
            module.training = training
    if not labels:
        raise ValueError("there are no batches to evaluate on")
    truth = torch.cat(labels).numpy()
    return score(task_metric, torch.cat(predictions).numpy(), truth), total / len(truth)
