"""Random subspace optimization without a federation: FedKRSO's optimizer alone, on any model with linear layers.

    python examples/central.py

Trains a small network on one batch of random data, along a new random subspace every ten steps, and prints the loss.
"""

import torch
from torch import nn

from fedkrso_app.core.rso import RSO
from fedkrso_app.core.subspace import attached


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 300, interval: int = 10) -> list[float]:
    """Train every linear layer of ``model`` in place; returns the loss of each step."""
    model.requires_grad_(False)
    targets = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    losses = []
    with attached(model, targets, rank=4) as layers:
        rso = RSO(layers, lr=2e-3)
        for step in range(steps):
            if step % interval == 0:
                rso.start_interval(seed=step)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            rso.step()
            rso.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    x = torch.randn(256, 32)
    losses = train(model, x, x[:, :3].prod(1, keepdim=True))
    for step in range(0, len(losses), 50):
        print(f"step {step:3d}  loss {losses[step]:.4f}")
    print(f"step {len(losses)}  loss {losses[-1]:.4f}")
