"""Conversations as turns ``{"role": …, "content": …}``, from the formats that they come in.

``messages`` (role, content), ShareGPT's ``conversations`` (from, value), and questions with answers, as texts or as
lists of turns.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Turn = dict[str, str]
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_TOOLS = {"tool", "function", "function_call", "function_response", "observation", "ipython"}


def of_columns(cells: Sequence[str | None], lists: Sequence[bool]) -> list[Turn]:
    """The turns of a row: of each of its cells a list of turns (a JSON text) where ``lists`` says so, else a text.

    Texts before the last cell are the user's, joined by line breaks; the last is the assistant's. What comes after the
    assistant's last turn is left out: nothing is learned from it. Raises ValueError, with the reason, where a cell is
    no such list, where there is no answer, and where tools take part.
    """
    turns: list[Turn] = []
    for i, (cell, is_list) in enumerate(zip(cells, lists, strict=True)):
        if is_list:
            turns += _listed(cell or "[]")
        elif i == len(cells) - 1:
            turns.append({"role": "assistant", "content": cell or ""})
        elif cell and turns and turns[-1]["role"] == "user":
            turns[-1] = {"role": "user", "content": f"{turns[-1]['content']}\n{cell}"}
        elif cell:
            turns.append({"role": "user", "content": cell})
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("no turn is the assistant's, so there is nothing to learn")
    return turns[: answers[-1] + 1]


def _listed(cell: str) -> list[Turn]:
    try:
        held = json.loads(cell)
    except ValueError:
        held = None
    if isinstance(held, Mapping):  # how datasets once wrote a list of objects
        parts = {key: values for key, values in held.items() if isinstance(values, list)}
        held = [dict(zip(parts, values, strict=False)) for values in zip(*parts.values(), strict=False)]
    if not isinstance(held, list) or not all(isinstance(turn, Mapping) for turn in held):
        raise ValueError('it is not a list of turns, as [{"role": "user", "content": "…"}, …]')
    return [_turn(turn, f"turn {number}") for number, turn in enumerate(held, 1)]


def _turn(turn: Mapping[str, Any], what: str) -> Turn:
    said, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if said in _TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"{what} calls a tool or is a tool's, which chat templates lay out in ways of their own")
    if not isinstance(said, str) or said.lower() not in _ROLES:
        raise ValueError(f"{what} has the role {said!r}, which is not system, user or assistant")
    if turn.get("weight") == 0:
        raise ValueError(f"{what} has weight 0, and every turn of the assistant is learned")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{what} has no text (its content is {content!r})"[:200])
    if not content.strip():
        raise ValueError(f"{what} is empty")
    return {"role": _ROLES[said.lower()], "content": content}
