"""The scripts of deploy/ one by one, without a federation: what they refuse, warn of and leave alone."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, expire

pytestmark = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="needs openssl and ssh-keygen"
)
STUB = """#!/bin/bash
if [ "$*" = --version ]; then echo "Flower version: $FLWR_VERSION"; else echo "$(basename $0) started: $*"; fi
"""


@pytest.fixture
def script(tmp_path):
    """Runs a script of deploy/ with programs of Flower that say what they are started with."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("flower-superlink", "flower-supernode", "python"):
        (bin / name).write_text(STUB)
        (bin / name).chmod(0o755)

    def run(name, *arguments, **env):
        env = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "FLWR_VERSION": "1.42.0"} | env
        command = [str(ROOT / "deploy" / f"{name}.sh"), *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "federation"
    command = [str(ROOT / "deploy" / "keys.sh"), str(folder), "2", "server.example.org", "192.0.2.10"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        *(
            "--host 0.0.0.0",
            "--host=0.0.0.0",
            "--host ::",
            "--host 192.0.2.10",
            "--hos 0.0.0.0",
            "--host 127.0.0.1.evil",
        ),
        *(
            "--port 8001 --host 0.0.0.0",
            "--host",
            "--control-api-address 0.0.0.0:8000",
            "--fleet-api-address 0.0.0.0:1",
        ),
        *("--insecure", "--simulation", "--enable-supernode-auth", "--database :memory:", "--isolation process"),
    ],
)
def test_a_superlink_that_the_network_could_command_is_not_started(options, script, keys):
    done = script("superlink", keys, *options.split())
    assert done.returncode == 2 and "started" not in done.stdout
    assert done.stderr.startswith("superlink.sh: --") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("version", ["1.42.0", "1.39.0"])
def test_a_superlink_listens_on_loopback_takes_registered_nodes_only_and_for_1_39_opens_the_fleet_port(
    version, script, keys
):
    done = script("superlink", keys, "--port", 8009, FLWR_VERSION=version)
    assert not done.returncode, done.stderr
    started = done.stdout.split()
    value = {option: started[at + 1] for at, option in enumerate(started[:-1]) if option.startswith("--")}
    assert value["--host"] == "127.0.0.1" and started[-1] == "8009" and "--enable-supernode-auth" in started
    assert value.get("--fleet-api-address") == {"1.42.0": None, "1.39.0": "0.0.0.0:9092"}[version]


@pytest.mark.parametrize("options", ["--host 0.0.0.0", "--insecure", "--isolation process", "--ho=0.0.0.0"])
def test_a_supernode_that_listens_to_the_network_or_speaks_in_the_clear_is_not_started(options, script, keys, tmp_path):
    done = script("supernode", keys, 0, 2, "localhost:8000", tmp_path, *options.split())
    assert done.returncode == 2 and "started" not in done.stdout and "supernode.sh: --" in done.stderr


def test_a_supernode_says_what_it_does_not_limit(script, keys, tmp_path):
    free = script("supernode", keys, 0, 2, "localhost:8000", tmp_path)
    assert "runs every app that the server hands out" in free.stderr and "can be changed by this account" in free.stderr
    pinned = script("supernode", keys, 0, 2, "localhost:8000", tmp_path, "--app-hash", "a" * 64)
    assert "every app" not in pinned.stderr.replace("so does every app", "").replace("so by every app", "")
    assert "guarded.py supernode any --root-certificates" in free.stdout
    assert f"guarded.py supernode {'a' * 64} --root-certificates" in pinned.stdout


def test_a_supernode_s_own_policy_is_in_its_node_config(script, keys, tmp_path):
    (tmp_path / "peers").write_text("ecdsa-sha2-nistp384 AAAA node0")
    own = ["--require", "secure-aggregation", "--min-cohort", 5, "--peers", tmp_path / "peers", "--max-epsilon", 3.5]
    said = script("supernode", keys, 0, 2, "localhost:8000", tmp_path, *own).stdout
    signs = f"peers='{tmp_path / 'peers'}' key='{keys / 'node0'}'"
    assert f"require='secure-aggregation' min-cohort=5 {signs} max-epsilon=3.5" in said
    for wrong in (["--require", "a b"], ["--min-cohort", "five"], ["--peers", tmp_path / "nowhere"]):
        assert script("supernode", keys, 0, 2, "localhost:8000", tmp_path, *wrong).returncode == 2


def test_a_supernode_with_several_partitions_has_a_folder_for_each(script, keys, tmp_path):
    done = script("supernode", keys, 1, 9, "localhost:8000", tmp_path, "--partitions", "0-2,7")
    assert f"--node-config partitions='0-2,7' num-partitions=9 data-dir=\"{tmp_path}/{{partition}}\"" in done.stdout
    assert f"{tmp_path}/{{partition}} can be changed by this account" in done.stderr
    for wrong in ("", "a", "1-", "0 1", "0-2'"):
        assert script("supernode", keys, 1, 9, "localhost:8000", tmp_path, "--partitions", wrong).returncode == 2


@pytest.mark.parametrize("hash", ["", "any", "A" * 64, "a" * 63])
def test_an_app_hash_that_is_none_never_means_every_app(hash, script, keys, tmp_path):
    done = script("supernode", keys, 0, 2, "localhost:8000", tmp_path, "--app-hash", hash)
    assert done.returncode == 2 and "started" not in done.stdout
    assert f"--app-hash '{hash}' is not 64 hexadecimal digits" in done.stderr


def test_the_keys_are_open_to_their_owner_alone_and_survive_one_more_device(script, keys, tmp_path):
    folder = shutil.copytree(keys, tmp_path / "federation")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not script("keys", folder, 3).returncode
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() - before.keys() == {"node2", "node2.pub"} and after | before == after

    (folder / "node1").unlink()  # a new key for one node, a new certificate with another name, the same authority
    assert not script("keys", folder, 3, "other.example.org").returncode
    changed = {name for name, content in after.items() if (folder / name).read_bytes() != content}
    assert changed == {"node1", "node1.pub", "server.key", "server.pem", "ca.srl"}
    names = ["openssl", "x509", "-in", "server.pem", "-noout", "-ext", "subjectAltName"]
    listed = subprocess.run(names, cwd=folder, capture_output=True, text=True).stdout
    assert "DNS:other.example.org" in listed and "DNS:localhost" in listed
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", "server.pem"]
    assert subprocess.run(verify, cwd=folder, capture_output=True).returncode == 0


@pytest.mark.parametrize(("days", "warned"), [(800, False), (8, False), (6, True)])
def test_a_certificate_with_less_than_a_week_is_named_at_the_start(days, warned, script, keys, tmp_path):
    folder = shutil.copytree(keys, tmp_path / "federation")
    expire(folder, days)
    assert (f"{folder}/server.pem is valid until" in script("superlink", folder).stderr) == warned


@pytest.mark.slow
def test_registering_leaves_a_new_machine_s_flower_with_its_default_connection_and_a_used_one_s_as_it_was(tmp_path):
    """Nothing answers at the address; the connections are written first."""
    folder = tmp_path / "federation"
    folder.mkdir()
    command = [str(ROOT / "deploy" / "register.sh"), str(folder), "devices", "127.0.0.1:1"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    new, untouched, used = (tmp_path / name for name in ("new", "untouched", "used"))
    subprocess.run(["flwr", "config", "list"], env=env | {"FLWR_HOME": str(untouched)}, capture_output=True, check=True)
    subprocess.run(command, env=env | {"FLWR_HOME": str(new)}, capture_output=True)
    usual, written = (tomllib.loads((home / "config.toml").read_text())["superlink"] for home in (untouched, new))
    assert written.pop("devices") == {"address": "127.0.0.1:1", "root-certificates": str(folder / "ca.crt")}
    assert written == usual and usual["default"] in usual

    used.mkdir()
    mine = '# mine\n[superlink]\ndefault = "work"\n[superlink.work]\naddress = "192.0.2.1:8000"\n'
    (used / "config.toml").write_text(mine)
    for _ in range(2):
        subprocess.run(command, env=env | {"FLWR_HOME": str(used)}, capture_output=True)
    written = (used / "config.toml").read_text()
    assert written.startswith(mine) and written.count("[superlink.devices]") == 1
    other = subprocess.run([*command[:-1], "127.0.0.1:2"], env=env | {"FLWR_HOME": str(used)}, capture_output=True)
    assert other.returncode == 1 and b"another address than 127.0.0.1:2" in other.stderr


def test_only_an_open_connection_of_the_own_account_counts_as_the_owner_s(tmp_path):
    specification = importlib.util.spec_from_file_location("guarded", ROOT / "deploy" / "guarded.py")
    guarded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(guarded)
    client, server = ("127.0.0.1", 0x9C40), ("127.0.0.1", 0x1F41)
    row = "   0: 0100007F:9C40 0100007F:1F41 {state} 00000000:00000000 00:00000000 00000000  {uid}        0 1 1 0 20\n"
    if sys.byteorder == "big":
        row = row.replace("0100007F", "7F000001")
    table = tmp_path / "tcp"
    for state, uid, expected in (("01", 1000, 1000), ("01", 0, 0), ("06", 0, None), ("04", 0, None)):
        table.write_text("  sl  local_address rem_address   st ...\n" + row.format(state=state, uid=uid))
        assert guarded.account(client, server, table) == expected
        assert guarded.account(server, client, table) is None  # the SuperLink's own end of it
        assert guarded.account(("127.0.0.1", 0), server, table) is None
        assert guarded.account(("::1", 0x9C40), server, table) is None
        assert guarded.account(("127.0.0.2", 0x9C40), server, table) is None


def test_the_units_of_a_device_hold_what_the_page_says():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["supernode"]
    assert compose["read_only"] and compose["cap_drop"] == ["ALL"] and not compose["user"].startswith("0")
    assert "no-new-privileges:true" in compose["security_opt"] and "ports" not in compose
    private = [volume for volume in compose["volumes"] if not volume.startswith("state:")]
    assert len(private) == 2 and all(volume.endswith(":ro") for volume in private)
    assert "--app-hash" in compose["command"]
    unit = (ROOT / "deploy" / "fedkrso-supernode.service").read_text().splitlines()
    assert {"User=fedkrso", "NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet="} <= set(unit)
    assert any(line.startswith("BindReadOnlyPaths=") for line in unit) and any("--app-hash" in line for line in unit)
