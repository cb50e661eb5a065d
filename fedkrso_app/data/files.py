"""Data files: which belong to a split, and the rows in them."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from fedkrso_app.config import ConfigError
from fedkrso_app.data import rows, written
from fedkrso_app.data.rows import Rows, warn

__all__ = ["columns", "find", "read", "warn", "wordy"]

_MEANT = re.compile(r"(val|valid|dev|eval|evaluation)([-_.].*)?$", re.IGNORECASE)  # names of a validation file
_SUFFIXES = (".parquet", ".csv", ".jsonl", ".json")


def find(root: Path, name: str, split: str, needed: bool = True) -> tuple[Path, ...]:
    """The file ``<split>.<ext>`` of task ``name``, else the one ``<split>_<more>.<ext>``, else all shards.

    They are looked for in ``root/name`` and then in ``root``. Raises :class:`ConfigError` where several would do, and
    where there is none unless it is not ``needed`` and no file has another common name of a validation file.
    """
    if not root.is_dir():
        raise ConfigError(f"data-dir = {str(root)!r} is not a folder.")
    # "validation" alone never means one of MNLI's two, which are splits with names of their own
    matching = re.compile(re.escape(split) + r"(?![-_.](mis)?matched)([-_.].*)?$")
    for folder in (root / name, root):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        files = [f for f in files if f.suffix in _SUFFIXES and matching.match(f.stem) and f.is_file()]
        files = [f for f in files if f.stem == split] or files
        shards_of = [int(shard[1]) for f in files if (shard := re.search(r"-\d+-of-0*(\d+)$", f.stem))]
        if shards_of == [len(files)] * max(1, len(files)) or (len(files) == 1 and not shards_of):
            return tuple(files)
        if files:
            several = f"{folder} has {', '.join(f.name for f in files)} for {split!r}"
            raise ConfigError(f"{several}; keep one file, or one full set of shards.")
    if not needed:
        for folder in (root / name, root):
            meant = [f.name for f in sorted(folder.glob("*")) if f.suffix in _SUFFIXES and _MEANT.match(f.stem)]
            if meant:
                fix = f"name it {split}{Path(meant[0]).suffix}, or take it away to hold training rows back"
                raise ConfigError(f"{folder} has {', '.join(meant)} and no validation file: {fix}.")
        return ()
    found = ", ".join(sorted(f.name for f in root.iterdir())[:20]) or "nothing"
    wanted = f"{name}/{split}*.parquet (nor .csv, .jsonl, .json), nor one directly in it"
    raise ConfigError(f"data-dir = {str(root)!r} has no {wanted}. It holds: {found}.")


def columns(files: Sequence[Path], skip: bool) -> tuple[str, ...]:
    """The names of the columns of ``files``, those that are there twice twice. Raises ConfigError as :func:`read`."""
    return _columns(tuple(files), _stamps(files), skip)


def read(files: Sequence[Path], wanted: Sequence[str], texts: Sequence[str], skip: bool) -> Rows:
    """The rows of ``files``: of the columns, those in ``wanted`` alone, of which ``texts`` hold texts or lists.

    Broken lines of csv and jsonl are left out (and counted in the log) if ``skip``; else, and where a file cannot be
    read at all, :class:`ConfigError` names the file and the line. Nothing in another column matters.
    """
    return _read(tuple(files), _stamps(files), tuple(dict.fromkeys(wanted)), frozenset(texts), skip)


def wordy(files: Sequence[Path], is_word: Callable[[str], bool]) -> set[str]:
    """The columns of texts of which some are words."""
    found: set[str] = set()
    for file in files:
        is_parquet = file.suffix == ".parquet"
        found |= rows.wordy(_opened(file).read(), is_word) if is_parquet else written.wordy(file, is_word)
    return found


def _stamps(files: Sequence[Path]) -> tuple:
    """What differs once a file has changed."""
    return tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@lru_cache(maxsize=4)  # only the whole of a JSON file tells its columns
def _columns(files: tuple[Path, ...], stamps: tuple, skip: bool) -> tuple[str, ...]:
    names: Counter[str] = Counter()
    for file in files:
        is_parquet = file.suffix == ".parquet"
        names |= Counter(_opened(file).schema_arrow.names) if is_parquet else written.columns(file)
    for file in () if names else files:
        if file.suffix in (".jsonl", ".json"):
            written.read(file, (), frozenset(), skip)  # names a line that is broken
    if not names:
        raise ConfigError(_no_rows(_listed(files)))
    return tuple(names.elements())


@lru_cache(maxsize=4)  # a split is asked for its labels, and soon after for all that is needed
def _read(files: tuple[Path, ...], stamps: tuple, wanted: tuple[str, ...], texts: frozenset[str], skip: bool) -> Rows:
    source, found = _listed(files), columns(files, skip)
    for name in wanted:
        if found.count(name) > 1:
            raise ConfigError(f"{source}: column {name!r} is there {found.count(name)} times; rename all but one.")
    kept = [name for name in wanted if name in found]
    parts = []
    for file in files:
        lacks = (
            [name for name in kept if name not in columns([file], skip)] if file.suffix in (".csv", ".parquet") else []
        )
        if lacks:
            raise ConfigError(f"{file}: column {lacks[0]!r} is missing, which another file of this split has.")
        parts.append(_typed(file, kept) if file.suffix == ".parquet" else written.read(file, kept, texts, skip))
    try:
        table = pa.concat_tables([part.table for part in parts], promote_options="permissive")
        if any((part.classes, part.lists) != (parts[0].classes, parts[0].lists) for part in parts):
            raise pa.ArrowInvalid("class names or lists")
    except pa.ArrowException as error:
        raise ConfigError(f"{source}: these files differ in the type of a column ({_reason(error)}).") from error
    if kept and not len(table):
        raise ConfigError(_no_rows(source))
    lines = tuple(part for of_file in parts for part in of_file.parts)
    return Rows(source, table, tuple(dict.fromkeys(found)), parts[0].lists, parts[0].classes, lines)


def _typed(file: Path, wanted: Sequence[str]) -> Rows:
    """The columns of a parquet file."""
    opened = _opened(file)
    schema = opened.schema_arrow
    try:
        table = opened.read(columns=list(wanted)).select(list(wanted))
    except (pa.ArrowException, OSError) as error:  # the file's end may be good and a column damaged
        raise ConfigError(f"{file}: could not be read as parquet ({_reason(error)}).") from error
    known = datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}
    return rows.of_table(str(file), table, schema.names, known)


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        if not file.stat().st_size:
            raise ConfigError(_no_rows(str(file))) from None
        raise ConfigError(f"{file}: could not be read as parquet ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _no_rows(source: str) -> str:
    return f"{source}: there are no rows; put some in, or remove the file."
