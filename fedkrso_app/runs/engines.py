"""What makes one run of a comparison: Flower's engine (``flower``), or one process without it (``process``)."""

import os
import re
import subprocess
import sys
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from fedkrso_app.config import ConfigError
from fedkrso_app.federation.local import nodes_of

Engine = Literal["flower", "process"]

APP = Path(__file__).resolve().parents[2]
FLWR = Path(sys.executable).with_name("flwr")


def check(engine: Engine) -> None:
    """Raises ConfigError where the engine is not installed."""
    if engine == "flower" and not FLWR.is_file():
        raise ConfigError(f"Flower's command {FLWR} is missing: pip install -r requirements.txt.")


def play(engine: Engine, settings: Path, clients: int, each: int, log: Path) -> Generator[None]:
    """Make or resume the run that the file ``settings`` describes, with ``each`` clients at a node; yields now and then
    until it has ended.

    A generator that is closed before stops the run, which can be resumed.
    """
    command: list[str | Path] = [sys.executable, "-m", "fedkrso_app.local_app", settings, str(clients)]
    if engine == "flower":
        federation = f"num-supernodes={nodes_of(clients, each)} client-resources-num-cpus=1"
        command = [FLWR, "run", APP, "--stream", "--federation-config", federation, "--run-config", settings]
    with open(log, "w") as output:
        # A session of its own, so that Ctrl-C reaches us alone and the run can be stopped in order.
        process = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(), start_new_session=True)
    try:
        while process.poll() is None:
            yield
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
    except BaseException:
        stop(log)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        raise


def stop(log: Path) -> None:
    """Have Flower stop the run that ``log`` is about; no harm if it has ended or was none of Flower's."""
    started = re.findall(r"started run (\d+)", log.read_text(errors="replace")) if log.is_file() else []
    if started:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([FLWR, "stop", started[-1]], env=_environment(), capture_output=True, timeout=60)


def said(log: Path) -> str:
    """Why a run failed, by its log: what the app said last, or else the end of the log."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    last = re.findall(r"The run (?:cannot start|failed): (.*)", text)[-1:]
    last = last or [line.strip() for line in text.splitlines() if line.strip()][-5:]
    return " / ".join(last) or "nothing was logged"


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{FLWR.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
