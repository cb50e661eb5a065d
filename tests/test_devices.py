"""A device without float64, as Apple's mps: every method trains there, and takes an entry over."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedkrso_app.federation.aggregate import Aggregate
from fedkrso_app.records import wire
from fedkrso_app.strategies import STRATEGIES, make, parse
from fedkrso_app.training import loop, model
from fedkrso_app.training.shapes import Shapes


class Mps(TorchFunctionMode):
    """Some tensors, and all that is made from them, are on a device: there is no float64, and no numpy."""

    def __init__(self, tensors):
        super().__init__()
        self.there = {id(tensor): tensor for tensor in tensors}  # kept, so that no id is given twice

    def holds(self, value) -> bool:
        return isinstance(value, torch.Tensor) and id(value) in self.there

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = any(map(self.holds, tree_leaves((args, kwargs))))
        if given and function is torch.Tensor.numpy:
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        made = function(*args, **(kwargs or {}))
        if not given:
            return made
        if function is torch.Tensor.cpu or (function is torch.Tensor.to and "cpu" in map(str, args[1:])):
            return made.detach().clone()
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                if tensor.dtype == torch.float64:
                    raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
                self.there[id(tensor)] = tensor
        return made


def test_the_stand_in_refuses_what_mps_refuses():
    x, y = torch.ones(2), torch.ones(2)
    with Mps([x]) as device:
        assert (y.double() + 1).sum().item() == 4 and (2 * x).cpu().double().numpy().sum() == 4
        for wrong in (lambda: (x + y).double(), lambda: (x * y).numpy(), lambda: x.to(torch.float64)):
            with pytest.raises(TypeError):
                wrong()
        assert device.holds(x + y) and not device.holds((x + y).to("cpu", torch.float64))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_method_needs_float64_on_the_device(run_config, strategy):
    config = parse(run_config | {"strategy": strategy, "local-steps": 2, "max-grad-norm": 1.0, "evaluate": "off"})
    loaded = model.load(config.model, 2, 0)
    method = make(config, Shapes.of(loaded))
    local = method.local(loaded)
    batch = {"input_ids": torch.tensor([[0, 7, 8, 2]]), "labels": torch.tensor([1])}
    rng = np.random.default_rng(0)
    before = model.state_digest(local.plain_state())
    with Mps([*local.module.parameters(), *local.shared()]):
        with local.session(method.instructions(1), rng) as session:
            loop.train(local.module, iter([batch] * 2), session, config, rng)
            arrays = session.update()
        arrays = {name: arrays[name] for name in method.reply.travelling.fields if name in arrays}
        wire.pack(wire.encode(arrays, method.reply, rng))
        method.observe(0, local.state())
        sums = Aggregate(method)
        sums.add(method.summands(arrays), arrays, 1, 0)
        entry = method.conclude(sums, 1)
        local.apply({name: entry[name] for name in method.entry.travelling.fields if name in entry})
    assert model.state_digest(local.plain_state()) != before
