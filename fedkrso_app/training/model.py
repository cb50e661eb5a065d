"""Load a model, find its target layers and its head, write it in the hub's format."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedkrso_app.config import Config, ConfigError, is_local, resolved_path
from fedkrso_app.data import Task, pairs, repository
from fedkrso_app.data.embedded import pretraining as embedded
from fedkrso_app.training import checkpoint, heads, vocabulary
from fedkrso_app.training import tokenizer as tokenizers
from fedkrso_app.training.device import device as choose


@dataclass(frozen=True)
class LoadedModel:
    """A model at W^0. ``targets`` and ``head`` map names to layers and parameters of ``module``, sorted by name."""

    module: nn.Module
    tokenizer: Any
    targets: dict[str, nn.Module]
    head: dict[str, nn.Parameter]
    classes: tuple[str, ...]  # the labels' names, if there are any
    new: frozenset[str]  # what the checkpoint lacks, by name
    frozen: frozenset[str] = frozenset()  # the parameters on the base model that no method trains

    def digest(self) -> str:
        """SHA-256 (hex) of the pretrained weights and the labels' names; not of what is newly initialised, unless it
        never travels."""
        digest = state_digest(self.module.state_dict(), without=self.new - self.frozen)
        # Nodes that number the labels in another way would train against each other.
        return hashlib.sha256("\n".join([digest, *self.classes]).encode()).hexdigest() if self.classes else digest


def load(
    name: str,
    num_labels: int,
    seed: int,
    classes: Sequence[str] = (),
    weights: bool = True,
    device: str = "auto",
    head: str = "dense",
    dtype: str = "float32",
) -> LoadedModel:
    """The model ``name`` for a task, of ``dtype`` (float32 or bfloat16), on ``device``; without ``weights`` only its
    shapes. In bfloat16 each tensor of the checkpoint is rounded as it is read, and the head is float32 after that.

    A classifier for ``num_labels`` above 1, with the labels' names ``classes`` if there are any; for 1 a regression;
    for 0 a language model. ``name`` is ``embedded``, a local folder, or a hub name with or without ``@revision``. The
    head is what sits on the base model; of a language model only what the checkpoint lacks, since its output layer is
    tied to the embeddings or as large as they are. A head that the checkpoint has for the same labels in another order
    is put into this one; one for other labels, and what the checkpoint lacks, is initialised from ``seed``. Which part
    of it is trained says ``head`` (:mod:`training.heads`). Raises
    :class:`ConfigError` where there is no such model, where its checkpoint or its tokenizer is not that of the model
    that config.json describes, where it has no linear layer to train, or where it is no language model.
    """
    place = choose(device) if weights else torch.device("meta")
    architecture = _architecture(num_labels)
    with _explained(name):
        folder = _source(name, weights=True)
        described = checkpoint.check(folder, weights=True)
        torch.manual_seed(seed)
        module, info = architecture.from_pretrained(
            folder,
            config=_settings(folder, num_labels, classes),
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of the head; _lacking refuses those of the base model
            device_map=None if weights else "meta",
            trust_remote_code=False,
            local_files_only=True,
        )
        new = _lacking(module, info)
        new |= _match_head(module, num_labels, classes, _label_names(described), new)
        tokenizer = tokenizers.load(folder)
        tokenizers.fit(tokenizer, module, classifies=bool(num_labels))
        if num_labels:
            pairs.add_border(tokenizer)
        module.eval()
        targets, on_top = _parts(module, num_labels, new)
        if weights and not num_labels and _sees_ahead(module):
            raise ConfigError("it sees the words that it would have to predict: take a decoder, as GPT-2")
        if weights and num_labels:
            tokenizers.settle_padding(tokenizer, module)
        vocabulary.can(module)  # before any layer is replaced
    if new:
        count = sum(parameter.numel() for key, parameter in module.named_parameters() if key in new)
        checkpoint.say("%s begins with a new %s (%d parameters)", name, ", ".join(sorted(new)), count)
    trained = heads.trained(head, module, on_top, new, num_labels)
    for parameter in on_top.values():
        parameter.data = parameter.data.float()
    module = module.to(place) if weights else module
    frozen = frozenset(on_top.keys() - trained.keys())
    return LoadedModel(module, tokenizer, targets, trained, tuple(classes), new, frozen)


def of_run(config: Config, task: Task, weights: bool = True) -> LoadedModel:
    """The model of a run on ``task``, as :func:`load` gives it."""
    c = config
    place, head, dtype = c.weights_device, c.head, c.state_dtype
    return load(c.model, task.num_labels, c.seed, task.classes, weights=weights, device=place, head=head, dtype=dtype)


def outline(name: str, num_labels: int, head: str = "dense") -> LoadedModel:
    """The shapes of model ``name`` by its config.json alone, on torch's meta device.

    Its tokenizer is None where there is none. What a checkpoint lacks is not known here: the head is what sits on the
    base model. Raises :class:`ConfigError` as :func:`load` does.
    """
    with _explained(name):
        folder = _source(name, weights=False)
        checkpoint.check(folder, weights=False)
        with torch.device("meta"):
            module = _architecture(num_labels).from_config(
                _settings(folder, num_labels), dtype=torch.float32, trust_remote_code=False
            )
        tokenizer = tokenizers.load(folder, needed=False)
        if tokenizer is not None:
            tokenizers.fit(tokenizer, module, classifies=bool(num_labels))
        targets, on_top = _parts(module, num_labels)
        vocabulary.can(module)
    trained = heads.trained(head, module, on_top, frozenset(), num_labels)
    frozen = frozenset(on_top.keys() - trained.keys())
    return LoadedModel(module, tokenizer, targets, trained, classes=(), new=frozenset(), frozen=frozen)


def _architecture(num_labels: int) -> Any:
    return AutoModelForSequenceClassification if num_labels else AutoModelForCausalLM


def _settings(folder: Path, num_labels: int, classes: Sequence[str] = ()) -> Any:
    """The model's config.json, changed for the task."""
    facts: dict[str, Any] = {"num_labels": num_labels} if num_labels else {}
    if classes:
        facts |= {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **facts)
    # The checkpoint's own may be another ("multi_label_classification"), and it decides on the loss.
    kinds = {0: None, 1: "regression"}
    settings.problem_type = kinds.get(num_labels, "single_label_classification")
    if getattr(settings, "auto_map", None):
        checkpoint.say("the code that it brings (auto_map) is not run; transformers has %s itself", settings.model_type)
        del settings.auto_map  # or what is exported would ask for that code
    return settings


def _label_names(described: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the checkpoint's own labels in the order of their ids; () where config.json gives none."""
    try:
        names = {int(id): str(label) for id, label in described["id2label"].items()}
    except (KeyError, ValueError, AttributeError):
        return ()
    ordered = tuple(names[id] for id in sorted(names))
    return () if all(label == f"LABEL_{id}" for id, label in enumerate(ordered)) else ordered


def _lacking(module: Any, info: Mapping[str, Any]) -> frozenset[str]:
    """The keys that a checkpoint lacks on its base model. Raises :class:`ConfigError` where the base lacks some.

    A pooler belongs to the head: it reads what the last block gave, and language models are saved without theirs.
    """
    sizes = {key: (list(found), list(wanted)) for key, found, wanted in info["mismatched_keys"]}
    missing, base = set(info["missing_keys"]), module.base_model_prefix + "."
    body = {key for key in module.state_dict() if key.startswith(base) and "pooler" not in key.split(".")}
    if wrong := sorted(body & set(sizes)):
        found, wanted = sizes[wrong[0]]
        raise ConfigError(f"its checkpoint has {wrong[0]} of shape {found} and its config.json says {wanted}")
    checkpoint.refuse_missing(missing & body, sorted(info["unexpected_keys"]), len(body))
    return frozenset(missing | set(sizes))


@torch.no_grad()
def _match_head(
    module: Any, num_labels: int, classes: Sequence[str], names: Sequence[str], new: Set[str]
) -> frozenset[str]:
    """Bring the output layer of a checkpoint that was trained for the labels ``names`` to ``classes``.

    Its rows are put into this order where the names are the same (in any case of letters); else the layer is drawn
    anew. Returns the keys of what was drawn.
    """
    if num_labels < 2 or not classes or len(names) != num_labels:
        return frozenset()
    layers = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
        and part.out_features == num_labels
        and not name.startswith(module.base_model_prefix + ".")
    }
    name, layer = next(reversed(layers.items()), ("", None))
    if layer is None or f"{name}.weight" in new:
        return frozenset()
    before, now = ([label.casefold() for label in labels] for labels in (names, classes))
    if before == now:
        return frozenset()
    if sorted(before) == sorted(now) and len(set(now)) == num_labels:
        order = [before.index(label) for label in now]
        for parameter in layer.parameters():
            parameter.copy_(parameter[order].clone())
        checkpoint.say("rows of the head put in the order %s; it had %s", ", ".join(classes), ", ".join(names))
        return frozenset()
    checkpoint.say("its head is for the labels %s, not %s: a new one is trained", ", ".join(names), ", ".join(classes))
    layer.weight.normal_(0, getattr(module.config, "initializer_range", 0.02))
    if layer.bias is not None:
        layer.bias.zero_()
    return frozenset(f"{name}.{key}" for key, _ in layer.named_parameters())


def _parts(
    module: Any, num_labels: int, new: Set[str] = frozenset()
) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """The target layers and the head of ``module``."""
    targets = find_targets(module)
    if not targets:
        raise ConfigError("it has no linear layer inside a stack of blocks: nothing to train")
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
    except ConfigError as error:
        raise ConfigError(f"model = {name!r}: {error}.") from None
    except Exception as error:  # files of strangers: pickles, tokenizers and settings each fail in ways of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            raise ConfigError(f"model = {name!r}: {checkpoint.NEEDS_CODE}.") from None
        if "weights_only" in reason or "Weights only" in reason:
            reason = "its weights are a pickle that holds more than tensors, and it was not opened"
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


def find_small(loaded: LoadedModel) -> dict[str, nn.Parameter]:
    """The parameters with one axis that are not the head's, nor frozen, by name: norms and biases."""
    named, aside = sorted(loaded.module.named_parameters()), loaded.head.keys() | loaded.frozen
    return {name: parameter for name, parameter in named if parameter.ndim == 1 and name not in aside}


def find_blocks(loaded: LoadedModel) -> dict[str, dict[str, nn.Parameter]]:
    """The blocks of the model, in its own order: every part of an outermost stack that holds a target layer, with all
    of its parameters by name (norms and biases too) but those that are used elsewhere as well."""
    module = loaded.module
    stacks = [name + "." for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    outer = [stack for stack in stacks if not any(stack != other and stack.startswith(other) for other in stacks)]
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    blocks: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        stack = next((stack for stack in outer if name.startswith(stack)), None)
        if stack is not None and uses[id(parameter)] == 1:
            blocks.setdefault(stack + name[len(stack) :].split(".")[0], {})[name] = parameter
    return {name: block for name, block in blocks.items() if any(t.startswith(name + ".") for t in loaded.targets)}


def state_digest(state: Mapping[str, Tensor], without: set[str] | frozenset[str] = frozenset()) -> str:
    """SHA-256 (hex) of a state's names, shapes and float bits."""
    sha = hashlib.sha256()
    for name in sorted(set(state) - set(without)):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        value = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
        sha.update(value.numpy().data if value.numel() else b"")
    return sha.hexdigest()


def export(loaded: LoadedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a plain hub-format model with the weights ``state`` and its tokenizer to ``folder``, each weight in its own
    dtype."""
    few = any(value.dtype == torch.bfloat16 for value in state.values())
    with quiet(), torch.random.fork_rng(devices=[]):
        architecture: Any = type(loaded.module)
        with torch.device("meta"):  # no second copy
            plain = architecture(loaded.module.config)
        plain.load_state_dict({name: value.cpu() for name, value in state.items()}, assign=True)
        plain.tie_weights()
        if few:
            plain.config.dtype = torch.bfloat16
        if getattr(loaded.module, "generation_config", None) is not None:
            plain.generation_config = loaded.module.generation_config
        plain.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)


def check(name: str, num_labels: int) -> None:
    """Raise :class:`ConfigError` as :func:`load` does where that shows without reading the weights.

    A model of the hub is on this machine then.
    """
    outline(name, num_labels)
    with _explained(name):
        folder = _source(name, weights=True)
        checkpoint.check(folder, weights=True)
        tokenizers.load(folder)


def _source(name: str, weights: bool) -> Path:
    """The folder of a model; of the hub's it is on this machine then, with its ``weights`` if they are asked for."""
    if name == "embedded":
        return embedded.model_path()
    if is_local(name):
        return resolved_path(name)
    return checkpoint.fetch(repository.parse("model", name), weights)


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
