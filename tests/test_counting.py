"""Counting on the meta device: autocast, CUDA's kernels and checkpoints behave there as where they exist."""

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedkrso_app.training.counting import counting

OPERATIONS = {
    "linear": lambda x, w: functional.linear(x, w),
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "@": lambda x, w: x @ w.T,
    "bmm": lambda x, w: torch.bmm(x, x.mT),
    "addmm": lambda x, w: torch.addmm(w, x[0], w),
    "baddbmm": lambda x, w: torch.baddbmm(x, x, x),
    "attention": lambda x, w: functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    "gelu": lambda x, w: functional.gelu(x),
    "add": lambda x, w: x + w,
    "layer norm": lambda x, w: functional.layer_norm(x, (8,)),
    "softmax": lambda x, w: functional.softmax(x, -1),
    "power": lambda x, w: x.pow(2).mean(-1),
    "loss": lambda x, w: functional.cross_entropy(x.flatten(0, 1), torch.zeros(16, dtype=torch.long, device=x.device)),
}
EXACT = {"layer norm", "softmax", "power", "loss"}  # on CUDA, by torch's documentation


def result(name, device, dtype):
    x, w = torch.ones(2, 8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
    with torch.autocast("cpu", torch.bfloat16):
        return OPERATIONS[name](x, w).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_gives_meta_tensors_the_dtypes_of_real_ones(name, dtype):
    with counting():
        assert result(name, "meta", dtype) == result(name, "cpu", dtype)
    with counting(cuda=True):
        assert result(name, "meta", dtype) == (torch.float32 if name in EXACT else result(name, "cpu", dtype))


def test_a_checkpoint_computes_again_under_the_same_autocast():
    layer = torch.nn.Linear(8, 8, device="meta")
    x = torch.ones(2, 8, device="meta", requires_grad=True)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with counting(cuda=True):
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(lambda x: functional.gelu(layer(x)), x, use_reentrant=False)
        y.float().sum().backward()
    assert seen == [torch.bfloat16] * 2 and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_keeps_no_square_of_the_tokens(dtype):
    """Kept: the result, one number per row and head for the softmax, and what draws dropout; the inputs are there."""
    q = torch.ones(2, 4, 64, 16, dtype=dtype, device="meta", requires_grad=True)
    with counting(cuda=True) as counter:
        y = functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1, is_causal=True)
    assert y.grad_fn is not None
    assert 2 * 4 * 64 * (16 * dtype.itemsize + 4) <= counter.live <= 2 * 4 * 64 * (16 * dtype.itemsize + 4) + 256
    with counting() as counter:
        y = functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1, is_causal=True)
    assert counter.live > 2 * 4 * 64 * 64 * dtype.itemsize


def test_operations_are_two_for_each_multiplication_that_is_added():
    x, w = torch.ones(3, 5, device="meta"), torch.ones(7, 5, device="meta", requires_grad=True)
    with counting() as counter:
        functional.linear(x, w).sum().backward()
    assert counter.operations == 2 * (2 * 3 * 5 * 7)  # y, and the gradient of w
