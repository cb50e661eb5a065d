"""The whole thing through Flower's own engine: SuperLink, simulation, Ray."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from helpers import MASKS, digest

from fedkrso_app.runs import engines
from fedkrso_app.runs.folder import Run


@pytest.fixture
def flower(tmp_path, monkeypatch):
    """A SuperLink of its own, which is ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv("TMPDIR")  # Ray's sockets must have short paths, which those of pytest's folders are not
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", str(port))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
    yield
    found = subprocess.run(["pgrep", "-f", f"flower-superlink.*{port}"], capture_output=True, text=True)
    for process in found.stdout.split():
        os.kill(int(process), signal.SIGTERM)
    time.sleep(1)


@pytest.mark.slow
@pytest.mark.skipif(not engines.FLWR.is_file(), reason="the flwr command is not installed beside this Python")
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep is needed to end the SuperLink")
def test_flowers_engine_with_two_workers_gives_the_same_bits_as_one_process(sites, flower, tmp_path):
    """Both as ``fedkrso compare`` starts them, on five sites; in
    Flower's engine under masks, whose secrets its nodes keep from message to message."""

    def made_by(engine, each, masked) -> str:
        file, log = tmp_path / f"{engine}.toml", tmp_path / f"{engine}.log"
        settings = sites[0] | MASKS | {"run-name": engine, "clients-per-node": each, "secure-aggregation": masked}
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        for _ in zip(range(1200), engines.play(engine, file, 5, each, log), strict=False):  # of half a second
            pass
        run, said = Run(Path(settings["output-dir"]) / engine), log.read_text()
        assert run.path.is_dir() and run.status == "completed", said[-3000:]
        assert said.count("Run directory: ") == 2
        assert all(f"round {number}/2" in said for number in range(3))
        return digest(run)

    assert made_by("flower", each=1, masked=True) == made_by("process", each=5, masked=False)  # one node holds all then
