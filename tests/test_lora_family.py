"""The family of LoRA: each method's own laws, and where two methods are one. The expected values are dense."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from helpers import arrays_of, digest, play, replayed, replica
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.core.flat import unflatten
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
    """The weights of the target layers at a version, by layer, float64."""
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
