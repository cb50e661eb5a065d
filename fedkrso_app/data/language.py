"""Rows of a language-model task as token ids, and the labels that say which of them are to be predicted.

One text ("causal-lm"): every token of it and the end-of-text token. Several ("instruction"): the last is the answer,
those before it, joined by line breaks, are the question, and only the answer is asked for. The tokenizer's chat
template lays the two out; without one a row is ``<beginning><question>\\n<answer><end>``.
"""

from collections.abc import Sequence
from typing import Any

import torch

IGNORED = -100  # transformers' losses leave such labels out


def batch(columns: Sequence[Sequence[str | None]], tokenizer: Any, max_length: int) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, all (b, t) int64, padded on the right, t <= ``max_length``.

    ``columns`` holds b texts each. A text that is too long loses its end. Of a question with its answer, the answer
    loses what exceeds the half of ``max_length`` that it may always use, and the question its beginning. Labels stand
    where their token stands (the model shifts them). Raises ValueError where nothing is left to predict, or
    where the chat template leaves the answer out.
    """
    rows = _texts(columns[0], tokenizer, max_length) if len(columns) == 1 else _chats(columns, tokenizer, max_length)
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    if not (labels[:, 1:] != IGNORED).any():
        raise ValueError(
            "there is no token to predict: every text is a single token, and the tokenizer has no end token"
        )
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": labels,
    }


def _texts(texts: Sequence[str | None], tokenizer: Any, max_length: int) -> list[tuple[list[int], list[int]]]:
    rows = []
    for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]:
        ids = (ids if ids[-1:] == _end(tokenizer) else ids + _end(tokenizer))[:max_length]
        rows.append((ids, ids))
    return rows


def _chats(
    columns: Sequence[Sequence[str | None]], tokenizer: Any, max_length: int
) -> list[tuple[list[int], list[int]]]:
    questions, answers = [], []
    for *parts, answer in zip(*columns, strict=True):
        question = "\n".join(part for part in parts if part)
        if tokenizer.chat_template:
            asked = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
            # Some templates end a prompt in a way of its own, as with the beginning of a thought.
            at = len(prompt) if whole.startswith(prompt) else whole.rfind(answer.strip())
            if at < 0:
                raise ValueError("the tokenizer's chat template does not show the answer as it is")
            question, answer = whole[:at], whole[at:]
        else:
            question += "\n"
        questions.append(question)
        answers.append(answer)
    plain = {"add_special_tokens": False, "truncation": False, "verbose": False}
    begin, end = ([], []) if tokenizer.chat_template else (_begin(tokenizer), _end(tokenizer))
    rows = []
    for asked, answered in zip(
        tokenizer(questions, **plain)["input_ids"], tokenizer(answers, **plain)["input_ids"], strict=True
    ):
        prompt_ids = begin + asked
        answer_ids = (answered + end)[: max_length - min(len(prompt_ids), max_length // 2)]
        prompt_ids = prompt_ids[max(0, len(prompt_ids) + len(answer_ids) - max_length) :]
        rows.append((prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids))
    return rows


def _begin(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, where the tokenizer puts one before a text."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
