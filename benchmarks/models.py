"""The peers of the benchmarks: one RoBERTa with random weights, made trainable in five ways; clock, memory, table.

floor        frozen backbone; gradients flow through to the embeddings, only the head learns
fedkrso      this app's layers and optimizer
a-frozen     peft LoRA on the same layers, A frozen
lora         peft LoRA on the same layers
full         every parameter, torch's AdamW

All of them train the head with AdamW as well.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, RobertaConfig

from fedkrso_app.core import lora
from fedkrso_app.core.rso import RSO
from fedkrso_app.core.subspace import AdapterLinear, SubspaceLinear
from fedkrso_app.training import vocabulary
from fedkrso_app.training.activations import activation_memory
from fedkrso_app.training.loop import head_optimizer, precision
from fedkrso_app.training.model import LoadedModel, find_targets

PEERS = ("floor", "fedkrso", "a-frozen", "lora", "full")
RANK, RATE = 4, 1e-4
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


def classifier(size: str, attention: str = "sdpa") -> Any:
    """RoBERTa with a head for two labels, frozen, in training mode, on torch's default device."""
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **SIZES[size])
    module = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).train()
    return module.requires_grad_(False)


def llama(size: str) -> Any:
    """The shape of Llama-3.2-3B or -3.1-8B, random weights, frozen, in training mode, on torch's default device."""
    common = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "pad_token_id": 0}
    config = LlamaConfig(**common, **LLAMAS[size])
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train().requires_grad_(False)


LLAMAS: dict[str, dict[str, int]] = {
    "3.2-3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}

# What benchmarks.gpu measures and benchmarks.memory counts: model, dtype, rows and tokens.
ON_GPU: dict[str, tuple[Callable[[], Any], torch.dtype, tuple[int, int]]] = {
    "RoBERTa-large, float32": (lambda: classifier("large"), torch.float32, (16, 128)),
    "RoBERTa-large, bfloat16": (lambda: classifier("large"), torch.bfloat16, (16, 128)),
    "Llama-3.2-3B, bfloat16": (lambda: llama("3.2-3B"), torch.bfloat16, (4, 768)),
    "Llama-3.1-8B, bfloat16": (lambda: llama("3.1-8B"), torch.bfloat16, (1, 1024)),
}


def on_gpu(case: str, device: str, name: str, setting: str, logits: bool) -> "tuple[Peer, dict[str, Tensor]]":
    """A peer of one of :data:`ON_GPU` and its batch, on ``device``."""
    make, dtype, shape = ON_GPU[case]
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            peer, inputs = Peer(name, make(), setting, logits), batch(*shape)
        finally:
            torch.set_default_dtype(torch.float32)
    if case.startswith("Llama"):
        inputs["labels"] = inputs["input_ids"]
    return peer, inputs


def head_of(module: Any) -> dict[str, nn.Parameter]:
    """What is trained of it; of a language model nothing, as in the app."""
    base = module.base_model_prefix + "."
    classifies = module.get_output_embeddings() is None
    return {name: p for name, p in sorted(module.named_parameters()) if classifies and not name.startswith(base)}


def loaded(module: nn.Module) -> LoadedModel:
    """A classifier as the app would have loaded it, without a tokenizer."""
    return LoadedModel(module, None, find_targets(module), head_of(module), classes=(), new=frozenset())


def batch(rows: int, tokens: int) -> dict[str, Tensor]:
    """Random token ids and labels."""
    ids = torch.randint(5, 50000, (rows, tokens))
    return {"input_ids": ids, "labels": torch.zeros(rows, dtype=torch.long)}


class Peer:
    """One way to train ``module``: ``forward`` gives the loss, ``step`` does one whole local step.

    With ``logits`` a language model's loss is made from all its logits at once, as transformers does; without, as the
    app does, from a few tokens' at a time.
    """

    def __init__(self, name: str, module: Any, memory: str = "keep", logits: bool = True) -> None:
        self.name, self.module, self.memory, self.logits = name, module, memory, logits
        vocabulary.can(module)  # before any layer is replaced
        weight = next(module.parameters())
        half = weight.dtype == torch.bfloat16
        self.precision = precision("bfloat16" if half else "float32", weight.device)
        head = head_of(module)
        targets = find_targets(module)
        self.rso: RSO | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        if name == "full":
            self.optimizers = [torch.optim.AdamW(module.parameters(), lr=RATE)]
        elif name == "fedkrso":
            form = AdapterLinear if half else SubspaceLinear
            layers = {key: form(layer, RANK) for key, layer in targets.items()}
            for key, layer in layers.items():
                module.set_submodule(key, layer)
            self.rso = RSO(layers, RATE)
            self.rso.start_interval(1)
            self.optimizers = [self.rso]
        elif name in ("lora", "a-frozen"):
            pairs = [lora.factors(layer) for layer in lora.attach(module, list(targets), RANK, 8.0, 0).values()]
            factors = [B for _, B in pairs] + [A for A, _ in pairs if name == "lora"]
            for A, B in pairs:
                A.data, B.data = A.data.to(weight.dtype), B.data.to(weight.dtype)
            module.requires_grad_(False)
            self.optimizers = [torch.optim.AdamW(factors, lr=RATE)]
        elif name == "floor":
            module.enable_input_require_grads()
        if name != "full":
            self.optimizers.append(head_optimizer(head, RATE))
        for parameter in self.trained():
            parameter.requires_grad_(True)

    def trained(self) -> list[nn.Parameter]:
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """What the app does to the model while it trains; the others are torch's and peft's own work."""
        own = activation_memory(self.module, self.memory) if self.name == "fedkrso" else nullcontext()
        with own, nullcontext() if self.logits else vocabulary.without_logits(self.module):
            yield

    def step(self, inputs: Mapping[str, Tensor]) -> None:
        with self.keeping():
            with self.precision:
                loss = self.module(**inputs).loss
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def medians(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each call on one thread. Calls are interleaved, so that a slow phase affects all of them;
    each is warmed up once. CPU time depends least on what else the machine does."""
    return {name: statistics.median(values) for name, values in _seconds(calls, repeats).items()}


def best(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least CPU seconds of each call, as :func:`medians`: for a ratio on a machine that does other work too."""
    return {name: min(values) for name, values in _seconds(calls, repeats).items()}


def _seconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repeat:
                times[name].append(time.process_time() - start)
    return times


def show(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print ``rows`` (all with the keys of the first) as JSON or as a table."""
    if as_json:
        print(json.dumps(list(rows), indent=2, ensure_ascii=False))
        return
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    Console(width=170).print(table)
