"""What makes one run of a comparison: Flower's engine (``flower``), or one process without it (``process``)."""

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

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
    if engine == "process":
        yield from _forked([str(settings), str(clients)], log)
        return
    federation = f"num-supernodes={nodes_of(clients, each)} client-resources-num-cpus=1"
    command: list[str | Path] = [
        FLWR,
        "run",
        APP,
        "--stream",
        "--federation-config",
        federation,
        "--run-config",
        settings,
    ]
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


def _forked(arguments: list[str], log: Path) -> Generator[None]:
    """``python -m fedkrso_app.local_app ARGUMENTS``, forked from a process that has imported everything once: that
    takes longer than a small run. Elsewhere than on Linux a fork is unsafe, and each run imports for itself."""
    process: Any
    if sys.platform == "linux":
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(["fedkrso_app.federation.client", "fedkrso_app.server_app", "peft"])
        process = forking.Process(target=_run_app, args=(arguments, log))
    else:
        process = multiprocessing.get_context("spawn").Process(target=_run_app, args=(arguments, log))
    process.start()
    try:
        while process.is_alive():
            yield
            process.join(0.5)
    except BaseException:
        process.terminate()
        process.join(10)
        raise


def _run_app(arguments: list[str], log: Path) -> None:
    """In a process of its own: be the app, with its output in ``log``, and end with the comparison."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the parent alone
    with open(log, "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.argv[1:] = arguments
    runpy.run_module("fedkrso_app.local_app", run_name="__main__")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()  # the comparison, not the process that we were forked from
    if parent:
        parent.join()
        os._exit(1)


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
