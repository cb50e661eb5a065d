"""The family of LoRA: each method's own laws, and where two methods are one. The expected values are dense."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from helpers import arrays_of, digest, play, replayed, replica
from test_families import build
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.config import ConfigError
from fedkrso_app.core import projection, srd
from fedkrso_app.core.flat import unflatten
from fedkrso_app.core.products import by_layer
from fedkrso_app.core.subspace import is_conv1d, matrix
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs import plan
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.fedkrso import FedKRSOLocal
from fedkrso_app.strategies.flora import FLoRALocal
from fedkrso_app.strategies.rolora import RoLoRA
from fedkrso_app.training import loop, model
from fedkrso_app.training.shapes import Shapes

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


# FLoRA


class Given:
    """The replies of a round, as ``conclude`` sees them."""

    def __init__(self, replies):
        self.replies = [(1 / len(replies), arrays) for arrays in replies]

    def mean(self, key):
        return np.mean([arrays[key] for _, arrays in self.replies], axis=0, dtype=np.float64).astype(np.float32)


@pytest.mark.parametrize("ranks", ["", "2,1"])
def test_flora_moves_W_by_the_mean_of_the_products(run_config, ranks):
    replies = Replies()
    run = play(run_config | {"strategy": "flora", "lora.ranks": ranks, "num-server-rounds": 2}, tamper=replies)
    half = replica(run, 2)
    W0 = weights(run, -1)
    for round in (1, 2):
        products = products_of(half, replies.at[round])
        W0 = [W + SCALE * sum(each) / 4 for W, each in zip(W0, products, strict=True)]
        for W, expected in zip(weights(run, round), W0, strict=True):
            torch.testing.assert_close(W, expected, rtol=0, atol=1e-6)
    assert len(Ledger(run.ledger).read(1).arrays["A"]) == (6 if ranks else 8)
    drawn = {arrays["A"].tobytes() for of in replies.at.values() for arrays in of.values()}
    assert len(drawn) == 8  # of each client and round its own


def test_flora_sends_its_weights_where_they_are_smaller_than_the_missed_stacks(run_config):
    """Here a stack of three clients has 2496 values, and all weights are 3584."""
    settings = run_config | {"strategy": "flora", "num-server-rounds": 5}
    kinds = set()

    def absent(partition, message, reply):
        kinds.update(name.split("-")[0] for name in message.content.array_records if partition == 3)
        late = partition == 3 and message.content["train"]["round"] < 5
        return Message(Error(code=8, reason="gone"), reply_to=message) if late else reply

    run = play(settings, tamper=absent, devices=True)
    assert replayed(run) == digest(run) and kinds == {"entry", "weights"}


def test_flora_cuts_the_stack_to_the_rank_of_merging(run_config):
    run = play(run_config | {"strategy": "flora", "flora.merge-rank": 3, "num-server-rounds": 1})
    assert Ledger(run.ledger).read(1).arrays["A"].shape[0] == 3
    for W, W0 in zip(weights(run), weights(run, -1), strict=True):
        S = torch.linalg.svdvals(W - W0)
        assert S[2] > 1e-5 > 1e-6 > S[3]


def test_flora_with_A_at_rest_is_fedkrso_with_one_seed_in_one_interval(run_config, monkeypatch):
    """P = A, the accumulator is s·B, and the rate s·η; Adam sees a gradient's scale in its ε alone."""
    rates = {"fedkrso.learning-rate": SCALE * 0.01, "flora.learning-rate": 0.01, "fedkrso.interval": 4}
    config = parse(run_config | {"warmup": 0.0} | rates)
    batch = {"input_ids": torch.tensor([[0, 7, 8, 9, 2]]), "labels": torch.tensor([1])}

    class Frozen(FLoRALocal):
        factors = ("B",)

    def trained(half):
        """The layers' weights after four steps, and before."""
        local, rng = half(model.load(run_config["model"], 2, 0), config), np.random.default_rng(0)
        before = [matrix(layer).clone() for layer in local.targets.values()]
        with local.session({"seeds": np.arange(3, dtype="<u8").tobytes()}, rng) as session:
            session.optimizers = session.optimizers[:1]  # the head's rates differ
            session.optimizers[0].param_groups[0]["eps"] = SCALE * 1e-8  # RSO has its own
            loop.train(local.module, iter([batch] * 4), session, config, rng)
            after = [matrix(layer).clone() for layer in local.targets.values()]
        return local, after, before

    flora, after, before = trained(Frozen)
    moved = [SCALE * (B @ A).detach() for A, B in flora.pairs]
    drawn = {name: A.detach().numpy() for name, (A, _) in zip(flora.targets, flora.pairs, strict=True)}
    assert all(map(torch.equal, after, before))
    monkeypatch.setattr(projection, "kept", lambda seed, name, r, n, kind: drawn[name])
    _, after, before = trained(FedKRSOLocal)
    for product, end, start in zip(moved, after, before, strict=True):
        torch.testing.assert_close(product, end - start, rtol=0, atol=1e-5)
        assert product.abs().max() > 0.01


def test_flexlora_of_all_components_makes_floras_model_of_the_round(run_config):
    replies = Replies()
    play(uneven(run_config, "flexlora") | {"num-server-rounds": 1}, tamper=replies)
    small = [replies.at[1][p] for p in (1, 3)]  # two of rank 1: as many components as R = 2
    halves, states = [], []
    for strategy in ("flexlora", "flora"):
        loaded = model.load(run_config["model"], 2, 0)
        method = make(parse(uneven(run_config, strategy)), Shapes.of(loaded))
        halves.append(method.local(loaded))
        halves[-1].apply(method.conclude(Given(small), 1))
        states.append(halves[-1].plain_state())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-6)


# FedEx-LoRA


def test_fedex_moves_the_model_by_the_mean_of_the_products(run_config):
    replies = Replies()
    run = play(run_config | {"strategy": "fedex-lora", "num-server-rounds": 2}, tamper=replies)
    half, base = replica(run, 2), weights(run, -1)
    for round in (1, 2):
        products = products_of(half, replies.at[round])
        for W, W_base, each in zip(weights(run, round), base, products, strict=True):
            torch.testing.assert_close(W, W_base + SCALE * sum(each) / 4, rtol=0, atol=1e-6)
        means = products_of(half, {0: Ledger(run.ledger).read(round).arrays})
        base = [W - SCALE * product for W, (product,) in zip(weights(run, round), means, strict=True)]


@pytest.mark.parametrize(("clients", "rank"), [(1, -1), (4, 0)])
def test_fedex_without_a_residual_is_fedit(run_config, clients, rank):
    fedit = play(run_config | {"strategy": "fedit"}, nodes=clients)
    own = {"strategy": "fedex-lora", "fedex-lora.residual-rank": rank, "run-name": "fedex"}
    assert digest(play(run_config | own, nodes=clients, run_id=2)) == digest(fedit)


def test_a_missed_entry_of_fedex_brings_its_residual_alone(run_config):
    settings = run_config | {"strategy": "fedex-lora", "fraction-train": 0.5, "num-server-rounds": 6}
    settings |= {"fedex-lora.residual-rank": 1}  # short enough for entries to be sent, not weights
    older = set()

    def look(partition, message, reply):
        records = message.content.array_records
        for name in sorted(records)[:-1]:
            older.update(records[name])
        return reply

    run = play(settings, tamper=look, devices=True)
    assert older == {"residual-A", "residual-B"} and replayed(run) == digest(run)


def test_the_residual_moves_a_conv1d_along_its_own_sides(run_config, model_folder, tmp_path):
    """The authors' code adds it transposed, which is right for GPT-2 and wrong, without a word, for square linears."""
    folder = build(tmp_path / "gpt2", model_folder, "gpt2", True)
    for name, classes in ((str(folder), 0), (str(model_folder), 2)):
        loaded = model.load(name, classes, 0)
        method = make(parse(run_config | {"strategy": "fedex-lora"}), Shapes.of(loaded))
        half, rng = method.local(loaded), np.random.default_rng(0)
        before = half.plain_state()
        A, B = (
            rng.standard_normal((3, sum(side)), dtype=np.float32)
            for side in reversed(list(zip(*half.sizes, strict=True)))
        )
        half.move(A, B)
        for layer, (A_l, B_l) in zip(half.targets, by_layer(A, B, half.sizes), strict=True):
            delta = half.plain_state()[f"{layer}.weight"] - before[f"{layer}.weight"]
            delta = delta.T if is_conv1d(half.targets[layer]) else delta
            torch.testing.assert_close(delta, SCALE * B_l @ A_l, rtol=0, atol=1e-4)


# LoRA-FAIR


def test_lora_fair_comes_nearer_to_the_mean_of_the_products_and_a_large_penalty_makes_it_fedit(run_config):
    replies, states, off = Replies(), {}, {}
    for i, penalty in enumerate((None, 1e12, 0.0), start=1):
        own = {"strategy": "lora-fair", "lora-fair.penalty": penalty} if i > 1 else {"strategy": "fedit"}
        run = play(run_config | own | {"run-name": str(i), "num-server-rounds": 1}, tamper=replies, run_id=i)
        states[penalty] = weights(run)
    half = replica(run, 1)
    As, Bs = (of_layers(half, name, replies.at[1]) for name in ("A", "B"))
    exact = [sum(b @ a for b, a in zip(B, A, strict=True)) / 4 for B, A in zip(Bs, As, strict=True)]
    for penalty, state in states.items():
        pairs = zip(state, weights(run, -1), exact, strict=True)
        off[penalty] = [float((W - W0 - SCALE * product).norm()) for W, W0, product in pairs]
    for W, fedit in zip(states[1e12], states[None], strict=True):
        torch.testing.assert_close(W, fedit, rtol=0, atol=1e-6)
    assert all(fair < 0.999 * fedit for fair, fedit in zip(off[0.0], off[None], strict=True))


# Fed-DARE


def test_fed_dare_adds_the_mean_of_what_the_masks_left(run_config):
    replies = Replies()
    run = play(run_config | {"strategy": "fed-dare", "num-server-rounds": 1}, tamper=replies)
    entries = [Ledger(run.ledger).read(version).arrays for version in (0, 1)]
    before, after = (np.concatenate([entry["A"], entry["B"]]).astype(np.float64) for entry in entries)
    dense = np.zeros((4, before.size))
    for p, arrays in replies.at[1].items():
        keep = srd.dare_mask((before.size,), 0.9, srd.dare_rng(int(arrays["mask"][0])))
        assert 0.05 < keep.mean() < 0.15
        dense[p, keep] = arrays["values"]
    np.testing.assert_allclose(after, before + dense.mean(0), rtol=0, atol=1e-6)
    assert len({int(arrays["mask"][0]) for arrays in replies.at[1].values()}) == 4


def test_fed_dare_that_drops_nothing_is_fedit(run_config):
    fedit = play(run_config | {"strategy": "fedit"})
    own = {"strategy": "fed-dare", "fed-dare.sparsity": 0.0, "fed-dare.learning-rate": 0.05, "run-name": "dare"}
    for a, b in zip(weights(fedit), weights(play(run_config | own, run_id=2)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_fed_dare_refuses_values_that_its_mask_has_no_place_for(run_config, caplog):
    def cut(partition, message, reply):
        if partition == 1:
            arrays = arrays_of(reply)
            reply.content["update"] = wire.pack(arrays | {"values": arrays["values"][:-1]})
        return reply

    play(run_config | {"strategy": "fed-dare", "num-server-rounds": 1}, nodes=2, tamper=cut)
    assert "places in its mask" in caplog.text
    with pytest.raises(ConfigError, match="does not go with fed-dare, whose clients send zeros"):
        parse(run_config | {"strategy": "fed-dare", "aggregation": "median"})
