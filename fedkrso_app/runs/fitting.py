"""Which settings let a client train within so much memory, and at what cost: ``fedkrso plan --device-memory``."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedkrso_app import data
from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.stacked import Unstackable
from fedkrso_app.federation.device_memory import CONTEXT, GAPS, GIB, LIBRARIES, MIB, WORKSPACES, allowed
from fedkrso_app.federation.memory import SETTINGS, Memory, client_memory, outlined, pass_memory
from fedkrso_app.strategies import parse
from fedkrso_app.training import model
from fedkrso_app.training.together import at_once

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
# What a change costs in exactness, least first.
AS_SET, SAME, ROUNDING, OTHER = _COSTS = ("as set", "same bits", "rounding", "other")


def size(text: str) -> int:
    """Bytes of ``8GB``, ``16 GiB``, ``900MB``. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", text)
    if not found or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError(f"--device-memory {text!r} is not a size; write for instance 8GB, 7.5GiB or 900MB.")
    return round(float(found[1]) * _UNITS[found[2]])


def fitting(settings: Mapping[str, Any], strategy: str, memory: int) -> dict[str, Any]:
    """What of ``settings`` must change for a client of ``strategy`` to train on a device with ``memory`` bytes.

    ``rows`` are the settings that were counted: their ``changes``, the bytes of the device and of W^t in the host, the
    operations of a step relative to those as set, what the change costs in exactness, and whether they fit. ``choice``
    is the row that fits and costs least (its index; None if there is none). Activation memory is tried first, then
    smaller batches that are accumulated, then ``compute-dtype`` and ``state-dtype``. The device is a GPU unless
    ``device`` is ``cpu``. Raises ConfigError where the settings are wrong or nothing can be counted.
    """
    given = parse({**settings, "strategy": strategy})
    cuda = given.device != "cpu"
    budget = allowed(memory, cuda)
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    with model.quiet():
        for changes in _numbers(given):
            try:
                config = parse({**given.to_dict(), **changes})
            except ConfigError as error:  # a method that trains whole matrices takes no W of two bytes
                reasons[", ".join(f"{key} = {value!r}" for key, value in changes.items())] = str(error)
                continue
            for row in _rows(config, changes, given, cuda, budget, reasons):
                rows.append(row)
            if any(row["fits"] and row["exactness"] == AS_SET for row in rows):
                break
        if not rows:
            raise ConfigError(f"the memory of {strategy} cannot be counted: {next(iter(reasons.values()), '')}")
        base = rows[0]["operations"]
        rows = [{**row, "operations": row["operations"] / base} for row in rows]
        fits = [i for i, row in enumerate(rows) if row["fits"]]
        choice = min(fits, key=lambda i: (_COSTS.index(rows[i]["exactness"]), rows[i]["operations"]), default=None)
        chosen = given if choice is None else parse({**given.to_dict(), **rows[choice]["changes"]})
        together = _together(chosen, cuda, budget, base) if choice is not None else None
    return {
        "strategy": strategy,
        "memory": memory,
        "budget": budget,
        "device": "cuda" if cuda else "cpu",
        "rows": rows,
        "choice": choice,
        "pass": together,
        "not_counted": reasons,
    }


def _numbers(given: Config) -> Iterator[dict[str, str]]:
    """What the weights are computed and kept in, from the settings as they are to the fewest bits."""
    yield {}
    if given.compute_dtype == "float32":
        yield {"compute-dtype": "bfloat16"}
    if given.state_dtype == "float32":
        yield {"compute-dtype": "bfloat16", "state-dtype": "bfloat16"}


def _rows(
    config: Config, changes: Mapping[str, Any], given: Config, cuda: bool, budget: int, reasons: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The settings of activation memory at the batch as it is, then at half of it and so on until something fits or no
    batch could."""
    batch, parts = config.batch_size, config.gradient_accumulation
    chooses = given.activation_memory == "auto"  # a GPU's client does
    first = "keep" if chooses else given.activation_memory
    while True:
        halved = {"batch-size": batch, "gradient-accumulation": parts} if batch != config.batch_size else {}
        smaller = parse({**config.to_dict(), **halved})
        memories, refused, host = _counted(smaller, first, cuda)
        reasons |= {f"activation-memory = {setting!r}": reason for setting, reason in refused.items()}
        anything = not memories
        for setting, memory in memories.items():
            device = memory.total if cuda else memory.total + host
            own = {} if setting == first or (chooses and cuda) else {"activation-memory": setting}
            exactness = OTHER if changes else ROUNDING if halved else SAME if own else AS_SET
            fits = device <= budget
            anything |= fits or memory.total - memory.peak > budget
            yield {
                "changes": {**changes, **halved, **own},
                "activation_memory": setting,
                "batch": [batch, parts],
                "compute_dtype": config.compute_dtype,
                "state_dtype": config.state_dtype,
                "device": device,
                "host": host if cuda else 0,
                "operations": memory.operations,
                "exactness": exactness,
                "fits": fits,
            }
        if anything or batch % 2:
            return
        batch, parts = batch // 2, 2 * parts


def _counted(config: Config, first: str, cuda: bool) -> tuple[dict[str, Memory], dict[str, str], int]:
    """The memory of a client by setting of activation-memory, ``first`` in front, and the bytes of W^t in the host."""
    task = data.resolve(config, look=bool(config.data_dir or config.dataset))
    method, local, inputs = outlined(config, task)
    settings = (first, *(setting for setting in SETTINGS if setting != first))
    memories, refused = client_memory(method, local, inputs, cuda, settings)
    each = 4 if config.state_dtype == "float32" else 2
    return memories, refused, 0 if config.on_device else each * sum(p.numel() for p in local.module.parameters())


def _together(config: Config, cuda: bool, budget: int, base: float) -> dict[str, Any] | None:
    """How many of a node's clients fit into one pass, with its bytes and relative operations; None where clients take
    turns."""
    most = min(config.clients_per_node, at_once(config, "cuda"))
    if most == 1:
        return None
    task = data.resolve(config, look=bool(config.data_dir or config.dataset))
    try:
        one, two = (pass_memory(*outlined(config, task), clients, cuda)[0] for clients in (1, 2))
        clients = max(1, min(most, 1 + (budget - one) // max(1, two - one)))
        while (found := pass_memory(*outlined(config, task), clients, cuda))[0] > budget and clients > 1:
            clients -= 1
    except Unstackable as reason:
        return {"clients": 1, "reason": str(reason)}
    return {"clients": clients, "asked": most, "device": found[0], "operations": found[1] / base}


def notes(facts: Mapping[str, Any]) -> Iterator[str]:
    """What the rows of :func:`fitting` lead to, and what they mean."""
    row = None if facts["choice"] is None else facts["rows"][facts["choice"]]
    if row is None:
        yield "Nothing of this fits. Lower max-length or the method's rank, or take a smaller model."
    elif row["exactness"] == AS_SET:
        yield "It fits as set."
    else:
        changes = " ".join(f"--set {key}={value}" for key, value in row["changes"].items())
        yield f"It does not fit as set. It fits with: {changes}"
    if row and row["host"]:
        yield (
            f"The host holds W^t beside it, {row['host'] / GIB:.2f} GiB. Where host and GPU share one memory, add "
            "both; state-dtype = 'bfloat16' leaves no copy there."
        )
    if (together := facts["pass"]) and "reason" in together:
        yield f"The clients of a node train one after another: {together['reason']}."
    elif together:
        yield (
            f"Of {together['asked']} clients of a node, {together['clients']} fit into one pass: "
            f"{together['device'] / GIB:.2f} GiB, {together['operations']:.2f} of the operations for each step of one."
        )
    for what, reason in facts["not_counted"].items():
        yield f"not counted with {what}: {reason}"
    added = (
        f"{CONTEXT // MIB} MiB for CUDA's context (assumed), {WORKSPACES // MIB} MiB for cuBLAS's workspaces (measured "
        "on an H200)"
        if facts["device"] == "cuda"
        else f"{LIBRARIES // MIB} MiB for Python and its libraries (measured in a small run)"
    )
    yield (
        f"Left out of the counts, so taken off the device: {added}, and {GAPS:.0%} of what is counted for what the "
        "allocator rounds up and cannot use (assumed)."
    )
    yield (
        "operations: of the matrix products and attention of one optimizer step, relative to the first row. This is a "
        "count and no time: small batches use a GPU less well, and bfloat16 is several times as fast on most GPUs."
    )
    yield (
        "results: other settings of activation-memory have the same bits; accumulated batches differ by rounding and "
        "dropout masks; bfloat16 computes with other numbers."
    )
