"""A batch's attention mask, at whose values no model has to look: that would make a host wait for its device."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import transformers.masking_utils
from torch import Tensor
from transformers import PreTrainedModel


def told(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``batch``, on the CPU, without a mask that hides nothing: then models compute without one, as they do where they
    find that out."""
    mask = batch.get("attention_mask")
    full = mask is not None and bool(mask.all())
    return {name: tensor for name, tensor in batch.items() if not full or name != "attention_mask"}


@contextmanager
def unread(module: Any) -> Iterator[None]:
    """Inside, transformers looks at no mask's values to see whether it can be left out, nor at the tokens of a batch
    without a mask to warn of it; and a decoder keeps no cache of keys and values, which nobody asks for."""
    with ExitStack() as context:
        context.enter_context(_swapped(transformers.masking_utils, "is_tracing", lambda tensor=None: True))
        context.enter_context(
            _swapped(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda self, ids, mask: None)
        )
        if getattr(getattr(module, "config", None), "use_cache", None):
            context.enter_context(_swapped(module.config, "use_cache", False))
        yield


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
