"""The whole thing through Flower's own engine: SuperLink, simulation, Ray."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, digest, play

from fedkrso_app.runs.folder import Run

FLWR = shutil.which("flwr", path=str(Path(sys.executable).parent))


@pytest.fixture
def flower(tmp_path):
    """The environment of a SuperLink of its own, which is ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray's sockets must have short paths, which those of pytest's folders are not.
    yield {key: value for key, value in os.environ.items() if key != "TMPDIR"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    found = subprocess.run(["pgrep", "-f", f"flower-superlink.*{port}"], capture_output=True, text=True)
    for process in found.stdout.split():
        os.kill(int(process), signal.SIGTERM)
    time.sleep(1)


@pytest.mark.slow
@pytest.mark.skipif(FLWR is None, reason="the flwr command is not installed beside this Python")
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep is needed to end the SuperLink")
def test_flowers_engine_with_two_workers_gives_the_same_bits_as_one_process(sites, flower, tmp_path):
    """On the very run that tests/test_deployment.py gives to three devices."""
    settings = sites[0] | {"run-name": "engine"}
    file = tmp_path / "settings.toml"
    file.write_text(
        "".join(
            f"{json.dumps(key) if '.' not in key else key} = {json.dumps(value)}\n" for key, value in settings.items()
        )
    )
    federation = "num-supernodes=3 client-resources-num-cpus=1"
    command = [FLWR, "run", str(ROOT), "--stream", "--federation-config", federation, "--run-config", str(file)]
    ended = subprocess.run(command, env=flower, capture_output=True, text=True, timeout=240)
    run = Run(Path(settings["output-dir"]) / "engine")
    assert run.path.is_dir() and run.status == "completed", ended.stdout[-3000:] + ended.stderr[-3000:]
    assert ended.stdout.count("Run directory: ") == 2
    assert all(f"round {number}/2" in ended.stdout for number in range(3))
    assert digest(run) == digest(play(settings | {"run-name": "process"}, nodes=3))
