"""CONTRIBUTING's promise: a method that is defined here and nowhere else runs, resumes, catches up, plans and reports.

Scalars along seeds: every client moves W along the directions of the round's seeds by zeroth-order steps and sends one
number per seed. It has a table of settings, a part of the model that stays with each client (its head), a state of the
server (momentum over all rounds), and optimizers that need losses and no gradients.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from helpers import arrays_of, play, replica
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.config import ConfigError, Settings, need_positive
from fedkrso_app.core.flat import flatten
from fedkrso_app.core.projection import stream
from fedkrso_app.core.subspace import matrix
from fedkrso_app.federation import client
from fedkrso_app.federation.store import NodeStore, cache
from fedkrso_app.records.ledger import Ledger, LedgerError
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.runs import plan, report
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies import STRATEGIES, make, parse
from fedkrso_app.strategies.base import Local, Method
from fedkrso_app.training import model
from fedkrso_app.training.loop import Session
from fedkrso_app.training.shapes import Shapes

SEEDS, EPSILON = 3, 1e-3


@dataclass(frozen=True)
class ScalarsSettings(Settings):
    table = "scalars"
    learning_rate: float
    momentum: float

    def __post_init__(self) -> None:
        need_positive("scalars.learning-rate", self.learning_rate)


class Along(torch.optim.Optimizer):
    """g = (f(W + εz) − f(W − εz)) / 2ε; W ← W − η g z."""

    def __init__(self, tensors, rate, directions):
        super().__init__([torch.nn.Parameter(torch.zeros(()))], {"lr": rate})
        self.tensors, self.directions, self.scalars, self.j = tensors, directions, np.zeros(SEEDS, np.float32), 0

    def step(self, closure):
        k, losses = self.j % SEEDS, []
        for move in (EPSILON, -2 * EPSILON):
            shift(self.tensors, self.directions[k], move)
            losses.append(closure().item())
        shift(self.tensors, self.directions[k], EPSILON)
        s = -self.param_groups[0]["lr"] * (losses[0] - losses[1]) / (2 * EPSILON)
        shift(self.tensors, self.directions[k], s)
        self.scalars[k] += np.float32(s)
        self.j += 1


@torch.no_grad()
def shift(tensors, direction, s):
    for tensor, z in zip(tensors, direction, strict=True):
        tensor.add_(z, alpha=float(s))


def direction(seed, tensors):
    return [
        torch.from_numpy(stream(seed, "z", i).standard_normal(t.shape, dtype=np.float32)) for i, t in enumerate(tensors)
    ]


class ScalarsLocal(Local):
    def state(self):
        return {}

    def apply(self, arrays):
        for seed, s in zip(arrays["seeds"].tolist(), arrays["scalars"], strict=True) if "seeds" in arrays else ():
            shift(self.shared(), direction(seed, self.shared()), s)

    @contextmanager
    def session(self, instructions, rng) -> Iterator[Session]:
        seeds = np.frombuffer(instructions["seeds"], dtype="<u8")
        rate = self.config.of(ScalarsSettings).learning_rate
        along = Along(self.shared(), rate, [direction(seed, self.shared()) for seed in seeds.tolist()])
        own = Along(self.personal()["head"], rate, [direction(7 + k, self.personal()["head"]) for k in range(SEEDS)])
        update = lambda: {"seeds": seeds, "scalars": along.scalars, "head": flatten(self.personal()["head"])}  # noqa: E731
        yield Session([along, own], update, from_losses=True)

    def optimized(self):
        return list(self.head.values())

    def shared(self):
        return [matrix(layer) for layer in self.targets.values()]

    def personal(self):
        return {"head": [parameter.detach() for parameter in self.head.values()]}


class Scalars(Method):
    half = ScalarsLocal
    settings = (ScalarsSettings,)
    arxiv = "0000.00000"
    learning_rate_key = "scalars.learning-rate"

    @property
    def reply(self):
        fields = {"seeds": Field("uint64", (SEEDS,), "key"), "scalars": Field("float32", (SEEDS,))}
        return Schema({**fields, "head": Field("float32", (self.shapes.head,), "personal")})

    @property
    def entry(self):
        return Schema(
            {**self.reply.only(["seeds", "scalars"]).fields, "velocity": Field("float32", (SEEDS,), "server")}
        )

    @property
    def weights_sizes(self):
        return self.shapes.weights, 0

    def paper_bytes(self):
        return 2 * 4 * SEEDS

    def instructions(self, round):
        return {
            "seeds": stream(self.config.seed, "scalars", round).integers(2**63, size=SEEDS, dtype=np.uint64).tobytes()
        }

    def check(self, arrays, round):
        if arrays["seeds"].tobytes() != self.instructions(round)["seeds"]:
            raise Refused("other seeds than this round's")

    def summands(self, arrays):
        return {"scalars": arrays["scalars"]}

    def conclude(self, means, round):
        before = self.kept.get("velocity", np.zeros(SEEDS, np.float32))
        velocity = self.config.of(ScalarsSettings).momentum * before + means.mean("scalars")
        seeds = np.frombuffer(self.instructions(round)["seeds"], dtype="<u8").copy()
        return {"seeds": seeds, "scalars": velocity, "velocity": velocity}


@pytest.fixture
def settings(run_config, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "scalars", Scalars)
    own = {"strategy": "scalars", "scalars.learning-rate": 1e-3, "scalars.momentum": 0.5, "evaluate": "clients"}
    return run_config | own | {"client-metrics": True}


def weights(run) -> bytes:
    return flatten(replica(run).shared()).tobytes()


def heads(run) -> list[bytes]:
    """What each partition keeps of the model to itself, as the end of the run has left it on the node's disk."""
    folder = cache() / "personal" / run.info["id"]
    owned = [Ledger(folder / f"personal-{partition}") for partition in range(4)]
    return [kept.read(kept.versions()[-1]).arrays["head"].tobytes() for kept in owned]


def test_it_runs_and_every_partition_keeps_a_head_of_its_own(settings):
    run = play(settings)
    assert run.status == "completed" and len(set(heads(run))) == 4
    own = [[c["metric"] for c in line["per_client"].values()] for line in run.metrics()[1:]]
    assert all(len(scores) == 4 for scores in own)
    counts = np.array([40] * 4)  # forty validation rows, ten each: the pooled metric is the mean of the clients'
    assert run.metrics()[-1]["metric"] == pytest.approx(np.average(own[-1], weights=counts))


def test_what_is_personal_and_what_is_the_servers_never_travels(settings):
    seen = set()

    def look(partition, message, reply):
        for content in (message.content, reply.content):
            seen.update(name for record in content.array_records.values() for name in record)
        return reply

    play(settings, tamper=look)
    assert seen == {"seeds", "scalars", "tally"}


def test_the_entry_is_momentum_over_the_means(settings):
    sent = {}

    def keep(partition, message, reply):
        if message.metadata.message_type == "train":
            sent.setdefault(message.content["train"]["round"], []).append(arrays_of(reply)["scalars"])
        return reply

    run = play(settings, tamper=keep)
    velocity = np.zeros(SEEDS)
    for round in (1, 2, 3):
        velocity = 0.5 * velocity + np.mean(sent[round], axis=0, dtype=np.float64)
        np.testing.assert_allclose(Ledger(run.ledger).read(round).arrays["scalars"], velocity, rtol=1e-5)


def test_order_and_processes_change_no_bit(settings):
    run = play(settings)
    other = play(settings | {"run-name": "other"}, order=lambda replies: replies[::-1], run_id=2, devices=True)
    assert weights(run) == weights(other)
    assert [line["metric"] for line in run.metrics()[1:]] == [line["metric"] for line in other.metrics()[1:]]


@pytest.mark.parametrize("after", ["train", "evaluate"])
def test_a_resumed_run_ends_at_the_same_bits_and_heads(settings, after):
    """The second round is interrupted, when some clients have trained already: they begin it again where it began."""
    whole = play(settings)
    expected = weights(whole), heads(whole)

    def stop(partition, message, reply):
        if partition == 2 and message.metadata.message_type == after and stop.left:
            stop.left -= 1
            if not stop.left:
                raise KeyboardInterrupt
        return reply

    stop.left = 2
    with pytest.raises(KeyboardInterrupt):
        play(settings | {"run-name": "again"}, tamper=stop, run_id=2)
    path = whole.path.parent / "again"
    resumed = play(settings | {"run-name": "again", "resume": str(path)}, run_id=3)
    assert (weights(resumed), heads(resumed)) == expected


def test_a_message_that_comes_twice_gives_the_same_reply(settings):
    def twice(partition, message, reply):
        if message.metadata.message_type == "train":
            again = twice.grid.app(message, twice.grid.contexts[message.metadata.dst_node_id])
            assert {k: v.tobytes() for k, v in arrays_of(again).items()} == {
                k: v.tobytes() for k, v in arrays_of(reply).items()
            }
        return reply

    play(settings, tamper=twice, prepare=lambda grid: setattr(twice, "grid", grid))


def test_a_resume_without_the_servers_state_is_refused(settings):
    def stop(partition, message, reply):
        if message.metadata.message_type == "train" and message.content["train"]["round"] == 3:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        play(settings, tamper=stop)
    run = Run(Path(settings["output-dir"]) / settings["run-name"])
    shutil.rmtree(run.path / "server")
    with pytest.raises(LedgerError, match="entry 2 is missing"):
        play(settings | {"resume": str(run.path)}, run_id=2)


def test_partial_participation_catches_up(settings):
    partial = settings | {"fraction-train": 0.5, "num-server-rounds": 5}
    seen = {}

    def look(partition, message, reply):
        place = client.workplace(str(message.content[message.metadata.message_type]["run"]), parse(partial), 4)
        seen.setdefault(place.replica.version, set()).add(flatten(place.replica.local.shared()).tobytes())
        return reply

    run = play(partial, tamper=look)
    assert all(len(states) == 1 for states in seen.values()) and seen[5] == {weights(run)}


def test_a_bad_reply_costs_its_share(settings, caplog):
    def forge(partition, message, reply):
        if partition == 1 and message.metadata.message_type == "train":
            return Message(Error(code=8, reason="gone"), reply_to=message)
        return reply

    def other_seeds(partition, message, reply):
        if partition == 1 and message.metadata.message_type == "train":
            array = reply.content["update"]["seeds"].numpy().copy()
            array[0] += 1
            reply.content["update"]["seeds"] = type(reply.content["update"]["seeds"])(array)
        return reply

    a = play(settings, tamper=forge)
    b = play(settings | {"run-name": "b"}, tamper=other_seeds, run_id=2)
    assert weights(a) == weights(b) and "partition 1 refused: other seeds" in caplog.text


def test_it_is_planned_to_the_byte_and_reported(settings, model_folder, tmp_path):
    run = play(settings)
    made = make(parse(settings), Shapes.of(model.outline(str(model_folder), 2)))
    costs, _ = plan.traffic(make(parse(settings | {"evaluate": "off"}), made.shapes), 4, 4)
    play(settings | {"run-name": "bytes", "evaluate": "off", "client-metrics": False}, run_id=2)
    lines = [line for line in type(run)(run.path.parent / "bytes").metrics() if line["round"]]
    up, down = (sum(line[key] for line in lines) / 12 for key in ("uplink_bytes", "downlink_bytes"))
    assert (costs["up"], costs["down"]) == pytest.approx((up, down), rel=0.01)
    report.write([run], tmp_path / "report.html")
    assert "scalars" in (tmp_path / "report.html").read_text()
    entries = json.loads(CliRunner().invoke(cli.app, ["ledger", str(run.path), "--json"]).stdout)["entries"]
    assert set(entries[-1]["norms"]) == {"scalars"} and entries[-1]["version"] == 3


def test_the_model_of_a_partition_is_exported_with_its_own_part(settings, tmp_path):
    run = play(settings)
    call = lambda *options: CliRunner().invoke(cli.app, ["export", str(run.path), str(tmp_path / "out"), *options])  # noqa: E731
    assert "keep head to themselves: give --partition" in call().output
    assert "partition 9 has left nothing" in call("--partition", "9").output
    assert call("--partition", "2").exit_code == 0
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    names = list(replica(run).head)
    assert flatten(dict(exported.named_parameters())[name] for name in names).tobytes() == heads(run)[2]
    fedit = play(settings | {"strategy": "fedit", "evaluate": "server", "run-name": "fedit"}, run_id=2)
    answer = CliRunner().invoke(cli.app, ["export", str(fedit.path), str(tmp_path / "no"), "--partition", "0"])
    assert "keep nothing of the model to themselves" in answer.output


def test_a_server_that_would_judge_alone_is_refused(settings):
    with pytest.raises(ConfigError, match="leaves a part of the model at each client"):
        play(settings | {"evaluate": "server"})


def test_two_files_of_a_partition_stay(tmp_path):
    store = NodeStore("0" * 16)
    for round in (1, 2, 3):
        store.put_personal(5, round, {"head": np.full(2, round, np.float32)})
    assert store.personal(5)["head"][0] == 3 and store.personal(5, before=3)["head"][0] == 2
    assert store.personal(5, before=2) == {} and store.personal(4) == {}
    released = store.clear()
    assert released and Ledger(released / "personal-5").versions() == [2, 3] and not store.folder.exists()
