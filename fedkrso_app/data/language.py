"""Rows of a language-model task as token ids, and the labels that say which of them are to be predicted.

One text ("causal-lm"): every token of it and the end-of-text token. A conversation ("instruction"): what the assistant
says in it, each time with the mark of its end. Of several texts the last is the answer and those before it, joined by
line breaks, are the question. The tokenizer's chat template lays turns out; without one a row is
``<beginning><question>\\n<answer><end>``, and so on with further turns.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fedkrso_app.data.turns import Turn

_PLAIN: dict[str, Any] = {"add_special_tokens": False, "truncation": False, "verbose": False}
IGNORED = -100  # transformers' losses leave such labels out


def laid_out(columns: Sequence[Sequence[Any]], tokenizer: Any, max_length: int) -> dict[str, list[list[int]]]:
    """``input_ids``, ``attention_mask`` and ``labels`` of each row, at most ``max_length`` values; a batch pads them on
    the right.

    ``columns`` holds b texts each, or one column b conversations. A text that is too long loses its end. Of a
    conversation, what begins with the first answer loses all beyond the half of ``max_length`` that it may always use,
    and what is before it its beginning. A label is where its token is (the model shifts them). Raises ValueError as
    :func:`placed` does.
    """
    if len(columns) == 1 and not isinstance(columns[0][0], list):
        rows = _texts(columns[0], tokenizer, max_length)
    else:
        rows = _chats(conversations(columns), tokenizer, max_length)
    ids, labels = [ids for ids, _ in rows], [labels for _, labels in rows]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}


def checked(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``batch``. Raises ValueError where nothing is left to predict."""
    if not (batch["labels"][:, 1:] != IGNORED).any():
        raise ValueError(
            "there is no token to predict: every text is a single token, and the tokenizer has no end token"
        )
    return batch


def _texts(texts: Sequence[str | None], tokenizer: Any, max_length: int) -> list[tuple[list[int], list[int]]]:
    rows = []
    for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]:
        ids = (ids if ids[-1:] == _end(tokenizer) else ids + _end(tokenizer))[:max_length]
        rows.append((ids, ids))
    return rows


def conversations(columns: Sequence[Sequence[Any]]) -> list[list[Turn]]:
    """Rows as turns: those that one column holds, or a question (the first columns) and its answer (the last)."""
    if len(columns) == 1:
        return list(columns[0])
    questions = ["\n".join(part for part in parts if part) for parts in zip(*columns[:-1], strict=True)]
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(questions, columns[-1], strict=True)
    ]


def placed(turns: Sequence[Turn], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the chat template lays it out, and the (start, end) of what the assistant says in it.

    An answer begins where the text parts from that of the same turns with another answer. It ends with what follows it
    when it is the last turn (the mark of its end), as far as the whole text has that too. Raises ValueError, with the
    reason, where the template refuses the turns, or does not show an answer.
    """

    def shown(these: Sequence[Turn]) -> str:
        try:
            return tokenizer.apply_chat_template(list(these), tokenize=False)
        except Exception as error:  # a template raises errors of its own
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer's chat template refuses these turns ({reason})") from error

    whole, spans = shown(turns), []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        other = {
            **turn,
            "content": next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in turn["content"]),
        }
        changed = shown([*turns[:i], other, *turns[i + 1 :]])
        start = _agree(whole, changed)
        end = len(whole) - _agree(whole[start:][::-1], changed[start:][::-1])
        if whole == changed or end <= start:
            raise ValueError(f"the tokenizer's chat template does not show the answer of turn {i + 1}")
        stop = len(whole)
        if i < len(turns) - 1:
            last, instead = shown(turns[: i + 1]), shown([*turns[:i], other])
            ending = last[len(last) - _agree(last[::-1], instead[::-1]) :]
            stop = end + _agree(ending, whole[end:])
        spans.append((start, stop))
    return whole, spans


def _agree(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _chats(rows: Sequence[Sequence[Turn]], tokenizer: Any, max_length: int) -> list[tuple[list[int], list[int]]]:
    encoded = _templated(rows, tokenizer) if tokenizer.chat_template else _plain(rows, tokenizer)
    cut = []
    for ids, learned in encoded:
        first = learned.index(True) if True in learned else len(ids)
        rest = len(ids[first:][: max_length - min(first, max_length // 2)])
        kept = slice(max(0, first + rest - max_length), first + rest)
        ids, learned = ids[kept], learned[kept]
        cut.append((ids, [id if asked else IGNORED for id, asked in zip(ids, learned, strict=True)]))
    return cut


def _templated(rows: Sequence[Sequence[Turn]], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """The ids of each row and which of them are learned: those with a character of an answer or of its end."""
    laid_out = [placed(row, tokenizer) for row in rows]
    encoded = tokenizer([text for text, _ in laid_out], return_offsets_mapping=True, **_PLAIN)
    return [
        (ids, [any(start < end and begin < stop for begin, end in spans) for start, stop in offsets])
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], laid_out, strict=True)
    ]


def _plain(rows: Sequence[Sequence[Turn]], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """Without a template: a line for each turn, and the end token after each of the assistant's."""
    end, encoded = _end(tokenizer), []
    texts = [
        turn["content"] + ("" if i == len(row) - 1 or (turn["role"] == "assistant" and end) else "\n")
        for row in rows
        for i, turn in enumerate(row)
    ]
    of_turns = iter(tokenizer(texts, **_PLAIN)["input_ids"])
    for row in rows:
        ids = list(_begin(tokenizer))
        learned = [False] * len(ids)
        for turn in row:
            answer = turn["role"] == "assistant"
            more = next(of_turns) + (end if answer else [])
            ids, learned = ids + more, learned + [answer] * len(more)
        encoded.append((ids, learned))
    return encoded


def _begin(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where the tokenizer puts one before a text."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
