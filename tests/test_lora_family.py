"""The family of LoRA: each method's own laws, and where two methods are one. The expected values are dense."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from helpers import arrays_of, digest, play, replayed, replica
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.config import ConfigError
from fedkrso_app.core.flat import unflatten
from fedkrso_app.core.products import by_layer
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs import plan
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.strategies.rolora import RoLoRA
from fedkrso_app.training import model

SCALE = 4.0  # alpha / rank of run_config


class Replies:
    """Keeps every reply of a run: ``at[round][partition]`` has its arrays, ``entries`` how many came with a message."""

    def __init__(self):
        self.at, self.entries, self.versions = {}, [], []

    def __call__(self, partition, message, reply):
        round = message.content["train"]["round"]
        self.at.setdefault(round, {})[partition] = arrays_of(reply)
        self.entries.append(len(message.content.array_records))
        self.versions.append(message.content["train"]["version"])
        return reply


def matrices(half, name, flat):
    """A flat array of FedIT's as one float64 matrix per layer."""
    tensors = [torch.zeros_like(tensor) for tensor in half.tensors[name]]
    unflatten(flat, tensors)
    return [tensor.double() for tensor in tensors]


def weights(run, version=None):
    """The weights of the target layers at a version (-1: W^0), by layer, float64."""
    half = replica(run, version)
    state = half.plain_state()
    return [state[f"{name}.weight"].double() for name in half.targets]


# RoLoRA


def test_rolora_moves_one_factor_in_a_round_and_its_product_is_the_mean_of_the_products(run_config):
    replies = Replies()
    run = play(run_config | {"strategy": "rolora", "num-server-rounds": 2}, tamper=replies)
    entries = [Ledger(run.ledger).read(version).arrays for version in (0, 1, 2)]
    assert [set(entry) for entry in entries] == [{"A", "B", "head"}, {"B", "head"}, {"A", "head"}]
    half = replica(run, 0)
    A, B = matrices(half, "A", entries[0]["A"]), matrices(half, "B", entries[1]["B"])
    base = weights(run, 0)
    means = [
        [sum(Bi @ a for Bi in layer) / 4 for layer, a in zip(of_layers(half, "B", replies.at[1]), A, strict=True)],
        [sum(b @ Ai for Ai in layer) / 4 for layer, b in zip(of_layers(half, "A", replies.at[2]), B, strict=True)],
    ]
    for version in (1, 2):
        for W, W0, product in zip(weights(run, version), base, means[version - 1], strict=True):
            torch.testing.assert_close(W, W0 + SCALE * product, rtol=0, atol=1e-6)


def of_layers(half, name, replies):
    """Of each layer the factor ``name`` in every reply."""
    return list(zip(*(matrices(half, name, arrays[name]) for arrays in replies.values()), strict=True))


def test_rolora_needs_two_entries_at_most_and_they_lead_to_the_same_bits(run_config):
    settings = run_config | {"strategy": "rolora", "fraction-train": 0.5, "num-server-rounds": 6}
    replies = Replies()
    run = play(settings, tamper=replies, devices=True)
    assert set(replies.entries) == {1, 2} and replayed(run) == digest(run)
    assert digest(play(settings | {"run-name": "warm"}, run_id=2)) == digest(run)


def test_a_round_of_rolora_that_publishes_nothing_keeps_the_turn(run_config):
    replies = Replies()

    def failing(partition, message, reply):
        if message.content["train"]["round"] == 2:
            return Message(Error(code=8, reason="gone"), reply_to=message)
        return replies(partition, message, reply)

    run = play(run_config | {"strategy": "rolora", "num-server-rounds": 4}, nodes=2, tamper=failing)
    assert [set(replies.at[round][0]) - {"head"} for round in (1, 3, 4)] == [{"B"}, {"A"}, {"B"}]
    assert [line["version"] for line in run.metrics()] == [0, 1, 1, 2, 3]


def test_rolora_refuses_the_factor_whose_turn_it_is_not(run_config, caplog):
    def swap(partition, message, reply):
        if partition == 1:
            reply.content["update"]["A"] = reply.content["update"].pop("B")
        return reply

    play(run_config | {"strategy": "rolora", "num-server-rounds": 1}, nodes=2, tamper=swap)
    assert "partition 1 refused: it holds A, head, expected B and head" in caplog.text


def test_rolora_without_turns_of_A_is_ffa_lora(run_config, monkeypatch):
    ffa = play(run_config | {"strategy": "ffa-lora"})
    monkeypatch.setattr(RoLoRA, "factor", "B")
    assert digest(play(run_config | {"strategy": "rolora", "run-name": "rolora"}, run_id=2)) == digest(ffa)


def test_the_bytes_planned_of_rolora_hold_the_factor_that_a_client_missed(run_config):
    settings = run_config | {"strategy": "rolora", "fraction-train": 0.5, "num-server-rounds": 12, "local-steps": 1}
    replies = Replies()
    run = play(settings, nodes=8, tamper=replies)
    method = make(parse(settings), Shapes.of(model.outline(settings["model"], 2)))
    down = plan.traffic(method, 8, 0)[0]["down"]
    factor = plan.record_bytes(method.entry.only(["A"]), {})
    late = replies.entries.count(2) / len(replies.entries)  # a draw; half of those after the first on average
    expected = down + (late - 11 / 12 / 2) * factor
    assert expected == pytest.approx(sum(line["downlink_bytes"] for line in run.metrics()) / 48, rel=0.01)


def test_the_ledger_of_rolora_says_how_far_each_factor_moved_since_its_last_entry(run_config):
    run = play(run_config | {"strategy": "rolora", "num-server-rounds": 4})
    ledger = Ledger(run.ledger)
    assert ledger.versions() == [2, 3, 4]  # two versions that they lead to
    listed = CliRunner().invoke(cli.app, ["ledger", str(run.path), "--json", "--layers"])
    lines = answered(listed)["entries"]
    moved = np.linalg.norm(ledger.read(4).arrays["A"].astype(float) - ledger.read(2).arrays["A"])
    assert lines[-1]["norms"]["A"] == pytest.approx(moved) and "B" not in lines[-1]["norms"]
    assert CliRunner().invoke(cli.app, ["ledger", str(run.path), "--verify"]).exit_code == 0


def answered(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# FedSVD


def test_fedsvd_sends_orthonormal_rows_and_the_products_mean(run_config):
    replies = Replies()
    run = play(run_config | {"strategy": "fedsvd", "num-server-rounds": 2}, tamper=replies)
    assert all(set(arrays) == {"B", "head"} for arrays in replies.at[1].values())
    half, ledger = replica(run, 1), Ledger(run.ledger)
    before = matrices(half, "A", ledger.read(1).arrays["A"])
    after = ledger.read(2).arrays
    for Bs, A0, B, A in zip(
        of_layers(half, "B", replies.at[2]), before, matrices(half, "B", after["B"]), matrices(half, "A", after["A"]),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(B @ A, sum(Bs) / 4 @ A0, rtol=0, atol=1e-6)
        torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close(A0 @ A.T @ A, A0, rtol=0, atol=1e-6)  # the same span
        assert B[:, 0].norm() >= B[:, 1].norm() and not torch.allclose(A, A0, atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"evaluate": "off"}, {"aggregation": "median"}])
def test_fedsvd_without_decompositions_is_ffa_lora(run_config, more):
    """With a server that has no model too: then A comes from the seed on both sides."""
    same = run_config | {"fedsvd.learning-rate": 0.05, "fedsvd.period": 0} | more
    ffa, svd = (
        play(same | {"strategy": name, "run-name": name}, run_id=i) for i, name in enumerate(("ffa-lora", "fedsvd"))
    )
    assert replayed(svd) == replayed(ffa)


def test_fedsvd_decomposes_every_period(run_config):
    run = play(run_config | {"strategy": "fedsvd", "fedsvd.period": 2, "num-server-rounds": 3})
    rows = [Ledger(run.ledger).read(version).arrays["A"] for version in (2, 3)]
    assert np.array_equal(*rows)  # the third round keeps what the second has made
    half = replica(run, 3)
    for A in matrices(half, "A", rows[0]):
        torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)


# Clients of different ranks

RANKED = ["flexlora", "hetlora"]
UNEVEN = {"lora.ranks": "2,1"}


def uneven(run_config, strategy):
    return run_config | UNEVEN | {"strategy": strategy}


def products_of(half, replies):
    """Of each layer the product of every client's factors, float64."""
    sizes = [(B.shape[0], A.shape[1]) for A, B in half.pairs]
    clients = [list(by_layer(arrays["A"], arrays["B"], sizes)) for arrays in replies.values()]
    return [[(B.double() @ A.double()) for A, B in layer] for layer in zip(*clients, strict=True)]


@pytest.mark.parametrize("strategy", RANKED)
def test_each_client_sends_its_rank_and_another_is_refused(strategy, run_config, caplog):
    replies = Replies()

    def cut(partition, message, reply):
        reply = replies(partition, message, reply)
        if partition == 2:
            arrays = arrays_of(reply)
            content = {name: values if name == "head" else values[:1] for name, values in arrays.items()}
            reply.content["update"] = wire.pack(content)
        return reply

    play(uneven(run_config, strategy) | {"num-server-rounds": 1}, tamper=cut)
    assert [len(replies.at[1][p]["A"]) for p in range(4)] == [2, 1, 2, 1]
    assert "partition 2 refused: array 'A' has shape (1, " in caplog.text


@pytest.mark.parametrize("strategy", RANKED)
def test_a_client_of_rank_one_trains_as_if_all_had_rank_one(strategy, run_config):
    replies, alone = Replies(), Replies()
    play(uneven(run_config, strategy) | {"num-server-rounds": 1}, tamper=replies)
    one = {"strategy": strategy, "lora.rank": 1, "lora.alpha": 4.0, "num-server-rounds": 1, "run-name": "one"}
    play(run_config | one, tamper=alone, run_id=2)
    for name, values in replies.at[1][1].items():
        np.testing.assert_allclose(values, alone.at[1][1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", RANKED)
def test_uneven_clients_catch_up_resume_and_send_few_bits_to_the_same_model(strategy, run_config):
    settings = uneven(run_config, strategy) | {"wire-dtype": "int8", "fraction-train": 0.5, "num-server-rounds": 4}
    run = play(settings, devices=True)
    assert [line["refused"] + line["failed"] for line in run.metrics()] == [0] * 5
    assert digest(play(settings | {"run-name": "warm"}, run_id=2)) == digest(run) == replayed(run)


@pytest.mark.parametrize("strategy", RANKED)
def test_the_bytes_planned_of_uneven_clients_are_those_of_a_run(strategy, run_config):
    settings = uneven(run_config, strategy)
    lines = play(settings).metrics()
    costs, _ = plan.traffic(make(parse(settings), Shapes.of(model.outline(settings["model"], 2))), 4, 0)
    assert 12 * costs["up"] == pytest.approx(sum(line["uplink_bytes"] for line in lines), rel=0.01)
    assert 12 * costs["down"] == pytest.approx(sum(line["downlink_bytes"] for line in lines), rel=0.01)


def test_ranks_are_refused_where_they_cannot_be(run_config):
    with pytest.raises(ConfigError, match=r"lora\.ranks = '2,1' does not go with fedit, whose clients share one rank"):
        parse(uneven(run_config, "fedit"))
    with pytest.raises(ConfigError, match="'2,x' is not a list of ranks"):
        parse(run_config | {"strategy": "hetlora", "lora.ranks": "2,x"})
    with pytest.raises(ConfigError, match=r"lora\.ranks = '2,16' is impossible: each must be below 16"):
        play(run_config | {"strategy": "hetlora", "lora.ranks": "2,16"})
    with pytest.raises(ConfigError, match="aggregation = 'median' does not go with flexlora"):
        parse(run_config | {"strategy": "flexlora", "aggregation": "median"})
    assert parse(run_config | UNEVEN | {"strategy": "fedkrso"})  # it has no LoRA


# FlexLoRA


@pytest.mark.parametrize("ranks", ["", "2,1"])
def test_flexlora_is_the_dense_decomposition_of_the_mean_of_the_products(run_config, ranks):
    replies = Replies()
    run = play(run_config | {"strategy": "flexlora", "lora.ranks": ranks, "num-server-rounds": 2}, tamper=replies)
    half, base = replica(run, 2), weights(run, -1)
    for (A, _), W, W0, each in zip(half.pairs, weights(run), base, products_of(half, replies.at[2]), strict=True):
        U, S, Vh = torch.linalg.svd(sum(each) / len(each))
        torch.testing.assert_close(W - W0, SCALE * (U[:, :2] * S[:2] @ Vh[:2]), rtol=0, atol=1e-6)
        torch.testing.assert_close(A @ A.T, torch.eye(2), rtol=0, atol=1e-5)


def test_what_the_sum_lacks_in_flexlora_trains_in_the_next_round(run_config):
    """One reply of rank 1: the second component begins as zero in B alone."""
    settings = uneven(run_config, "flexlora") | {"num-server-rounds": 2}

    def only(partition, message, reply):
        first = message.content["train"]["round"] == 1
        return reply if partition == first else Message(Error(code=8, reason="gone"), reply_to=message)

    run = play(settings, nodes=2, tamper=only)
    B = [Ledger(run.ledger).read(version).arrays["B"] for version in (1, 2)]
    assert np.abs(B[0][1]).max() < 1e-6 < 1e-3 < np.abs(B[1][1]).max()


# HetLoRA


def test_hetlora_of_equal_ranks_and_weights_is_fedit(run_config):
    fedit = play(run_config | {"strategy": "fedit"})
    het = play(run_config | {"strategy": "hetlora", "hetlora.weights": "config", "run-name": "het"}, run_id=2)
    assert digest(het) == digest(fedit)


def test_hetlora_weighs_padded_factors_by_the_norms_of_the_dense_products(run_config):
    replies = Replies()
    run = play(uneven(run_config, "hetlora") | {"num-server-rounds": 1}, tamper=replies)
    half = replica(run, 1)
    squares = np.zeros(4)
    for each in products_of(half, replies.at[1]):
        squares += [float(product.square().sum()) for product in each]
    p = np.sqrt(squares) / np.sqrt(squares).sum()
    entry = Ledger(run.ledger).read(1).arrays
    for name in ("A", "B"):
        rows = [replies.at[1][i][name] for i in range(4)]
        expected = [sum(w * row[k] for w, row in zip(p, rows, strict=True) if k < len(row)) for k in (0, 1)]
        np.testing.assert_allclose(entry[name], expected, rtol=1e-4, atol=1e-7)
    assert p.max() > 1.2 * p.min()
