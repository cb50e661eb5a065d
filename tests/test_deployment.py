"""Across processes and the network, by the scripts of deploy/: one SuperLink behind its proxy, three SuperNodes, TLS
and node keys; and who gets in there.

The installed flwr is tried every time, and other versions, each in an environment of its own, when FEDKRSO_FLWR names
them ("1.39.0", where SuperNodes speak gRPC and need no proxy). `make deployment` does both.
"""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from federation import CLIENTS, NODES, answers, started, until
from helpers import MASKS, ROOT, digest, play

from fedkrso_app.runs.folder import Run

VERSIONS = ["installed", *os.environ.get("FEDKRSO_FLWR", "").split()]
needs = [tool for tool in ("openssl", "ssh-keygen") if not shutil.which(tool)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(needs), reason=f"needs {' and '.join(needs)}")]

PYPROJECT = """
[project]
name = "other"
version = "0.1.0"
dependencies = []
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[tool.flwr.app]
publisher = "stranger"
[tool.flwr.app.components]
serverapp = "other.server:app"
clientapp = "other.client:app"
[tool.flwr.app.config]
"""
SERVER = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    end = time.time() + 60
    while len(list(grid.get_node_ids())) < 3 and time.time() < end: time.sleep(0.5)
    asked = [Message(RecordDict({"c": ConfigRecord({"a": 1})}), node, "query") for node in grid.get_node_ids()]
    for reply in grid.send_and_receive(asked, timeout=60):
        print("FOREIGN", reply.error.reason if reply.has_error() else "ran")
"""
CLIENT = """
import os, pathlib
pathlib.Path(os.environ["FEDKRSO_CACHE"], "foreign").write_text("code of another app ran here")
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    return Message(RecordDict({"c": ConfigRecord({"b": 1})}), reply_to=message)
"""


@pytest.fixture(scope="module", params=VERSIONS)
def federation(request, tmp_path_factory):
    """One for all tests: it takes ten seconds to start."""
    with started(request.param, tmp_path_factory.mktemp("deployment")) as made:
        yield made


def test_three_devices_with_a_file_or_three_give_the_bits_of_one_process_with_the_whole(federation, sites, tmp_path):
    """The last device holds three partitions, with a folder for each. In clear and under masks."""
    settings, own_files = sites[0], sites[1]
    for i, own in enumerate(own_files):
        folder = federation.folder / (f"data-{i}" if i < NODES - 1 else f"data-{NODES - 1}/{i}")
        shutil.copytree(own, folder, dirs_exist_ok=True)
    made = []
    for name, more in (("devices", {}), ("masked", MASKS | {"num-server-rounds": 1})):
        file, own = tmp_path / f"{name}.toml", settings | more | {"run-name": name}
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in own.items()))
        ended = federation.flwr("run", ROOT, "devices", "--stream", "--run-config", file, timeout=400)
        run = Run(Path(settings["output-dir"]) / name)
        said = ended.stdout[-3000:] + ended.stderr[-3000:] + (federation.folder / "superlink.log").read_text()[-2000:]
        assert run.path.is_dir() and run.status == "completed", said
        assert [line["clients"] for line in run.metrics()[1:]] == [CLIENTS] * own["num-server-rounds"]
        assert re.search(r"server\.pem is valid\s+until", ended.stdout), ended.stdout
        made.append((run, own | {"run-name": f"{name}-process", "secure-aggregation": False}))
    assert "server.pem is valid until" in (federation.folder / "superlink.log").read_text()
    left = lambda: [path for i in range(NODES) for path in (federation.folder / f"cache-{i}").glob("nodes/*/*")]  # noqa: E731
    until(lambda: not left(), federation.folder / "superlink.log")  # the farewell is a message too
    for own in own_files:
        longest = max((own / "train.csv").read_bytes().splitlines(), key=len)
        assert not files_with(longest.split(b",")[0], federation.folder)
    assert all(digest(run) == digest(play(alike, nodes=CLIENTS)) for run, alike in made)


def files_with(text: bytes, folder: Path) -> list[Path]:
    """Files in ``folder``, the devices' data apart, in which ``text`` is: the database, logs and caches among them."""
    found = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # what runs there may remove a file now
            if path.is_file() and "data-" not in path.relative_to(folder).parts[0] and text in path.read_bytes():
                found.append(path)
    return found


def test_who_holds_the_public_certificate_starts_no_run_and_registers_no_key(federation, app, tmp_path):
    before = federation.listed()
    home = {"FLWR_HOME": str(tmp_path / "stranger")}
    connect(tmp_path / "stranger", "door", federation.public, federation.folder / "keys" / "ca.crt")
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / "key"], check=True)
    attempts = [["run", app, "door", "--stream"], ["supernode", "register", tmp_path / "key.pub", "door"]]
    # A participant is no stranger, but commands as little.
    attempts += [["supernode", "register", federation.folder / "keys" / "node1.pub", "door"], ["list", "door"]]
    for attempt in attempts:
        refused = federation.flwr(*attempt, env=federation.env | home)
        assert refused.returncode and "successfully" not in refused.stdout, refused.stdout
    assert federation.listed() == before
    # 127.0.0.2 is answered only by what listens on every address of the machine.
    ports = [int(address.split(":")[1]) for address in (federation.public, federation.owner)]
    assert [answers(port, "127.0.0.2") for port in ports] == [not federation.grpc, False]


def test_a_device_that_takes_one_app_runs_no_line_of_another_also_of_the_owners(federation, app):
    ended = federation.flwr("run", app, "devices", "--stream")
    said = sorted(re.findall("FOREIGN (.*)", ended.stdout))
    assert said == ["The FAB could not be verified.", "ran", "ran"], ended.stdout[-3000:] + ended.stderr[-2000:]
    ran = [(federation.folder / f"cache-{i}" / "foreign").exists() for i in range(NODES)]
    assert ran == [False, True, True]
    assert "refused an app with SHA-256" in (federation.folder / "node0.log").read_text()


@pytest.mark.parametrize("account", ["the owner", "another"])
def test_the_machine_s_other_accounts_command_nothing(federation, account):
    if os.getuid():
        pytest.skip("needs root, to take another account's place")
    # 415: the request came in, and is no protobuf message. The header would make uvicorn take its word for the sender.
    came_in = "415" if account == "the owner" else "403"
    asked = [
        (federation.owner, "/v1/control/list-runs", "", came_in),
        (federation.owner, "/v1%2fcontrol/list-runs", "", came_in),
        (federation.owner, "/v1/runtime/acquire-task", "", came_in),
        (federation.owner, "/v1/control/list-runs", "X-Forwarded-For: 127.0.0.1\r\n", "403"),
        (federation.node, "/v1/runtime/acquire-task", "", came_in),
    ]
    program = f"""
import encodings.idna, os, socket, ssl
context = ssl.create_default_context(cafile={str(federation.folder / "keys" / "ca.crt")!r})
if {account == "another"}:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
for address, path, header, _ in {asked!r}:
    host, port = address.split(":")
    link = socket.create_connection((host, int(port)), 10)
    if address == {federation.owner!r}:
        link = context.wrap_socket(link, server_hostname=host)
    head = f"POST {{path}} HTTP/1.1\\r\\nHost: x\\r\\n{{header}}Content-Length: 0\\r\\nConnection: close\\r\\n\\r\\n"
    link.sendall(head.encode())
    print(link.recv(1000).split()[1].decode())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [expected for *_, expected in asked], done.stderr


TRICKS = [
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/docs",
    "/openapi.json",
    "/",
    "/health/",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1%2fcontrol/start-run",
    "//v1/control/start-run",
    "/v1//control/start-run",
    "/./v1/control/start-run",
    "/V1/Control/start-run",
    "/v1/control/start-run/",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/pull-messages;/../../control/start-run",
    "/v1/fleet/%0d%0a",
    "/v1/fleet/pull-messages?a=1",
    "/v1/fleet/pull-messages#a",
    "/v1/fleet\\..\\control\\start-run",
    "/v1/fleet/pull-messages%00",
    "/health/../v1/control/start-run",
    "https://localhost/v1/control/start-run",
    "*",
]


def test_the_proxy_passes_a_supernode_s_requests_and_health_and_nothing_that_looks_like_them(federation):
    if federation.grpc:
        pytest.skip("flwr 1.39 has a port for SuperNodes alone, and no proxy")
    context = ssl.create_default_context(cafile=federation.folder / "keys" / "ca.crt")
    host, port = federation.public.split(":")

    def ask(text: str) -> list[str]:
        """The status codes of all answers to these bytes."""
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            tls.settimeout(10)
            tls.sendall(text.encode())
            answer = b""
            while piece := tls.recv(65536):
                answer += piece
        return re.findall(r"HTTP/1\.1 (\d+) ", answer.decode())

    def post(target, headers="Content-Length: 0", body="", last=True):
        closing = "Connection: close\r\n" * last
        return f"POST {target} HTTP/1.1\r\nHost: localhost\r\n{closing}{headers}\r\n\r\n{body}"

    log = federation.folder / "superlink.log"
    before = len(log.read_text())
    for target in TRICKS:
        assert ask(post(target)) in (["403"], ["400"]), target
    inner = post("/v1/control/start-run")
    for headers in (
        f"Content-Length: {5 + len(inner)}\r\nTransfer-Encoding: chunked",
        f"Content-Length: 0\r\nContent-Length: {len(inner)}",
        f"Content-Length: +{len(inner)}",
        f"Transfer-Encoding : chunked\r\nContent-Length: {len(inner)}",
        f"Transfer-Encoding: xchunked\r\nContent-Length: {len(inner)}",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    ):
        assert ask(post("/v1/fleet/pull-messages", headers, "0\r\n\r\n" + inner))[0] in ("400", "501"), headers
    assert ask(post("/v1/fleet/pull-messages", last=False) + inner) == ["415", "403"]  # one after the other
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0"
    assert ask(post("/v1/control/start-run", upgrade)) == ["403"]
    assert ask("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == ["400"]
    assert not re.findall("/v1/control|/v1/runtime.* 40|/docs", log.read_text()[before:])
    # And what is meant to pass does: 415 is Flower's own word on a message that is none.
    assert ask(post("/v1/fleet/pull-messages")) == ask(post("http://localhost/v1/fleet/pull-messages")) == ["415"]
    assert ask("GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") == ["200"]
    # 24 MiB is four times what Flower sends at once.
    large = post("/v1/fleet/push-object", f"Content-Length: {24 << 20}", "x" * (24 << 20))
    assert ask(large) == ["415"]


def test_a_node_s_key_acts_as_that_node_and_as_nobody_else_until_it_is_revoked(federation):
    keys = federation.folder / "keys"
    assert not federation.script("keys", keys, NODES + 1).returncode  # one device more: node3, never started here
    registered = federation.script("register", keys, "devices", federation.owner)
    assert not registered.returncode and registered.stdout.count("node3.pub: node") == 1, registered.stdout
    other = (keys / "node0.id").read_text().strip()

    stolen = shutil.copy(keys / "node3", federation.folder / "stolen")
    done = federation.with_key(stolen, other)
    assert [action for action, result in done.items() if result == "done"] == ["activate", "pull own", "sign off"]
    assert "permission" in done["reply as another"] and "permission" in done["command another"]
    assert "permission" in done["write to another"] and "permission" not in done["reply"]  # but there is no such run

    revoked = federation.script("revoke", keys, "devices", 3)
    assert not revoked.returncode, revoked.stderr
    assert "done" not in federation.with_key(stolen, other).values()
    assert not federation.script("keys", keys, NODES + 1).returncode  # the same number, with a new key
    assert not federation.script("register", keys, "devices", federation.owner).returncode
    assert (keys / "node3").read_text() != Path(stolen).read_text()
    assert federation.with_key(keys / "node3", other)["activate"] == "done"
    assert "done" not in federation.with_key(stolen, other).values()


@pytest.fixture
def app(tmp_path) -> Path:
    """Somebody's own app, whose client leaves a trace when its module is imported."""
    folder = tmp_path / "other_app"
    (folder / "other").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    for name, text in {"__init__": "", "server": SERVER, "client": CLIENT}.items():
        (folder / "other" / f"{name}.py").write_text(text)
    return folder


def connect(home: Path, name: str, address: str, ca: Path) -> None:
    home.mkdir()
    text = f'[superlink]\ndefault = "{name}"\n[superlink.{name}]\naddress = "{address}"\nroot-certificates = "{ca}"\n'
    (home / "config.toml").write_text(text)
