"""Repositories of the hub: the commit that a name means, and their files in this machine's cache.

Names are ``name``, ``name@revision`` and, of datasets, ``name:configuration``. What can be asked is asked once: a name
that was pinned to its commit needs no network once its files are here.
"""

import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import httpx
import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from fedkrso_app.config import ConfigError

logger = logging.getLogger("flwr")

_COMMIT = re.compile("[0-9a-f]{40}")
_PROGRESS_SECONDS = 15.0


@dataclass(frozen=True)
class Repository:
    """A repository at a ``revision``: a branch, a tag, a commit, or "" for its main branch."""

    kind: str  # "model" or "dataset"
    name: str
    revision: str = ""
    configuration: str = ""  # of a dataset that has several
    cached: bool = False  # the hub did not answer: only the cache can be read

    @property
    def commit(self) -> str:
        """The revision, if it is a commit; else ""."""
        return self.revision if _COMMIT.fullmatch(self.revision) else ""

    @property
    def cache(self) -> Path:
        """The folder of its files and references in the hub's cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type=self.kind)

    def __str__(self) -> str:
        configuration = f":{self.configuration}" if self.configuration else ""
        return self.name + configuration + (f"@{self.revision}" if self.revision else "")


def parse(kind: str, text: str) -> Repository:
    """The repository that a user's ``text`` names. Raises :class:`ConfigError` (a reason) for what is no name."""
    found = re.fullmatch(r"([\w./-]+)(?::([^:@]+))?(?:@([^:@]+))?(?::([^:@]+))?", text)
    if not found or (found[2] and found[4]) or (kind == "model" and (found[2] or found[4])):
        form = "org/name or org/name@revision" if kind == "model" else "org/name, org/name:configuration@revision"
        raise ConfigError(f"{text!r} is not a name of the hub ({form})")
    return Repository(kind, found[1], found[3] or "", found[2] or found[4] or "")


@lru_cache(maxsize=32)
def pinned(repository: Repository) -> Repository:
    """``repository`` by its present name and at the commit that its revision means now, once it may be read.

    Where the hub cannot be reached, at the commit that this machine knows of; the log says so. Raises
    :class:`ConfigError` (a reason) where there is no such repository, or where it may not be read.
    """
    if constants.HF_HUB_OFFLINE:
        return _known(repository, "HF_HUB_OFFLINE is set")
    timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
    revision = repository.revision or None
    try:
        info: Any = HfApi().repo_info(repository.name, repo_type=repository.kind, revision=revision, timeout=timeout)
        found = replace(repository, name=info.id, revision=info.sha)
        # The description of a gated repository is public. Its files may be here from when they could be read.
        if getattr(info, "gated", False) and info.siblings:
            url = huggingface_hub.hf_hub_url(
                info.id, info.siblings[0].rfilename, repo_type=repository.kind, revision=info.sha
            )
            huggingface_hub.get_hf_file_metadata(url, timeout=timeout)
    except Exception as error:
        if _unreachable(error):
            return _known(repository, why(error))
        raise ConfigError(why(error)) from None
    _note(replace(repository, name=found.name), found.revision)
    return found


def fetch(repository: Repository, patterns: Sequence[str]) -> Path:
    """The folder with those files of a pinned ``repository`` whose names match ``patterns``, downloaded if need be.

    Every process of a machine shares it. Raises :class:`ConfigError` (a reason).
    """
    try:
        with progress(repository), offline(repository):
            folder = huggingface_hub.snapshot_download(
                repository.name, repo_type=repository.kind, revision=repository.commit, allow_patterns=list(patterns)
            )
    except Exception as error:
        raise ConfigError(why(error)) from None
    return Path(folder)


@contextlib.contextmanager
def offline(repository: Repository) -> Iterator[None]:
    """Without requests where the hub did not answer before: each would be waited for, and tried again."""
    flags = [(constants, constants.HF_HUB_OFFLINE), (datasets.config, datasets.config.HF_HUB_OFFLINE)]
    try:
        for owner, before in flags:
            owner.HF_HUB_OFFLINE = before or repository.cached
        yield
    finally:
        for owner, before in flags:
            owner.HF_HUB_OFFLINE = before


def files(repository: Repository) -> list[str]:
    """The names of all files of a pinned ``repository``; none where the hub does not answer."""
    with contextlib.suppress(Exception):
        return HfApi().list_repo_files(repository.name, repo_type=repository.kind, revision=repository.commit)
    return []


def verify(folder: Path) -> None:
    """Raise :class:`ConfigError` (a reason) for a cached file in ``folder`` that is not what the hub has.

    The cache names a file by its hash: SHA-256 of a large one, git's SHA-1 of the others.
    """
    for file in sorted(folder.rglob("*")):
        name = file.resolve().name
        if not file.is_symlink() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name) or not file.is_file():
            continue
        with open(file, "rb") as opened:
            sha = hashlib.sha256() if len(name) == 64 else hashlib.sha1(b"blob %d\0" % file.stat().st_size)
            while block := opened.read(1 << 20):
                sha.update(block)
        if sha.hexdigest() != name:
            raise ConfigError(f"{file.resolve()} in the cache ({file.name}) is damaged: remove it, then run again")


@contextlib.contextmanager
def progress(repository: Repository) -> Iterator[None]:
    """Log how much of ``repository`` has been downloaded, from time to time, while the block runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_PROGRESS_SECONDS):
            held = 0
            for file in (repository.cache / "blobs").glob("*"):
                with contextlib.suppress(OSError):
                    held += file.stat().st_blocks * 512
            logger.info("downloading %s: %.0f MB are here", repository, held / 1e6)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def unwritable(error: BaseException) -> str:
    """Which file of this machine's cache of the hub cannot be written, why, and the fix; "" for any other ``error``."""
    caches = tuple(map(str, (constants.HF_HOME, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)))
    if not isinstance(error, OSError) or not error.strerror or not str(error.filename).startswith(caches):
        return ""
    return f"{error.filename} ({error.strerror}): set HF_HOME to a folder that can be"


def why(error: BaseException) -> str:
    """What an error of the hub means, whole and in words, and the way out where there is one."""
    if cache := unwritable(error):
        return f"the cache cannot be written, {cache}"
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    token = "set HF_TOKEN where the server and the clients run (flwr run's first SuperLink keeps its environment)"
    if isinstance(error, GatedRepoError):
        return f"it is gated: ask for access on its page, then {token}: {said}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has none of this name, or it is private: check the spelling, or {token}: {said}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision: {said}"
    if isinstance(error, HFValidationError):
        return f"it is not a name of the hub: {said}"
    if isinstance(error, EntryNotFoundError):
        return f"a file is missing: {said}"
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return f"the hub refuses the token: {token}: {said}"
    if isinstance(error, httpx.TimeoutException):
        return f"{constants.ENDPOINT} did not answer within {constants.HF_HUB_ETAG_TIMEOUT} s"
    if isinstance(error, httpx.TransportError):
        return f"{constants.ENDPOINT} cannot be reached: {said}"
    return said


def _unreachable(error: Exception) -> bool:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    return isinstance(error, httpx.TransportError | OfflineModeIsEnabled) or status == 429 or status >= 500


def _known(repository: Repository, reason: str) -> Repository:
    """``repository`` at the commit that this machine's cache has for its revision."""
    if "/" not in repository.name and not repository.cache.is_dir():  # a short name: cached by the whole one
        whole = list(Path(constants.HF_HUB_CACHE).glob(f"{repository.kind}s--*--{repository.name}"))
        if len(whole) == 1:
            repository = replace(repository, name=whole[0].name.partition("--")[2].replace("--", "/"))
    noted = repository.cache / "refs" / (repository.revision or "main")
    commit = repository.commit
    with contextlib.suppress(OSError):
        commit = commit or noted.read_text().strip()
    if not _COMMIT.fullmatch(commit) or not (repository.cache / "snapshots" / commit).is_dir():
        raise ConfigError(f"{reason}, and {repository} is not in the cache {constants.HF_HUB_CACHE}")
    logger.warning("%s: %s is used as the cache has it, commit %s", reason, repository, commit)
    return replace(repository, revision=commit, cached=True)


def _note(repository: Repository, commit: str) -> None:
    """Note in the hub's cache, as its own library does, which commit a revision means."""
    if repository.commit:
        return
    noted = repository.cache / "refs" / (repository.revision or "main")
    with contextlib.suppress(OSError):  # a cache that cannot be written says so where it is needed
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(commit)
