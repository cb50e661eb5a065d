"""Client-level DP: bounds in Python's integers, noise, what is paid and when, whole runs, what is refused."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from flwr.app import ConfigRecord, Message, RecordDict
from helpers import arrays_of, digest, play, replayed, replica

from fedkrso_app.cli import planning
from fedkrso_app.config import ConfigError
from fedkrso_app.core import projection
from fedkrso_app.core.accounting import gaussian_epsilon
from fedkrso_app.federation import workplace
from fedkrso_app.federation.published import Published
from fedkrso_app.federation.released import Released, Spent, release_of
from fedkrso_app.federation.spending import Release, Spending
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.wire import Refused
from fedkrso_app.runs import plan
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.privacy import noise_over_clip
from fedkrso_app.training.loop import NotFinite
from fedkrso_app.training.shapes import Shapes

PRIVATE = {"privacy.unit": "client", "privacy.clip": 1.0, "privacy.noise": 2.0, "privacy.delta": 1e-3}
SILENT = PRIVATE | {"privacy.clip": 1000.0, "privacy.noise": 1e-15}  # a deviation of 0.07 steps: rounded to none
SHAPES = Shapes({"layer": (5_000, 40)}, 16, 200_016)


def epsilon_of(times: int, noise: float = 2.0, delta: float = 1e-3) -> float:
    return gaussian_epsilon(math.sqrt(times) / noise, delta)


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "privacy.jsonl").read_text().splitlines()]


def released(run_config, tmp_path, asked, **settings) -> Released:
    method = make(parse(run_config | settings), SHAPES)
    start = {"head": np.zeros(16, np.float32)}
    spending = Spending(tmp_path / "privacy.jsonl", 1e-3)
    release = release_of(1, method.config, asked, asked, spending)
    return Released(method, 1, start, method.instructions(1), asked, lambda: spending.write(release))


def integers(sums: Released) -> list[int]:
    return [int(value) for key in sums._shapes for value in sums._sums.steps(key).ravel()]


def test_a_node_moves_the_sum_by_at_most_the_clip_whatever_it_sends(run_config, tmp_path):
    """Two partitions of one node share its clip; values are counted in Python's integers."""
    asked = {7: [0, 1], 8: [2]}
    with_, without = (released(run_config, tmp_path, asked, **SILENT | {"privacy.clip": 0.3}) for _ in range(2))
    rng = np.random.default_rng(0)
    seeds = with_.method.pool(1).tolist()

    def update(size: float) -> dict:
        drawn = rng.choice(len(seeds), 2, replace=False)
        wide = {seeds[k]: (rng.standard_normal(10_000) * size).astype(np.float32) for k in drawn}
        return wide | {"head": rng.standard_normal(16).astype(np.float32)}

    other = update(1e-3)
    for sums in (with_, without):
        sums.add(other, {}, 1, 2)
    same = update(50.0)
    with_.add(same, {}, 1, 0)
    with_.add({key: x + np.float32(1) for key, x in same.items()}, {}, 1, 1)  # nearly the same direction
    square = sum((a - b) ** 2 for a, b in zip(integers(with_), integers(without), strict=True))
    numerator, denominator = (0.3).as_integer_ratio()
    assert 0.99 < square * denominator**2 / (numerator * 2**36) ** 2 <= 1
    assert square * denominator**2 <= (numerator * 2**36) ** 2
    with pytest.raises(Refused, match="nothing that this round adds up"):  # and would have no noise
        with_.add({12345: np.ones(1, np.float32)}, {}, 1, 2)


def test_the_noise_is_gaussian_everywhere_and_no_seed_repeats_it(run_config, tmp_path, monkeypatch):
    """30 slots that nobody drew, 10,000 numbers each."""
    settings = PRIVATE | {"fedkrso.num-seeds": 30, "privacy.clip": 0.5}
    both = [released(run_config, tmp_path, {7: [0]}, **settings) for _ in range(2)]
    seeds = both[0].method.pool(1).tolist()
    monkeypatch.setattr(projection, "stream", lambda *_: pytest.fail("noise from the run's seed"))
    drawn = []
    for sums in both:
        assert all(seed in sums for seed in seeds)
        sums.open(None, {})
        sums.weight = 4
        drawn.append(np.concatenate([sums.mean(seed) for seed in seeds]) * 4)  # of four replies, the sum
        assert np.all(sums.mean("head") != 0)
    for z in drawn:
        assert z.var() == pytest.approx(1.0, rel=0.01)  # σ · clip = 1
        assert scipy.stats.kstest(z[::7], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.01


@pytest.mark.parametrize("strategy", ["fedkrso", "fedsvd"])
def test_without_noise_and_clip_the_model_is_the_plain_one(strategy, run_config):
    """fedsvd computes with values, so its mean needs the start beside it."""
    settings = run_config | {"strategy": strategy, "num-server-rounds": 2}
    plain, private = (play(settings | {"run-name": name} | own, nodes=2) for name, own in (("a", {}), ("b", SILENT)))
    for ours, its in zip(replica(private).shared(), replica(plain).shared(), strict=True):
        assert np.allclose(ours.numpy(), its.numpy(), rtol=0, atol=2e-5)


def test_a_run_tells_its_epsilon_and_no_loss(run_config):
    run = play(run_config | PRIVATE | {"fedkrso.num-seeds": 12}, nodes=2)
    for line in run.metrics()[1:]:
        assert line["epsilon"] == pytest.approx(epsilon_of(line["round"]), abs=1e-4)
        assert line["train_loss"] is None and line["client_peak_bytes"] == 0 and line["client_seconds"] % 10 == 0
    assert json.loads((run.path / "result.json").read_text())["epsilon"] == run.metrics()[-1]["epsilon"]
    assert digest(run) == replayed(run)
    entry = Ledger(run.ledger).read(1).arrays
    assert len(entry["seeds"]) == 12 and np.all(entry["accumulators"] != 0)  # two clients draw four at most
    assert entry["accumulators"].std() == pytest.approx(1.0, rel=0.1)  # σ C / n
    assert [(line["round"], line["asked"]) for line in lines(run)] == [(r, [0, 1]) for r in (1, 2, 3)]


def test_under_masks_the_nodes_add_the_noise(run_config):
    """Four nodes, threshold 3, one of them colluding: each adds σ²/2, and all four twice the whole."""
    masks = {"secure-aggregation": True, "secagg.colluders": 1, "strategy": "fedkrso", "fedkrso.num-seeds": 12}
    run = play(run_config | PRIVATE | masks | {"num-server-rounds": 2}, nodes=4)
    for line in run.metrics()[1:]:
        assert line["epsilon"] == pytest.approx(epsilon_of(line["round"]), abs=1e-4) and line["train_loss"] is None
    entry = Ledger(run.ledger).read(1).arrays
    assert len(entry["seeds"]) == 12 and entry["accumulators"].std() == pytest.approx(2 * math.sqrt(2) / 4, rel=0.1)
    assert digest(run) == replayed(run) and [line["round"] for line in lines(run)] == [1, 2]


def test_under_masks_without_noise_the_sum_is_the_plain_one(run_config):
    settings = run_config | SILENT | {"strategy": "fedsvd", "num-server-rounds": 1, "privacy.clip": 0.1}
    plain, masked = (
        play(settings | {"run-name": name, "secure-aggregation": on}, nodes=3)
        for name, on in (("a", False), ("b", True))
    )
    assert digest(plain) == digest(masked)


def test_whoever_is_killed_after_paying_pays_again(run_config, monkeypatch):
    plain = Published.append

    def killed(self, figures, *args):
        if figures["round"] == 2:
            raise KeyboardInterrupt
        plain(self, figures, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Published, "append", killed)
        play(run_config | PRIVATE, nodes=2)
    path = f"{run_config['output-dir']}/run"
    run = play(run_config | PRIVATE | {"resume": path}, nodes=2)
    assert [line["round"] for line in lines(run)] == [1, 2, 2, 3]
    assert run.metrics()[-1]["epsilon"] == pytest.approx(epsilon_of(4), abs=1e-4)
    assert [line["version"] for line in run.metrics()] == [0, 1, 2, 3]


def test_a_run_ends_before_its_bound_with_the_model_so_far(run_config, caplog):
    settings = run_config | PRIVATE | {"privacy.max-epsilon": (epsilon_of(2) + epsilon_of(3)) / 2}
    run = play(settings, nodes=2)
    assert run.status == "completed" and [line["version"] for line in run.metrics()] == [0, 1, 2]
    assert "would be exceeded in round 3" in caplog.text and (run.model / "config.json").is_file()
    again = play(settings | {"resume": str(run.path)}, nodes=2)  # a resume gives nothing back
    assert again.status == "completed" and len(lines(again)) == 2
    assert again.metrics()[-1]["epsilon"] == pytest.approx(epsilon_of(2), abs=1e-4)


def test_a_loss_that_is_no_number_is_not_told(run_config, monkeypatch):
    replies = []

    def keep(partition, message, reply):
        replies.append(reply)
        return reply

    plain, calls = workplace.loop.train, []

    def lost(*arguments):
        calls.append(plain(*arguments))
        if len(calls) == 1:
            raise NotFinite("the loss is nan")
        return calls[-1]

    monkeypatch.setattr(workplace.loop, "train", lost)
    run = play(run_config | PRIVATE | {"num-server-rounds": 1}, nodes=2, tamper=keep)
    first, second = map(arrays_of, replies)
    assert not first["accumulators"].any() and not first["head"].any() and second["accumulators"].any()
    assert first["accumulators"].shape[1:] == second["accumulators"].shape[1:] and first["seeds"].any()
    assert run.metrics()[-1]["clients"] == 2 and run.metrics()[-1]["failed"] == 0


def test_the_partitions_of_a_node_share_its_clip_unless_they_are_simulated(run_config):
    norms = []

    def measure(partition, message, reply):
        content = {name: record for name, record in reply.content.array_records.items() if "update" in name}
        for record in content.values():
            floats = [a.numpy() for name, a in record.items() if name != "seeds"]
            norms.append(math.sqrt(sum(float((x.astype(float) ** 2).sum()) for x in floats)))
        return reply

    def two_nodes(grid):
        for node, held in ((100, "0-1"), (101, "2")):
            grid.contexts[node].node_config |= {"partitions": held, "num-partitions": 3}

    settings = run_config | PRIVATE | {"privacy.clip": 1e-3, "num-server-rounds": 1, "run-name": "held"}
    run = play(settings, nodes=2, prepare=two_nodes, tamper=measure)
    assert norms == pytest.approx([5e-4, 5e-4, 1e-3], rel=1e-4)
    assert lines(run)[0]["asked"] == [0, 1, 2]
    norms.clear()
    run = play(settings | {"run-name": "simulated", "clients-per-node": 2}, nodes=4, tamper=measure)
    assert norms == pytest.approx([1e-3] * 4, rel=1e-4) and lines(run)[0]["asked"] == [0, 1, 2, 3]


def test_a_node_that_is_told_no_partitions_shares_its_clip_among_all_that_it_trains(run_config):
    """A server says none to a node of one; under masks nobody would clip what a node of two then sent."""
    norms = []

    def measure(message, context, answer):
        if message.metadata.message_type == "train" and context.node_id == 100:
            record = ConfigRecord({**message.content["train"]})
            record.pop("partitions")
            made = Message(RecordDict({**message.content, "train": record}), 100, "train")
            made.metadata.__dict__["_message_id"] = "forged"
            for update in answer(made, context).content.array_records.values():
                floats = [a.numpy().astype(float) for key, a in update.items() if key != "seeds"]
                norms.append(math.sqrt(sum(float((x**2).sum()) for x in floats)))
        return answer(message, context)

    def two_nodes(grid):
        for node, held in ((100, "0-1"), (101, "2")):
            grid.contexts[node].node_config |= {"partitions": held, "num-partitions": 3}
        answer = grid.app
        grid.app = lambda message, context: measure(message, context, answer)

    play(run_config | PRIVATE | {"privacy.clip": 1e-3, "num-server-rounds": 1}, nodes=2, prepare=two_nodes)
    assert norms == pytest.approx([5e-4, 5e-4], rel=1e-4)


def test_the_unit_that_was_asked_most_decides(tmp_path):
    file = tmp_path / "privacy.jsonl"
    spending = Spending(file, 1e-3)
    assert spending.epsilon() == 0
    for round, asked in ((1, (0, 1, 2)), (2, (0, 1)), (3, (1, 3))):  # 0 and 1 were one node's and part in between
        spending.write(Release(round, 2.0, 1.0, asked))
    assert Spending(file, 1e-3).releases == spending.releases and (file.stat().st_mode & 0o777) == 0o600
    assert spending.epsilon() == pytest.approx(epsilon_of(3), abs=1e-4)
    assert spending.epsilon(Release(4, 2.0, 1.0, (3,))) == pytest.approx(epsilon_of(3), abs=1e-4)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:30])  # killed while it was written: nothing was released
    Spending(file, 1e-3).write(Release(4, 2.0, 1.0, (1,)))
    assert [release.round for release in Spending(file, 1e-3).releases] == [1, 2, 3, 4]
    file.write_bytes(b"{}\n" + whole)
    with pytest.raises(ConfigError, match="line 1 cannot be read"):
        Spending(file, 1e-3)


def test_a_plan_has_the_epsilon_and_the_size_of_the_noise(run_config):
    """30 rounds, computed with privacy loss distributions; σ √d / n of FedKRSO with ten slots on RoBERTa-base."""
    rounds = {"num-server-rounds": 30, "privacy.delta": 1e-5, "privacy.noise": 5.0}
    both = parse(run_config | rounds)
    assert plan.epsilon_of_clients(both) == pytest.approx(4.866, abs=1e-3) and plan.epsilon_by_rows(both)
    assert plan.epsilon_by_rows(parse(run_config | PRIVATE | rounds)) == {}
    assert plan.epsilon_of_clients(parse(run_config)) is None
    assert noise_over_clip(7.62, 3_909_890, 10) == pytest.approx(1506, rel=1e-3)
    facts = plan.plan(run_config | PRIVATE, ["fedkrso"], clients=20)
    assert facts["rows"][0]["noise_over_clip"] > 1 and facts["rows"][0]["used"] == 3
    assert any("times a full update" in line for line in planning.notes(facts))


def test_a_round_beyond_the_bound_is_not_begun(run_config, tmp_path):
    bound = PRIVATE | {"privacy.max-epsilon": epsilon_of(1) + 0.01}
    released(run_config, tmp_path, {7: [0]}, **bound).open(None, {})
    released(run_config, tmp_path, {8: [1]}, **bound)  # another client has its own
    with pytest.raises(Spent, match="exceeded in round 1"):
        released(run_config, tmp_path, {7: [0]}, **bound)


REFUSED = {
    "bits": ({"secure-aggregation": True, "secagg.bits": 32}, "set it to 64"),
    "wide": ({"secure-aggregation": True, "privacy.clip": 1000.0, "privacy.noise": 20.0}, "fits under masks"),
    "weighting": ({"weighting": "examples"}, "a weight would multiply"),
    "robust": ({"aggregation": "median"}, "made for a mean"),
    "norms": ({"max-update-norm": 1.0}, "a refusal would tell"),
    "metrics": ({"client-metrics": True}, "of single clients"),
    "strategy": ({"strategy": "fedsrd"}, "its server needs each client's reply"),
    "scalars": ({"strategy": "decomfl"}, "depends on what each of them sends"),
    "start": ({"evaluate": "off"}, "needs evaluate = 'server': head would be clipped as a difference"),
    "clip": ({"privacy.clip": 2000.0}, "at most 1024"),
    "bound": ({"privacy.max-epsilon": 0.1}, "would be exceeded in round 1"),
    "noise": ({"privacy.noise": 0.0}, "needs privacy.clip and privacy.noise above 0"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_it_is_refused(changes, message, run_config):
    make(parse(run_config | PRIVATE), SHAPES)
    with pytest.raises(ConfigError, match=message):
        make(parse(run_config | PRIVATE | changes), SHAPES)
