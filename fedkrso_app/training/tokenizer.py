"""A model's tokenizer, brought into agreement with the model: one padding id, ids that it embeds, a length it reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from fedkrso_app.config import ConfigError
from fedkrso_app.training.checkpoint import NEEDS_CODE, has_vocabulary, say

_UNLIMITED = 10**9  # transformers writes 10^30 where a tokenizer does not say how much its model reads
_PROBES = ("a", "a b c d e f g h")  # texts of unlike length


def load(folder: Path, needed: bool = True) -> Any:
    """The tokenizer in ``folder``; None where it has none and none is ``needed``. Raises :class:`ConfigError`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each family's reader raises errors of its own
        if "trust_remote_code" in str(error):
            raise ConfigError(NEEDS_CODE) from None
        if has_vocabulary(folder, {"": ""}):
            lacks = "sentencepiece and " if any(folder.glob("*.model")) else ""
            raise ConfigError(
                f"its tokenizer cannot be read ({_first(error)}); install {lacks}the libraries of requirements.txt"
            ) from None
        tokenizer = None
    names: Mapping[str, str] = getattr(tokenizer, "vocab_files_names", {}) or {}
    if tokenizer is not None and has_vocabulary(folder, names) and len(tokenizer) > len(set(tokenizer.all_special_ids)):
        return tokenizer
    if needed:
        raise ConfigError(f"{folder} has no tokenizer files: put those of its model there (tokenizer.json)")
    return None


def fit(tokenizer: Any, module: Any, classifies: bool) -> None:
    """Bring ``tokenizer`` and ``module`` into agreement, both in place. Raises :class:`ConfigError` if they cannot be.

    The padding id is the tokenizer's and is written into the model's settings, but where the model counts positions
    from it (RoBERTa): there it is the model's. A classifier needs one.
    """
    settings = module.config.get_text_config()
    _refuse_strange_ids(tokenizer, module.get_input_embeddings().weight.shape[0])
    tables = _positions(module)
    reserved = next((table.padding_idx for table in tables if table.padding_idx is not None), None)
    if reserved is not None:
        if tokenizer.pad_token_id != reserved:
            token = tokenizer.convert_ids_to_tokens(reserved) if reserved < len(tokenizer) else None
            if token is None or not _is_special(tokenizer, reserved, token):
                raise ConfigError(
                    f"the model counts positions from padding id {reserved} and its tokenizer pads with "
                    f"{tokenizer.pad_token_id}; take the tokenizer that belongs to the model"
                )
            say("%s is the padding token: the model counts positions from id %d", token, reserved)
            tokenizer.pad_token = token
    elif tokenizer.pad_token_id is None:
        own = settings.pad_token_id
        token = tokenizer.convert_ids_to_tokens(own) if own is not None and 0 <= own < len(tokenizer) else None
        token = token or tokenizer.eos_token  # decoders often have none; padding is masked
        if token is None and classifies:
            raise ConfigError(
                "its tokenizer has neither a padding nor an end token; set tokenizer.pad_token and save it again"
            )
        if token is not None:
            tokenizer.pad_token = token
    if tokenizer.pad_token_id is not None:
        set_padding(module, tokenizer.pad_token_id)
    readable = min((_readable(table) for table in tables), default=None)
    if readable is None and tokenizer.model_max_length > _UNLIMITED:
        readable = getattr(settings, "max_position_embeddings", None)
    if readable:
        tokenizer.model_max_length = min(tokenizer.model_max_length, readable)


def set_padding(module: Any, pad: int) -> None:
    """Write the padding id ``pad`` wherever the model's settings have one."""
    for settings in (module.config, module.config.get_text_config(), getattr(module, "generation_config", None)):
        if settings is not None:
            settings.pad_token_id = pad


@torch.no_grad()
def settle_padding(tokenizer: Any, module: nn.Module) -> None:
    """Choose the side of padding on which a text's logits do not depend on its neighbours in the batch.

    Decoders are often saved with padding on the left, for generation, and count positions from there. Raises
    :class:`ConfigError` where neither side will do.
    """
    texts = [tokenizer(text)["input_ids"] for text in _PROBES]
    if not texts[0] or len(texts[0]) == len(texts[1]):
        return
    before = tokenizer.padding_side
    for side in (before, "left" if before == "right" else "right"):
        tokenizer.padding_side = side
        alone, beside = (
            module(**tokenizer(list(probe), padding=True, return_tensors="pt")).logits[0]
            for probe in (_PROBES[:1], _PROBES)
        )
        if torch.allclose(alone, beside, rtol=1e-3, atol=1e-4):
            if side != before:
                say("texts are padded on the %s: on the %s their neighbours would change their logits", side, before)
            return
    tokenizer.padding_side = before
    raise ConfigError("a text's logits depend on its neighbours in the batch, whichever side is padded")


def _refuse_strange_ids(tokenizer: Any, rows: int) -> None:
    """Refuse ids that the model does not embed, except for special tokens that no text has and nobody adds."""
    named = {
        getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "unk", "cls", "sep", "mask")
    }
    extra = {id for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special} - named
    strange = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows and id not in extra)
    if strange:
        id, token = strange[0]
        raise ConfigError(
            f"its tokenizer has {len(strange)} ids that the model does not embed (the first: {token!r}, id {id}; the "
            f"embedding has {rows} rows); take the tokenizer that belongs to it, or save the model after "
            "resize_token_embeddings"
        )


def _is_special(tokenizer: Any, id: int, token: str) -> bool:
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(id)
    return id in tokenizer.all_special_ids or (added is not None and added.special) or "pad" in token.casefold()


def _positions(module: nn.Module) -> list[nn.Embedding]:
    """The tables of learned absolute positions, which an input must not run over."""
    names = ("position_embeddings", "embed_positions", "wpe")
    return [
        part
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding) and name.rpartition(".")[2] in names
    ]


def _readable(table: Any) -> int:
    """How many tokens a table of positions can place: some families keep its first rows for padding."""
    reserved = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - reserved


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
