"""What a comparison compares: arms (settings by name) in cases (tasks and partitions), over the same draws."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedkrso_app.config import ConfigError, choice, flatten, need, resolved_path
from fedkrso_app.runs.engines import APP
from fedkrso_app.strategies import STRATEGIES, parse

Settings = dict[str, Any]  # a flat run config, or what one changes

FACTOR = 2.0  # from one learning rate of a sweep to the next
_KEYS = ("clients", "draws", "vary", "rates", "sweep-draws", "energy", "span", "settings", "cases", "arms")


@dataclass(frozen=True)
class Study:
    """``cases`` and ``arms`` hold what each changes in ``base``, a run config with every key, by name.

    Draw d sets the key ``vary`` to d: ``seed``, which draws everything, the partition too unless ``partition-seed`` is
    set; or ``partition-seed``, which draws the partition alone. ``rates`` above 0 asks for a sweep: as many learning
    rates for every arm in every case, judged on ``sweep_draws``. ``energy`` asks for the share of the gradient that
    each round could move in, which takes a replay of each run. ``span`` names two arms: of the others is
    reported which share of the distance from the first to the second they cover. Raises :class:`ConfigError` for
    settings that cannot be.
    """

    base: Settings
    cases: dict[str, Settings]
    arms: dict[str, Settings]
    draws: tuple[int, ...]
    vary: str = "seed"
    clients: int = 10
    rates: int = 0
    sweep_draws: tuple[int, ...] = (0,)
    energy: bool = False
    span: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.arms and self.cases and self.draws) or self.base["evaluate"] == "off":
            raise ConfigError(
                "a comparison needs a method, a partition and a seed at least, and evaluate = 'server' or 'clients'."
            )
        choice("vary", self.vary, ["seed", "partition-seed"])
        for key, value, least in (("clients", self.clients, 1), ("rates", self.rates, 0)):
            need(type(value) is int and value >= least, key, value, f"a whole number of at least {least}")
        need(isinstance(self.energy, bool), "energy", self.energy, "true or false")
        if self.span and (len(self.span) != 2 or not {*self.span} <= self.arms.keys()):
            raise ConfigError(f"span = {list(self.span)} does not name two arms; they are {', '.join(self.arms)}.")
        if self.rates and self.base["holdout"]:
            raise ConfigError("a sweep holds training rows back by itself: leave out holdout, or --sweep.")
        for case, arm in self.pairs():
            self.settings(case, arm)

    def pairs(self) -> list[tuple[str, str]]:
        """(case, arm), all arms of a case one after another."""
        return list(product(self.cases, self.arms))

    def settings(self, case: str, arm: str, **changes: Any) -> Settings:
        """The run config of an arm in a case, checked."""
        return parse(self.base | self.cases[case] | self.arms[arm] | changes).to_dict()


def settings(file: Path | None, assignments: Sequence[str]) -> Settings:
    """pyproject.toml's defaults, changed by the TOML ``file`` and then by ``key=value``; not checked yet.

    Raises ConfigError where something cannot be read.
    """
    return _settings(flatten(_read(file)) if file else {}, assignments)


def load(file: Path, assignments: Sequence[str]) -> Study:
    """The study that the TOML ``file`` describes, its ``[settings]`` changed by ``key=value``.

    ``cases`` is a list of tables, or tables by name. A list as a value, ``task = ["glue/mrpc", "glue/sst2"]``, makes a
    case of each value, and of two lists one of each pair; such a case is named after its values. ``arms`` are tables by
    name. Raises ConfigError where something cannot be read, or a key is unknown.
    """
    tables = _read(file)
    for key in tables:
        choice(f"{file}: key", key, _KEYS)
    base = _settings(flatten(tables.get("settings", {})), assignments)
    named: Any = tables.get("cases", [{}])
    listed = named.items() if isinstance(named, dict) else [("", table) for table in named]
    cases = {name: changes for prefix, table in listed for name, changes in _cases(prefix, flatten(table), base)}
    arms = {name: flatten(table) for name, table in tables.get("arms", {}).items()}
    more = {key.replace("-", "_"): tables[key] for key in ("vary", "clients", "rates", "energy") if key in tables}
    draws, tried = _numbers(file, tables, "draws", 10), _numbers(file, tables, "sweep-draws", [0])
    return Study(base, cases, arms, draws, sweep_draws=tried, span=tuple(tables.get("span", ())), **more)


def arm(text: str) -> tuple[str, Settings]:
    """``"name: strategy, key=value, ..."`` as a name and what the arm changes."""
    name, colon, rest = text.partition(":")
    strategy, *assignments = [part.strip() for part in rest.split(",")]
    if not (colon and name.strip() and strategy) or "=" in strategy:
        raise ConfigError(f"--arm {text!r} is not 'name: strategy, key=value, ...'.")
    return name.strip(), {"strategy": strategy} | dict(_assigned(part, "--arm") for part in assignments)


def rate_of(config: Mapping[str, Any]) -> float:
    """The learning rate of the config's own method."""
    return config[STRATEGIES[config["strategy"]].learning_rate_key]


def grid(rate: float, count: int) -> list[float]:
    """``count`` rates, each twice the one before, ``rate`` in their middle or just below it."""
    return [float(f"{rate * FACTOR ** (i - (count - 1) // 2):.6g}") for i in range(count)]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the settings cannot be read: {file}: {error}.") from None


def _settings(changes: Settings, assignments: Sequence[str]) -> Settings:
    try:
        flat = flatten(_read(APP / "pyproject.toml")["tool"]["flwr"]["app"]["config"])
    except KeyError as error:
        raise ConfigError(f"the settings cannot be read: {APP / 'pyproject.toml'} has no {error}.") from None
    flat |= changes | dict(_assigned(text, "--set") for text in assignments)
    for key in ("model", "data-dir"):  # Flower's engine runs in a folder of its own
        if flat[key] and Path(str(flat[key])).expanduser().exists():
            flat[key] = str(resolved_path(str(flat[key])))
    return flat


def _assigned(text: str, option: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{option} {text!r} is not key=value.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value  # a string without quotes


def _cases(prefix: str, table: Settings, base: Settings) -> list[tuple[str, Settings]]:
    """What a table of cases stands for: name -> changes."""
    lists = {key: value for key, value in table.items() if isinstance(value, list)}
    found = []
    for values in product(*lists.values()):
        changes = table | dict(zip(lists, values, strict=True))
        shown = [prefix] if prefix else []
        shown += [str(value) for key, value in changes.items() if key in lists or not prefix]
        found.append((" ".join(shown) or f"{base['task']} {base['partition']}", changes))
    return found


def _numbers(file: Path, tables: Settings, key: str, default: Any) -> tuple[int, ...]:
    """A count, 10 for 0 to 9, or a list of whole numbers."""
    value = tables.get(key, default)
    numbers = list(range(value)) if isinstance(value, int) else value
    if not isinstance(numbers, list) or not numbers or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ConfigError(f"{file}: {key} = {value!r} is neither a count nor a list of whole numbers.")
    return tuple(numbers)
