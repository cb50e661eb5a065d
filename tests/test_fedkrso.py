"""What holds for FedKRSO alone: the pool, the average by seed, one application per version, bytes at real sizes."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from helpers import arrays_of, default_config, play
from transformers import AutoModelForSequenceClassification, RobertaConfig

from fedkrso_app.core.projection import projection
from fedkrso_app.core.subspace import matrix
from fedkrso_app.federation.aggregate import Aggregate
from fedkrso_app.federation.replica import NeedSync, Replica
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.records.protocol import Figures, Instructions, Status, trained
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import parse
from fedkrso_app.strategies.fedkrso import FedKRSO, FedKRSOLocal, draw_seeds
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes


def test_seeds_are_distinct_fresh_every_round_and_the_same_for_the_same_run():
    pools = [draw_seeds(3, round, 50) for round in range(1, 20)]
    assert len({int(seed) for pool in pools for seed in pool}) == 50 * 19
    np.testing.assert_array_equal(draw_seeds(3, 7, 50), pools[6])
    assert not set(draw_seeds(4, 7, 50).tolist()) & set(pools[6].tolist())


@pytest.fixture
def method(config):
    """On two layers of 3 × 4 and 3 × 3 with a head of 2 (r = 2, so Q = 12)."""
    return FedKRSO(config, Shapes({"a": (3, 4), "b": (3, 3)}, head=2, parameters=23))


def update(method, ks, value=1.0):
    rows, pool = [np.full(12, value * (k + 1), np.float32) for k in ks], method.pool(1)
    return {
        "seeds": pool[ks],
        "accumulators": np.stack(rows),
        "head": np.array([value, -value], np.float32),
    }


def test_a_seed_that_a_client_did_not_draw_counts_as_zero_and_the_divisor_is_everyone(method):
    sums = Aggregate(method)
    for partition, (reply, weight) in enumerate(
        [(update(method, [0, 2]), 1), (update(method, [2]), 1), (update(method, [2], value=4.0), 2)]
    ):
        sums.add(method.summands(reply), reply, weight, partition)
    entry = method.conclude(sums, 1)
    assert entry["seeds"].tolist() == method.pool(1)[[0, 2]].tolist()  # seed 1 was drawn by nobody
    np.testing.assert_allclose(entry["accumulators"][0], np.full(12, 1 / 4))
    np.testing.assert_allclose(entry["accumulators"][1], np.full(12, (3 + 3 + 2 * 12) / 4))
    np.testing.assert_allclose(entry["head"], [(1 + 1 + 2 * 4) / 4, -(1 + 1 + 2 * 4) / 4])


def test_seeds_outside_the_pool_or_twice_are_refused(method):
    good, first = update(method, [0, 1]), method.pool(1)[0]
    method.check(good, 1)
    with pytest.raises(Refused, match="not in this round's pool"):
        method.check(good, 2)
    with pytest.raises(Refused, match="not in this round's pool"):
        method.check(good | {"seeds": np.array([first, 12345], np.uint64)}, 1)
    with pytest.raises(Refused, match="occurs twice"):
        method.check(good | {"seeds": np.array([first] * 2, np.uint64)}, 1)


def test_a_client_can_send_no_more_seeds_than_it_has_intervals(method):
    wire.unpack(wire.pack(update(method, [0, 1])), method.reply)  # four steps, intervals of two
    with pytest.raises(Refused, match="at most 2"):
        wire.unpack(wire.pack(update(method, [0, 1, 2])), method.reply)


def test_apply_equals_the_sum_over_seeds_and_layers(model_folder, config):
    loaded, plain = (model.load(str(model_folder), 2, 0) for _ in range(2))
    local, rng = FedKRSOLocal(loaded, config), np.random.default_rng(0)
    seeds, Q = np.array([7, 2**63 + 1], np.uint64), Shapes.of(loaded).outputs(2)
    entry = local.state() | {"seeds": seeds, "accumulators": rng.normal(size=(2, Q)).astype(np.float32)}
    local.apply(entry)
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
    local, applied = FedKRSOLocal(loaded, config), []
    local.apply = applied.append
    store = Ledger(tmp_path / "store")
    for version in (0, 1, 3):
        store.put(Entry(version, {"version": np.array([version])}))
    replica = Replica(local, store, span=None)
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
    ends, starts, names, replies = [], [], [], []
    session = FedKRSOLocal.session

    @contextmanager
    def watched(self, instructions, rng):
        starts.append([matrix(layer).clone() for layer in self.targets.values()])
        with session(self, instructions, rng) as opened:
            yield opened
        ends.append([matrix(layer).clone() for layer in self.targets.values()])
        names.append(list(self.targets))

    monkeypatch.setattr(FedKRSOLocal, "session", watched)
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
    return Shapes.of(model.LoadedModel(module, None, model.find_targets(module), head, (), frozenset()))


# wire-dtype -> bytes of a value in an accumulator and in the head, a scale of two bytes for 128 values included
BYTES = {"float32": (4, 4), "float16": (2, 2), "int8": (65 / 64, 65 / 64), "int4": (33 / 64, 65 / 64)}


@pytest.mark.parametrize(("dtype", "count"), [("float32", 1), ("float32", 6), *((dtype, 10) for dtype in BYTES)])
def test_bytes_at_roberta_base_size_are_within_one_percent_of_the_formula(roberta_base, dtype, count):
    config = parse(default_config() | {"local-steps": 100, "wire-dtype": dtype})
    Q, h = roberta_base.outputs(4), roberta_base.head
    rng = np.random.default_rng(0)
    arrays = {
        "seeds": draw_seeds(0, 1, 10)[:count],
        "accumulators": rng.standard_normal((count, Q), dtype=np.float32),
        "head": rng.standard_normal(h, dtype=np.float32),
    }
    method = FedKRSO(config, roberta_base)
    arrays = wire.encode(arrays, method.entry, rng)
    reply = trained(Status(1), wire.pack(arrays), Figures(1, 0.5, 1.0, 1))
    question = Instructions("0" * 16, 1, "0" * 64, round=1, method=method.instructions(1)).record()
    for content in (reply, RecordDict({"entry-1": wire.pack(arrays), "train": question})):
        assert wire.measured_bytes(content) == pytest.approx(
            BYTES[dtype][0] * count * Q + BYTES[dtype][1] * h, rel=0.01
        )
    assert method.paper_bytes() == 31_279_120
