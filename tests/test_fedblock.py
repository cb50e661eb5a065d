"""One block per round: whose turn it is, what moves, and what the messages hold."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers import arrays_of, play, replica
from test_families import build

from fedkrso_app.core.flat import flatten
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.fedblock import block_of
from fedkrso_app.training import model
from fedkrso_app.training.shapes import Shapes

BLOCK = 4 * (16 * 16 + 16) + 2 * 16 * 24 + 24 + 16 + 2 * 2 * 16  # by hand: attention, feed-forward, two norms


@pytest.fixture
def settings(run_config) -> dict:
    return run_config | {"strategy": "fedblock", "num-server-rounds": 1}


@pytest.mark.parametrize("order", ["random", "ascending"])
def test_every_cycle_gives_each_block_one_turn(order):
    cycles = [[block_of(12 * cycle + turn, 12, 0, order) for turn in range(1, 13)] for cycle in range(5)]
    assert all(Counter(cycle) == Counter(range(12)) for cycle in cycles) and cycles[0] == [*range(12)]
    assert len({tuple(cycle) for cycle in cycles}) == (5 if order == "random" else 1)
    assert order == "ascending" or [block_of(13 + turn, 12, 1, order) for turn in range(12)] != cycles[1]


def test_a_round_moves_one_block_to_the_mean_of_the_clients_and_leaves_the_rest_bit_for_bit(settings):
    replies = []

    def keep(partition, message, reply):
        replies.append(arrays_of(reply)["values"].astype(np.float64))
        return reply

    run = play(settings, tamper=keep)
    start, end = replica(run, 0), replica(run)
    assert Ledger(run.ledger).read(1).arrays["block"].tolist() == [0]
    expected = flatten(start.blocks[0]) + np.mean(replies, axis=0)
    np.testing.assert_allclose(flatten(end.blocks[0]), expected, rtol=0, atol=1e-7)
    moved = {id(parameter) for parameter in [*end.blocks[0], *end.head.values()]}
    before = dict(start.module.named_parameters())
    for name, parameter in end.module.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in moved)


def test_a_reply_for_another_block_than_the_one_at_work_is_refused(settings):
    method = make(parse(settings), Shapes({"a": (3, 4)}, head=2, parameters=30, blocks=(12, 14)))
    good = {"values": np.zeros(12, np.float32), "head": np.zeros(2, np.float32)}
    method.check(good, 1)
    with pytest.raises(Refused, match="12 values for a block of 14"):
        method.check(good, 2)
    assert method.paper_bytes() == 8 * (13 + 2) and sum(method.weights_sizes) == 28


@pytest.mark.parametrize("family", ["roberta", "gpt2", "modernbert"])
def test_blocks_hold_all_parameters_of_their_layers_each_once(family, model_folder, tmp_path):
    folder = model_folder if family == "roberta" else build(tmp_path, model_folder, family, family == "gpt2")
    loaded = model.load(str(folder), 0 if family == "gpt2" else 2, 0)
    blocks = model.find_blocks(loaded)
    names = [name for block in blocks.values() for name in block]
    assert len(names) == len(set(names)) and not set(names) & set(loaded.head)
    weights = {f"{name}.weight" for name in loaded.targets}
    assert len(blocks) == 2
    assert weights <= set(names) and not any("embeddings" in name or "wte" in name for name in names)
    assert Shapes.of(loaded).blocks == tuple(sum(p.numel() for p in block.values()) for block in blocks.values())
    if family == "roberta":
        assert Shapes.of(loaded).blocks == (BLOCK, BLOCK) == Shapes.of(model.outline(str(folder), 2)).blocks
