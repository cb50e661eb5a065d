"""`make soak`: a run on the embedded task is killed with SIGKILL at random instants and resumed, again and again.

Prints each instant and, whenever a run has come to its end, whether its digest is that of a run nobody interrupted.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import default_config

SETTINGS = {"task": "embedded/acceptability", "num-server-rounds": 8, "local-steps": 5, "fedkrso.interval": 1}


def start(folder: Path, log: Path, more: dict) -> subprocess.Popen:
    """A process that makes or resumes the run in ``folder``, with ``more`` settings."""
    resume = str(folder) if (folder / "config.json").is_file() else ""
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    places = {"output-dir": str(folder.parent), "run-name": folder.name, "resume": resume}
    settings, file = default_config() | SETTINGS | more | places, folder.with_suffix(".toml")
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    command = [sys.executable, "-m", "fedkrso_app.local_app", str(file), "4"]
    with open(log, "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


def digest(folder: Path) -> str:
    return json.loads((folder / "result.json").read_text())["digest"]


def as_it_should_be(folder: Path, expected: str) -> bool:
    """Whether the digest is that of the uninterrupted run, unless a round was left out that had been opened (masks)."""
    whole = len((folder / "metrics.jsonl").read_text().splitlines()) == 1 + SETTINGS["num-server-rounds"]
    return (digest(folder) == expected) is whole and (whole or (folder / "openings.jsonl").is_file())


def main(instants: int, seed: int, masked: bool) -> int:
    more = {"secure-aggregation": masked, "fedkrso.draw": "each", "fedkrso.num-seeds": 5}
    rng = random.Random(seed)
    scratch = Path(tempfile.mkdtemp(prefix="soak-"))
    log = scratch / "log"
    print(f"one run without interruption first; log: {log}", flush=True)
    began = time.monotonic()
    if start(scratch / "whole", log, more).wait():
        print(log.read_text()[-2000:])
        return 1
    created = (scratch / "whole" / "config.json").stat().st_ctime
    span = (scratch / "whole" / "result.json").stat().st_mtime - created
    expected = digest(scratch / "whole")
    print(f"digest {expected[:16]}…; {time.monotonic() - began:.0f} s, of which {span:.1f} s can be interrupted")
    killed = finished = equal = 0
    number = 0
    while killed < instants:
        folder = scratch / f"run{number}"
        before = {path: path.stat().st_mtime for path in folder.glob("status")}
        process = start(folder, log, more)
        while process.poll() is None and {path: path.stat().st_mtime for path in folder.glob("status")} == before:
            time.sleep(0.01)
        try:
            process.wait(rng.uniform(0, span))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            entries = len(list((folder / "ledger").glob("*.safetensors")))
            print(f"instant {killed}: killed with {entries} ledger entries on disk", flush=True)
            continue
        number += 1
        if process.returncode or not (folder / "result.json").is_file():
            print(log.read_text()[-2000:])
            return 1
        finished += 1
        equal += as_it_should_be(folder, expected)
        print(
            f"  {folder.name} came to its end: digest {'equal' if digest(folder) == expected else 'DIFFERENT'}",
            flush=True,
        )
    if start(folder, log, more).wait() == 0:
        finished += 1
        equal += as_it_should_be(folder, expected)
    print(f"{killed} instants survived, {equal} of {finished} digests as they should be")
    shutil.rmtree(scratch)
    return 0 if finished and equal == finished else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instants", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masked", action="store_true", help="with secure-aggregation")
    options = parser.parse_args()
    sys.exit(main(options.instants, options.seed, options.masked))
