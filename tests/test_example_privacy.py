"""Example-level DP in whole runs: ε by another route, the node's book, what the server sees, what is refused."""

import functools
import json
import math
from contextlib import nullcontext

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from helpers import digest, play, replayed

from fedkrso_app.config import ConfigError
from fedkrso_app.federation import budget
from fedkrso_app.federation.budget import Event
from fedkrso_app.federation.discretion import Declined
from fedkrso_app.federation.policy import Policy
from fedkrso_app.runs.summary import closing_table
from fedkrso_app.strategies import parse

PRIVATE = {"privacy.unit": "example", "privacy.clip": 1.0, "privacy.noise": 1.0, "privacy.delta": 1e-3}


@functools.cache
def epsilon_of(rows: int, batch: int, steps: int, noise: float = 1.0, delta: float = 1e-3) -> float:
    pld = PLDAccountant(value_discretization_interval=1e-3)
    pld.compose(PoissonSampledDpEvent(batch / rows, GaussianDpEvent(noise)), steps)
    return pld.get_epsilon(delta)


def books(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["fedkrso", "ffa-lora", "fedit"])
def test_a_run_tells_the_epsilon_of_its_rounds_and_no_loss(strategy, run_config, tmp_path):
    run = play(run_config | PRIVATE | {"strategy": strategy, "num-server-rounds": 2}, nodes=4)
    lines = run.metrics()
    for line in lines[1:]:
        exact = epsilon_of(40, 8, 4 * line["round"])
        assert exact - 1e-3 <= line["epsilon"] <= exact + 0.11 and line["epsilon"] == round(line["epsilon"], 1)
        assert line["train_loss"] is None and line["clients"] == 4
        assert line["client_seconds"] % 10 == 0 and line["client_peak_bytes"] == 0
    assert digest(run) == replayed(run)
    assert f"{lines[-1]['epsilon']:.2f} at delta = 0.001 for each example" in closing_table(run, "accuracy")
    (folder,) = (tmp_path / "cache" / "privacy").iterdir()  # the books of a simulation are each run's own
    assert sorted(file.name for file in folder.iterdir()) == [f"{i}.jsonl" for i in range(4)]
    more = run_config | PRIVATE | {"strategy": strategy, "resume": str(run.path)}  # three rounds
    assert play(more, nodes=4).metrics()[-1]["epsilon"] >= epsilon_of(40, 8, 12) - 1e-3


def test_the_seed_repeats_a_run_and_the_operating_system_does_not(run_config):
    settings = run_config | PRIVATE | {"num-server-rounds": 1, "local-steps": 2}
    seeded = settings | {"privacy.randomness": "seed"}
    one, other = (digest(play(seeded | {"run-name": name}, nodes=2)) for name in ("a", "b"))
    assert one == other
    one, other = (digest(play(settings | {"run-name": name}, nodes=2)) for name in ("c", "d"))
    assert one != other


def test_a_node_keeps_to_its_own_bound_over_runs(run_config, tmp_path, caplog):
    """Runs of two rounds: a node whose bound is between three and four rounds leaves in the fourth."""
    bound = (epsilon_of(40, 8, 12, delta=1e-5) + epsilon_of(40, 8, 16, delta=1e-5)) / 2

    def careful(grid):
        grid.contexts[101].node_config["max-epsilon"] = bound
        grid.contexts[102].node_config["max-epsilon"] = 1000

    settings = run_config | PRIVATE | {"num-server-rounds": 2}
    first = play(settings | {"run-name": "first"}, nodes=4, prepare=careful).metrics()
    assert [line["clients"] for line in first[1:]] == [4, 4]
    spent = books(tmp_path / "cache" / "privacy.jsonl")
    assert len(spent) == 4 and len({event["data"] for event in spent}) == 2
    assert {event["rate"] for event in spent} == {0.2} and {event["steps"] for event in spent} == {4}
    again = settings | {"run-name": "again", "seed": 1, "partition-seed": 0}  # other noise, the same rows
    second = play(again, nodes=4, prepare=careful).metrics()
    assert [line["clients"] for line in second[1:]] == [4, 3]
    assert "this node's max-epsilon would be exceeded" in caplog.text
    assert len(books(tmp_path / "cache" / "privacy.jsonl")) == len(spent) + 1 + 2


def event(run="a", round=1, data="d", folder="", rows=40, noise=1.0, steps=4) -> Event:
    return Event(run, round, data, folder, rows, noise, 1.0, 0.2, steps)


def test_the_book_adds_up_what_concerns_the_same_rows():
    spend = functools.partial(budget.spend, budget.book())
    assert spend(event(), 1e-3) == pytest.approx(epsilon_of(40, 8, 4), abs=1e-3)
    assert spend(event(data="other"), 1e-3) == pytest.approx(epsilon_of(40, 8, 4), abs=1e-3)
    assert spend(event(round=1), 1e-3) == pytest.approx(epsilon_of(40, 8, 8), abs=1e-3)  # the round is done again
    assert spend(event(run="b"), 1e-3) == pytest.approx(epsilon_of(40, 8, 4), abs=1e-3)  # ε of a run is its own
    most = (epsilon_of(40, 8, 12, delta=1e-5) + epsilon_of(40, 8, 16, delta=1e-5)) / 2
    with pytest.raises(ConfigError, match="this node's max-epsilon would be exceeded"):
        spend(event(run="c"), 1e-3, most)
    assert len(budget.known(budget.book())) == 4  # nothing was written
    spend(event(run="c", data="other"), 1e-3, most)
    assert (budget.book().stat().st_mode & 0o777) == 0o600


def test_a_larger_delta_of_the_run_does_not_stretch_a_node_s_own_bound():
    """The run's settings come from the other side."""
    most = epsilon_of(40, 8, 4, delta=1e-5) - 0.01
    assert epsilon_of(40, 8, 4, delta=1e-2) < most
    with pytest.raises(ConfigError, match="this node's max-epsilon would be exceeded"):
        budget.spend(budget.book(), event(), 1e-2, most)
    budget.spend(budget.book(), event(), 1e-2, most + 0.02)


def test_under_masks_a_reply_that_is_refused_is_not_in_the_sum(run_config):
    def silent(partition, message, reply):
        if partition == 2:
            del reply.content["shares"]["epsilon"]
        return reply

    settings = run_config | PRIVATE | {"secure-aggregation": True, "num-server-rounds": 1, "local-steps": 2}
    settings |= {"fedkrso.draw": "each", "fedkrso.num-seeds": 1}
    line = play(settings, nodes=4, tamper=silent).metrics()[-1]
    assert (line["clients"], line["refused"], line["partitions"]) == (3, 1, [0, 1, 3])


def test_a_run_keeps_to_its_own_bound_and_ends_there(run_config, caplog):
    bound = (epsilon_of(40, 8, 8) + epsilon_of(40, 8, 12)) / 2
    run = play(run_config | PRIVATE | {"privacy.max-epsilon": bound, "num-server-rounds": 6}, nodes=4)
    lines = run.metrics()
    assert [line["clients"] for line in lines] == [0, 4, 4, 0] and lines[-1]["version"] == 2
    assert max(line.get("epsilon", 0.0) for line in lines) <= bound + 0.1
    assert run.status == "completed" and "for each client; the run ends here" in caplog.text


def test_a_folder_counts_whatever_was_in_it():
    budget.spend(budget.book(), event(data="yesterday", folder="/data"), 1e-3)
    with pytest.raises(ConfigError, match="would be exceeded"):
        budget.spend(budget.book(), event(data="today", folder="/data"), 1e-3, epsilon_of(40, 8, 4, delta=1e-5) + 0.1)
    budget.spend(budget.book(), event(data="today", folder="/elsewhere"), 1e-3, epsilon_of(40, 8, 4, delta=1e-5) + 0.1)


def test_rows_that_change_within_a_run_do_not_begin_its_epsilon_anew():
    spend = functools.partial(budget.spend, budget.book(), delta=1e-3)
    assert spend(event(folder="f")) < spend(event(data="one row more", folder="f", round=2))
    assert spend(event(data="others", folder="g")) == pytest.approx(epsilon_of(40, 8, 4), abs=1e-3)


def test_a_node_with_a_bound_counts_runs_that_split_its_rows_otherwise(run_config, tmp_path):
    """A server may choose another holdout, and so other rows, for each run."""

    def careful(grid):
        grid.contexts[101].node_config["max-epsilon"] = 1000

    settings = run_config | PRIVATE | {"num-server-rounds": 1, "local-steps": 2}
    for name, seed in (("a", 0), ("b", 1)):
        play(settings | {"run-name": name, "partition-seed": seed}, nodes=4, prepare=careful)
    one, other = books(tmp_path / "cache" / "privacy.jsonl")
    assert one["data"] != other["data"] and one["folder"] == other["folder"]


def test_a_line_that_was_cut_short_was_not_spent_and_a_broken_one_is_said():
    budget.spend(budget.book(), event(), 1e-3)
    whole = budget.book().read_bytes()
    budget.book().write_bytes(whole + whole[:20])
    budget.spend(budget.book(), event(round=2), 1e-3)
    assert [e.round for e in budget.known(budget.book())] == [1, 2]
    budget.book().write_bytes(b"{}\n" + whole)
    with pytest.raises(ConfigError, match="line 1 cannot be read"):
        budget.known(budget.book())


def test_delta_must_promise_something_to_a_client_of_so_many_rows():
    with pytest.raises(ConfigError, match="below 1/1000"):
        budget.spend(budget.book(), event(rows=1000), 1e-3)
    assert [budget.reported(value) for value in (0.0, 0.31, 0.4, 2.05)] == [0.0, 0.4, 0.4, 2.1]
    assert budget.reported(math.inf) == math.inf


REFUSED = {
    "strategy": ({"strategy": "fedfft"}, "trains more than linear layers"),
    "no gradients": ({"strategy": "fedkseed"}, "takes no gradients"),
    "max-grad-norm": ({"max-grad-norm": 1.0}, "set it to 0"),
    "ranks": ({"strategy": "hetlora", "lora.ranks": "2,1"}, "leave it empty"),
    "passes": ({"batch-clients": "4"}, "one after another"),
    "graphs": ({"captured-steps": "on"}, "batches have no fixed size"),
    "noise": ({"privacy.noise": 0.0}, "needs privacy.clip and privacy.noise above 0"),
    "little noise": ({"privacy.noise": 0.2}, "must be at least 0.3"),
    "clip": ({"privacy.clip": 0.0}, "needs privacy.clip and privacy.noise above 0"),
    "delta": ({"privacy.delta": 0.0}, "at least 1e-08 and below 1"),
}


DECLINED = {
    "no noise": ({"privacy.unit": "none"}, "only takes part in runs with privacy.unit = 'example'"),
    "known noise": ({"privacy.randomness": "seed"}, "set privacy.randomness = 'os'"),
    "nothing": ({}, ""),
}


@pytest.mark.parametrize("changes, message", DECLINED.values(), ids=DECLINED)
@pytest.mark.parametrize("own", [{"max-epsilon": 3}, {"require": "example-privacy"}], ids=str)
def test_a_node_with_a_bound_takes_part_in_private_runs_alone(own, changes, message, run_config):
    config, policy = parse(run_config | PRIVATE | changes), Policy.of(own)
    with pytest.raises(Declined, match=message) if message else nullcontext():
        policy.check(config)


@pytest.mark.parametrize("own", [{"max-epsilon": "3"}, {"max-epsilon": True}, {"max_epsilon": 3}], ids=str)
def test_a_bound_that_cannot_be_read_is_said(own):
    with pytest.raises(Declined, match=r"is not a number|did you mean 'max-epsilon'"):
        Policy.of(own)


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_it_is_refused(changes, message, run_config):
    parse(run_config | PRIVATE)
    with pytest.raises(ConfigError, match=message):
        parse(run_config | PRIVATE | changes)


def test_a_coupled_model_is_refused_before_round_1(run_config, model_folder, tmp_path):
    from test_families import build

    folder = build(tmp_path / "coupled", model_folder, "deberta-v2", False)
    with pytest.raises(ConfigError, match=r"whose first axis is not the batch"):
        play(run_config | PRIVATE | {"model": str(folder)}, nodes=2)
