"""Which share of the gradient lies in the directions that a round has moved the model in."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.core.subspace import is_conv1d, matrix
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs import replay
from fedkrso_app.runs.folder import Run
from fedkrso_app.training import model
from fedkrso_app.training.loop import predicted

ROWS = 128  # of the training rows, the same in every round


def captured(run: Run, entries: Ledger) -> dict[int, dict[str, tuple[float, int]]]:
    """Of every entry whose predecessor is there: target layer, or ``all`` -> share of ‖G‖², and number of directions.

    G (m × n) is the gradient of the mean loss on :data:`ROWS` training rows at the version before, without dropout. The
    share is ‖G Vᵀ‖² / ‖G‖², V an orthonormal basis of the rows of W^v − W^{v−1}: for FedKRSO the span of the P_k that
    the entry uses, for LoRA methods that of the factors' rows. ``all`` takes the layers together. Needs the training
    rows; raises ConfigError where they are not here, or where W was rounded.
    """
    config = run.config
    if config.state_dtype != "float32":  # a rounded W has moved a little in every direction
        raise ConfigError(
            f"--energy needs a run with state-dtype = 'float32': in {run.path} rounding moves W in all directions."
        )
    task = data.resolve(config)
    every = data.load(task, config.data_dir, "train", config.holdout)
    chosen = np.sort(np.random.default_rng(0).permutation(len(every))[:ROWS])
    _, steps = replay.walked(run, entries, replay.reached(run, entries))
    plain = model.of_run(config, task)
    examples = every.select(chosen)
    tokens = config.batch_size * config.max_length
    batches = list(data.evaluation_batches(examples, task, plain.tokenizer, tokens, config.max_length))
    shares: dict[int, dict[str, tuple[float, int]]] = {}
    last, before, gradients = -1, dict[str, Tensor](), dict[str, Tensor]()
    for version, local in steps:
        plain.module.load_state_dict(local.plain_state())
        now = {name: matrix(layer).double().clone() for name, layer in plain.targets.items()}
        if before and last == version - 1:
            shares[version] = _shares(gradients, {name: moved_rows(before[name], now[name]) for name in now})
        last, before, gradients = version, now, _gradients(plain, batches)
    return shares


def moved_rows(before: Tensor, after: Tensor) -> Tensor:
    """An orthonormal basis, R × n, of the rows of ``after`` − ``before`` (m × n, float32 values held in float64).

    Left out are directions that the rounding of float32 would give of itself.
    """
    _, lengths, directions = torch.linalg.svd(after - before, full_matrices=False)
    m, n = before.shape
    rounding = 2**-23 * float(before.square().mean().sqrt()) * (math.sqrt(m) + math.sqrt(n))
    return directions[lengths > rounding]


def _shares(gradients: dict[str, Tensor], bases: dict[str, Tensor]) -> dict[str, tuple[float, int]]:
    kept = {name: float((G @ bases[name].T).square().sum()) for name, G in gradients.items()}
    whole = {name: float(G.square().sum()) for name, G in gradients.items()}
    shares = {name: (kept[name] / whole[name] if whole[name] else 0.0, len(bases[name])) for name in gradients}
    total = sum(whole.values())
    return shares | {"all": (sum(kept.values()) / total if total else 0.0, sum(map(len, bases.values())))}


def _gradients(plain: model.LoadedModel, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """∇_W of the mean loss over all batches, m × n in float64, by target layer."""
    weights: dict[str, Any] = {name: layer.weight for name, layer in plain.targets.items()}
    device, total = next(iter(weights.values())).device, sum(map(predicted, batches))
    for parameter in plain.module.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad = None
    for batch in batches:
        loss = plain.module(**{name: value.to(device) for name, value in batch.items()}).loss
        (loss * (predicted(batch) / total)).backward()
    grads = {name: weight.grad.double() for name, weight in weights.items()}
    return {name: grads[name].T if is_conv1d(layer) else grads[name] for name, layer in plain.targets.items()}
