"""What several runs read from the hub: one commit of each repository, whenever each run is made."""

import json
from pathlib import Path

from fedkrso_app.config import Config
from fedkrso_app.data import hub

_KEYS = ("model", "model-revision", "task", "data-dir", "dataset", "dataset-revision")


def hold(config: Config, file: Path) -> dict[str, str]:
    """The keys of a run config that say what is read, at the commits of the first call that asked for the same.

    ``file`` keeps these. Raises :class:`ConfigError` where the hub has no such repository, or where it may not be read.
    """
    asked = {key: config.to_dict()[key] for key in _KEYS}
    kept = json.loads(file.read_text()) if file.is_file() else []
    before = next((entry["commits"] for entry in kept if entry["asked"] == asked), None)
    config = hub.pinned(config) if before is None else hub.at(config, before)
    if before is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept.append({"asked": asked, "commits": hub.commits(config)})
        file.write_text(json.dumps(kept, indent=2) + "\n")
    return {key: config.to_dict()[key] for key in _KEYS}
