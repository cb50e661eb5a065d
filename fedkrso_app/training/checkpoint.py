"""The folder of a model in the hub's format: what it is, and whether all of it is there, before anything is loaded."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedkrso_app.config import ConfigError
from fedkrso_app.data.repository import Repository, files, pinned, verify
from fedkrso_app.data.repository import fetch as download

logger = logging.getLogger("flwr")

NEEDS_CODE = (
    "it needs code of its own (auto_map, trust_remote_code), which is never run; take a model of a family that "
    "transformers knows"
)
CONFIG = "config.json"
# transformers looks for weights in this order; an index names the files of a checkpoint in several parts
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# what AutoTokenizer reads; beside tokenizer.json each is the vocabulary of a family
VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "spm.model", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model", "sentencepiece.model", "prophetnet.tokenizer", "bpe.codes", "dict.txt", "tekken.json",
    "vocab.bpe", "encoder.json", "entity_vocab.json",
)  # fmt: skip
_SMALL = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*", "*.tiktoken",
)  # fmt: skip
_POINTER = b"version https://git-lfs.github.com/spec/"
_SHOWN = 3  # keys and files that a message names


def check(folder: Path, weights: bool) -> dict[str, Any]:
    """The config.json of the model in ``folder``, once its files are known to be what transformers can load.

    With ``weights`` the files of weights and of the tokenizer are looked at too. Raises :class:`ConfigError` whose
    message has the reason alone.
    """
    if not (folder / CONFIG).is_file():
        if adapter := _adapter(folder):
            raise ConfigError(adapter)
        held = _listed(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder} has no {CONFIG}, only: {held}")
    for file in folder.iterdir():
        _refuse_pointer(file)
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / CONFIG} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder / CONFIG} is not a JSON object")
    if adapter := _adapter(folder):
        raise ConfigError(adapter)
    _refuse_quantized(settings)
    if weights:
        for file in weight_files(folder):
            _refuse_damaged(file)
    return settings


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers would read. Raises :class:`ConfigError` if one is missing."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            files = (
                [folder / part for part in parts(folder / name)] if name.endswith(".index.json") else [folder / name]
            )
            if missing := [file.name for file in files if not file.is_file()]:
                raise ConfigError(f"{name} names files that are missing: {_listed(missing)}")
            return files
    raise ConfigError(_no_weights([file.name for file in folder.iterdir()]))


def parts(index: Path) -> list[str]:
    """The names of the files that an index lists, each once. Raises :class:`ConfigError` for an index that is none."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{index} is not an index of weights") from None
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ConfigError(f"{index} names files outside of its folder")
    return names


def has_vocabulary(folder: Path, names: Mapping[str, str]) -> bool:
    """Whether ``folder`` holds a tokenizer; ``names`` are the files that the tokenizer's class itself would read.

    Where there is none, transformers makes up one with a handful of entries. A class that reads no files (bytes) needs
    but its settings.
    """
    known = {*VOCABULARIES, *names.values()} - {"tokenizer_config.json"}
    held = {file.name for file in folder.iterdir()}
    return (
        bool(known & held)
        or any(name.endswith(".tiktoken") for name in held)
        or (not names and "tokenizer_config.json" in held)
    )


def refuse_missing(missing: Iterable[str], unexpected: Sequence[str], expected: int) -> None:
    """Raise :class:`ConfigError` for keys of the base model that the checkpoint lacks.

    ``missing`` and ``unexpected`` are keys as transformers reports them, ``expected`` is how many the base model has.
    """
    lacks = sorted(missing)
    if not lacks:
        return
    prefix = _prefix(lacks, unexpected)
    holds = f"; its keys begin with {prefix!r} instead: save the model itself, by save_pretrained" if prefix else ""
    raise ConfigError(
        f"its checkpoint lacks {len(lacks)} of {expected} tensors of the base model: {_listed(lacks)}{holds}"
    )


def _prefix(lacks: Sequence[str], holds: Sequence[str]) -> str:
    """What precedes the keys of a checkpoint that would fit without it; "" if that is not the reason."""
    for key in holds:
        for wanted in lacks:
            bare = wanted.partition(".")[2]  # a base model may have been saved, whose keys lack its own name
            for end in (wanted, bare):
                if end and key != end and key.endswith("." + end):
                    return key.removesuffix(end)
    return ""


@lru_cache(maxsize=256)
def say(message: str, *values: Any) -> None:
    """Log ``message`` once in this process, however often the model is loaded."""
    logger.info("model: " + message, *values)


def _adapter(folder: Path) -> str:
    if not (folder / "adapter_config.json").is_file():
        return ""
    return "it is an adapter (adapter_config.json), not a model: merge it into its base model and save that"


def _no_weights(held: Sequence[str]) -> str:
    return f"there are no weights: neither {' nor '.join(WEIGHTS[::2])}, only {_listed(held)}{_gguf(held)}"


def _gguf(held: Sequence[str]) -> str:
    found = any(name.endswith(".gguf") for name in held)
    return " (GGUF is a format for inference: take the model that it was made from)" if found else ""


def _refuse_pointer(file: Path) -> None:
    if file.is_file() and file.stat().st_size < 1024:
        with open(file, "rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ConfigError(f"{file} is a git-lfs pointer, not the file itself: run git lfs pull in its folder")


def _refuse_quantized(settings: Mapping[str, Any]) -> None:
    how = settings.get("quantization_config")
    if not how:
        return
    how = how if isinstance(how, dict) else {}
    bits = how.get("bits") or (4 if how.get("load_in_4bit") else 8 if how.get("load_in_8bit") else "")
    kind = " ".join(str(part) for part in (f"{bits}-bit" if bits else "", how.get("quant_method", "")) if part)
    raise ConfigError(f"its weights are quantized ({kind or 'quantization_config'}); take the model in full precision")


def _refuse_damaged(file: Path) -> None:
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, framework="numpy") as opened:  # it compares the header with the file's length
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is damaged ({error}): remove it, and copy or download it again") from None


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more or "nothing"


def fetch(repository: Repository, weights: bool) -> Path:
    """The folder of a model of the hub on this machine: settings and tokenizer, and its ``weights`` if asked for.

    Raises :class:`ConfigError` (a reason).
    """
    found = repository if repository.commit and "/" in repository.name else pinned(repository)
    folder = download(found, [CONFIG, "adapter_config.json", *_SMALL, *VOCABULARIES])
    if not (folder / CONFIG).is_file() and not _adapter(folder):
        raise ConfigError(f"the repository has no {CONFIG}, only {_listed(files(found))}{_gguf(files(found))}")
    if not weights:
        return folder
    for name in WEIGHTS:
        download(found, [name])
        if (folder / name).is_file():
            if name.endswith(".index.json"):
                download(found, parts(folder / name))
            break
    else:
        raise ConfigError(_no_weights(files(found)))
    verify(folder)
    return folder
