"""What holds for FedKRSO alone: the pool, the average by seed, one application per version, bytes at real sizes."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from helpers import arrays_of, default_config, play
from transformers import AutoModelForSequenceClassification, RobertaConfig

from fedkrso_app.config import parse
from fedkrso_app.core.projection import projection
from fedkrso_app.core.subspace import matrix
from fedkrso_app.federation.replica import NeedSync, Replica
from fedkrso_app.federation.round import no_figures
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.strategies.fedkrso import FedKRSO, FedKRSOLocal, draw_seeds
from fedkrso_app.training import model


def test_seeds_are_distinct_fresh_every_round_and_the_same_for_the_same_run():
    pools = [draw_seeds(3, round, 50) for round in range(1, 20)]
    assert len({int(seed) for pool in pools for seed in pool}) == 50 * 19
    np.testing.assert_array_equal(draw_seeds(3, 7, 50), pools[6])
    assert not set(draw_seeds(4, 7, 50).tolist()) & set(pools[6].tolist())


@pytest.fixture
def strategy(tmp_path, config):
    """Round 1 of a run on two layers of 3 × 4 and 2 × 3 with a head of 2 (r = 2, so Q = 10)."""
    ledger = Ledger(tmp_path / "ledger")
    ledger.append(Entry(0, {}, no_figures()))
    made = FedKRSO(config, Shapes({"a": (3, 4), "b": (2, 3)}, head=2, parameters=20), ledger, "", "0" * 16)
    made.round = 1
    made.begin()
    return made


def update(strategy, ks, value=1.0):
    rows = [np.full(10, value * (k + 1), np.float32) for k in ks]
    return {
        "seeds": np.array([strategy.pool[k] for k in ks], np.uint64),
        "accumulators": np.stack(rows),
        "head": np.array([value, -value], np.float32),
    }


def test_a_seed_that_a_client_did_not_draw_counts_as_zero_and_the_divisor_is_everyone(strategy):
    strategy.absorb(update(strategy, [0, 2]), 1, 0)
    strategy.absorb(update(strategy, [2]), 1, 1)
    strategy.absorb(update(strategy, [2], value=4.0), 2, 2)
    entry = strategy.average(4)
    assert entry["seeds"].tolist() == [strategy.pool[0], strategy.pool[2]]  # seed 1 was drawn by nobody
    np.testing.assert_allclose(entry["accumulators"][0], np.full(10, 1 / 4))
    np.testing.assert_allclose(entry["accumulators"][1], np.full(10, (3 + 3 + 2 * 12) / 4))
    np.testing.assert_allclose(entry["head"], [(1 + 1 + 2 * 4) / 4, -(1 + 1 + 2 * 4) / 4])


def test_seeds_outside_the_pool_or_twice_are_refused(strategy):
    good = update(strategy, [0, 1])
    strategy.check(good)
    with pytest.raises(Refused, match="not in this round's pool"):
        strategy.check(good | {"seeds": np.array([strategy.pool[0], 12345], np.uint64)})
    with pytest.raises(Refused, match="occurs twice"):
        strategy.check(good | {"seeds": np.array([strategy.pool[0]] * 2, np.uint64)})


def test_a_client_can_send_no_more_seeds_than_it_has_intervals(strategy, config):
    schema = FedKRSO.reply_schema(config, strategy.shapes)  # four steps, intervals of two
    wire.unpack(wire.pack(update(strategy, [0, 1])), schema)
    with pytest.raises(Refused, match="at most 2"):
        wire.unpack(wire.pack(update(strategy, [0, 1, 2])), schema)


def test_apply_equals_the_sum_over_seeds_and_layers(model_folder, config):
    loaded, plain = (model.load(str(model_folder), 2, 0) for _ in range(2))
    method = FedKRSOLocal(loaded.module, loaded.targets, loaded.head, config)
    rng = np.random.default_rng(0)
    entry = method.initial()
    seeds = np.array([7, 2**63 + 1], np.uint64)
    entry |= {"seeds": seeds, "accumulators": rng.normal(size=(2, entry["accumulators"].shape[1])).astype(np.float32)}
    method.apply(entry)
    start = 0
    for name, layer in plain.targets.items():
        W = matrix(layer).double()
        m, n = W.shape
        for seed, B in zip(seeds.tolist(), entry["accumulators"], strict=True):
            block = torch.from_numpy(B[start : start + 2 * m]).view(m, 2).double()
            W += block @ torch.from_numpy(projection(seed, name, 2, n)).double()
        torch.testing.assert_close(matrix(loaded.targets[name]).double(), W, rtol=1e-5, atol=1e-5)
        start += 2 * m


def test_no_version_is_applied_twice_and_none_is_skipped(model_folder, config, tmp_path):
    loaded = model.load(str(model_folder), 2, 0)
    method = FedKRSOLocal(loaded.module, loaded.targets, loaded.head, config)
    applied = []
    method.apply = applied.append
    store = Ledger(tmp_path / "store")
    for version in (0, 1, 3):
        store.put(Entry(version, {"version": np.array([version])}))
    replica = Replica(method, store, incremental=True)
    replica.advance(1)
    replica.advance(1)
    assert [int(arrays["version"][0]) for arrays in applied] == [0, 1]
    with pytest.raises(NeedSync, match="entry 2 is missing"):
        replica.advance(3)
    with pytest.raises(NeedSync, match="beyond 0"):
        replica.advance(0)
    assert replica.version == 1 and len(applied) == 2


def test_clients_receive_seeds_accumulators_and_the_head_and_never_weights(run_config):
    names, sizes = set(), []

    def look(partition, message, reply):
        for record in message.content.array_records.values():
            names.update(record)
            sizes.extend(array.numpy().size for array in record.values())
        return reply

    play(run_config, tamper=look)
    K, Q, encoder = 3, 2 * 2 * (4 * 16 + 24 + 16), 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert names == {"seeds", "accumulators", "head"} and max(sizes) <= K * Q < encoder


def test_every_upload_reproduces_the_clients_end_weights(run_config, monkeypatch):
    """Σ over the uploaded accumulators, from W^t, gives the weights that training ended with."""
    ends, starts = [], []
    train = FedKRSOLocal.train

    def watch(self, batches, instructions, rng):
        starts.append([matrix(layer).clone() for layer in self.targets.values()])
        result = train(self, batches, instructions, rng)
        ends.append([matrix(layer).clone() for layer in self.targets.values()])
        names.append(list(self.targets))
        return result

    names, replies = [], []
    monkeypatch.setattr(FedKRSOLocal, "train", watch)
    play(run_config | {"num-server-rounds": 1}, tamper=lambda p, m, r: replies.append(r) or r)
    for before, after, layers, reply in zip(starts, ends, names, replies, strict=True):
        arrays, start = arrays_of(reply), 0
        for W, end, name in zip(before, after, layers, strict=True):
            m, n = W.shape
            for seed, B in zip(arrays["seeds"].tolist(), arrays["accumulators"], strict=True):
                W += torch.from_numpy(B[start : start + 2 * m]).view(m, 2) @ torch.from_numpy(
                    projection(seed, name, 2, n)
                )
            torch.testing.assert_close(W, end, rtol=0, atol=1e-6)
            start += 2 * m


@pytest.fixture(scope="module")
def roberta_base() -> Shapes:
    with torch.device("meta"):
        module = AutoModelForSequenceClassification.from_config(
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        )
    head = {name: p for name, p in module.named_parameters() if not name.startswith("roberta.")}
    return Shapes.of(module, model.find_targets(module), head)


# wire-dtype -> bytes of a value in an accumulator and in the head, a scale of two bytes for 128 values included
BYTES = {"float32": (4, 4), "float16": (2, 2), "int8": (65 / 64, 65 / 64), "int4": (33 / 64, 65 / 64)}


@pytest.mark.parametrize(("dtype", "count"), [("float32", 1), ("float32", 6), *((dtype, 10) for dtype in BYTES)])
def test_bytes_at_roberta_base_size_are_within_one_percent_of_the_formula(roberta_base, tmp_path, dtype, count):
    config = parse(default_config() | {"local-steps": 100, "wire-dtype": dtype})
    Q, h = roberta_base.outputs(4), roberta_base.head
    rng = np.random.default_rng(0)
    arrays = {
        "seeds": draw_seeds(0, 1, 10)[:count],
        "accumulators": rng.standard_normal((count, Q), dtype=np.float32),
        "head": rng.standard_normal(h, dtype=np.float32),
    }
    arrays = FedKRSO.encode_entry(arrays, config, roberta_base, 1)
    ledger = Ledger(tmp_path)
    ledger.append(Entry(0, {}, no_figures()))
    ledger.append(Entry(1, arrays, no_figures() | {"round": 1}))
    strategy = FedKRSO(config, roberta_base, ledger, "", "0" * 16)
    strategy.round = 2
    reply = RecordDict({"status": ConfigRecord({"version": 1}), "update": wire.pack(arrays)})
    for content in (reply, strategy.message_content(0, "train", {"round": 1, **strategy.instructions(1)})):
        assert wire.measured_bytes(content) == pytest.approx(
            BYTES[dtype][0] * count * Q + BYTES[dtype][1] * h, rel=0.01
        )
    assert strategy.paper_bytes() == 31_279_120
