"""Whole runs of the methods that send scalars: what travels, what moves, and what is refused."""

import numpy as np
import pytest
import torch
from helpers import arrays_of, digest, play, replayed, replica
from test_families import build, write_texts

from fedkrso_app.config import ConfigError
from fedkrso_app.core.directions import move, seeds_of
from fedkrso_app.core.flat import flatten
from fedkrso_app.core.subspace import matrix
from fedkrso_app.federation.aggregate import Aggregate
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.fedkseed import probabilities
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes


@pytest.fixture
def decomfl(run_config) -> dict:
    return run_config | {"strategy": "decomfl", "num-server-rounds": 2}


def weights(half) -> list[torch.Tensor]:
    return [matrix(layer).clone() for layer in half.targets.values()]


def at_start(run):
    """The half beside the model at W^0, which needs no entry."""
    loaded = model.load(run.config.model, 2, run.config.seed)
    return make(run.config, Shapes.of(loaded)).local(loaded)


def head(half) -> bytes:
    return flatten(half.head.values()).tobytes()


VARIANTS = [
    {"zeroth.head": "zeroth"},
    {"zeroth.head": "frozen", "decomfl.perturbations": 3},
    {"zeroth.directions": "dense", "zeroth.head": "zeroth"},
    {"decomfl.quantize": "sign", "zeroth.rank": 2},
    {"zeroth.head": "zeroth", "compute-dtype": "bfloat16"},
    {"strategy": "fedkseed", "zeroth.head": "zeroth", "compute-dtype": "bfloat16"},
    {"strategy": "fedkseed-pro", "wire-dtype": "int8"},
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


@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_a_language_model_moves_by_scalars_alone(family, decomfl, model_folder, tmp_path):
    """GPT-2 stores its weights the other way round; neither has a head of its own."""
    data = {"task": "causal-lm", "data-dir": str(write_texts(tmp_path / "d"))}
    run = play(decomfl | data | {"model": str(build(tmp_path / "m", model_folder, family, True))}, nodes=2)
    assert replayed(run) == digest(run)
    assert "head" not in Ledger(run.ledger).read(2).arrays
    start, end = replica(run, 0), replica(run)
    assert not any(torch.equal(a, b) for a, b in zip(weights(start), weights(end), strict=True))
    loss = [line["train_loss"] for line in run.metrics()[1:]]
    assert np.isfinite(loss).all()
    assert make(run.config, Shapes({"a": (3, 4)}, head=0, parameters=12)).paper_bytes() == 2 * 4 * 4 + 8


@pytest.mark.parametrize("family", ["deberta", "distilbert", "modernbert"])
def test_classifiers_of_other_families_move_by_losses_too(family, decomfl, model_folder, tmp_path):
    folder = build(tmp_path, model_folder, family, False)
    run = play(decomfl | {"model": str(folder), "zeroth.head": "zeroth", "num-server-rounds": 1}, nodes=2)
    assert replayed(run) == digest(run) and run.metrics()[-1]["clients"] == 2


# --- FedKSeed ---


@pytest.fixture
def fedkseed(run_config) -> dict:
    return run_config | {"strategy": "fedkseed", "num-server-rounds": 2}


def reply(method, indices, scalars, slopes=None, counts=None) -> dict[str, np.ndarray]:
    arrays = {"indices": np.array(indices, np.uint16), "scalars": np.array(scalars, np.float32)}
    if slopes is not None:
        arrays |= {"slopes": np.array(slopes, np.float32), "counts": np.array(counts, np.uint32)}
    return arrays | {name: np.zeros(2, np.float32) for name in method.head}


def concluded(method, replies, round=1) -> dict[str, np.ndarray]:
    sums = Aggregate(method)
    for partition, arrays in enumerate(replies):
        method.check(arrays, round)
        sums.add(method.summands(arrays), arrays, 1, partition)
    return method.conclude(sums, round)


SHAPES = Shapes({"a": (3, 4)}, head=2, parameters=14)


def test_slots_add_up_over_clients_and_rounds_and_one_that_is_missing_counts_as_zero(fedkseed):
    method = make(parse(fedkseed | {"fedkseed.slots": 4}), SHAPES)
    for round in (1, 2):
        entry = concluded(method, [reply(method, [0, 2], [4e-6, -2e-6]), reply(method, [3], [1e-3])], round)
        np.testing.assert_allclose(entry["slots"], np.array([2e-6, 0, -1e-6, 5e-4]) * round, rtol=1e-6)
        method.observe(round, entry)


def test_the_newest_entry_alone_leads_from_the_start_to_the_model(fedkseed):
    run = play(fedkseed | {"zeroth.head": "frozen", "num-server-rounds": 3, "fedkseed.slots": 5})
    assert make(run.config, SHAPES).entry.span == 1
    half, slots = at_start(run), Ledger(run.ledger).read(3).arrays["slots"]
    name = next(iter(half.targets))
    moved = matrix(half.targets[name]).clone()
    move(moved, half.seeds, slots.tolist(), name, 1)
    assert slots.shape == (5,) and slots.all() and torch.equal(matrix(replica(run).targets[name]), moved)


def test_with_one_slot_all_steps_of_all_clients_lie_on_a_line(fedkseed):
    run = play(fedkseed | {"zeroth.head": "frozen", "fedkseed.slots": 1})
    start, end = (torch.cat([W.flatten() for W in weights(half)]).double() for half in (at_start(run), replica(run)))
    (s,) = Ledger(run.ledger).read(2).arrays["slots"]
    torch.testing.assert_close((end - start).abs(), torch.full_like(start, abs(s)), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"indices": np.array([0, 4], np.uint16)}, "slot 4 is not below fedkseed.slots = 4"),
        ({"indices": np.array([1, 1], np.uint16)}, "a slot occurs twice"),
        ({"counts": np.array([3, 2], np.uint32)}, "do not add up to local-steps = 4"),
        ({"counts": np.array([4, 0], np.uint32)}, "do not add up to local-steps = 4"),
        ({"slopes": np.array([3e3 + 9, 1], np.float32)}, "sums of slopes cannot be"),
        ({"slopes": np.array([1, -1], np.float32)}, "sums of slopes cannot be"),
    ],
)
def test_replies_that_no_client_can_send_are_refused(fedkseed, changes, reason):
    method = make(parse(fedkseed | {"strategy": "fedkseed-pro", "fedkseed.slots": 4}), SHAPES)
    good = reply(method, [0, 1], [1e-6, 1e-6], [3e3, 0.5], [3, 1])
    method.check(good, 1)
    with pytest.raises(Refused, match=reason):
        method.check(good | changes, 1)


def test_steeper_slots_are_drawn_more_often_but_at_most_e_times():
    """By hand: means 0, 2 and 4 are spread to 0, 1/2 and 1."""
    e = np.exp([0, 0.5, 1])
    np.testing.assert_allclose(probabilities(np.array([0.0, 2.0, 4.0], np.float32)), e / e.sum(), rtol=1e-6)
    np.testing.assert_allclose(probabilities(np.zeros(5, np.float32)), np.full(5, 0.2))
    p = probabilities(np.random.default_rng(0).random(100).astype(np.float32) * 1e3)
    assert p.max() / p.min() == pytest.approx(np.e, rel=1e-6)


def test_probabilities_follow_from_the_mean_slope_over_all_draws_of_the_run(fedkseed):
    method = make(parse(fedkseed | {"strategy": "fedkseed-pro", "fedkseed.slots": 3}), SHAPES)
    p = lambda: np.frombuffer(method.instructions(1)["p"], "<f4")  # noqa: E731
    np.testing.assert_allclose(p(), np.full(3, 1 / 3), rtol=1e-6)
    for one, two in ((6, 2), (600, 48)):
        replies = reply(method, [0, 1], [0, 0], [one, 10], [3, 1]), reply(method, [0], [0], [two], [4])
        method.kept = {"seen": concluded(method, replies)["seen"]}
    means = np.array([(6 + 2 + 600 + 48) / 14, 20 / 2, 0])
    np.testing.assert_allclose(p(), probabilities(means), rtol=1e-5)


def test_the_pro_form_draws_by_the_probabilities_that_it_is_sent(fedkseed):
    run = play(fedkseed | {"strategy": "fedkseed-pro", "fedkseed.slots": 3, "local-steps": 10})
    half = at_start(run)
    certain = {"p": np.array([0, 0, 1], "<f4").tobytes()}
    with half.session(certain, np.random.default_rng(0)) as session:
        assert {session.optimizers[-1].seeds(j)[0] for j in range(20)} == {half.seeds[2]}
    kept = Ledger(run.path / "server").read(2).arrays["seen"]
    assert kept[:, 1].sum() == pytest.approx(2 * 10) and (kept[:, 0] > 0).all()


# --- FedMeZO ---


@pytest.fixture
def fedmezo(run_config) -> dict:
    return run_config | {"strategy": "fedmezo", "num-server-rounds": 2}


def test_the_first_round_moves_b_alone_and_the_next_both_factors(fedmezo):
    run = play(fedmezo)
    start = at_start(run).state()
    first, second = (Ledger(run.ledger).read(version).arrays for version in (1, 2))
    np.testing.assert_array_equal(first["A"], start["A"])
    assert first["B"].any() and (second["A"] != first["A"]).all() and (second["B"] != first["B"]).any()


def test_clients_draw_directions_of_their_own(fedmezo):
    """One step moves B by ± the same length along random signs; where all drew alike, so would the mean."""
    run = play(fedmezo | {"num-server-rounds": 1, "local-steps": 1, "warmup": 0.0})
    lengths = np.unique(np.abs(Ledger(run.ledger).read(1).arrays["B"]).round(9))
    assert len(lengths) > 2


@pytest.mark.parametrize("mode", ["zeroth", "frozen"])
def test_the_head_of_fedmezo_moves_by_losses_or_stays_at_home(fedmezo, mode):
    run = play(fedmezo | {"zeroth.head": mode})
    names = set(Ledger(run.ledger).read(2).arrays)
    assert names == ({"A", "B", "head"} if mode == "zeroth" else {"A", "B"})
    assert (head(at_start(run)) == head(replica(run))) == (mode == "frozen")
    assert replayed(run) == digest(run)


def test_the_bytes_are_those_of_fedit(fedmezo):
    paper = {name: make(parse(fedmezo | {"strategy": name}), SHAPES).paper_bytes() for name in ("fedmezo", "fedit")}
    assert paper["fedmezo"] == paper["fedit"] == 8 * (2 * 3 + 2 * 4 + 2)
