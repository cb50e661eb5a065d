"""Load a model, find its target layers and its head, write it in the hub's format."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedkrso_app.config import ConfigError, resolved_path
from fedkrso_app.data import pairs
from fedkrso_app.data.embedded import pretraining as embedded


@dataclass(frozen=True)
class LoadedModel:
    """A model at W^0. ``targets`` and ``head`` map names to layers and parameters of ``module``, sorted by name."""

    module: nn.Module
    tokenizer: Any
    targets: dict[str, nn.Module]
    head: dict[str, nn.Parameter]
    classes: tuple[str, ...]  # the labels' names, if there are any
    new: frozenset[str]  # what the checkpoint lacks, by name

    def digest(self) -> str:
        """SHA-256 (hex) of the pretrained weights and the labels' names; not of what is newly initialised."""
        digest = state_digest(self.module.state_dict(), without=self.new)
        # Nodes that number the labels in another way would train against each other.
        return hashlib.sha256("\n".join([digest, *self.classes]).encode()).hexdigest() if self.classes else digest


def load(
    name: str, num_labels: int, seed: int, classes: Sequence[str] = (), weights: bool = True, on_device: bool = True
) -> LoadedModel:
    """The model ``name`` for a task, float32; without ``weights`` only its shapes.

    It lies on the GPU if there is one and ``on_device`` allows it.

    A classifier for ``num_labels`` above 1, with the labels' names ``classes`` if there are any; for 1 a regression;
    for 0 a language model. ``name`` is ``embedded``, a local folder, or a hub name. What the checkpoint lacks is
    initialised from ``seed``. The head is what sits on the base model; of a language model only what the checkpoint
    lacks, since its output layer is tied to the embeddings or as large as they are. Raises :class:`ConfigError` where
    there is no such model, where it has no linear layer to train, or where it is no language model.
    """
    source, architecture = _source(name), _architecture(num_labels)
    with _explained(name):
        torch.manual_seed(seed)
        module, info = architecture.from_pretrained(
            source,
            config=_settings(source, num_labels, classes),
            dtype=torch.float32,
            output_loading_info=True,
            device_map=None if weights else "meta",
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    _settle(module, tokenizer)
    if num_labels:
        pairs.add_border(tokenizer)
    new = set(info["missing_keys"])
    targets, head = _parts(name, module, num_labels, new)
    module.eval()
    if weights and not num_labels and _sees_ahead(module):
        raise ConfigError(f"model = {name!r} sees the words that it would have to predict; choose a decoder, as GPT-2.")
    if weights and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, before its first product; same bits
        module = module.to("cuda") if on_device else module
    return LoadedModel(module, tokenizer, targets, head, tuple(classes), frozenset(new))


def outline(name: str, num_labels: int) -> LoadedModel:
    """The shapes of model ``name`` by its config.json alone, on torch's meta device.

    Its tokenizer is None where there is none. What a checkpoint lacks is not known here: the head is what sits on the
    base model. Raises :class:`ConfigError` as :func:`load` does.
    """
    source, tokenizer = _source(name), None
    with _explained(name), torch.device("meta"):
        module = _architecture(num_labels).from_config(_settings(source, num_labels), dtype=torch.float32)
    with contextlib.suppress(OSError, ValueError, ImportError):
        tokenizer = AutoTokenizer.from_pretrained(source)
    _settle(module, tokenizer)
    return LoadedModel(module, tokenizer, *_parts(name, module, num_labels), classes=(), new=frozenset())


def _architecture(num_labels: int) -> Any:
    return AutoModelForSequenceClassification if num_labels else AutoModelForCausalLM


def _settings(source: str, num_labels: int, classes: Sequence[str] = ()) -> Any:
    """The model's config.json, changed for the task."""
    facts: dict[str, Any] = {"num_labels": num_labels} if num_labels else {}
    if classes:
        facts |= {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    settings = AutoConfig.from_pretrained(source, **facts)
    if num_labels == 1:
        settings.problem_type = "regression"
    return settings


def _settle(module: Any, tokenizer: Any) -> None:
    """What model and tokenizer leave open: the padding token, and how much the model can read."""
    settings = module.config.get_text_config()
    if tokenizer is not None:
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token  # decoders often have none; padding is masked
        positions = getattr(settings, "max_position_embeddings", None)
        if positions and tokenizer.model_max_length > 10**9:  # it does not say how much the model can read
            tokenizer.model_max_length = positions
    if settings.pad_token_id is None:
        module.config.pad_token_id = getattr(tokenizer, "pad_token_id", 0)


def _parts(
    name: str, module: Any, num_labels: int, new: Set[str] = frozenset()
) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """The target layers and the head of ``module``."""
    targets = find_targets(module)
    if not targets:
        raise ConfigError(f"model = {name!r} has no linear layer inside a stack of blocks: nothing to train.")
    base = module.base_model_prefix + "."
    parameters = dict(module.named_parameters())
    on_top = {key for key in parameters if num_labels and not key.startswith(base)}
    return targets, {key: parameters[key] for key in sorted(parameters) if key in on_top | new}


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Quietly, with torch's random state left alone; what goes wrong becomes a ConfigError."""
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            yield
    # SafetensorError: a file that is no weights; ImportError: a tokenizer that needs a library of its own
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model = {name!r} could not be loaded ({reason}); give 'embedded', the folder of a model in the hub's "
            "format, or a hub name while the hub can be reached."
        ) from None


@torch.no_grad()
def _sees_ahead(module: nn.Module) -> bool:
    """Whether a token's logits depend on the token after it."""
    one, other = (module(input_ids=torch.tensor([[1, second]])).logits[0, 0] for second in (2, 3))
    return not torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def find_targets(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer (``nn.Linear``, ``Conv1D``) inside a stack of blocks, by structure; no tied weights."""
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    stacks = [name + "." for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    return {
        name: child
        for name, child in sorted(module.named_modules())
        if isinstance(child, nn.Linear | Conv1D)
        and any(name.startswith(stack) for stack in stacks)
        and uses[id(child.weight)] == 1
    }


def state_digest(state: Mapping[str, Tensor], without: set[str] | frozenset[str] = frozenset()) -> str:
    """SHA-256 (hex) of a state's names, shapes and float bits."""
    sha = hashlib.sha256()
    for name in sorted(set(state) - set(without)):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        sha.update(value.numpy().data if value.numel() else b"")
    return sha.hexdigest()


def export(loaded: LoadedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a plain hub-format model with the weights ``state`` and its tokenizer to ``folder``."""
    with quiet(), torch.random.fork_rng(devices=[]):
        architecture: Any = type(loaded.module)
        plain = architecture(loaded.module.config)
        plain.load_state_dict({name: value.cpu() for name, value in state.items()})
        if getattr(loaded.module, "generation_config", None) is not None:
            plain.generation_config = loaded.module.generation_config
        plain.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)


def is_local(name: str) -> bool:
    """Whether the model ``name`` is a folder of this machine."""
    return name.startswith(("~", "/", ".")) or resolved_path(name).is_dir()


def _source(name: str) -> str:
    if name == "embedded":
        return str(embedded.model_path())
    if is_local(name):
        path = resolved_path(name)
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model = {name!r}: {path} has no config.json; give the folder of a model in the hub's format."
            )
        return str(path)
    return name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' notes, as on newly initialised weights, which are expected here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
