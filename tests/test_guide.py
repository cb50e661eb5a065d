"""The guide is played: snippets run, keys exist, and its messages are those that the code can say, none left out."""

import ast
import importlib.metadata
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
import typer
from flwr.cli.app import app as flower
from flwr.common.config import parse_config_args
from flwr.proto.federation_config_pb2 import SimulationConfig
from helpers import ROOT, default_config, play
from test_families import build
from typer.testing import CliRunner

from fedkrso_app import cli, data
from fedkrso_app.config import resolved_path
from fedkrso_app.data import files, hub
from fedkrso_app.data.tasks import declared
from fedkrso_app.runs import compare
from fedkrso_app.strategies import parse

FENCED = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = {  # first word of a line -> why the test does not run it
    "pip": "needs a package index",
    "hf": "needs the hub",
    "tensorboard": "a server that does not end by itself",
}
FEDERATION = {field.replace("_", "-") for field in SimulationConfig.DESCRIPTOR.fields_by_name}
OTHERS = {"partition-id", "partitions", "num-partitions", "share-errors"}
OTHERS |= {"require", "min-cohort", "key", "peers", "max-epsilon"} | {
    "ssh-keygen",
    "flower-superlink",
    "flwr-simulation",
}  # a node's; programs


def asked(app: typer.Typer, name: str, arguments: Sequence[str]) -> dict:
    """What the real command line makes of ``arguments``; it raises where one is unknown or missing."""
    return typer.main.get_command(app).commands[name].make_context(name, list(arguments)).params


class Reader:
    """Does what a page says, line by line, on tiny models and data and with few steps."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.count, self.run = folders, 0, None

    def cut(self, settings: dict) -> dict:
        """``settings``, checked as they are, and then made small."""
        settings, self.count = default_config() | settings, self.count + 1
        task = declared(parse(settings))
        resumed = settings["resume"] and resolved_path(settings["resume"]).name
        small = {"local-steps": 2, "batch-size": 4, "fedkrso.interval": 1, "num-server-rounds": 2 if resumed else 1}
        small |= {"model": str(self.folders["decoder" if task.language else "encoder"])}
        small |= {"run-name": resumed or settings["run-name"] or f"run {self.count}"}
        if not task.own:
            small |= {"task": "glue/sst2", "data-dir": str(self.folders["glue"])}
        elif settings["dataset"] or not resolved_path(settings["data-dir"]).exists():
            small |= {"dataset" if settings["dataset"] else "data-dir": str(self.folders["own"])}
        return settings | small

    def flwr(self, name: str, *arguments: str) -> None:
        given = asked(flower, name, arguments)
        federation = parse_config_args(given["federation_config_overrides"])
        assert federation.keys() <= FEDERATION
        self.run = play(self.cut(parse_config_args(given["run_config_overrides"])), nodes=2)

    def fedkrso(self, name: str, *arguments: str) -> None:
        words = [str(self.run.path) if word == "RUN" else str(Path(word).expanduser()) for word in arguments]
        if name in ("plan", "compare"):
            given = compare.settings(None, asked(cli.app, name, words)["set_"])
            changed = {key: value for key, value in self.cut(given).items() if value != given[key]}
            words += [f"--set={key}={json.dumps(value)}" for key, value in changed.items()]
            words += ["--seeds=0", "--rates=1"] if name == "compare" else []
        result = CliRunner().invoke(cli.app, [name, *words])
        assert result.exit_code == 0, result.output

    def shell(self, text: str) -> None:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[0] in ("flwr", "fedkrso"):
                getattr(self, words[0])(*words[1:])
                continue
            assert words[0] in NOT_RUN and shutil.which(words[0]), f"who runs this? {line}"
            if words[0] == "pip":  # a file that is there, or a package that was installed
                assert (ROOT / words[-1]).is_file() if "-r" in words else importlib.metadata.version(words[-1])

    def python(self, text: str) -> None:
        exec(compile(text, "snippet", "exec"), {})

    def json(self, text: str) -> None:
        """What a line of metrics.jsonl is said to hold, or its part about each client: the keys of a real one."""
        shown, line = json.loads(text), self.run.metrics()[-1]
        real = line if "round" in shown else line["per_client"]
        keys = [{k: set(v) if isinstance(v, dict) else () for k, v in told.items()} for told in (shown, real)]
        assert keys[0] == keys[1]


@pytest.mark.parametrize("page", ["guide", "data", "results-of-a-run"])
def test_every_snippet_does_what_it_says(page, model_folder, data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compare, "_play", lambda config, clients, engine: (play(config, nodes=2) for _ in "1"))
    for cached in (data.load, data.resolve, hub.splits, files.warn):
        cached.cache_clear()
    own, rows = tmp_path / "own", [f"w{i} w{i + 1},{'neg' if i % 2 else 'pos'},w{i},w{i + 1}\n" for i in range(30)]
    own.mkdir()
    (own / "train.csv").write_text("text,label,question,answer\n" + "".join(rows))
    decoder = build(tmp_path / "decoder", model_folder, "gpt2", True)
    reader = Reader({"encoder": model_folder, "decoder": decoder, "glue": data_folder, "own": own})
    for language, text in FENCED.findall((ROOT / "docs" / f"{page}.md").read_text()):
        {"": reader.shell, "python": reader.python, "json": reader.json}[language](text)


def said(calls: tuple[str, ...] = ()) -> set[str]:
    """Every text in the package, or only the first argument of ``calls``; NUL where a value is put in."""
    texts = set()
    for file in (ROOT / "fedkrso_app").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        if calls:
            nodes = [n.args[0] for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) in calls]
        for node in nodes:
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            values = [part.value if isinstance(part, ast.Constant) else "\0" for part in parts]
            if id(node) not in documentation and all(isinstance(value, str) for value in values):
                texts.add("".join(values))
    return texts


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda page: page.stem
)
def test_every_key_that_a_page_names_exists(page):
    keys, text = set(default_config()), page.read_text()
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    named = set(re.findall(r"--set (\S+?)=", text))
    for span in [*spans, *re.findall(r'--run-config "([^"]+)"', text)]:
        named |= set(re.findall(r"(?<![\w.'\"-])([a-z][a-z.-]*) ?= ?[\"'\d~tf]", span))
    assert named <= keys | FEDERATION | OTHERS
    words = {
        span for span in spans if re.fullmatch(r"[a-z]+(-[a-z]+)+|(fedkrso|fedfft|lora|ffa-lora|fedsrd)\.\S+", span)
    }
    assert words <= keys | FEDERATION | OTHERS | said()  # the last: a value that the code knows


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]), ids=lambda page: page.stem)
def test_every_link_to_a_file_leads_to_one_and_to_a_heading_in_it(page):
    for target in re.findall(r"\]\(([^)\s:]+)\)", FENCED.sub("", page.read_text())):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCED.sub("", file.read_text()), re.MULTILINE)
            names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in names or f'<a id="{anchor}">' in file.read_text(), target


def test_the_messages_of_the_guide_are_those_of_the_code():
    last = (ROOT / "docs" / "guide.md").read_text().split("\n## 10.")[1]
    quoted = [
        quote for row in re.findall(r"^\| (`.*?) \| ", last, re.MULTILINE) for quote in re.findall(r"`(.+?)`", row)
    ]
    wanted = {quote: re.compile(".*".join(map(re.escape, quote.split("…"))), re.DOTALL) for quote in quoted}
    texts = said()
    assert not [quote for quote, pattern in wanted.items() if not any(map(pattern.search, texts))]
    raised = [text for text in said(("ConfigError", "LedgerError", "TrainingError")) if re.search("[a-z]", text)]
    assert not [text for text in raised if not any(pattern.search(text) for pattern in wanted.values())]
