"""A run's figures for the trackers that the user names, by accelerate's classes for them; by default for none."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from fedkrso_app.config import Config, ConfigError, names
from fedkrso_app.runs.folder import Run

logger = logging.getLogger("flwr")


def check(trackers: str) -> None:
    """Raise ConfigError if one of ``trackers``, separated by commas, is unknown or its library is not installed."""
    for name in names(trackers):
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"tracker = {name!r} is not one of {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name not in map(str, get_available_trackers()):
            raise ConfigError(f"tracker = {name!r} is not installed where the ServerApp runs: pip install {name}.")


@contextmanager
def started(config: Config, run: Run, metric: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """The trackers of ``config``, which get its settings; yields what hands them a round's figures.

    Their files, of those that ask where to put them, lie in ``<run>/tracking``. Raises ConfigError where one cannot be
    started. What fails after that costs a warning for each tracker, never the run.
    """
    failing: set[str] = set()

    def attempt(tracker: GeneralTracker, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # each library and its network raise errors of their own
            if tracker.name not in failing:
                logger.warning("tracker %s failed (%s); the run continues", tracker.name, _sentence(error))
            failing.add(tracker.name)

    with ExitStack() as stack:
        trackers: list[GeneralTracker] = []
        for name in names(config.tracker):
            PartialState(cpu=True)  # the trackers' own log messages ask it which process this is: the only one
            kind = LOGGER_TYPE_TO_CLASS[name]
            folder = run.path / "tracking"
            try:
                if kind.requires_logging_directory:
                    folder.mkdir(exist_ok=True)
                tracker = kind(run.path.name, *([folder] if kind.requires_logging_directory else []))
                tracker.start()
                stack.callback(attempt, tracker, tracker.finish)
                tracker.store_init_configuration(config.to_dict())
            except Exception as error:
                raise ConfigError(
                    f"tracker = {name!r} could not be started ({_sentence(error)}); set it up or leave it out."
                ) from error
            trackers.append(tracker)

        def track(figures: Mapping[str, Any]) -> None:
            values = numbers(figures, metric)
            for tracker in trackers:
                attempt(tracker, partial(tracker.log, values, step=figures["round"]))

        yield track


def numbers(figures: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The numbers among a round's figures: the metric by its name, a client's as ``client/<partition>/<figure>``."""
    values = {key: value for key, value in figures.items() if isinstance(value, int | float) and key != "round"}
    if "metric" in values:
        values[metric] = values.pop("metric")
    for partition, client in figures.get("per_client", {}).items():
        values |= {f"client/{partition}/{key}": value for key, value in client.items()}
    return values


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
