"""Projecting afterwards: what coefficients and rows keep of an update, and what a run sends, keeps and forgets."""

import itertools

import numpy as np
import pytest
import torch
from helpers import arrays_of, play, replica

from fedkrso_app.core import sketch
from fedkrso_app.core.directions import pair
from fedkrso_app.core.sketch import coefficients, rows, shares
from fedkrso_app.core.subspace import matrix
from fedkrso_app.federation.store import cache
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.sketch import SeparateLocal
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes

DELTA = torch.tensor([[0.5, -2.0], [1.0, 0.25]], dtype=torch.float64)


def test_over_all_signs_the_unbiased_coefficients_give_the_update_back(monkeypatch):
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))
    C, P = signs[:, :2, None], signs[:, None, 2:]
    monkeypatch.setattr(sketch, "pair", lambda seeds, *_: (C, P))
    gamma = coefficients(DELTA, [*range(16)], "a", 1, "unbiased")
    torch.testing.assert_close(torch.einsum("k,kmr,krn->mn", gamma, C.double(), P.double()), DELTA)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_coefficient_is_the_scaled_inner_product_with_its_direction(rank):
    C, P = pair([3, 4, 5], "a", 2, 2, rank)
    by_hand = [float((DELTA * (c.double() @ p.double())).sum()) for c, p in zip(C, P, strict=True)]
    for scale, c in (("unbiased", 1 / 3), ("contractive", 1 / (4 + 3 + 1))):
        np.testing.assert_allclose(coefficients(DELTA, [3, 4, 5], "a", rank, scale), np.multiply(by_hand, c), rtol=1e-6)


def test_no_other_scale_has_a_smaller_error_than_the_contractive_one():
    """On 3000 draws of 6 normal directions for 4 values; its mean is K/(d + K + 1) of the update's square."""
    errors = {factor: 0.0 for factor in (0.7, 1.0, 1.4)}
    for i in range(3000):
        seeds = [10 * i + k for k in range(6)]
        C, P = pair(seeds, "a", 2, 2, 0)
        back = torch.einsum("k,kmr,krn->mn", coefficients(DELTA, seeds, "a", 0, "contractive"), C.double(), P.double())
        for factor in errors:
            errors[factor] += float((factor * back - DELTA).square().sum()) / 3000
    assert errors[1.0] < min(errors[0.7], errors[1.4])
    assert errors[1.0] / float(DELTA.square().sum()) == pytest.approx(1 - 6 / 11, rel=0.05)


def test_rows_are_orthonormal_and_leave_the_share_that_is_not_in_their_span():
    U, left = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double(), []
    for seed in range(2000):
        Q = rows(seed, "a", 2, 8).double()
        left.append(float((U - U @ Q.T @ Q).square().sum() / U.square().sum()))
    torch.testing.assert_close(Q @ Q.T, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert max(left) <= 1 and np.mean(left) == pytest.approx(1 - 2 / 8, abs=5 * np.std(left) / 2000**0.5)


def test_longer_updates_get_more_directions():
    assert shares([1.0, 0.5, 0.001], 200) == [200, 100, 2] and shares([0.0, 0.0], 200) == [2, 2]
    assert shares([1.0, 3.0], 1) == [1, 1]


@pytest.fixture
def separate(run_config) -> dict:
    return run_config | {"strategy": "separate"}


@pytest.fixture
def ferret(run_config) -> dict:
    return run_config | {"strategy": "ferret", "num-server-rounds": 1}


def at_start(run) -> list[torch.Tensor]:
    loaded = model.load(run.config.model, 2, run.config.seed)
    return [matrix(layer).double() for layer in loaded.targets.values()]


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_what_was_published_and_what_is_left_are_all_that_the_clients_did(separate, wire, monkeypatch):
    """Σ_t B̄ Q + mean E = Σ_t mean Δ, with β = 1 and all clients in every round; rounding to int8 is lost."""
    updates, left = [], {}
    projected = SeparateLocal.projected

    def watched(self, root, deltas, choices):
        arrays = projected(self, root, deltas, choices)
        updates.append(torch.cat([delta.flatten() for delta in deltas.values()]).double())
        left[len(updates) % 4] = torch.from_numpy(arrays["residual"]).double()
        return arrays

    monkeypatch.setattr(SeparateLocal, "projected", watched)
    run = play(separate | {"wire-dtype": wire})
    end = [matrix(layer).double() for layer in replica(run).targets.values()]
    published = torch.cat([(a - b).flatten() for a, b in zip(end, at_start(run), strict=True)])
    done, kept = sum(updates) / 4, sum(left.values()) / 4
    assert len(updates) == 12 and kept.norm() > 0.5 * done.norm()
    error = float((published + kept - done).norm() / done.norm())
    assert error < (1e-5 if wire == "float32" else 0.05)


def test_what_is_left_stays_at_the_node_and_is_gone_with_the_run(separate):
    seen, folders = set(), set()

    def look(partition, message, reply):
        seen.update(arrays_of(reply))
        folders.update(path.name for path in (cache() / "nodes").glob("*/memory-*"))
        return reply

    play(separate, tamper=look)
    assert seen == {"rows", "head"} and folders == {f"memory-{partition}" for partition in range(4)}
    assert not [*cache().rglob("memory-*")] and not [*cache().rglob("personal-*")]
    folders.clear()
    play(separate | {"separate.feedback": 0.0, "run-name": "without"}, tamper=look, run_id=2)
    assert not folders


def test_ferret_publishes_the_mean_of_what_clients_chose(ferret):
    replies = []

    def keep(partition, message, reply):
        replies.append(arrays_of(reply))
        return reply

    run = play(ferret, tamper=keep)
    expected = np.zeros((12, 5))
    for reply in replies:
        places = iter(zip(reply["indices"].tolist(), reply["scalars"].tolist(), strict=True))
        for layer, count in enumerate(reply["counts"].tolist()):
            for _ in range(count):
                k, gamma = next(places)
                expected[layer, k] += gamma / 4
    assert all(2 <= reply["counts"].min() < reply["counts"].max() == 5 for reply in replies)
    np.testing.assert_allclose(
        Ledger(run.ledger).read(1).arrays["table"].reshape(12, 5), expected, rtol=1e-4, atol=1e-12
    )


def test_coefficients_that_no_client_can_send_are_refused(ferret):
    method = make(parse(ferret), Shapes({"a": (6, 6), "b": (6, 6)}, head=2, parameters=74))
    good = {
        "counts": np.array([2, 3], np.uint16),
        "indices": np.array([0, 1, 0, 1, 4], np.uint16),
        "scalars": np.zeros(5, np.float32),
    }
    method.check(good, 1)
    for changes, reason in (
        ({"counts": np.array([2, 2], np.uint16)}, "5 coefficients, of which its counts name 4"),
        ({"indices": np.array([0, 1, 0, 1, 5], np.uint16)}, "direction 5 is not below ferret.directions = 5"),
        ({"indices": np.array([1, 1, 0, 1, 4], np.uint16)}, "occurs twice in a layer"),
    ):
        with pytest.raises(Refused, match=reason):
            method.check(good | changes, 1)
