"""Low-rank factors on peft's LoRA layers: attach, read, merge. The effective weight is W + (alpha/r)·B·A."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedkrso_app.core.projection import stream
from fedkrso_app.core.subspace import is_conv1d

_ADAPTER = "default"


def initial_A(seed: int, name: str, rank: int, n: int) -> Tensor:
    """A at the start, r × n float32: Kaiming-uniform as in peft (variance 1/(3n)), drawn by numpy from the seed and the
    layer's name, so that every machine has the same bits and A need not travel."""
    bound = 1 / math.sqrt(n)
    return torch.from_numpy(stream(seed, "lora A", name).uniform(-bound, bound, (rank, n))).float()


def principal(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B), r × n and m × r float32 on the CPU, with scale·B·A the best approximation of W (m × n) of that rank.

    B = U √(Σ/scale), A = √(Σ/scale) Vᵀ with the largest singular values, in float64. The largest entry of each column
    of U is positive, so that every machine that finds the same vectors gives them the same signs.
    """
    U, sigma, Vt = torch.linalg.svd(W.detach().cpu().double(), full_matrices=False)
    U, sigma, Vt = U[:, :rank], sigma[:rank], Vt[:rank]
    signs = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()  # 1 × r
    root = (sigma / scale).sqrt()
    return (root[:, None] * Vt * signs.T).float(), (U * signs * root).float()


def initial_As(seed: int, targets: Mapping[str, tuple[int, int]], rank: int) -> list[Tensor]:
    """:func:`initial_A` of each target (name -> m, n)."""
    return [initial_A(seed, name, rank, n) for name, (_, n) in targets.items()]


def attach(module: nn.Module, names: list[str], rank: int, alpha: float, seed: int) -> dict[str, Any]:
    """Put a LoRA layer (no dropout, B = 0) around each named layer of ``module``; returns them by name."""
    from peft import LoraConfig, inject_adapter_in_model  # seconds, which no other method need wait

    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=list(names),
        bias="none",
        fan_in_fan_out=all(is_conv1d(module.get_submodule(name)) for name in names),  # else peft warns of it
    )
    with torch.random.fork_rng():  # peft draws a start of its own, which is overwritten below
        inject_adapter_in_model(settings, module, adapter_name=_ADAPTER)
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in names}
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = factors(layer)
            for factor in (A, B):  # in float32 beside a layer in bfloat16 too
                factor.data = factor.data.to(torch.promote_types(factor.dtype, torch.float32))
            A.copy_(initial_A(seed, name, rank, A.shape[1]))
            B.zero_()
    return layers


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """(A, B) of a layer: r × n and m × r."""
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight


def scaling(layer: Any) -> float:
    """s = alpha / r of a layer."""
    return layer.scaling[_ADAPTER]


def merged_state(module: nn.Module, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of ``module`` as if it had no LoRA layers: W + (alpha/r)·B·A under the plain names, as new tensors."""
    state = {
        key.replace(".base_layer.", "."): value
        for key, value in module.state_dict().items()
        if ".lora_A." not in key and ".lora_B." not in key
    }
    for name, layer in layers.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(_ADAPTER).detach()
    return state
