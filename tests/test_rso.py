"""Algorithm 2 against independent routes: float64 loops, torch's own Adam, the adapter form, dense gradient descent."""

import torch
from torch import nn

from fedkrso_app.core.projection import projection
from fedkrso_app.core.rso import RSO, adam_update
from fedkrso_app.core.subspace import AdapterLinear, SubspaceLinear, attached, matrix


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss(model, j):
    x = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(j))
    return (model(x) - x[:, :3]).pow(2).mean()


def train(model, seeds, interval, lr=0.05, **options):
    """Run one interval per entry of ``seeds``; return the accumulators by seed."""
    targets = {"0": model[0], "2": model[2]}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    form, ends = options.pop("form", SubspaceLinear), options.pop("ends", {})
    with attached(model, targets, options.pop("rank", 2), form) as layers:
        ends.update(layers)
        rso = RSO(layers, lr, **options)
        for number, seed in enumerate(seeds):
            rso.start_interval(seed)
            for j in range(interval):
                rso.zero_grad()
                loss(model, number * interval + j).backward()
                rso.step()
    return rso.accumulators


def test_adam_update_equals_torchs_adam():
    parameter = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=1.0)
    M, V, moved = torch.zeros(3, 5, dtype=torch.float64)
    for i in range(1, 6):
        G = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        parameter.grad = G.clone()
        adam.step()
        moved -= adam_update(G, M, V, i)
    torch.testing.assert_close(parameter.detach(), moved)


def test_accumulators_reproduce_the_end_weights():
    model, start = network(), network()
    accumulators = train(model, [11, 12, 11], interval=4)
    offset = 0
    for name, layer in {"0": start[0], "2": start[2]}.items():
        W = matrix(layer).clone()
        m, n = W.shape
        for seed, B in accumulators.items():
            W += B[offset : offset + m * 2].view(m, 2) @ torch.from_numpy(projection(seed, name, 2, n)).double()
        torch.testing.assert_close(matrix(model.get_submodule(name)), W, rtol=0, atol=1e-12)
        offset += m * 2


def test_the_layer_with_W_at_rest_takes_the_same_steps():
    moving, resting = network(), network()
    first, second = (
        train(net, [11, 12, 11], interval=4, form=form)
        for net, form in [(moving, SubspaceLinear), (resting, AdapterLinear)]
    )
    assert torch.equal(resting[0].weight, network()[0].weight)
    for seed in (11, 12):
        torch.testing.assert_close(second[seed], first[seed], rtol=1e-10, atol=1e-13)


def test_in_bfloat16_the_accumulators_say_where_the_layer_went():
    """What a layer at rest adds to W x is Σ B P x to bfloat16's rounding; moved in place, W loses most of each step."""

    class InPlace(SubspaceLinear):
        def move(self, step):
            super().move(step.to(self.W.dtype))

    errors = {}
    for form in (InPlace, AdapterLinear):
        model, ends = network().to(torch.bfloat16), {}
        start = model[0].weight.detach().float()
        accumulators = train(model, [11, 12], interval=10, lr=2e-4, form=form, ends=ends)
        m, n = start.shape
        said = sum(B[: m * 2].view(m, 2) @ torch.from_numpy(projection(k, "0", 2, n)) for k, B in accumulators.items())
        layer = ends["0"]
        went = layer.Bs.float() @ layer.Ps.float() if form is AdapterLinear else layer.W.float() - start
        errors[form] = float((went - said).norm() / said.norm())
    assert errors[AdapterLinear] < 0.01 < 0.2 < errors[InPlace]


def test_in_place_form_equals_the_adapter_form():
    """Inside an interval: frozen W and B trained by torch's Adam from zero give the same weights."""
    model, other = network(), network()
    train(model, [11, 12], interval=5, lr=0.05)
    for number, seed in enumerate([11, 12]):
        layers = [other[0], other[2]]
        Ws = [layer.weight.detach().clone() for layer in layers]
        Ps = [
            torch.from_numpy(projection(seed, name, 2, W.shape[1])).double() for name, W in zip("02", Ws, strict=True)
        ]
        Bs = [torch.zeros(W.shape[0], 2, dtype=torch.float64, requires_grad=True) for W in Ws]
        adam = torch.optim.Adam(Bs, lr=0.05)

        def forward(x, Ws=Ws, Ps=Ps, Bs=Bs, layers=layers):
            first, second = (W + B @ P for W, B, P in zip(Ws, Bs, Ps, strict=True))
            return torch.tanh(x @ first.T + layers[0].bias) @ second.T + layers[1].bias

        for j in range(5):
            adam.zero_grad()
            loss(forward, number * 5 + j).backward()
            adam.step()
        for layer, W, B, P in zip(layers, Ws, Bs, Ps, strict=True):
            layer.weight.data = W + (B @ P).detach()
    for mine, theirs in [(model[0], other[0]), (model[2], other[2])]:
        torch.testing.assert_close(mine.weight.data, theirs.weight.data, rtol=0, atol=1e-12)


def test_square_orthogonal_projection_makes_it_plain_gradient_descent(monkeypatch):
    monkeypatch.setattr("torch.from_numpy", lambda P: torch.as_tensor(P, dtype=torch.float64))
    exact = lambda seed, name, r, n, kind: torch.linalg.qr(  # noqa: E731
        torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )[0].numpy()
    monkeypatch.setattr("fedkrso_app.core.projection.kept", exact)
    torch.manual_seed(0)
    model, dense = (nn.Sequential(nn.Linear(6, 6)).double() for _ in range(2))
    dense.load_state_dict(model.state_dict())
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    with attached(model, {"0": model[0]}, 6) as layers:
        rso = RSO(layers, 0.1, betas=None)
        for seed in (1, 2):
            rso.start_interval(seed)
            for j in range(3):
                rso.zero_grad()
                loss(lambda x: model(x)[:, :3], j).backward()
                rso.step()
    descent = torch.optim.SGD([dense[0].weight], lr=0.1)
    for _ in (1, 2):
        for j in range(3):
            descent.zero_grad()
            loss(lambda x: dense(x)[:, :3], j).backward()
            descent.step()
    torch.testing.assert_close(model[0].weight, dense[0].weight.detach(), rtol=0, atol=1e-12)


def test_repeated_seed_accumulates_while_moments_restart():
    twice = train(network(), [5, 5], interval=3)
    assert list(twice) == [5]
    once = train(network(), [5], interval=3)
    assert not torch.equal(twice[5], once[5])
    longer = train(network(), [5], interval=6)  # the same six batches along one P, without the restart
    assert not torch.allclose(twice[5], longer[5], rtol=0, atol=1e-6)


def test_first_step_moves_W_by_the_learning_rate_in_rms():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 3)).double()
    start = model[0].weight.detach().clone()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with attached(model, {"0": model[0]}, 4) as layers:
        rso = RSO(layers, 1e-2)
        rso.start_interval(9)
        model(torch.randn(20, 400, dtype=torch.float64)).pow(2).sum().backward()
        rso.step()
    rms = (model[0].weight - start).pow(2).mean().sqrt().item()
    assert abs(rms / 1e-2 - 1) < 0.05


def test_the_example_of_central_training_learns_and_leaves_plain_layers():
    from examples.central import train

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x = torch.randn(64, 8)
    losses = train(model, x, x[:, :1] * x[:, 1:2], steps=200)
    assert losses[-1] < 0.7 * losses[0]
    assert type(model[0]) is torch.nn.Linear
