"""SubspaceLinear against autograd, and the memory law: nothing of the size of x or of ∇W is ever kept or made."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedkrso_app.core.subspace import SubspaceLinear, attached, fold, matrix

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: Conv1D(5, 6),
    "no bias": lambda: nn.Linear(6, 5, bias=False),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    layer = LAYERS[request.param]().double()
    with torch.no_grad():
        layer.weight.normal_()
    return layer


def subspace(layer, rank=2):
    made = SubspaceLinear(layer, rank)
    made.P = torch.randn(rank, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return made


def test_forward_is_the_plain_layer(layer):
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(subspace(layer)(x), layer(x), rtol=0, atol=1e-12)


def test_gradient_of_B_is_the_full_gradient_times_Pt(layer):
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    layer(x).pow(3).sum().backward()
    full = layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.T
    dX = x.grad.clone()
    x.grad = None
    mine = subspace(layer)
    mine(x).pow(3).sum().backward()
    torch.testing.assert_close(mine.B.grad, full @ mine.P.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, dX, rtol=1e-12, atol=1e-12)


def test_gradients_of_two_batches_add_up(layer):
    mine = subspace(layer)
    x, y = torch.randn(2, 3, 6, dtype=torch.float64)
    mine(torch.cat([x, y])).pow(3).sum().backward()
    whole = mine.B.grad.clone()
    mine.B.grad = None
    mine(x).pow(3).sum().backward()
    mine(y).pow(3).sum().backward()
    torch.testing.assert_close(mine.B.grad, whole)


def test_forward_keeps_only_the_weight_and_the_projected_input(layer):
    saved = []
    mine = subspace(layer)
    x = torch.randn(7, 11, 6, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mine(x)
    weight = layer.weight.untyped_storage().data_ptr()
    kept = [t for t in saved if t.untyped_storage().data_ptr() != weight]
    assert [tuple(t.shape) for t in kept] == [(2, 77)]  # P xᵀ


def test_backward_makes_no_tensor_of_the_weights_size(layer):
    mine = subspace(layer)
    y = mine(torch.randn(3, 6, dtype=torch.float64))  # x needs no gradient, as in a model's first block
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profile:
        y.sum().backward()
    assert layer.weight.grad is None
    allocated = max((event.self_cpu_memory_usage for event in profile.key_averages()), default=0)
    assert allocated < layer.weight.numel() * 8


def test_leaving_restores_the_original_layers():
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Sequential(nn.Linear(5, 4))})
    originals = {"a": model.a, "b.0": model.b[0]}
    with pytest.raises(RuntimeError), attached(model, originals, 2) as layers:
        assert model.get_submodule("b.0") is layers["b.0"] and isinstance(model.a, SubspaceLinear)
        raise RuntimeError
    assert model.a is originals["a"] and model.b[0] is originals["b.0"]


def test_fold_equals_the_sum_of_the_products(layer):
    generator = torch.Generator().manual_seed(2)
    Bs = torch.randn(3, 5, 2, dtype=torch.float64, generator=generator)
    Ps = torch.randn(3, 2, 6, dtype=torch.float64, generator=generator)
    expected = matrix(layer) + sum(B @ P for B, P in zip(Bs, Ps, strict=True))
    fold(matrix(layer), Bs, Ps)
    torch.testing.assert_close(matrix(layer), expected)


def test_fold_is_linear_in_B():
    generator = torch.Generator().manual_seed(3)
    B, C, P = (torch.randn(2, *shape, dtype=torch.float64, generator=generator) for shape in [(5, 2), (5, 2), (2, 6)])
    one, two = torch.zeros(5, 6).double(), torch.zeros(5, 6).double()
    fold(one, 2 * B + C, P)
    fold(two, B, P)
    fold(two, B, P)
    fold(two, C, P)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_the_output_may_be_changed_in_place_as_some_models_do(layer, shape):
    y = subspace(layer)(torch.randn(*shape, dtype=torch.float64))
    y.div_(2)
    y.sum().backward()
