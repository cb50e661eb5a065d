"""Options against clients whose classes differ, for any method that trains a classifier's head.

    client.head-rate          the head's learning rate is that many times the method's
    client.logit-adjustment   τ: a client's loss takes the logits + τ log π, π the shares of the classes among its rows
                              (Menon et al., arXiv:2007.07314, eq. 10), so that it need not learn these shares

The adjustment adds a constant to each logit, as the output layer's bias does. So the bias begins a session τ log π
higher and ends it as much lower, and neither the loss nor the model knows of it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.flat import storage
from fedkrso_app.strategies.base import Local
from fedkrso_app.training import heads
from fedkrso_app.training.loop import Session
from fedkrso_app.training.model import LoadedModel


class HeadRateLocal(Local):
    """The head's parameters in an optimizer's group of their own, at ``client.head-rate`` times its learning rate."""

    head_rate: float

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        own = {storage(parameter) for parameter in self.head.values()}
        with super().session(instructions, rng) as session:  # type: ignore[safe-super]
            for optimizer in session.optimizers:
                for group in list(optimizer.param_groups):
                    of_head = [p for p in group["params"] if storage(p) in own]
                    group["params"] = [p for p in group["params"] if storage(p) not in own]
                    if of_head:
                        optimizer.add_param_group({**group, "params": of_head, "lr": group["lr"] * self.head_rate})
                optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
            yield session


class AdjustedLocal(Local):
    """The bias of the output layer, τ log π higher while a client trains."""

    tau: float

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        settings: Any = self.module.config
        name = heads.output_bias(self.module, self.head, settings.num_labels)
        if name is None:
            raise ConfigError(
                f"client.logit-adjustment = {self.tau:g} needs an output layer whose bias is trained, and "
                f"{config.model} has none: set it to 0."
            )
        self.output_bias = name

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        bias = self.head[self.output_bias]
        shift = self.tau * log_shares(instructions["labels"](), len(bias)).to(bias)
        with torch.no_grad():
            bias.add_(shift)
        with super().session(instructions, rng) as session:  # type: ignore[safe-super]
            plain = session.update

            def update() -> dict[str, np.ndarray]:
                with torch.no_grad():
                    bias.sub_(shift)
                return plain()

            yield replace(session, update=update)


def log_shares(labels: np.ndarray, classes: int) -> torch.Tensor:
    """log π, (classes,) float64: of a client's labels (n, class ids), a class without rows counted as if it had one."""
    counts = np.maximum(np.bincount(labels, minlength=classes), 1)
    return torch.from_numpy(np.log(counts / counts.sum()))
