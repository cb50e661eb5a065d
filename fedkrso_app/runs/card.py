"""The model card of an exported model: what made it, of what, how good it is, and how to load it.

It says what the run's folder knows and nothing else, and of the user's paths the last component at most.
"""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedkrso_app.config import Config, is_local
from fedkrso_app.data.hub import source
from fedkrso_app.data.tasks import Task
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.privacy import sentence
from fedkrso_app.runs.results import asked_in, text
from fedkrso_app.strategies import STRATEGIES

HEADS = {
    "dense": "trained as a whole",
    "linear": "its output layer trained, the layers before that frozen",
    "frozen": "frozen",
}


def write(run: Run, task: Task, round: int, folder: Path) -> None:
    """Write ``README.md`` beside the model after ``round`` in ``folder``, in the hub's format for model cards."""
    info, config = run.info, run.config
    lines = [line for line in run.metrics() if line["round"] <= round]
    line = next((line for line in lines if line["round"] == round), {})  # a killed run may not have written it
    name, method = run.path.resolve().name, STRATEGIES[config.strategy]
    kind, auto = ("text-generation", "CausalLM") if task.language else ("text-classification", "SequenceClassification")
    hub, configuration = _hub_dataset(config)
    result = EvalResult(
        task_type=kind,
        dataset_type=hub or task.name,
        dataset_name=task.name,
        dataset_config=configuration or None,
        dataset_split="train" if config.holdout else None if task.own else task.validation,
        metric_type=task.metric,
        metric_value=line.get("metric"),
    )
    hub_model = config.model != "embedded" and not is_local(config.model)
    metadata = ModelCardData(
        base_model=config.model.partition("@")[0] if hub_model else None,
        datasets=[hub] if hub else None,
        library_name="transformers",
        pipeline_tag=kind,
        tags=["federated-learning", "flower", config.strategy],
        metrics=[task.metric],
        model_name=name,
        eval_results=[result] if "metric" in line else None,
    )
    paper = "[{}]({})".format(*method.citation())
    facts = {
        "Base model": "the small RoBERTa that FedKRSO pretrains on its own corpus"
        if config.model == "embedded"
        else f"`{_shown('model', config.model)}`",
        "Method": f"{config.strategy}, {paper}",
        "Task": task.name + (f"; columns {', '.join(task.reads)}" if task.columns else ""),
        "Head": HEADS[config.head] if task.num_labels else "",
        "Data": _data(config, task),
        "Partition": _partition(config),
        "Clients": _clients(lines),
        "Rounds": f"{round}, each of {config.local_steps} steps per client in batches of {config.batch_size}",
        **_measured(line, config, task),
        "Privacy": sentence(run, round),
        "Sent per client and round, on average": _bytes(lines),
        "Libraries": ", ".join(f"{library} {version}" for library, version in info["libraries"].items()),
    }
    settings = {key: text(_shown(key, value)) for key, value in info["config"].items()}
    content = f"""---
{metadata.to_yaml()}
---

# {name}, round {round}

Fine-tuned by federated learning, with FedKRSO's app on Flower.

{_table({key: value for key, value in facts.items() if value})}

## Load it

```python
from transformers import AutoModelFor{auto}, AutoTokenizer

folder = "."  # this folder, or its name on the Hub
model = AutoModelFor{auto}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

<details><summary>Settings at the start of the run</summary>

{_table({key: html.escape(value) for key, value in settings.items()})}

</details>
"""
    ModelCard(content).save(folder / "README.md")


def _table(rows: Mapping[str, str]) -> str:
    cells = [f"| {key} | {value.replace('|', '&#124;')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *cells])


def _shown(key: str, value: Any) -> Any:
    """A setting without the user's folders."""
    path = key in ("data-dir", "output-dir", "resume")
    path = path or (key in ("model", "dataset") and is_local(value.partition(":")[0]))
    return Path(value).name if path else value


def _hub_dataset(config: Config) -> tuple[str, str]:
    """The hub dataset that is read and its configuration; ("", "") where the rows come from elsewhere."""
    repository = source(config)
    return (repository.name, repository.configuration) if repository else ("", "")


def _data(config: Config, task: Task) -> str:
    if task.name.startswith("embedded/"):
        return "the synthetic corpus that comes with FedKRSO"
    if task.own and not (config.data_dir or config.dataset):
        return "each client's own files"
    folder, hub = _shown("data-dir", config.data_dir or config.dataset), " ".join(_hub_dataset(config)).strip()
    commit = f", commit `{config.dataset_revision}`" if hub and config.dataset_revision else ""
    where = f"{hub} on the hub{commit}" if hub else f"files in a folder `{folder}`"
    return f"{where}; a client with a data-dir of its own used the files in that"


def _partition(config: Config) -> str:
    column = f" by column {config.partition_column}" if config.partition_column else ""
    alpha = f", α = {config.dirichlet_alpha:g}" if config.partition.startswith("dirichlet") else ""
    scheme = config.partition + alpha
    return scheme + (column if config.partition != "iid" else "")


def _clients(lines: list[dict[str, Any]]) -> str:
    seen = {partition for line in lines for partition in line["partitions"]}
    replies, asked = sum(line["clients"] for line in lines), sum(asked_in(line) for line in lines)
    return f"{len(seen)} took part; {replies} of {asked} replies were counted" if asked else ""


def _measured(line: Mapping[str, Any], config: Config, task: Task) -> dict[str, str]:
    if "metric" not in line:
        return {}
    rows = f"the split {task.validation}"
    if config.holdout:
        rows = f"{config.holdout:g} of the training rows, which were held back"
    elif task.own and task.dataset and not config.data_dir:
        rows = "the split validation, else test, or where there was neither a tenth of the training rows, held back"
    elif task.own:
        rows = "the validation file or, where there was none, a tenth of the training rows, which were held back"
    who = {"server": "by the server", "clients": "by the clients, each on its share"}[config.evaluate]
    return {task.metric.capitalize(): f"{line['metric']:.4f} (loss {line['eval_loss']:.4f}), {who}, on {rows}"}


def _bytes(lines: list[dict[str, Any]]) -> str:
    asked = sum(asked_in(line) for line in lines)
    up, down = (sum(line[f"{way}link_bytes"] for line in lines) for way in ("up", "down"))
    return f"{up / asked / 1e6:.3f} MB; received {down / asked / 1e6:.3f} MB" if asked else ""
