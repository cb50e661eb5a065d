"""Each benchmark on a tiny model: it runs, counts right, and compares the same work. No time is asserted."""

import json

import pytest
import torch

from benchmarks import memory, models, replica, server, step
from fedkrso_app.plan import Storage


def by_peer(rows):
    return {row["peer"]: row for row in rows}


def test_step_relates_every_peer_to_the_others():
    rows = by_peer(step.rows("tiny", rows=2, tokens=8, repeats=1))
    assert {*models.PEERS, "fedkrso, recompute", "fedkrso, checkpoint"} == set(rows)
    assert all(row["seconds"] > 0 for row in rows.values()) and rows["full"]["÷ full"] == 1


def test_all_peers_compute_the_same_loss_and_move_what_they_say():
    inputs = models.batch(2, 8)
    losses = []
    for name in models.PEERS:
        torch.manual_seed(0)
        module = models.classifier("tiny")
        peer = models.Peer(name, module)
        torch.manual_seed(1)
        losses.append(peer.module(**inputs).loss.item())
        weight = peer.rso.layers["roberta.encoder.layer.0.output.dense"].W if peer.rso else None
        before = [(p, p.detach().clone()) for p in peer.trained() if weight is None or p.ndim == 1]
        start = None if weight is None else weight.clone()
        peer.step(inputs)
        peer.step(inputs)
        if weight is not None:
            assert not torch.equal(weight, start)
        elif name != "full":  # there the unused rows of the embeddings stay
            assert not any(torch.equal(p, old) for p, old in before)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_memory_counts_agree_with_the_hooks_and_fall_with_the_setting():
    rows = by_peer(memory.rows("tiny", rows=4, tokens=16))
    keep, recompute, checkpoint = (rows[f"fedkrso{end}"] for end in ("", ", recompute", ", checkpoint"))
    assert keep["hooks"] == pytest.approx(keep["activations"], rel=0.02)  # two routes to one number
    assert keep["activations"] <= rows["a-frozen"]["activations"] < rows["lora"]["activations"]
    assert keep["activations"] > recompute["activations"] > checkpoint["activations"]
    assert keep["gradients"] < rows["lora"]["gradients"] < rows["full"]["gradients"]
    assert rows["full"]["optimizer"] == pytest.approx(2 * rows["full"]["weights"], rel=0.01)


def test_storage_counts_a_hand_computed_example():
    with Storage() as storage:
        x = torch.zeros(100)  # 400 bytes
        y = x.view(10, 10) + 1  # another 400; the view is free
        del y
        z = torch.zeros(5, dtype=torch.float64)  # 40
    assert (storage.live, storage.peak) == (440, 800)
    del x, z
    assert storage.live == 0


def test_a_missed_round_costs_one_product_a_layer_over_all_seeds():
    rows = {row["part"]: row for row in replica.rows("tiny", missed=2, repeats=1)}
    targets = 6 * models.SIZES["tiny"]["num_hidden_layers"]
    assert rows["advance"]["products"] == rows["apply"]["products"] == rows["fold"]["products"] == targets


def test_the_servers_memory_does_not_grow_with_the_replies():
    few, many = server.rows("tiny", [4, 40])
    assert many["peak MiB"] < few["peak MiB"] + 0.2  # the other 36 replies weigh 3.3 MiB


def test_json_and_table_print_the_same_rows(capsys):
    rows = [{"peer": "a", "seconds": 0.5}]
    models.show("title", rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == rows
    models.show("title", rows, as_json=False)
    assert "0.5" in capsys.readouterr().out
