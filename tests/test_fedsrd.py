"""What holds for FedSRD and FedSRD-e: sparse both ways, both sides at the same pair, bytes by the formula."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from flwr.app import Array
from helpers import arrays_of, digest, play, replayed, replica

from fedkrso_app.core import srd
from fedkrso_app.core.flat import flatten
from fedkrso_app.core.projection import layer_key, philox
from fedkrso_app.federation import client
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.strategies import STRATEGIES, parse
from fedkrso_app.strategies.fedsrd import FedSRD, FedSRDe

SIZE = 2 * 2 * (4 * (16 + 16) + 2 * (16 + 24))  # rank 2, two blocks: all B and all A


@pytest.fixture(params=["fedsrd", "fedsrd-e"])
def settings(request, run_config) -> dict:
    return run_config | {"strategy": request.param, "num-server-rounds": 4}


def test_the_two_variants_differ_in_one_step():
    own = {name for name in vars(FedSRDe) if not name.startswith("__")}
    assert own - {"_abc_impl"} == {"represent"} and issubclass(FedSRDe, FedSRD)


def test_an_upload_is_values_and_one_bit_an_element(settings):
    replies = []
    play(settings, tamper=lambda partition, message, reply: replies.append(reply) or reply)
    for reply in replies:
        arrays = arrays_of(reply)
        bits = np.unpackbits(arrays["bits"], bitorder="little")
        assert arrays["bits"].nbytes == -(-SIZE // 8)
        assert arrays["values"].nbytes == 4 * bits.sum()
        assert bits.sum() <= (1 - 0.85) * SIZE + 24  # at least alpha is pruned, up to one element a matrix


def test_factors_take_turns_and_B_is_first(settings):
    run = play(settings)
    ledger = Ledger(run.ledger)
    assert [int(ledger.read(version).arrays["mask"][1]) for version in (1, 2, 3, 4)] == [0, 1, 0, 1]


def test_a_broadcast_keeps_about_a_fifth_of_one_factor(settings):
    run = play(settings)
    for version in (1, 2, 3, 4):
        values = Ledger(run.ledger).read(version).arrays["values"]
        assert 0.1 * SIZE / 2 < len(values) < 0.3 * SIZE / 2


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_the_server_and_every_client_hold_the_same_pair_bit_for_bit(settings, dtype, monkeypatch):
    settings, servers, clients = settings | {"wire-dtype": dtype}, {}, {}
    conclude = FedSRD.conclude

    def keep(self, means, round):
        servers[self.version] = {name: flatten(tensors).tobytes() for name, tensors in self.pair.items()}
        return conclude(self, means, round)

    def look(partition, message, reply):
        local = client.workplace(message.content["train"]["run"], parse(settings), 4).replica.local
        pair = {name: flatten(local.tensors[name]).tobytes() for name in ("B", "A")}
        clients.setdefault(message.content["train"]["version"], []).append(pair)
        return reply

    monkeypatch.setattr(FedSRD, "conclude", keep)
    play(settings, tamper=look)
    assert len(servers) == 4
    assert all(pair == servers[version] for version, pairs in clients.items() for pair in pairs)


def test_a_sparse_head_costs_less_and_replays_to_the_same_bits(settings):
    dense = play(settings)
    sparse = play(settings | {"run-name": "sparse", "fedsrd.sparsify-head": True}, run_id=2)
    assert replayed(sparse) == digest(sparse)
    assert sparse.metrics()[-1]["uplink_bytes"] < dense.metrics()[-1]["uplink_bytes"]


def test_without_sparsification_and_with_one_client_a_B_round_takes_over_the_clients_B(run_config, monkeypatch):
    """FedSRD-e, p = 0, nothing pruned, A untouched: the server's B becomes the client's."""
    settings = run_config | {
        "strategy": "fedsrd-e", "fedsrd.alpha": 0.0, "fedsrd.max-sparsity": 0.0, "fedsrd.compensate": "none",
        "fedsrd.download-sparsity": 0.0, "num-server-rounds": 1,
    }  # fmt: skip
    half, ends = STRATEGIES["fedsrd-e"].half, []
    session = half.session

    @contextmanager
    def train_B_only(self, instructions, rng):
        A = [tensor.detach().clone() for tensor in self.tensors["A"]]
        for tensor in self.tensors["A"]:
            tensor.requires_grad_(True).register_hook(torch.zeros_like)
        with session(self, instructions, rng) as opened:
            yield opened
        assert all(torch.equal(a, b) for a, b in zip(A, self.tensors["A"], strict=True))
        ends.append(flatten(self.tensors["B"]))

    monkeypatch.setattr(half, "session", train_B_only)
    run = play(settings, nodes=1)
    values = Ledger(run.ledger).read(1).arrays["values"]
    np.testing.assert_allclose(values, ends[0], rtol=0, atol=2e-7)


def test_a_factor_that_jumps_is_told_and_rcond_tames_it(run_config, caplog):
    def largest(rcond):
        run = play(run_config | {"strategy": "fedsrd-e", "fedsrd.rcond": rcond, "run-name": str(rcond)})
        return max(float(A.abs().max()) for A in replica(run).tensors["A"])

    run_config |= {"fraction-train": 0.5, "num-server-rounds": 4}
    wild = largest(0.0)
    assert "A moves by" in caplog.text and "set fedsrd.rcond" in caplog.text
    assert largest(1e-2) < 0.1 * wild


def test_the_broadcast_is_the_move_on_its_mask_over_what_dare_keeps(settings, monkeypatch):
    """Every value is the least squares' own one, divided by 1 − p, where the mask that its seed draws says so."""
    moves, solve = [], srd.least_squares_factors
    monkeypatch.setattr(srd, "least_squares_factors", lambda *args: moves.append(solve(*args)) or moves[-1])
    run = play(settings | {"num-server-rounds": 1, "fedsrd.download-sparsity": 0.75})
    arrays = Ledger(run.ledger).read(1).arrays
    exact = np.concatenate([move.numpy().ravel() for move in moves]).astype(np.float64)
    kept = np.random.Generator(philox(int(arrays["mask"][0]), layer_key("dare"))).random(len(exact)) >= 0.75
    np.testing.assert_allclose(arrays["values"], exact[kept] / 0.25, rtol=1e-6)


def test_values_beyond_reason_are_refused(settings, caplog):
    def forge(partition, message, reply):
        if partition == 0:
            values = reply.content["update"]["values"].numpy().copy()
            values[0] = 2e6
            reply.content["update"]["values"] = Array(values)
        return reply

    run = play(settings | {"num-server-rounds": 1}, tamper=forge)
    assert run.metrics()[-1]["refused"] == 1 and "too large: products of factors must stay finite" in caplog.text
