"""The offline default: a small RoBERTa pretrained on the language of ``grammar.py``, and the tasks in that language."""

import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM
from transformers.utils import logging as transformers_logging

from fedkrso_app.config import ConfigError
from fedkrso_app.data.embedded import grammar
from fedkrso_app.data.embedded.grammar import TASKS

_log = logging.getLogger("flwr")

_ROWS = {"train": 6000, "validation": 1000}
_STEPS, _BATCH, _DOCUMENTS, _RATE = 1500, 32, 24000, 1e-3
_MASKED, _REPLACED = 0.2, 0.15  # shares of the words
# Four layers: comparing two sentences and telling <s> what came of it takes several. No dropout: few steps, much data.
_MODEL: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256,
    "max_position_embeddings": 130, "type_vocab_size": 1, "initializer_range": 0.05,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def load_task(name: str) -> datasets.DatasetDict:
    """The rows of task ``name``, the same on every machine.

    "train" has 6000 rows and "validation" 1000 others; columns "sentence" (acceptability) or "sentence1" and
    "sentence2", and "label": int64, or float32 between 0 and 5 (similarity). Raises :class:`ConfigError` for a name
    that is not in ``TASKS``.
    """
    if name not in TASKS:
        raise ConfigError(f"task 'embedded/{name}' is unknown; the embedded tasks are {', '.join(TASKS)}.")
    writer = grammar.Writer(seed=TASKS[name], skew=1.5)
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    while len(rows) < sum(_ROWS.values()):
        row = getattr(writer, name)()
        rows.setdefault(tuple(value for key, value in row.items() if key != "label"), row)
    unique = list(rows.values())
    features = {key: datasets.Value("string") for key in unique[0]}
    features["label"] = datasets.Value("float32" if name == "similarity" else "int64")
    parts = {"train": unique[: _ROWS["train"]], "validation": unique[_ROWS["train"] :]}
    return datasets.DatasetDict(
        {key: datasets.Dataset.from_list(part, features=datasets.Features(features)) for key, part in parts.items()}
    )


def model_path() -> Path:
    """A folder in the hub's format with the pretrained RoBERTa and its tokenizer; the first call trains it.

    The folder lies under ``$FEDKRSO_CACHE`` or ``~/.cache/fedkrso`` and is named after the recipe: any edit of
    this file or of the grammar makes another model.
    """
    return _model_path(_STEPS)


def _model_path(steps: int) -> Path:
    cache = Path(os.environ.get("FEDKRSO_CACHE") or "~/.cache/fedkrso").expanduser()
    recipe = Path(__file__).read_bytes() + Path(grammar.__file__).read_bytes() + str(steps).encode()
    path = cache / f"embedded-{hashlib.sha256(recipe).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # a second process waits here and finds the model finished
        if not path.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                part = Path(scratch) / "model"
                tokenizer = _tokenizer()
                tokenizer.save_pretrained(part)
                pretrained = _pretrained(tokenizer, steps)
                bars = transformers_logging.is_progress_bar_enabled()
                transformers_logging.disable_progress_bar()
                pretrained.save_pretrained(part)
                if bars:
                    transformers_logging.enable_progress_bar()
                os.replace(part, path)
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(grammar.vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _pretrained(tokenizer: PreTrainedTokenizerFast, steps: int) -> RobertaForMaskedLM:
    """Masked language modelling on the corpus; PyTorch's global state is left as it was."""
    writer = grammar.Writer(seed=grammar.CORPUS_SEED)
    documents = [writer.document() for _ in range(min(_DOCUMENTS, steps * _BATCH))]
    ids = sorted((tokenizer(*document)["input_ids"] for document in documents), key=len)  # neighbours: little padding
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # the matrices are small, and beside busy processes more threads wait for each other
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _train_mlm(tokenizer, ids, steps)
    finally:
        torch.set_num_threads(threads)


def _train_mlm(tokenizer: PreTrainedTokenizerFast, ids: list[list[int]], steps: int) -> RobertaForMaskedLM:
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), **_MODEL)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    chances = _mask_chances(tokenizer)
    kin = _kin(tokenizer)
    start = time.monotonic()
    for step in range(1, steps + 1):
        at = int(torch.randint(max(1, len(ids) - _BATCH), ()))
        batch = tokenizer.pad({"input_ids": ids[at : at + _BATCH]}, return_tensors="pt")
        tokens = batch["input_ids"]  # (B, T) int64
        hidden = torch.rand(tokens.shape) < chances[tokens]
        # As in BERT some words are replaced instead of hidden, but only in second sentences: the first one tells.
        second = (tokens == tokenizer.sep_token_id).cumsum(1) >= 2
        wrong = (torch.rand(tokens.shape) < _REPLACED) & second & ~hidden
        other = kin[tokens, torch.randint(kin.shape[1], tokens.shape)]
        inputs = torch.where(wrong, other, tokens).where(~hidden, tokenizer.mask_token_id)
        labels = tokens.where(tokens >= len(grammar.SPECIAL), -100)  # any word may be wrong, so all are asked for
        loss = model(input_ids=inputs, attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            left = (time.monotonic() - start) / step * (steps - step)
            line = "pretraining the embedded model: step %d/%d, loss %.2f, %.0f s left"
            _log.info(line, step, steps, loss.item(), left)
    return model.eval()


def _mask_chances(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(V,) float32: how often each token is hidden."""
    chances = torch.full((len(tokenizer),), _MASKED)
    chances[tokenizer.convert_tokens_to_ids(grammar.FUNCTION_WORDS.split())] /= 2  # easy, there is little to learn from
    chances[tokenizer.convert_tokens_to_ids([word for words in grammar.LINKS.values() for word in words])] = (
        0.8  # one a pair
    )
    chances[: len(grammar.SPECIAL)] = 0.0
    return chances


def _kin(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(V, 64) int64: for each token 64 draws from the words of its group; itself where it has none."""
    kin = torch.arange(len(tokenizer))[:, None].repeat(1, 64)
    for group in grammar.the_lexicon().groups():
        ids = torch.tensor(tokenizer.convert_tokens_to_ids([word for concept in group for word in concept]))
        kin[ids] = ids[torch.randint(len(ids), (len(ids), 64))]
    return kin
