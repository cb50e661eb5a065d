"""The threads that torch computes with are a setting of the run, not a property of the machine."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import digest, play
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.config import ConfigError
from fedkrso_app.core import projection
from fedkrso_app.federation import evaluation
from fedkrso_app.training import loop, threads


@pytest.fixture
def counted(monkeypatch):
    """With how many threads clients train and models are evaluated."""
    seen = {"train": set(), "evaluate": set()}
    for module, name, kind in ((loop, "train", "train"), (evaluation, "tally", "evaluate")):
        real = getattr(module, name)

        def spy(*arguments, real=real, kind=kind):
            seen[kind].add(torch.get_num_threads())
            torch.set_num_threads(5)  # and whoever comes next finds another number
            return real(*arguments)

        monkeypatch.setattr(module, name, spy)
    return seen


@pytest.mark.parametrize("evaluate", ["server", "clients"])
@pytest.mark.parametrize("count", [1, 2])
def test_clients_compute_with_the_threads_of_the_run_whatever_their_process_had(run_config, counted, count, evaluate):
    run = play(run_config | {"torch-threads": count, "evaluate": evaluate, "num-server-rounds": 2})
    assert counted["train"] == {count}
    assert run.info["config"]["torch-threads"] == count
    if evaluate == "clients":
        assert counted["evaluate"] == {count}


def test_the_server_evaluates_with_the_threads_of_the_run(run_config, monkeypatch):
    seen = []
    real = evaluation.tally
    monkeypatch.setattr(evaluation, "tally", lambda *given: seen.append(torch.get_num_threads()) or real(*given))
    torch.set_num_threads(3)
    play(run_config | {"torch-threads": 2, "num-server-rounds": 1})
    assert set(seen) == {2}
    assert torch.get_num_threads() == 3  # the process is its caller's again


def test_the_bits_are_the_same_whatever_threads_a_process_begins_with(run_config, monkeypatch):
    digests = set()
    for begins_with in (1, 2, 3):
        torch.set_num_threads(begins_with)
        settings = run_config | {"run-name": str(begins_with), "num-server-rounds": 2}
        run = play(settings, run_id=begins_with, devices=True)
        digests.add(digest(run))
    assert len(digests) == 1
    torch.set_num_threads(4)
    verified = CliRunner().invoke(cli.app, ["ledger", str(run.path), "--verify"])
    assert verified.exit_code == 0, verified.output
    assert torch.get_num_threads() == 1


def test_a_torch_that_does_not_take_the_number_is_named_before_round_1(run_config, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(ConfigError, match="torch-threads = 2 cannot be set here: torch computes with 1"):
        threads.hold(2)
    with pytest.raises(ConfigError, match="torch-threads = 2 cannot be set here"):
        play(run_config | {"torch-threads": 2})


@pytest.mark.parametrize(
    "variable, value",
    [("OMP_DYNAMIC", "TRUE"), ("OMP_DYNAMIC", "1"), ("OMP_THREAD_LIMIT", "1"), ("OMP_MAX_ACTIVE_LEVELS", " 0")],
)
def test_a_variable_with_which_openmp_takes_fewer_threads_than_torch_says_is_named(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"torch-threads = 2 cannot be set here: {variable} = "):
        threads.hold(2)
    threads.hold(1)
    for harmless in ("false", "2", "64", ""):
        monkeypatch.setenv(variable, harmless)
        threads.hold(2)


WITHOUT_A_CHECK = """
import hashlib, torch
torch.set_num_threads(2)
torch.manual_seed(0)
layer, rows = torch.nn.Linear(700, 300), torch.randn(3000, 700)
value = layer(rows).softmax(-1).sum() + rows.sum()
value.backward()
both = [layer.weight.grad.numpy().tobytes(), value.detach().numpy().tobytes()]
print(torch.get_num_threads(), hashlib.sha256(b"".join(both)).hexdigest())
"""


@pytest.mark.parametrize("variable, value", [("OMP_THREAD_LIMIT", "1"), ("OMP_MAX_ACTIVE_LEVELS", "0")])
def test_such_a_variable_does_change_the_bits_while_torch_says_two(variable, value):
    """Why the check is needed: here torch itself does not notice."""

    def bits(**environment):
        env = {key: text for key, text in os.environ.items() if not key.startswith("OMP_")} | environment
        done = subprocess.run([sys.executable, "-c", WITHOUT_A_CHECK], env=env, capture_output=True, text=True)
        said, found = done.stdout.split()
        assert said == "2"
        return found

    if (two := bits()) == bits(**{variable: value}):
        pytest.skip("this machine's torch has the same bits with one thread and two, or cannot start two")
    assert bits(OMP_NUM_THREADS="1") == two  # torch.set_num_threads does win over this one


def test_a_node_whose_torch_does_not_take_the_number_says_so_when_it_joins(run_config, monkeypatch, caplog):
    real, nodes = torch.get_num_threads, []

    def prepare(grid):
        app, odd = grid.app, grid.contexts[102]

        def with_one_thread(message, context):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "get_num_threads", (lambda: 1) if context is odd else real)
                return app(message, context)

        grid.app = with_one_thread
        nodes.append(grid)

    run = play(run_config | {"torch-threads": 2, "num-server-rounds": 1}, prepare=prepare)
    assert run.metrics()[-1]["partitions"] == [0, 1, 3]
    assert "partition 2: torch-threads = 2 cannot be set here: torch computes with 1" in caplog.text


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_projections_that_a_spare_core_draws_ahead_change_no_bit(kind, run_config, monkeypatch):
    settings = run_config | {"fedkrso.projection": kind, "local-steps": 6, "num-server-rounds": 1}
    plain, asked, real = play(settings, nodes=2), [], projection.ahead
    monkeypatch.setattr(projection, "_newest", projection._Newest())
    monkeypatch.setattr(threads, "spare", lambda device: True)
    monkeypatch.setattr(projection, "ahead", lambda *given: asked.append(given[0]) or real(*given))
    assert digest(play(settings | {"run-name": "ahead"}, nodes=2, run_id=2)) == digest(plain)
    assert len(asked) == (2 * 2 if kind == "gaussian" else 0)  # all intervals but a client's first


def test_no_core_is_spare_where_all_of_them_compute():
    assert not threads.spare(torch.device("cpu")) and not threads.spare(torch.device("meta"))
