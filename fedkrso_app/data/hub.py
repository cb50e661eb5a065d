"""Datasets of the hub: their splits at one commit, as rows."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDERS

from fedkrso_app.config import Config, ConfigError, is_local, resolved_path
from fedkrso_app.data import files, repository
from fedkrso_app.data.repository import Repository
from fedkrso_app.data.tasks import GLUE, task

logger = logging.getLogger("flwr")

_HIDDEN = -1  # how a dataset says that it keeps a label to itself


def source(config: Config) -> Repository | None:
    """The repository of the hub that ``config`` reads its rows from; None where they come from elsewhere."""
    if config.data_dir or config.task.startswith("embedded/"):
        return None
    if config.task.startswith("glue/"):
        return Repository("dataset", GLUE, config.dataset_revision, task(config.task).folder)
    name = config.dataset
    if not name or is_local(name.partition(":")[0]):
        return None
    with _blamed("dataset", name):
        return repository.parse("dataset", name)


def pinned(config: Config, data_needed: bool = True) -> Config:
    """``config`` with the commits that its model and dataset are at now, where they come from the hub.

    Raises :class:`ConfigError` where they may not be read, or where nobody can tell the commit; of a dataset only if
    it is needed here.
    """
    found, dataset = {}, source(config)
    if config.model != "embedded" and not is_local(config.model):
        with _blamed("model", config.model):
            found["model"] = str(repository.pinned(repository.parse("model", config.model)))
    if dataset is not None:
        try:
            with _blamed("dataset", config.dataset or config.task):
                found["dataset"] = str(repository.pinned(dataset))
            if config.rows:
                logger.info("rows = %d are drawn from all: %s is downloaded as a whole.", config.rows, dataset)
        except ConfigError as error:
            if data_needed:
                raise
            logger.warning("%s The first node's commit counts.", error)
    return at(config, found)


def at(config: Config, commits: Mapping[str, str]) -> Config:
    """``config`` with its model and dataset at ``commits``, as :func:`commits` gives them."""
    changes = {}
    for kind, text in commits.items():
        with _blamed(kind, text):
            found = repository.parse(kind, text)
            if not found.commit:
                raise ConfigError("it is at no commit")
        changes[f"{kind}_revision"] = found.commit
        if kind == "model" or config.dataset:
            changes[kind] = text
    return replace(config, **changes)  # type: ignore[arg-type]


def commits(config: Config) -> dict[str, str]:
    """What a :func:`pinned` config reads from the hub, "model" and "dataset", as ``name@commit``."""
    dataset = source(config)
    found = {"model": config.model if config.model_revision else "", "dataset": str(dataset) if dataset else ""}
    return {kind: text for kind, text in found.items() if text and repository.parse(kind, text).commit}


def rows_of(config: Config) -> str:
    """The dataset that ``config`` reads from the hub, as ``name@commit``; "" where its rows come from elsewhere."""
    dataset = source(config)
    if dataset is None:
        return ""
    return str(dataset if dataset.commit else repository.pinned(dataset))


@contextmanager
def _blamed(key: str, named: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key} = {named!r}: {error}.") from None


@lru_cache(maxsize=2)
def splits(text: str) -> datasets.DatasetDict:
    """All splits of a dataset, ``name``, ``name:configuration``, each with ``@revision``, or a folder of one.

    A split "test" whose labels are all hidden is left out. Raises :class:`ConfigError` where it cannot be read, and
    where the rows at hand are not those of the commit.
    """
    try:
        local = is_local(text.partition(":")[0])
        loaded = _folder(text) if local else _loaded(repository.parse("dataset", text))
    except Exception as error:  # the hub, HTTP and datasets libraries each raise errors of their own
        if cache := repository.unwritable(error):
            raise ConfigError(f"dataset = {text!r}: the cache cannot be written, {cache}.") from error
        reason = repository.why(error)
        fix = "check the name, 'name:configuration' where it has several, and the network; or put files into data-dir"
        raise ConfigError(f"dataset = {text!r} could not be loaded ({reason}); {fix}.") from error
    if "test" in loaded and _hides_labels(loaded["test"]):
        if "validation" not in loaded:
            logger.info("%s: the labels of its split 'test' are not public; it is left out.", text)
        del loaded["test"]
    return loaded


def _folder(text: str) -> Any:
    name, _, configuration = text.partition(":")
    return datasets.load_dataset(str(resolved_path(name)), configuration or None)


def _loaded(asked: Repository) -> Any:
    if asked.name in BUILDERS:
        raise ConfigError(f"{asked.name!r} is a kind of files, not a dataset: put the files into a folder, data-dir")
    found = repository.pinned(asked)
    try:
        with repository.progress(found), repository.offline(found):
            loaded = datasets.load_dataset(found.name, found.configuration or None, revision=found.commit)
    except Exception:
        repository.verify(found.cache / "snapshots" / found.commit)  # a damaged file is named, and not what it led to
        raise
    for split in loaded.values():
        if found.cached and not found.configuration and split.config_name not in (None, "default"):
            files.warn(f"{found.name}: its configuration {split.config_name!r} is read, the one in the cache")
        for file in split.cache_files:
            # datasets falls back on whatever it has of this name; its folders are named by commit
            if found.commit not in Path(file["filename"]).parts:
                raise ConfigError(f"{found.name} is in the cache at another commit only than {found.commit}")
    return loaded


def _hides_labels(rows: datasets.Dataset) -> bool:
    """Whether a column of labels is hidden in every row."""
    for column, feature in rows.features.items():
        number = column.lower() in ("label", "labels") and str(getattr(feature, "dtype", "")).startswith(
            ("int", "float")
        )
        if number or isinstance(feature, datasets.ClassLabel):
            values = rows.with_format("arrow")[:][column]
            if len(values) and pc.all(pc.equal(values, _HIDDEN)).as_py():
                return True
    return False
