"""The threads that torch computes with are a setting of the run, not a property of the machine."""

import pytest
import torch
from conftest import digest, play
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.config import ConfigError
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
