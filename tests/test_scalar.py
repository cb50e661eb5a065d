"""Whole runs of the methods that send scalars: what travels, what moves, and what is refused."""

import numpy as np
import pytest
import torch
from helpers import arrays_of, digest, play, replayed, replica

from fedkrso_app.config import ConfigError
from fedkrso_app.core.directions import move, seeds_of
from fedkrso_app.core.flat import flatten
from fedkrso_app.core.subspace import matrix
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.training import model


@pytest.fixture
def decomfl(run_config) -> dict:
    return run_config | {"strategy": "decomfl", "num-server-rounds": 2}


def weights(half) -> list[torch.Tensor]:
    return [matrix(layer).clone() for layer in half.targets.values()]


def head(half) -> bytes:
    return flatten(half.head.values()).tobytes()


VARIANTS = [
    {"zeroth.head": "zeroth"},
    {"zeroth.head": "frozen", "decomfl.perturbations": 3},
    {"zeroth.directions": "dense", "zeroth.head": "zeroth"},
    {"decomfl.quantize": "sign", "zeroth.rank": 2},
    {"zeroth.head": "zeroth", "compute-dtype": "bfloat16"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: " ".join(map(str, changes.values())))
def test_fresh_nodes_that_missed_rounds_have_the_servers_bits(decomfl, changes):
    partial = decomfl | changes | {"fraction-train": 0.5, "num-server-rounds": 3, "local-steps": 2}
    run = play(partial)
    assert digest(play(partial | {"run-name": "fresh"}, devices=True, run_id=2)) == digest(run) == replayed(run)


@pytest.mark.parametrize("mode", ["first-order", "zeroth", "frozen"])
def test_the_head_travels_moves_or_stays_as_the_mode_says(decomfl, mode):
    seen = set()

    def look(partition, message, reply):
        seen.update(arrays_of(reply))
        return reply

    run = play(decomfl | {"zeroth.head": mode}, tamper=look)
    start, end = replica(run, 0), replica(run)
    assert seen == ({"scalars", "head"} if mode == "first-order" else {"scalars"})
    assert (head(start) == head(end)) == (mode == "frozen")
    assert not any(torch.equal(a, b) for a, b in zip(weights(start), weights(end), strict=True))


def test_an_entry_moves_the_layers_by_its_scalars_along_the_directions_of_its_root(decomfl):
    run = play(decomfl | {"zeroth.head": "frozen", "num-server-rounds": 1, "decomfl.perturbations": 2})
    entry, half = Ledger(run.ledger).read(1).arrays, replica(run, 0)
    assert set(entry) == {"root", "scalars"} and entry["scalars"].shape == (8,)
    name = next(iter(half.targets))
    moved = matrix(half.targets[name]).double()
    move(moved, seeds_of(int(entry["root"][0]), 8), entry["scalars"].tolist(), name, 1)
    torch.testing.assert_close(matrix(replica(run).targets[name]).double(), moved, rtol=0, atol=1e-6)


def test_signs_travel_as_bits_and_the_majority_moves_every_direction_by_the_rate(decomfl):
    replies = []

    def keep(partition, message, reply):
        replies.append(arrays_of(reply))
        return reply

    run = play(
        decomfl | {"decomfl.quantize": "sign", "zeroth.head": "frozen", "num-server-rounds": 1, "local-steps": 9},
        nodes=3,
        tamper=keep,
    )
    entry = Ledger(run.ledger).read(1).arrays
    bits = [np.unpackbits(reply["bits"], bitorder="little")[:9] for reply in replies]
    assert [reply["bits"].nbytes for reply in replies] == [2] * 3 and len({bit.tobytes() for bit in bits}) > 1
    majority = np.sum(bits, axis=0) >= 2
    np.testing.assert_array_equal(np.unpackbits(entry["bits"], bitorder="little")[:9], majority)
    half = replica(run, 0)
    name = next(iter(half.targets))
    moved = matrix(half.targets[name]).double()
    steps = np.where(majority, 1e-4, -1e-4).astype(np.float32).tolist()
    move(moved, seeds_of(int(entry["root"][0]), 9), steps, name, 1)
    torch.testing.assert_close(matrix(replica(run).targets[name]).double(), moved, rtol=0, atol=1e-6)


def test_bits_beyond_the_last_direction_are_refused(decomfl):
    method = make(parse(decomfl | {"decomfl.quantize": "sign"}), Shapes({"a": (3, 4)}, head=2, parameters=14))
    with pytest.raises(Refused, match="bits set beyond its 4"):
        method.check({"bits": np.array([16], np.uint8)}, 1)


@pytest.mark.parametrize("key", ["none", "sign"])
def test_one_hostile_client_moves_a_median_no_further_than_the_others_do(decomfl, key):
    """It sends the largest scalars that are not refused, or the opposite of every sign."""
    settings = decomfl | {"decomfl.quantize": key, "zeroth.head": "frozen", "num-server-rounds": 1}
    sent = []

    def forge(partition, message, reply):
        name = "bits" if key == "sign" else "scalars"
        value = reply.content["update"][name].numpy().copy()
        if partition == 1:
            value = np.full_like(value, 30) if key == "none" else (~value) & 15
            reply.content["update"][name] = type(reply.content["update"][name])(value)
        else:
            sent.append(value)
        return reply

    run = play(settings | {"aggregation": "median"}, nodes=5, tamper=forge)
    entry = Ledger(run.ledger).read(1).arrays
    if key == "none":
        assert (np.abs(entry["scalars"]) <= np.abs(sent).max(0)).all()
    else:
        good = np.unpackbits(np.stack(sent), axis=1, bitorder="little")[:, :4]
        agreed = (good.mean(0) == 0) | (good.mean(0) == 1)
        np.testing.assert_array_equal(np.unpackbits(entry["bits"], bitorder="little")[:4][agreed], good[0][agreed])


def test_dense_steps_beside_weights_of_few_bits_are_refused(decomfl):
    with pytest.raises(ConfigError, match="'dense' needs compute-dtype = 'float32'"):
        parse(decomfl | {"zeroth.directions": "dense", "compute-dtype": "bfloat16"})


def test_a_language_model_has_no_head_to_send(model_folder, decomfl):
    outline = Shapes({"a": (3, 4)}, head=0, parameters=12)
    method = make(parse(decomfl | {"zeroth.head": "zeroth"}), outline)
    assert method.weights_size == 12 and method.paper_bytes() == 2 * 4 * 4 + 8
    assert model.outline(str(model_folder), 2).head
