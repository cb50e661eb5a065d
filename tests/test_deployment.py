"""Across processes and the network, by the scripts of deploy/: one SuperLink, three SuperNodes, TLS and node keys.

The installed flwr is tried every time, and other versions, each in an environment of its own, when FEDKRSO_FLWR names
them ("1.39.0", where SuperNodes speak gRPC). `make deployment` does both.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
from helpers import ROOT, digest, play

from fedkrso_app.runs.folder import Run

VERSIONS = ["installed", *os.environ.get("FEDKRSO_FLWR", "").split()]
NODES = 3


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def programs(version, folder) -> Path:
    """Where that version's commands are: beside this Python, or in a new environment that borrows all else from it."""
    if version == "installed":
        return Path(sys.executable).parent
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    tag = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / tag / "site-packages" / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"flwr=={version}"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"flwr {version} cannot be installed here: {installed.stderr[-300:]}")
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="openssl and ssh-keygen needed"
)
def test_three_devices_with_a_file_each_give_the_bits_of_one_process_with_the_whole(version, sites, tmp_path):
    settings, own_files = sites[0] | {"run-name": "devices"}, sites[1]
    file = tmp_path / "settings.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    bin = programs(version, tmp_path / "venv")
    grpc = version.startswith("1.39.")
    link, *node_ports = free_ports(1 + NODES)
    fleet = free_ports(1)[0] if grpc else link
    env = {key: value for key, value in os.environ.items() if key != "TMPDIR"} | {
        "PATH": f"{bin}:{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    keys, address = tmp_path / "federation", f"127.0.0.1:{link}"
    script = lambda name, *arguments: [str(ROOT / "deploy" / f"{name}.sh"), *map(str, arguments)]  # noqa: E731
    subprocess.run(script("keys", keys, NODES, "localhost", "127.0.0.1"), check=True, env=env)
    log = tmp_path / "superlink.log"
    running = []

    def start(command, output, **more):
        with open(output, "w") as stream:
            # A session of its own, so that all its children can be ended together.
            running.append(
                subprocess.Popen(command, stdout=stream, stderr=stream, env=env | more, start_new_session=True)
            )

    try:
        ports = ["--port", link, *(["--fleet-api-address", f"127.0.0.1:{fleet}"] if grpc else [])]
        start(script("superlink", keys, *ports), log)
        until(lambda: answers(link) and answers(fleet), log)
        subprocess.run(script("register", keys, "devices", address), check=True, env=env, timeout=120)
        for i, port in enumerate(node_ports):
            command = script("supernode", keys, i, NODES, f"127.0.0.1:{fleet}", own_files[i], "--port", port)
            start(command, tmp_path / f"node{i}.log", FEDKRSO_CACHE=str(tmp_path / f"cache-{i}"))
        submit = [str(bin / "flwr"), "run", str(ROOT), "devices", "--stream", "--run-config", str(file)]
        ended = subprocess.run(submit, env=env, capture_output=True, text=True, timeout=400)
    finally:
        for process in reversed(running):
            os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.wait(30)
    run = Run(Path(settings["output-dir"]) / "devices")
    said = ended.stdout[-3000:] + ended.stderr[-3000:] + log.read_text()[-2000:]
    assert run.path.is_dir() and run.status == "completed", said
    assert [line["clients"] for line in run.metrics()[1:]] == [NODES, NODES]
    assert not [path for i in range(NODES) for path in (tmp_path / f"cache-{i}").glob("nodes/*/*")]
    assert digest(run) == digest(play(settings | {"run-name": "process"}, nodes=NODES))


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(holds, log, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.3)
