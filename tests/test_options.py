"""FedProx, server optimizers and SCAFFOLD: by hand on a quadratic, off means off, and the same bits on resume."""

import dataclasses
import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import arrays_of, digest, play, replayed

from fedkrso_app.config import ConfigError
from fedkrso_app.core.flat import flatten
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.runs import plan
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies import STRATEGIES, make, options, parse
from fedkrso_app.strategies.base import Local, Method
from fedkrso_app.training import loop
from fedkrso_app.training.loop import Session
from fedkrso_app.training.shapes import Shapes

MEANS = ["fedfft", "fedit", "ffa-lora", "rolora"]  # methods whose entries are the means of their replies
STEPS, RATE, A, TARGETS = 5, 0.1, np.array([1.0, 3.0]), np.array([[1.0, -2.0], [3.0, 0.5]])


class Quadratic(torch.nn.Module):
    """f(w) = ½ Σ a (w − b)², where b comes as a batch."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))

    def forward(self, b, labels):
        return SimpleNamespace(loss=0.5 * (torch.from_numpy(A).float() * (self.w - b) ** 2).sum())


class SGDLocal(Local):
    def state(self):
        return {"w": flatten([self.module.w])}

    def apply(self, arrays):
        self.module.w.data.copy_(torch.from_numpy(np.array(arrays["w"])))

    @contextmanager
    def session(self, instructions, rng):
        yield Session([torch.optim.SGD([self.module.w], lr=RATE)], self.state, constant_rate=True)

    def optimized(self):
        return [self.module.w]


class Mean(Method):
    half, settings, arxiv, learning_rate_key = SGDLocal, (), "", "lora.learning-rate"

    @property
    def reply(self):
        return Schema({"w": Field("float32", (2,), "state")})

    def paper_bytes(self):
        return 0


class Means:
    def __init__(self, replies):
        self._replies = replies

    def __contains__(self, name):
        return all(name in reply for reply in self._replies)

    def mean(self, name):
        return np.mean([reply[name] for reply in self._replies], axis=0, dtype=np.float64).astype(np.float32)


@pytest.fixture
def federate(run_config):
    """``federate(settings, rounds)``: the two clients' quadratics under those options; w after every round."""

    def run(settings, rounds, who=()):
        config = parse(run_config | {"strategy": "fedit", "local-steps": STEPS, "warmup": 0.0} | settings)
        shapes = SimpleNamespace(targets={"": (9, 9)})
        method = options.applied(Mean, config)(config, shapes)
        loaded = SimpleNamespace(module=Quadratic(), targets={}, head={})
        local, own, path = method.local(loaded), {0: {}, 1: {}}, []
        method.observe(0, local.state())
        for round, clients in zip(range(1, rounds + 1), who or [(0, 1)] * rounds, strict=True):
            replies = []
            for i in clients:
                start = [t.clone() for t in local.trained()]
                local.adopt(own[i])
                rng = np.random.default_rng(0)
                batch = {"b": torch.from_numpy(TARGETS[i]).float(), "labels": torch.zeros(1)}
                with local.session({}, rng) as session:
                    loop.train(local.module, itertools.repeat(batch), session, config, rng)
                    arrays = session.update()
                own[i] = {name: arrays.pop(name) for name in method.reply.named("memory")}
                replies.append(arrays)
                for tensor, before in zip(local.trained(), start, strict=True):
                    tensor.data.copy_(before)
            entry = method.conclude(Means(replies), round)
            method.kept = {name: entry.pop(name) for name in method.entry.named("server")}
            assert set(entry) == set(method.entry.travelling.fields)
            local.apply(entry)
            method.observe(round, entry)
            path.append(entry["w"].astype(np.float64))
        return np.array(path)

    return run


def descend(w, b, more=lambda y: 0.0):
    """``STEPS`` gradient steps on ½ Σ a (y − b)², in float64, with ``more`` added to each gradient."""
    y = w.copy()
    for _ in range(STEPS):
        y = y - RATE * (A * (y - b) + more(y))
    return y


def test_fedprox_is_gradient_descent_with_a_pull_to_the_start(federate):
    w, mu = np.zeros(2), 2.5
    for expected in federate({"client.proximal": mu}, 3):
        w = np.mean([descend(w, b, lambda y, start=w: mu * (y - start)) for b in TARGETS], axis=0)
        np.testing.assert_allclose(expected, w, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam", "fedyogi"])
def test_a_server_optimizer_steps_along_the_mean_difference(federate, optimizer):
    own = {"server.learning-rate": 0.5, "server.adaptive-learning-rate": 0.3, "server.momentum": 0.6}
    path = federate({"server.optimizer": optimizer, "server.beta2": 0.7, "server.tau": 0.01, **own}, 6)
    w, m, v = np.zeros(2), np.zeros(2), np.full(2, 0.01**2)
    for seen in path:
        move = np.mean([descend(w, b) for b in TARGETS], axis=0) - w
        if optimizer == "fedavgm":
            m = 0.6 * m + move
            w = w + 0.5 * m
        else:
            m = 0.6 * m + 0.4 * move
            decay = 0.7 * v + 0.3 * move**2 if optimizer == "fedadam" else v - 0.3 * move**2 * np.sign(v - move**2)
            v = decay
            w = w + 0.3 * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(seen, w, rtol=1e-4)


@pytest.mark.parametrize("who", [[(0, 1)] * 6, [(0,), (1,), (1,), (0, 1), (0,), (1,)]])
def test_scaffold_is_that_of_the_paper(federate, who):
    """Algorithm 1 of arXiv:1910.06378 with option II and plain gradient steps, in the paper's control variates."""
    share = len(who[0]) / 2
    path = federate({"client.correction": "scaffold", "fraction-train": share}, len(who), who)
    w, c, own = np.zeros(2), np.zeros(2), np.zeros((2, 2))
    for seen, clients in zip(path, who, strict=True):
        ends, changes = [], []
        for i in clients:
            y = descend(w, TARGETS[i], lambda y, i=i: c - own[i])  # noqa: B023
            now = own[i] - c + (w - y) / (STEPS * RATE)
            ends.append(y)
            changes.append(now - own[i])
            own[i] = now
        w, c = np.mean(ends, axis=0), c + share * np.mean(changes, axis=0)
        np.testing.assert_allclose(seen, w, rtol=1e-4, atol=1e-6)


def test_scaffold_finds_the_minimum_that_the_mean_of_drifting_clients_misses(federate, monkeypatch):
    """Clients of other curvature: local steps end elsewhere than at the minimum of the sum."""
    monkeypatch.setattr(f"{__name__}.TARGETS", np.array([[1.0, -2.0], [3.0, 0.5]]))
    curved = iter(itertools.cycle([np.array([1.0, 3.0]), np.array([6.0, 0.5])]))
    forward = Quadratic.forward

    def bent(self, b, labels):
        monkeypatch.setattr(f"{__name__}.A", np.array([1.0, 3.0]) if b[0] == 1 else np.array([6.0, 0.5]))
        return forward(self, b, labels)

    monkeypatch.setattr(Quadratic, "forward", bent)
    both = np.array([next(curved), next(curved)])
    best = (both * TARGETS).sum(axis=0) / both.sum(axis=0)
    plain, corrected = (federate({"client.correction": kind}, 60)[-1] for kind in ("none", "scaffold"))
    assert np.abs(plain - best).max() > 0.05 and np.abs(corrected - best).max() < 1e-3


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("constant", [True, False])
def test_the_shares_of_the_steps_are_those_of_the_learning_rates_in_training(config, constant, schedule):
    module, rates = Quadratic(), []
    optimizer = torch.optim.SGD([module.w], lr=0.3)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    batch = {"b": torch.zeros(2), "labels": torch.zeros(1)}
    config = dataclasses.replace(config, local_steps=20, warmup=0.2, schedule=schedule)
    session = Session([optimizer], dict, constant_rate=constant)
    loop.train(module, itertools.repeat(batch), session, config, np.random.default_rng(0))
    np.testing.assert_allclose(options.shares(config, constant), np.array(rates) / sum(rates), rtol=1e-12)


OFF = {"client.proximal": 0.0, "server.optimizer": "fedavgm", "server.momentum": 0.0, "server.learning-rate": 1.0}


@pytest.mark.parametrize("strategy", MEANS)
def test_a_server_at_rate_one_without_momentum_is_the_plain_mean_to_the_bit(run_config, strategy):
    settings = run_config | {"strategy": strategy}
    plain = play(settings)
    assert digest(play(settings | OFF | {"run-name": "off"}, run_id=2)) == digest(plain)


def test_options_that_are_off_leave_the_method_itself(run_config):
    config = parse(run_config)
    assert all(options.applied(method, config) is method for method in STRATEGIES.values() if not method.local_head)


SMALL = {"wire-dtype": "int8", "compute-dtype": "bfloat16"}
ON = {
    "fedprox": {"client.proximal": 0.1},
    "fedavgm": {"server.optimizer": "fedavgm", "server.momentum": 0.5},
    "fedadam": {"server.optimizer": "fedadam"},
    "scaffold": {"client.correction": "scaffold"},
    "all": {"client.proximal": 0.1, "server.optimizer": "fedyogi", "client.correction": "scaffold"},
}


@pytest.mark.parametrize(("option", "more"), [*((option, {}) for option in ON), ("all", SMALL)])
def test_an_interrupted_run_ends_at_the_bits_of_one_that_was_not(run_config, option, more, tmp_path, monkeypatch):
    settings = run_config | {"strategy": "fedit", "fraction-train": 0.5} | ON[option] | more
    whole = play(settings)
    assert replayed(whole) == digest(whole)

    def stop(partition, message, reply):
        if message.metadata.message_type == "train" and message.content["train"]["round"] == 3:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        play(settings | {"run-name": "again"}, tamper=stop, run_id=2, devices=True)
    monkeypatch.setenv("FEDKRSO_CACHE", str(tmp_path / "cache"))  # the nodes' disks again
    again = str(whole.path.parent / "again")
    resumed = play(settings | {"run-name": "again", "resume": again}, run_id=3, devices=True)
    assert digest(resumed) == digest(whole)


@pytest.mark.parametrize("strategy", ["fedkrso", *MEANS])
def test_a_proximal_term_keeps_clients_near_the_start(run_config, strategy):
    lengths = {}
    for mu in (0.0, 1e3):
        sent = []

        def keep(partition, message, reply, sent=sent):
            sent.append(arrays_of(reply))
            return reply

        settings = run_config | {"strategy": strategy, "num-server-rounds": 1, "client.proximal": mu}
        run = play(settings | {"run-name": f"{mu}"}, nodes=2, tamper=keep, run_id=1 + int(mu))
        start = Ledger(run.ledger).read(0).arrays
        if strategy == "fedkrso":
            moved = [reply["accumulators"].ravel() for reply in sent]
        else:
            moved = [np.concatenate([(x[n] - start[n]).ravel() for n in x]) for x in sent]
        lengths[mu] = np.linalg.norm(np.concatenate(moved))
    assert 0 < lengths[1e3] < 0.9 * lengths[0.0]


def test_scaffold_sends_nothing_more_up_and_the_drift_down(run_config):
    settings = run_config | {"strategy": "ffa-lora", "num-server-rounds": 2}
    plain = play(settings).metrics()[-1]
    run = play(settings | ON["scaffold"] | {"run-name": "scaffold"}, run_id=2)
    line = run.metrics()[-1]
    trained = sum(value.size for name, value in Ledger(run.ledger).read(2).arrays.items() if name != "drift")
    assert abs(line["uplink_bytes"] - plain["uplink_bytes"]) < 100
    assert 4 * 4 * trained <= line["downlink_bytes"] - plain["downlink_bytes"] < 4 * 4 * trained + 4 * 600


@pytest.mark.parametrize("by_difference", [{}, {"wire-dtype": "float16"}])
def test_where_all_take_part_the_drift_is_what_the_last_round_moved(run_config, by_difference):
    run = play(run_config | {"strategy": "ffa-lora", "num-server-rounds": 3} | ON["scaffold"] | by_difference, nodes=2)
    entries = [wire.decode(Ledger(run.ledger).read(version).arrays) for version in (2, 3)]
    moved = np.concatenate([(entries[1][name] - entries[0][name]).ravel() for name in ("B", "head")])
    assert np.allclose(entries[1]["drift"], moved, rtol=0, atol=1e-3) and np.abs(moved).max() > 0.02


@pytest.mark.parametrize("option", ON)
def test_a_plan_counts_an_options_bytes_and_memory(run_config, option):
    settings = run_config | {"strategy": "fedit"} | ON[option]
    plain, row = (plan.plan(s, ["fedit"], 4)["rows"][0] for s in (run_config, settings))
    lines = [line for line in play(settings).metrics() if line["round"]]
    up, down = (sum(line[key] for line in lines) / 12 for key in ("uplink_bytes", "downlink_bytes"))
    assert (row["up"], row["down"]) == pytest.approx((up, down), rel=0.01)
    copies = {"fedprox": 1, "scaffold": 4, "all": 5}.get(option, 0)  # of what is trained
    more = row["memory"]["keep"]["total"] - plain["memory"]["keep"]["total"]
    assert copies - 1 <= more / (4 * row["trained"]) <= copies + 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strategy": "fedkrso", "server.optimizer": "fedadam"}, "more than the means of its replies"),
        ({"strategy": "fedsrd", "client.correction": "scaffold"}, "more than the means of its replies"),
        ({"strategy": "fedit", "server.optimizer": "fedadam", "evaluate": "off"}, "needs evaluate = 'server'"),
        ({"strategy": "fedit", "client.correction": "scaffold", "aggregation": "median"}, "needs aggregation = 'mean'"),
        ({"client.proximal": -1.0}, "client.proximal"),
        ({"server.optimizer": "adam"}, "is not one of"),
        ({"server.tau": 0.0}, "server.tau"),
    ],
)
def test_what_an_option_cannot_go_with_is_refused_before_anything_starts(run_config, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(run_config | settings)


def test_scaffold_goes_with_a_method_that_has_a_size_of_its_own(run_config):
    shapes = Shapes({"layer": (30, 20)}, 10, 610, small={})
    method = make(parse(run_config | {"strategy": "fedfft"} | ON["scaffold"]), shapes)
    assert method.reply.fields["own-drift"].shape == method.reply.fields["parameters"].shape


def test_scaffold_does_not_go_with_arrays_that_take_turns(run_config):
    with pytest.raises(ConfigError, match="whose arrays take turns"):
        play(run_config | {"strategy": "rolora"} | ON["scaffold"])


def test_a_proximal_term_without_gradients_is_refused(run_config, monkeypatch):
    class Zeroth(STRATEGIES["fedit"]):
        zeroth_order = True

    monkeypatch.setitem(STRATEGIES, "fedit", Zeroth)
    with pytest.raises(ConfigError, match="takes no gradients"):
        parse(run_config | {"strategy": "fedit", "client.proximal": 1.0})


def test_the_servers_moments_are_beside_the_ledger_and_not_in_it(run_config):
    run: Run = play(run_config | {"strategy": "ffa-lora"} | ON["fedadam"])
    assert set(Ledger(run.ledger).read(3).arrays) == {"B", "head"}
    assert set(Ledger(run.path / "server").read(3).arrays) == {"m.B", "m.head", "v.B", "v.head"}
