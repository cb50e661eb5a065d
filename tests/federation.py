"""A deployment on this machine by the scripts of deploy/, for tests/test_deployment.py."""

import dataclasses
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT, expire

NODES, CLIENTS = 3, 5  # the last node holds what the others leave
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


@dataclasses.dataclass
class Federation:
    """A SuperLink that runs: ``public`` is the address for devices, ``owner`` the one for its own account; ``node`` is
    where a SuperNode hands its messages to its own account's processes."""

    grpc: bool
    bin: Path
    env: dict
    folder: Path
    public: str
    owner: str
    node: str

    def flwr(self, *arguments, **options):
        return self.call(self.bin / "flwr", *arguments, **options)

    def script(self, name, *arguments):
        return self.call(ROOT / "deploy" / f"{name}.sh", *arguments)

    def call(self, *command, **options):
        options = {"env": self.env, "capture_output": True, "text": True, "timeout": 200} | options
        return subprocess.run([*map(str, command)], **options)

    def listed(self) -> list[set[str]]:
        """The ids of all runs and of all nodes that the SuperLink knows."""
        found = []
        for command, each, id in ((["list"], "runs", "run-id"), (["supernode", "list"], "nodes", "node-id")):
            listed = self.flwr(*command, "devices", "--format", "json")
            assert not listed.returncode, listed.stdout
            found.append({str(one[id]) for one in json.loads(listed.stdout)[each]})
        return found

    def with_key(self, key, other) -> dict:
        """What whoever holds the node's key in file ``key`` gets done, by action (tests/node_key.py)."""
        program, ca = ROOT / "tests" / "node_key.py", self.folder / "keys" / "ca.crt"
        done = self.call(self.bin / "python", program, self.public, ca, key, other)
        assert not done.returncode, done.stderr
        return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


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


@contextmanager
def started(version: str, folder: Path) -> Iterator[Federation]:
    """Keys, SuperLink, proxy, registration and three SuperNodes, of which the first runs this app only.

    The server's certificate ends in three days.
    """
    grpc = version.startswith("1.39.")
    if not grpc and not NGINX:
        pytest.skip("needs nginx (apt-get install nginx-light), without which no device is let in")
    bin = programs(version, folder / "venv")
    public, owner, *node_ports = free_ports(2 + NODES)
    env = {key: value for key, value in os.environ.items() if key != "TMPDIR"} | {
        "PATH": f"{bin}:{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    made = Federation(grpc, bin, env, folder, *(f"127.0.0.1:{port}" for port in (public, owner, node_ports[1])))
    keys, running = folder / "keys", []
    assert not made.script("keys", keys, NODES, "127.0.0.1").returncode
    expire(keys, days=3)
    pin = made.script("app-hash").stdout.strip()

    def start(name, output, *arguments, **more):
        with open(folder / output, "w") as stream:
            # A session of its own, so that all its children can be ended together.
            command = [str(ROOT / "deploy" / f"{name}.sh"), *map(str, arguments)]
            running.append(
                subprocess.Popen(command, stdout=stream, stderr=stream, env=env | more, start_new_session=True)
            )

    try:
        open_to_all = ["--fleet-api-address", made.public] if grpc else []
        start("superlink", "superlink.log", keys, "--port", owner, *open_to_all)
        if not grpc:
            start("proxy", "proxy.log", keys, public, owner)
        until(lambda: answers(owner) and answers(public), folder / "superlink.log")
        registered = made.script("register", keys, "devices", made.owner)
        assert not registered.returncode, registered.stderr
        for i, port in enumerate(node_ports):
            (folder / f"data-{i}").mkdir()
            (folder / f"cache-{i}").mkdir()
            options = ["--port", port, *(["--app-hash", pin] if i == 0 else [])]
            options += ["--partitions", f"{i}-{CLIENTS - 1}"] if i == NODES - 1 else []
            own = {"FEDKRSO_CACHE": str(folder / f"cache-{i}")}
            start("supernode", f"node{i}.log", keys, i, CLIENTS, made.public, folder / f"data-{i}", *options, **own)
        yield made
    finally:
        for process in reversed(running):
            os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.wait(30)


def answers(port, host="127.0.0.1"):
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def until(holds, log, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.3)
