"""results.jsonl: the finished runs of a comparison, a line each, small enough to be kept in a repository.

    {"settings": "3f2a…", "case": …, "arm": …, "task": …, "metric": …, "config": {…}}      before the first of its runs
    {"run": "3f2a…", "draw": 0, "rate": 0.001, "sweep": false, "rounds": [[round, metric, bytes up, bytes down], …], …}

A line belongs to the settings that it names, whatever the machine. The folders of model and data are no part of these,
and neither is where a run is kept; the digest of the model's weights is compared instead.
"""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedkrso_app.config import ConfigError
from fedkrso_app.runs.engines import APP
from fedkrso_app.runs.folder import ASIDE, Run
from fedkrso_app.runs.results import asked_in, measures, replied_in
from fedkrso_app.strategies import STRATEGIES
from fedkrso_app.strategies.options import ClientOptions, ServerOptions

# As the machine at hand has them.
_FREE = (*ASIDE, "model", "data-dir", "device", "torch-threads", "round-timeout", "clients-per-node", "batch-clients")
_LIBRARIES = ("flwr", "torch", "transformers")


def defining(config: Mapping[str, Any], clients: int, vary: str) -> dict[str, Any]:
    """What makes runs repeats of one another: the settings of the run's own method and of all methods, less those of
    the machine, of the draw and the learning rate, which have a place in each run's line."""
    method = STRATEGIES[config["strategy"]]
    tables = {ClientOptions.table, ServerOptions.table} | {settings.table for settings in method.settings}
    own = {key: value for key, value in config.items() if "." not in key or key.split(".")[0] in tables}
    left_out = (*_FREE, vary, method.learning_rate_key)
    return {key: value for key, value in own.items() if key not in left_out} | {"clients": clients, "vary": vary}


class Journal:
    """The lines of ``file``, which need not exist. ``notes`` says what was dropped or left out in reading.

    Raises ConfigError where a line other than the last cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.notes = file, list[str]()
        self.settings: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        self._good = 0  # bytes up to the end of the last whole line
        text = file.read_bytes() if file.is_file() else b""
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            try:
                facts = json.loads(line)
                if not line.endswith(b"\n"):
                    raise ValueError("cut short")
                self._take(facts)
            except (ValueError, KeyError, TypeError) as error:
                if self._good + len(line) < len(text):
                    raise ConfigError(
                        f"{file}, line {number} cannot be read ({error}): restore it or delete it."
                    ) from None
                self.notes.append(f"{file}: the last line was cut short and is dropped; its run is made again.")
                break
            self._good += len(line)

    def lock(self) -> None:
        """Keep other comparisons from writing here, until this process ends, and drop a last line that was cut short.

        Raises ConfigError if another one does so already.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(self.file, "ab")  # noqa: SIM115
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._handle.close()
            raise ConfigError(f"{self.file} is being written by another comparison; stop that first.") from None
        self._handle.truncate(self._good)

    def close(self) -> None:
        self._handle.close()

    def expect(self, wanted: Iterable[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """See that the lines here are of (case, arm, what defines it, all defaults) as ``wanted`` has them.

        A key that a line lacks counts as today's default. Raises ConfigError where a line has another value; lines of
        other cases and arms are left out, with a note.
        """
        known = {(case, arm): (config, defaults) for case, arm, config, defaults in wanted}
        for id, facts in self.settings.items():
            name = (facts["case"], facts["arm"])
            if name not in known:
                count = sum(run["run"] == id for run in self.runs)
                self.notes.append(
                    f"{self.file}: {count} runs of arm {name[1]!r} in case {name[0]!r} are left out: the comparison "
                    "has no such arm."
                )
                continue
            now, defaults = known[name]
            for key in dict.fromkeys([*facts["config"], *now]):
                before = facts["config"].get(key, defaults.get(key))
                if before != now.get(key):
                    raise ConfigError(
                        f"{self.file}: arm {name[1]!r} in case {name[0]!r} was made with {key} = {before!r}, now it is "
                        f"{now.get(key)!r}; give the arm another name, or move that file away."
                    )

    def find(self, case: str, arm: str) -> list[dict[str, Any]]:
        """All run lines of an arm in a case."""
        ids = {id for id, facts in self.settings.items() if (facts["case"], facts["arm"]) == (case, arm)}
        return [run for run in self.runs if run["run"] in ids]

    def add(self, settings: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Append a run, and before it the settings that it belongs to where they are new.

        Raises ConfigError, and writes nothing, where the case was begun with another model.
        """
        id = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        same = [other for other in self.runs if self.settings[other["run"]]["case"] == settings["case"]]
        for other in same:
            if run["model"] and other["model"] not in ("", run["model"]):
                raise ConfigError(
                    f"{self.file}: case {settings['case']!r} was begun with another model ({other['model']}, now "
                    f"{run['model']}); set model to that one, or move that file away."
                )
        new = [] if id in self.settings else [{"settings": id, **settings}]
        for facts in [*new, {"run": id, **run}]:
            self._take(facts)
            self._handle.write(json.dumps(facts, ensure_ascii=False).encode() + b"\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def _take(self, facts: dict[str, Any]) -> None:
        if "settings" in facts:
            if not isinstance(facts["config"], dict) or not all(isinstance(facts[k], str) for k in ("case", "arm")):
                raise ValueError("no settings of a comparison")
            self.settings[facts["settings"]] = {key: value for key, value in facts.items() if key != "settings"}
        elif facts["run"] not in self.settings or not facts["rounds"]:
            raise ValueError("a run without settings or rounds")
        else:
            self.runs.append(facts)


def line_of(run: Run, draw: int, rate: float, sweep: bool) -> dict[str, Any]:
    """What a completed run leaves in the journal. Bytes are those of one client that was asked in the round."""
    rounds: list[list[Any]] = []
    up = down = 0.0
    for line in run.metrics():
        up += line["uplink_bytes"] / max(1, replied_in(line))
        down += line["downlink_bytes"] / max(1, asked_in(line))
        if "metric" not in line and not rounds:  # clients judge from round 1 on
            continue
        # A round that published nothing leaves the model and its metric as they were.
        metric = _short(line["metric"]) if "metric" in line else rounds[-1][1]
        rounds.append([line["round"], metric, round(up), round(down)])
        up = down = 0.0
    info = run.info
    return {
        "draw": draw,
        "rate": rate,
        "sweep": sweep,
        "rounds": rounds,
        "figures": {key: _short(value) for key, value in measures(run).items()},
        "model": info["model_digest"][:12],
        "digest": run.digest[:12],
        "device": _device(info["config"]["device"]),
        "versions": {key: info["libraries"].get(key, "") for key in _LIBRARIES} | {"python": platform.python_version()},
        "commit": _commit(),
        "read": info.get("commits", {}),  # what came from the hub, at which commits
    }


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _device(setting: str) -> str:
    """The name of the GPU if runs use one, else of the processor."""
    if setting in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return setting if setting not in ("auto", "cpu") else next(_processors(), platform.machine())


def _processors() -> Iterator[str]:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else ():
        if line.startswith("model name"):
            yield line.partition(":")[2].strip()


def _commit() -> str:
    """The repository's commit, with a + where files differ from it; "" where there is none."""
    answers = []
    for words in (
        [
            "ls-files",
            "--error-unmatch",
            "fedkrso_app/__init__.py",
        ],  # or it would be a repository around an installation
        ["rev-parse", "--short=12", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no", "fedkrso_app"],
    ):
        try:
            said = subprocess.run(["git", "-C", str(APP), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if said.returncode:
            return ""
        answers.append(said.stdout.strip())
    return answers[1] + ("+" if answers[2] else "")
