"""What a task is: the columns that it reads, what its labels mean, and how it is judged.

``embedded/*`` and ``glue/*`` are known here in full. A task without a slash is read from the user's own data: its
columns are named by the config, or guessed from names that are common, and never guessed where two would do.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.data import cells

GLUE = "nyu-mll/glue"  # the hub dataset that glue/* are read from without a data-dir
_INDEX = re.compile(r"|Unnamed: \d+|__index_level_\d+__")  # names that pandas gives to the numbers of rows


@dataclass(frozen=True)
class Task:
    """What to read and how to judge it."""

    name: str  # "glue/sst2", "embedded/entailment", "causal-lm"
    columns: tuple[str, ...]  # the text columns; of "instruction" the last is the answer, and one alone holds turns
    num_labels: int  # 1 for regression, 0 where the next token is the label
    metric: str  # one of metrics.py's
    validation: str = "validation"  # the split to report on
    label: str = "label"  # the label's column, "" where there is none
    classes: tuple[str, ...] = ()  # the labels' names in the order of their ids; of GLUE as the hub has them
    group: str = ""  # a column by which the rows are split among clients
    skip: bool = False  # leave bad rows out
    dataset: str = ""  # the hub dataset that is read where no folder is given
    rows: int = 0  # as many of each split at most, 0: all

    @property
    def regression(self) -> bool:
        return self.num_labels == 1

    @property
    def folder(self) -> str:
        """The name of its files and of its configuration on the hub."""
        return self.name.rpartition("/")[2].removesuffix("-matched")

    @property
    def language(self) -> bool:
        """Whether a language model is trained, on the next token."""
        return self.num_labels == 0

    @property
    def own(self) -> bool:
        """Whether it is read from the user's own data, files or a hub dataset."""
        return "/" not in self.name

    @property
    def reads(self) -> list[str]:
        """Every column that is needed, once."""
        return [column for column in dict.fromkeys((*self.columns, self.label, self.group)) if column]


_ONE, _TWO = ("sentence",), ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")
_ALL = [
    Task("embedded/acceptability", _ONE, 2, "accuracy"),
    Task("embedded/entailment", _TWO, 3, "accuracy"),
    Task("embedded/similarity", _TWO, 1, "pearson"),
    Task("glue/cola", _ONE, 2, "matthews", classes=("unacceptable", "acceptable")),
    Task("glue/sst2", _ONE, 2, "accuracy", classes=("negative", "positive")),
    Task("glue/mrpc", _TWO, 2, "accuracy", classes=("not_equivalent", "equivalent")),
    Task("glue/qqp", ("question1", "question2"), 2, "accuracy", classes=("not_duplicate", "duplicate")),
    Task("glue/stsb", _TWO, 1, "pearson"),
    Task("glue/mnli", ("premise", "hypothesis"), 3, "accuracy", "validation_mismatched", classes=_NLI),
    Task("glue/mnli-matched", ("premise", "hypothesis"), 3, "accuracy", "validation_matched", classes=_NLI),
    Task("glue/qnli", ("question", "sentence"), 2, "accuracy", classes=("entailment", "not_entailment")),
    Task("glue/rte", _TWO, 2, "accuracy", classes=("entailment", "not_entailment")),
    # Columns and label are open until config or files name them; 2 stands for as many labels as there will be.
    Task("text-classification", (), 2, "accuracy", label=""),
    Task("text-pair", (), 2, "accuracy", label=""),
    Task("regression", (), 1, "pearson", label=""),
    Task("causal-lm", (), 0, "perplexity", label=""),
    Task("instruction", (), 0, "exact-match", label=""),
]
_TASKS = {task.name: task for task in _ALL}

# The names that are guessed, in any case. docs/data.md lists them.
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "score", "rating")
_SINGLES: list[tuple[str, ...]] = [(name,) for name in ("text", "sentence", "content", "review", "document", "body")]
_PAIRS: list[tuple[str, ...]] = [
    _TWO,
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
]
_ANSWERS: list[tuple[str, ...]] = [
    ("messages",),
    ("conversations",),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("input", "output"),
]
_GUESSES: dict[str, list[tuple[str, ...]]] = {
    "text-classification": _SINGLES,
    "text-pair": _PAIRS,
    "regression": _SINGLES + _PAIRS,
    "causal-lm": _SINGLES,
    "instruction": _ANSWERS,
}
_METRICS = {True: ("accuracy", "f1", "matthews"), False: ("perplexity", "exact-match")}  # of classifiers; of language
_COUNTS = {  # how many text columns, and what they are
    "text-classification": (1, 1, "one text column"),
    "text-pair": (2, 2, "two text columns"),
    "regression": (1, 2, "one or two text columns"),
    "causal-lm": (1, 1, "one text column"),
    "instruction": (1, 9, "the columns of the question and, last, the answer's, or one column of turns"),
}


def task(name: str) -> Task:
    """The task called ``name``, such as ``glue/sst2``. Raises :class:`ConfigError` for an unknown one."""
    if name not in _TASKS:
        hint = "".join(f" Did you mean {close!r}?" for close in difflib.get_close_matches(name, _TASKS, n=1))
        raise ConfigError(f"task = {name!r} is not one of {', '.join(_TASKS)}.{hint}")
    return _TASKS[name]


def metric(settings: Mapping[str, Any]) -> str:
    """The metric of a run with these flat ``settings``. Raises :class:`ConfigError` where the task has no such."""
    known, chosen = task(settings["task"]), settings.get("metric") or ""
    choices = (known.metric,) if known.regression else _METRICS[known.num_labels > 1]
    if chosen and chosen not in choices:
        fix = f"set it to {' or '.join(choices)}, or leave it empty"
        raise ConfigError(f"metric = {chosen!r} does not go with task = {known.name!r}: {fix}.")
    return chosen or known.metric


def declared(config: Config) -> Task:
    """The task of ``config`` by its keys alone; what only files can tell is still open.

    Raises :class:`ConfigError` where the keys do not go together.
    """
    known = task(config.task)
    texts, labels = _split(config.text_columns), _split(config.labels)
    by_class = known.own and known.num_labels > 1

    def need(holds: bool, key: str, value: str, problem: str) -> None:
        if value and not holds:
            raise ConfigError(f"{key} = {value!r} {problem}.")

    for key, value in (("text-columns", config.text_columns), ("label-column", config.label_column)):
        need(known.own, key, value, f"does not go with task = {known.name!r}, whose columns are known; leave it empty")
    need(known.own, "dataset", config.dataset, f"does not go with task = {known.name!r}; leave it empty")
    need(not known.language, "label-column", config.label_column, f"does not go with {known.name}; leave it empty")
    need(by_class, "labels", config.labels, f"does not go with task = {known.name!r}; leave it empty")
    need(len(set(labels)) == len(labels) > 1, "labels", config.labels, "must be two or more different names")
    if texts:
        low, high, what = _COUNTS[known.name]
        other = "; two texts are task = 'text-pair'" if known.name == "text-classification" else ""
        need(
            low <= len(set(texts)) == len(texts) <= high, "text-columns", config.text_columns, f"must be {what}{other}"
        )
    if known.language and config.partition.startswith("dirichlet") and not config.partition_column:
        raise ConfigError(
            f"partition = {config.partition!r} shares rows out by their labels and {known.name} has none: "
            "set partition-column to the column to go by, or partition = 'iid'."
        )
    return replace(
        known,
        columns=texts or known.columns,
        label=config.label_column or known.label,
        classes=labels or known.classes,
        num_labels=len(labels) or known.num_labels,
        metric=metric(config.to_dict()),
        group="" if config.partition == "iid" else config.partition_column,
        skip=config.bad_rows == "skip",
        dataset=config.dataset or _glue(known, config),
        rows=config.rows,
    )


def with_columns(open_task: Task, found: Sequence[str], source: str, words: Callable[[], Set[str]]) -> Task:
    """``open_task`` with its text columns and label, guessed where they are open.

    ``found`` are the columns of ``source``; ``words`` gives those whose cells are texts that are no numbers, and is
    only called where no name says enough. A guess is taken where it is the only one; else :class:`ConfigError` lists
    what was found and says what to set. Columns that are there twice and pandas' index are never guessed.
    """
    usable = [name for name in found if found.count(name) == 1 and not _INDEX.fullmatch(name)]

    def ask(key: str, example: str, why: str) -> ConfigError:
        return ConfigError(f"{source}: {why}; set {key}, for instance {key}='{example}'. {listed(found)}")

    label, columns = open_task.label, open_task.columns
    for key, wanted in (
        ("text-columns", columns),
        ("label-column", (label,)),
        ("partition-column", (open_task.group,)),
    ):
        for name in wanted:
            if name and name not in found:
                close = difflib.get_close_matches(name, usable, n=1) or usable or list(found)
                raise ask(
                    key, ",".join(close[0] if other == name else other for other in wanted), f"no column {name!r}"
                )
    if not label and not open_task.language:
        free = [name for name in usable if name not in columns]
        likely = [name for name in free if name.lower() in _LABELS]
        if not likely:
            known = {name for option in _GUESSES[open_task.name] for name in option}
            likely = [name for name in free if name.lower() not in known and name != open_task.group]
        if len(likely) != 1:
            why = f"the label may be {' or '.join(likely)}" if likely else "no column looks like the label"
            raise ask("label-column", (likely or usable or list(found))[-1], why)
        label = likely[0]
    if not columns:
        names = {name.lower(): name for name in usable if name != label}
        options = [set(option) for option in _GUESSES[open_task.name] if set(option) <= set(names)]
        whole = [
            tuple(names[name] for name in option)
            for option in _GUESSES[open_task.name]
            if set(option) in options and not any(set(option) < other for other in options)
        ]
        low, _, what = _COUNTS[open_task.name]
        if not whole and open_task.name != "instruction":  # there the order matters, so it is not guessed
            seen = words()
            texts = [name for name in usable if name in seen and name not in (label, open_task.group)]
            whole = [tuple(texts)] if len(texts) == low else []
        if len(whole) != 1:
            why = f"{open_task.name} needs {what}, and "
            why += f"{' or '.join(map(','.join, whole))} may be meant" if whole else "no column looks like it"
            low = 2 if open_task.name == "instruction" else low
            raise ask("text-columns", ",".join((whole or [tuple(usable or found)[:low]])[0]), why)
        columns = whole[0]
    return replace(open_task, columns=columns, label=label)


def listed(found: Sequence[str]) -> str:
    """The end of a message: the columns that there are."""
    more = f" and {len(found) - 30} more" if len(found) > 30 else ""
    return f"Columns found: {', '.join(found[:30]) or 'none'}{more}."


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Label names in the order of their ids: by value where all are numbers, else alphabetically."""
    values = {name: cells.value(name) for name in names}
    if None in values.values():
        return tuple(sorted(values))
    return tuple(sorted(values, key=lambda name: (values[name], name)))


def _glue(known: Task, config: Config) -> str:
    """The hub's configuration for a task of GLUE without files."""
    if config.data_dir or not known.name.startswith("glue/"):
        return ""
    return f"{GLUE}:{known.folder}" + (f"@{config.dataset_revision}" if config.dataset_revision else "")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
