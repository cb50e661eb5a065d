"""Trackers: what they are told, by the event files that tensorboard itself reads back; and that none can stop a run."""

import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker, get_available_trackers
from helpers import digest, play
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedkrso_app.config import ConfigError
from fedkrso_app.runs.tracking import check, numbers

SETTINGS = {"num-server-rounds": 2, "local-steps": 2, "client-metrics": True, "tracker": "tensorboard"}


def curves(run) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, of all event files of a run."""
    events = EventAccumulator(str(run.path / "tracking" / run.path.name)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_the_tracker_holds_the_numbers_of_every_round(run_config):
    run = play(run_config | SETTINGS, nodes=2)
    told = curves(run)
    for line in run.metrics():
        step = line["round"]
        assert told["accuracy"][step] == pytest.approx(line["metric"], rel=1e-6)
        for key in ("eval_loss", "uplink_bytes", "downlink_bytes", "clients", "refused", "failed", "seconds"):
            assert told[key][step] == pytest.approx(line[key], rel=1e-6), key
        for partition, client in line.get("per_client", {}).items():
            for key, value in client.items():
                assert told[f"client/{partition}/{key}"][step] == pytest.approx(value, rel=1e-6)
    assert list(told["train_loss"]) == [1, 2] and list(told["client/1/train_loss"]) == [1, 2]
    (settings,) = (run.path / "tracking").rglob("hparams.yml")
    assert yaml.safe_load(settings.read_text()) == run_config | SETTINGS


def test_nothing_is_written_by_default_and_a_tracker_changes_no_bit(run_config):
    run = play(run_config | {"num-server-rounds": 1}, nodes=2)
    assert not (run.path / "tracking").exists()
    tracked = play(run_config | {"num-server-rounds": 1, "run-name": "b", "tracker": "tensorboard"}, nodes=2)
    assert digest(tracked) == digest(run)


def test_a_resumed_run_goes_on_with_its_tracker_or_takes_up_another(run_config):
    one = SETTINGS | {"num-server-rounds": 1}
    run = play(run_config | one, nodes=2)
    play(run_config | SETTINGS | {"resume": str(run.path)}, nodes=2)
    assert list(curves(run)["accuracy"]) == [0, 1, 2]
    later = play(run_config | one | {"run-name": "later", "tracker": "", "client-metrics": False}, nodes=2)
    play(run_config | SETTINGS | {"run-name": "later", "resume": str(later.path)}, nodes=2)
    assert list(curves(later)["accuracy"]) == [2]


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_a_tracker_that_fails_costs_one_warning_and_never_the_run(run_config, monkeypatch, caplog, broken):
    def fail(*arguments, **options):
        raise ConnectionError("the network\nis away")

    monkeypatch.setattr(TensorBoardTracker, broken, fail)
    run = play(run_config | SETTINGS, nodes=2)
    assert run.status == "completed" and [line["round"] for line in run.metrics()] == [0, 1, 2]
    assert caplog.text.count("tracker tensorboard failed (ConnectionError: the network is away)") == 1


def test_a_tracker_that_cannot_start_ends_the_run_before_round_one(run_config, monkeypatch):
    def fail(self):
        raise RuntimeError("no key")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    with pytest.raises(ConfigError, match=r"'tensorboard' could not be started \(RuntimeError: no key\); set"):
        play(run_config | SETTINGS, nodes=2)


def test_an_unknown_tracker_is_named_before_there_is_a_folder(run_config, tmp_path):
    with pytest.raises(ConfigError, match=r"tracker = 'tensorbord' is not one of .*tensorboard"):
        play(run_config | {"tracker": "tensorboard, tensorbord"})
    assert not (tmp_path / "runs").exists()


def test_a_tracker_without_its_library_is_told_how_to_get_it():
    missing = sorted(set(LOGGER_TYPE_TO_CLASS) - set(map(str, get_available_trackers())))
    if not missing:
        pytest.skip("every library that accelerate knows is installed here")
    with pytest.raises(ConfigError, match=f"tracker = '{missing[0]}' is not installed .*: pip install {missing[0]}"):
        check(f"tensorboard,{missing[0]}")


def test_only_numbers_are_handed_over():
    figures = {"round": 3, "metric": 0.5, "train_loss": None, "partitions": [0, 1], "clients": 2}
    figures["per_client"] = {"7": {"train_loss": 0.25, "num_examples": 4}}
    expected = {"pearson": 0.5, "clients": 2, "client/7/train_loss": 0.25, "client/7/num_examples": 4}
    assert numbers(figures, "pearson") == expected
