"""FR-LoRA and FeDeRA: the principal start, and what each round makes of it, against dense products in float64."""

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from helpers import arrays_of, digest, play, replayed, replica
from test_families import build

from fedkrso_app.core import lora
from fedkrso_app.core.subspace import matrix
from fedkrso_app.federation.published import Published
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.strategies import make, parse
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes

S, RANK = 4.0, 2  # alpha / rank of run_config


def test_the_principal_part_is_the_best_approximation_in_even_halves():
    rng = np.random.default_rng(0)
    for m, n in ((7, 5), (5, 7)):
        W = rng.standard_normal((m, n))
        A, B = (x.double().numpy() for x in lora.principal(torch.from_numpy(W), 3, S))
        sigma = np.linalg.svd(W, compute_uv=False)
        assert np.linalg.norm(W - S * B @ A) ** 2 == pytest.approx((sigma[3:] ** 2).sum(), rel=1e-5)
        np.testing.assert_allclose(A @ A.T, np.diag(sigma[:3] / S), atol=1e-5)
        np.testing.assert_allclose(B.T @ B, np.diag(sigma[:3] / S), atol=1e-5)
        assert all(column[np.abs(column).argmax()] > 0 for column in B.T)


def targets_of(state, names):
    return {name: state[f"{name}.weight"].double().clone() for name in names}


def start_of(run_config, strategy):
    """The names of the targets, W^0, and the half beside it."""
    config = parse(run_config | {"strategy": strategy, "evaluate": "clients"})
    loaded = model.load(config.model, 2, 0)
    before = {name: matrix(layer).double().clone() for name, layer in loaded.targets.items()}
    return before, make(config, Shapes.of(loaded)).local(loaded)


@pytest.mark.parametrize("strategy", ["fr-lora", "federa"])
def test_the_model_that_training_begins_with_is_w0(run_config, strategy):
    before, local = start_of(run_config, strategy)
    after = targets_of(local.plain_state(), before)
    for name, W in before.items():
        torch.testing.assert_close(after[name], W, atol=1e-6, rtol=0)
        inside = matrix(local.targets[name]).double()
        assert torch.linalg.matrix_norm(inside) < torch.linalg.matrix_norm(W)  # its principal part is outside


def dense(arrays, before, start):
    """W of every target after ``arrays``, the newest of FeDeRA or a sum over entries of FR-LoRA, in float64."""
    split, ends = {}, dict(before)
    for name in ("A", "B"):
        sizes = [(RANK * W.shape[1] if name == "A" else RANK * W.shape[0]) for W in before.values()]
        split[name] = torch.from_numpy(arrays[name].copy()).double().split(sizes)
    for i, (layer, W) in enumerate(before.items()):
        A0, B0 = start[layer]
        A, B = split["A"][i].view(RANK, -1), split["B"][i].view(-1, RANK)
        ends[layer] = W + S * (B @ A - B0 @ A0)
    return ends


def starts(before):
    return {name: tuple(x.double() for x in lora.principal(W, RANK, S)) for name, W in before.items()}


def test_every_round_of_frlora_adds_the_difference_of_the_products(run_config):
    run = play(run_config | {"strategy": "fr-lora"})
    before, _ = start_of(run_config, "fr-lora")
    start, expected, ledger = starts(before), before, Ledger(run.ledger)
    flat = {k: np.concatenate([start[layer][i].numpy().ravel() for layer in start]) for i, k in enumerate("AB")}
    for version in (1, 2, 3):
        entry = ledger.read(version).arrays
        whole = {name: entry[name] + flat[name] for name in ("A", "B")}
        expected = dense(whole, expected, start)
        found = targets_of(replica(run, version).plain_state(), before)
        for name, W in expected.items():
            torch.testing.assert_close(found[name], W, atol=2e-6, rtol=0)


def test_federa_is_fedit_from_that_start(run_config):
    run = play(run_config | {"strategy": "federa"})
    before, _ = start_of(run_config, "federa")
    expected = dense(Ledger(run.ledger).read(3).arrays, before, starts(before))
    found = targets_of(replica(run).plain_state(), before)
    for name, W in expected.items():
        torch.testing.assert_close(found[name], W, atol=2e-6, rtol=0)


def test_the_first_round_of_both_is_the_same(run_config):
    one = {"num-server-rounds": 1}
    ends = [
        play(run_config | one | {"strategy": s, "run-name": s}, run_id=i) for i, s in enumerate(("fr-lora", "federa"))
    ]
    before, _ = start_of(run_config, "federa")
    a, b = (targets_of(replica(run).plain_state(), before) for run in ends)
    moved = max(float((a[name] - W).abs().max()) for name, W in before.items())
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-3 * moved


def test_the_rank_of_what_is_learned_grows_with_the_rounds(run_config):
    run = play(run_config | {"strategy": "fr-lora"}, nodes=2)
    before, _ = start_of(run_config, "fr-lora")
    for version in (1, 2, 3):
        after = targets_of(replica(run, version).plain_state(), before)
        ranks = [int(torch.linalg.matrix_rank(after[n] - W, rtol=1e-4)) for n, W in before.items()]
        assert max(ranks) <= RANK * (version + 1) and (version == 1 or min(ranks) > RANK)


def test_a_round_in_which_nothing_is_trained_moves_nothing(run_config):
    _, local = start_of(run_config, "fr-lora")
    with local.session({}, np.random.default_rng(0)) as session:
        update = session.update()
    assert not update["A"].any() and not update["B"].any()
    before = [tensor.clone() for tensor in local.shared()]
    local.apply(update)
    assert all(torch.equal(a, b) for a, b in zip(before, local.shared(), strict=True))


def test_the_start_comes_once_and_the_same_to_all(run_config):
    """4L bytes in entry 0 to every node, and nothing of them later, also to one that comes late."""
    seen = {}

    def look(partition, message, reply):
        for record, arrays in message.content.array_records.items():
            for name, array in arrays.items():
                if name.startswith("start"):
                    seen.setdefault(partition, []).append((record, name, array.numpy().tobytes()))
        return reply

    run = play(run_config | {"strategy": "fr-lora", "fraction-train": 0.5, "num-server-rounds": 6}, tamper=look)
    took_part = {p for line in run.metrics() for p in line["partitions"]}
    assert seen.keys() == took_part and all(len(found) == 2 for found in seen.values())
    assert len({tuple(found) for found in seen.values()}) == 1


def test_weights_in_the_place_of_entries_bring_the_start_too(run_config, monkeypatch):
    """A fresh node that is sent weights never sees entry 0: here from the second missed round on."""
    settings = run_config | {"strategy": "fr-lora", "fraction-train": 0.5, "num-server-rounds": 5}
    plain, brought = play(settings), []
    smaller = lambda self, since: catch_up(self, since) if self.version - since < 2 else weights(self)  # noqa: E731
    catch_up = Published.catch_up

    def weights(self):
        brought.append(self.version)
        return RecordDict({f"weights-{self.version}": wire.pack(self.weights())})

    monkeypatch.setattr(Published, "catch_up", smaller)
    run = play(settings | {"run-name": "devices"}, run_id=2, devices=True)
    assert brought and digest(run) == digest(plain) == replayed(plain)


def test_a_server_without_a_model_leaves_the_start_to_the_nodes(run_config):
    settings = run_config | {"strategy": "fr-lora"}
    run, other = play(settings), play(settings | {"evaluate": "clients", "run-name": "clients"}, run_id=2)
    assert not Ledger(other.ledger).read(0).arrays
    for one, two in zip(run.metrics()[1:], other.metrics()[1:], strict=True):
        assert one["metric"] == pytest.approx(two["metric"])
    assert replayed(run) == replayed(other)


@pytest.mark.parametrize("strategy", ["fr-lora", "federa"])
def test_weights_that_are_stored_the_other_way_round_move_alike(run_config, strategy, model_folder, tmp_path):
    """GPT-2's Conv1D, whose weight is n × m."""
    folder = build(tmp_path / "gpt2", model_folder, "gpt2", False)
    run = play(run_config | {"strategy": strategy, "model": str(folder)}, nodes=2)
    assert replayed(run) == digest(run) and run.metrics()[-1]["clients"] == 2


def test_its_paper_is_cited_where_it_is(run_config):
    run = play(run_config | {"strategy": "fr-lora", "num-server-rounds": 1}, nodes=2)
    assert "https://openreview.net/forum?id=e0rQRMUhs7" in (run.model / "README.md").read_text()


def test_options_go_with_it(run_config):
    sent = []

    def look(partition, message, reply):
        sent.append(set(arrays_of(reply)))
        return reply

    on = {"server.optimizer": "fedavgm", "client.correction": "scaffold", "client.proximal": 0.1}
    run = play(run_config | {"strategy": "fr-lora", "fraction-train": 0.5} | on, tamper=look)
    assert replayed(run) == digest(run) and all(names == {"A", "B", "head"} for names in sent)
