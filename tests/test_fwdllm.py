"""FwdLLM: norms and biases alone, directions that are chosen, pairs that add up, and how many of them."""

import numpy as np
import pytest
import torch
from helpers import arrays_of, digest, play, replayed, replica

from fedkrso_app.config import ConfigError
from fedkrso_app.core.directions import vectors
from fedkrso_app.federation.aggregate import Aggregate
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.fwdllm import paced
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes

SMALL = {"a.bias": 3, "b.bias": 4, "c.bias": 2}
SHAPES = Shapes({"a": (3, 4)}, head=2, parameters=23, small=SMALL)


@pytest.fixture
def settings(run_config) -> dict:
    return run_config | {"strategy": "fwdllm", "num-server-rounds": 2}


@pytest.fixture
def half(settings):
    loaded = model.load(settings["model"], 2, 0)
    return make(parse(settings), Shapes.of(loaded)).local(loaded)


def reply(method, seeds, scalars) -> dict[str, np.ndarray]:
    pairs = {"seeds": np.array(seeds, np.uint64), "scalars": np.array(scalars, np.float32)}
    return pairs | {"head": np.zeros(2, np.float32)}


def concluded(method, *replies) -> dict[str, np.ndarray]:
    sums = Aggregate(method)
    for partition, arrays in enumerate(replies):
        method.check(arrays, 1)
        sums.add(method.summands(arrays), arrays, 1, partition)
    return method.conclude(sums, 1)


@pytest.mark.parametrize("mode", ["first-order", "zeroth", "frozen"])
def test_norms_and_biases_move_and_nothing_else_but_the_head(settings, mode):
    run = play(settings | {"zeroth.head": mode})
    start, end = (dict(replica(run, version).module.named_parameters()) for version in (0, None))
    head = set() if mode == "frozen" else set(replica(run).head)
    small = {name for name, parameter in start.items() if parameter.ndim == 1 and "classifier" not in name}
    assert {name for name in start if not torch.equal(start[name], end[name])} == small | head
    assert replayed(run) == digest(run)


def test_pairs_of_one_seed_are_added_up_and_every_client_counts_by_its_share(settings):
    method = make(parse(settings | {"local-steps": 2}), SHAPES)
    entry = concluded(method, reply(method, [9, 4], [1e-3, 2e-3]), reply(method, [4, 7], [4e-3, -6e-3]))
    assert entry["seeds"].tolist() == [4, 7, 9]
    np.testing.assert_allclose(entry["scalars"], [3e-3, -3e-3, 0.5e-3], rtol=1e-6)


@pytest.mark.parametrize(
    ("seeds", "scalars", "reason"),
    [([1], [0], "1 pairs, expected 2"), ([1, 1], [0, 0], "a seed occurs twice"), ([1, 2], [0, 33], "above 32")],
)
def test_pairs_that_cannot_be_are_refused(settings, seeds, scalars, reason):
    method = make(parse(settings | {"local-steps": 2}), SHAPES)
    with pytest.raises(Refused, match=reason):
        method.check(reply(method, seeds, scalars), 1)


def test_the_directions_kept_have_the_largest_cosines_with_the_last_update(half):
    last = half.last({"seeds": np.array([5, 6], "<u8").tobytes(), "scalars": np.array([1, -2], "<f4").tobytes()})
    whole = lambda seed: torch.cat([vectors([seed], n, o.numel(), 1)[0] for n, o in half.others.items()])  # noqa: E731
    flat = torch.cat([last[name].flatten() for name in half.others])
    torch.testing.assert_close(flat, whole(5) - 2 * whole(6))
    cosines = {seed: float(torch.cosine_similarity(whole(seed), flat, dim=0)) for seed in range(20)}
    best = sorted(cosines, key=cosines.__getitem__)[-3:]
    assert half.closest([*range(20)], last, 3) == sorted(best)
    assert half.last({"seeds": b"", "scalars": b""}) == {}


def test_from_the_second_round_on_clients_choose(settings):
    run = play(settings | {"local-steps": 6, "fwdllm.candidates": 30})
    half, entries = replica(run, 1), [Ledger(run.ledger).read(version).arrays for version in (1, 2)]
    sums = half.last({"seeds": entries[0]["seeds"].tobytes(), "scalars": entries[0]["scalars"].tobytes()})
    flat = torch.cat([total.flatten() for total in sums.values()])

    def cosine(seeds):
        z = torch.cat([vectors(seeds, name, total.numel(), 1) for name, total in sums.items()], dim=1)
        return torch.cosine_similarity(z, flat[None]).min()

    assert cosine(entries[1]["seeds"].tolist()) > 0  # of thirty directions the closest is never on the other side


def test_more_directions_are_asked_for_while_clients_disagree(settings):
    assert [paced(4, v, 1.0, 6) for v in (2.0, 0.5, 0.1)] == [6, 4, 2]
    assert paced(1, 0.0, 1.0, 6) == 1 and paced(4, 9.0, 0.0, 6) == 4
    sent = {}

    def keep(partition, message, reply):
        sent.setdefault(message.content["train"]["round"], set()).add(arrays_of(reply)["seeds"].size)
        return reply

    pace = {"fwdllm.threshold": 1e-12, "fwdllm.most-perturbations": 3, "num-server-rounds": 3, "local-steps": 2}
    run = play(settings | pace, tamper=keep)
    assert sent == {1: {2}, 2: {4}, 3: {6}} and replayed(run) == digest(run)


def test_the_variance_is_that_of_the_clients_mean_estimates_on_one_tensor(settings):
    changes = {"local-steps": 2, "fwdllm.threshold": 1.0, "fwdllm.learning-rate": 0.5}
    method = make(parse(settings | changes), SHAPES)
    replies = reply(method, [1, 2], [0.1, 0.2]), reply(method, [3, 4], [-0.3, 0.1])
    sums = Aggregate(method)
    for partition, arrays in enumerate(replies):
        sums.add(method.summands(arrays), arrays, 1, partition)
    estimates = []
    for arrays in replies:  # s = -η g: by hand g = -2 s, and the mean over two directions
        z = vectors(arrays["seeds"].tolist(), "b.bias", 4, 1).double().numpy()
        estimates.append((-2 * arrays["scalars"].astype(float)) @ z / 2)
    expected = ((estimates[0] - estimates[1]) ** 2 / 4).mean()
    assert method.variance(sums) == pytest.approx(expected, rel=1e-6)


def test_what_it_cannot_do_is_refused_before_the_run(settings):
    with pytest.raises(ConfigError, match="norms and biases, and this model has none"):
        make(parse(settings), Shapes({"a": (3, 4)}, head=2, parameters=14))
    with pytest.raises(ConfigError, match="does not go with fwdllm, which needs every reply itself"):
        parse(settings | {"aggregation": "median"})
    with pytest.raises(ConfigError, match=r"at most fwdllm\.most-perturbations = 16"):
        parse(settings | {"fwdllm.perturbations": 17})
