"""One whole run in this process: ``python -m fedkrso_app.local_app SETTINGS.toml CLIENTS``.

``fedkrso compare --engine process`` starts one such process per run.
"""

import os
import sys
import threading
import time
import tomllib
from pathlib import Path

from fedkrso_app import client_app, server_app
from fedkrso_app.config import flatten
from fedkrso_app.federation.local import LocalGrid, play


def main(settings: Path, clients: int) -> None:
    """The run that the TOML file ``settings`` describes, with every key set. Raises what the ServerApp raises."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    run_config = flatten(tomllib.loads(settings.read_text()))
    play(server_app.app, LocalGrid(client_app.app, run_config, clients), run_config)


def end_with(parent: int) -> None:
    """End this process, as if it were killed, once ``parent`` no longer runs; nobody would stop it otherwise."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
