"""The border between the two texts of a pair."""

from typing import Any

from tokenizers import processors

from fedkrso_app.data.rows import warn


def has_border(tokenizer: Any) -> bool:
    """Whether a token that is of neither text is between those of a pair; so too where that cannot be known."""
    if not getattr(tokenizer, "is_fast", False):
        return True
    sides = tokenizer("a", "a").sequence_ids()
    if not {0, 1} <= set(sides):
        return True
    return sides.index(1) - (len(sides) - sides[::-1].index(0)) > 0


def add_border(tokenizer: Any) -> None:
    """Have ``tokenizer`` put its separator, else its end token, between the texts of a pair, where nothing is there.

    The tokenizers of most decoders put nothing there, so that ("the soup was", "good") and ("the soup", "was good") are
    the same ids. The change is in place, and saved with the tokenizer: whoever uses the exported model gets the ids
    that it was trained on. A single text stays as it was, and so does all where there is neither token.
    """
    mark = tokenizer.sep_token or tokenizer.eos_token
    if has_border(tokenizer) or mark is None:
        return

    def around(*texts: str) -> tuple[list[str], list[str]]:
        """The special tokens before and after the texts."""
        encoded = tokenizer(*texts)
        tokens, inside = encoded.tokens(), [i for i, side in enumerate(encoded.sequence_ids()) if side is not None]
        return tokens[: inside[0]], tokens[inside[-1] + 1 :]

    (before, after), (before_pair, after_pair) = around("a"), around("a", "a")
    used = {*before, *after, *before_pair, *after_pair, mark}
    layout = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before_pair, "$A:0", f"{mark}:0", "$B:1", *after_pair],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in sorted(used)],
    )
    backend = tokenizer.backend_tokenizer
    of_bytes = isinstance(backend.post_processor, processors.ByteLevel)  # it sees to the offsets
    backend.post_processor = processors.Sequence([backend.post_processor, layout]) if of_bytes else layout
    warn(f"the tokenizer puts nothing between the texts of a pair: {mark} is put there")
