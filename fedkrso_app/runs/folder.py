"""A run's folder: config.json, status, metrics.jsonl, ledger/, model/. Made new, or opened to be resumed."""

import fcntl
import json
import re
import secrets
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedkrso_app.config import Config, ConfigError, resolved_path
from fedkrso_app.data import hub
from fedkrso_app.records import disk
from fedkrso_app.records import lines as logs
from fedkrso_app.strategies import parse

_LIBRARIES = ("flwr", "torch", "transformers", "datasets", "flwr-datasets", "peft", "numpy", "safetensors")
# Settings that touch only where a run is kept and what is shown of it.
ASIDE = ("resume", "run-name", "output-dir", "tracker", "client-metrics")
# What a resumed run may set anew; everything else must be what the run began with.
_FREE = (*ASIDE, "num-server-rounds", "min-replies", "round-timeout")


class Run:
    """The folder of one run at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def info(self) -> dict[str, Any]:
        """config.json as a dictionary; raises ConfigError where there is none."""
        file = self.path / "config.json"
        try:
            info = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path} is not a run's folder: {file} cannot be read ({error}).") from None
        if not isinstance(info, dict) or "config" not in info:
            raise ConfigError(f"{self.path} is not a run's folder: {file} does not hold the settings of one.")
        return info

    @property
    def config(self) -> Config:
        """Its settings, with what it reads from the hub at the commits that it began with."""
        return hub.at(parse(self.info["config"]), self.commits)

    @property
    def commits(self) -> dict[str, str]:
        """What the run reads from the hub, "model" and "dataset", as ``name@commit``."""
        return self.info.get("commits", {})

    def lock(self) -> None:
        """Keep others from writing here until :meth:`unlock`, or the end of this process however it ends.

        Raises ConfigError if another process does so already.
        """
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(f"{self.path} is being written by a run that has not ended; stop that first.") from None

    def unlock(self) -> None:
        self._lock.close()

    @property
    def status(self) -> str:
        """``completed``, ``failed: why``, ``running``; ``interrupted`` where it says running and nobody writes here."""
        file = self.path / "status"
        status = file.read_text().strip() if file.is_file() else "unknown"
        return "interrupted" if status == "running" and not self._is_locked() else status

    def _is_locked(self) -> bool:
        try:
            with open(self.path / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def know_model(self, digest: str) -> None:
        """Note the digest of W^0, which a server without the weights learns from the first node."""
        info = self.info
        if digest and info["model_digest"] != digest:
            disk.write(self.path / "config.json", json.dumps(info | {"model_digest": digest}, indent=2) + "\n")

    def set_status(self, status: str) -> None:
        """``running``, ``completed`` or ``failed: <reason>``, in the file ``status``."""
        disk.write(self.path / "status", status + "\n")

    def complete(self, digest: str | None) -> None:
        """Say that the run ended well; ``digest`` is the SHA-256 of the final weights, if the server has made them."""
        disk.write(
            self.path / "result.json",
            json.dumps({**self.metrics()[-1], "head": self.info["config"]["head"], "digest": digest}, indent=2) + "\n",
        )
        self.set_status("completed")

    @property
    def digest(self) -> str:
        """What result.json says of the final weights; "" where the run has not ended or the server made none."""
        try:
            return json.loads((self.path / "result.json").read_text())["digest"] or ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that was cut short is left out."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        figures = []
        for line in lines:
            try:
                figures.append(json.loads(line))
            except ValueError:
                break
        return figures

    def add_opening(self, round: int, kind: str, partitions: list[int]) -> None:
        """Append to openings.jsonl, on the disk when this returns, whose sum is about to be opened: of updates
        ("train") or of tallies ("evaluate")."""
        with open(self.path / "openings.jsonl", "a+b") as file:
            logs.append(file, {"round": round, "kind": kind, "partitions": partitions})

    @property
    def opened(self) -> int:
        """The last round in openings.jsonl; 0 if there is none. Of a line that was cut short nothing was asked yet.
        A round whose tallies were opened has its entry."""
        file = self.path / "openings.jsonl"
        last = 0
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                last = max(last, int(json.loads(line)["round"]))
            except ValueError:
                continue
        return last

    def add_metrics(self, figures: dict[str, Any]) -> None:
        """Append one line, or replace the lines from its round on (a resumed run does a round again)."""
        kept = [line for line in self.metrics() if line["round"] < figures["round"]]
        disk.write(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in [*kept, figures]))


def create(config: Config, model_digest: str, commits: Mapping[str, str] | None = None) -> Run:
    """A new folder ``<output-dir>/<run-name>``; raises ConfigError if it already exists or cannot be made.

    ``commits`` are those of what the run reads from the hub.
    """
    name = config.run_name or time.strftime("%Y-%m-%d-%H%M%S-") + re.sub(
        r"\W+", "-", f"{config.strategy}-{config.task}"
    )
    path = resolved_path(config.output_dir) / name
    try:
        path.mkdir(mode=0o700, parents=True)  # a ledger, a model and figures of other people's data
    except FileExistsError:
        raise ConfigError(
            f"{path} already exists: choose another run-name, delete it, or continue it with resume='{path}'."
        ) from None
    except OSError as error:
        raise ConfigError(f"output-dir = {config.output_dir!r}: {path} cannot be made ({error.strerror}).") from None
    libraries = {}
    accountant = ["dp-accounting"] if config.to_dict()["privacy.unit"] != "none" else []
    for library in [*_LIBRARIES, *accountant]:
        try:
            libraries[library] = version(library)
        except PackageNotFoundError:
            libraries[library] = "not installed"
    info = {
        "id": secrets.token_hex(8),  # names the run's files on the nodes, also when another Flower run continues it
        "config": config.to_dict(),
        "commits": dict(commits or {}),
        "libraries": libraries,
        "model_digest": model_digest,
    }
    try:
        disk.write(path / "config.json", json.dumps(info, indent=2) + "\n")
    except OSError as error:
        path.rmdir()  # or the name would be taken by a folder that no run can continue
        raise ConfigError(f"output-dir = {config.output_dir!r}: nothing can be written ({error.strerror}).") from None
    return Run(path)


def resume(config: Config, model_digest: str) -> Run:
    """The folder of an interrupted run; raises ConfigError if it was made with other settings or another model."""
    run = Run(resolved_path(config.resume))
    before, now = run.info["config"], config.to_dict()
    for key in now:
        if key not in _FREE and before.get(key) != now[key]:
            raise ConfigError(
                f"resume: the run in {run.path} has {key} = {before.get(key)!r}, now it is {now[key]!r}; "
                "give it the value it had, or start a new run."
            )
    if model_digest and run.info["model_digest"] != model_digest:
        raise ConfigError(f"resume: model = {config.model!r} has other weights than when the run in {run.path} began.")
    return run
