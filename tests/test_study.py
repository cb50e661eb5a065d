"""Studies: arms paired over draws, a journal that grows in slices and mixes nothing, intervals by another route."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from rich.console import Console
from test_compare import flwr, started  # noqa: F401  # a fixture
from test_report import Page
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.config import ConfigError
from fedkrso_app.runs import compare, journal, paired, study, tables
from fedkrso_app.runs.journal import Journal

CURVE = [[0, 0.1, 0, 0], [1, 0.2, 1, 2], [2, 0.4, 1, 2], [3, 0.6, 1, 2], [4, 0.8, 1, 2]]  # 3 bytes per round
STUDY = """
clients = 4
draws = 3
[settings]
num-server-rounds = 2
local-steps = 20
[[cases]]
task = ["embedded/similarity", "embedded/acceptability"]
partition = "iid"
[[cases]]
task = "embedded/similarity"
partition = ["dirichlet", "dirichlet-equal"]
dirichlet-alpha = [0.5, 0.25]
[arms.ten]
strategy = "fedkrso"
fedkrso.learning-rate = 1e-3
[arms."one seed"]
strategy = "fedkrso"
fedkrso = { num-seeds = 1, learning-rate = 2e-3 }
"""


def test_the_interval_is_students():
    assert paired.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert paired.interval([0.3]) == (0.3, None, None)


def test_of_many_intervals_nineteen_in_twenty_hold_the_mean():
    samples = np.random.default_rng(0).normal(0.7, 2.0, (1000, 4))
    ends = [paired.interval(list(sample))[1:] for sample in samples]
    assert 0.93 < np.mean([low < 0.7 < high for low, high in ends]) < 0.97  # three standard errors


@pytest.mark.parametrize("within, expected", [(float("inf"), 0.6), (12, 0.6), (11, 0.4), (3, 0.2), (2.9, 0.1)], ids=str)
def test_a_score_is_the_mean_of_the_last_three_rounds_within_the_bytes(within, expected):
    assert paired.score(CURVE, within) == pytest.approx(expected)


def test_differences_are_over_the_draws_that_both_arms_have_and_bytes_are_those_of_the_cheaper():
    """b spends twice as many bytes in each round, so that half of its rounds fit into a's 12."""
    dear = [[n, metric + 0.05, 2 * up, 2 * down] for n, metric, up, down in CURVE]
    steps, by_bytes = paired.differences({"a": {0: CURVE, 1: CURVE, 7: CURVE}, "b": {1: dear, 0: dear, 2: dear}})
    assert (steps["draws"], by_bytes["draws"]) == (2, 2)
    assert steps["mean"] == pytest.approx(-0.05) and steps["low"] == pytest.approx(-0.05)
    assert by_bytes["mean"] == pytest.approx(0.6 - 0.35) and by_bytes["mb"] == 12e-6


def test_fiellers_interval_holds_the_ratio_and_is_that_of_the_mean_for_a_constant_distance():
    rng = np.random.default_rng(0)
    x = rng.normal(0.4, 0.1, 6)
    _, low, high = paired.interval(list(x))
    assert paired.fieller(x, np.full(6, 0.5)) == pytest.approx((low / 0.5, high / 0.5))
    held = []
    for _ in range(1000):
        y = rng.normal(0.5, 0.1, 5)
        low, high = paired.fieller(0.8 * y + rng.normal(0, 0.05, 5), y)
        held.append(low is not None and low < 0.8 < high)
    assert 0.93 < np.mean(held) < 0.97
    assert paired.fieller(x, np.array([1, -1, 1, -1, 0.1, -0.2])) == (None, None)


def test_the_share_of_the_distance_is_over_the_draws_of_all_three():
    low, high = ([[n, metric + shift, up, down] for n, metric, up, down in CURVE] for shift in (0.0, 0.4))
    mid = [[n, metric + 0.3, up, down] for n, metric, up, down in CURVE]
    (row,) = paired.kept(
        {"low": {0: low, 1: low}, "mid": {1: mid, 0: mid, 2: mid}, "high": {0: high, 1: high}}, "low", "high"
    )
    assert row == {"arm": "mid", "share": pytest.approx(0.75), "from": None, "to": None, "draws": 2}


# --- the file of a study ---


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "mine.toml").write_text(STUDY)
    return tmp_path / "mine.toml"


def test_lists_are_multiplied_into_cases_with_names(file):
    found = study.load(file, ["batch-size=3"])
    assert list(found.cases) == [
        "embedded/similarity iid",
        "embedded/acceptability iid",
        *(
            f"embedded/similarity {scheme} {alpha}"
            for scheme in ("dirichlet", "dirichlet-equal")
            for alpha in (0.5, 0.25)
        ),
    ]
    assert found.draws == (0, 1, 2) and found.clients == 4
    config = found.settings("embedded/similarity dirichlet-equal 0.25", "one seed")
    assert (config["dirichlet-alpha"], config["fedkrso.num-seeds"], config["batch-size"]) == (0.25, 1, 3)
    assert found.settings("embedded/acceptability iid", "ten")["fedkrso.num-seeds"] == 10


@pytest.mark.parametrize(
    "change, said",
    [
        (("draws = 3", "drawz = 3"), "Did you mean 'draws'"),
        (("draws = 3", "draws = [0, 0.5]"), "neither a count nor a list"),
        (("draws = 3", 'span = ["ten", "two"]'), "does not name two arms; they are ten, one seed"),
        (("draws = 3", "energy = 1"), "energy = 1 is impossible"),
        (("clients = 4", "clients = 2.5"), "clients = 2.5"),
        (("draws = 3", "draws = []"), "neither a count nor a list"),
        (("draws = 3", 'vary = "seeds"'), "vary = 'seeds'"),
        (("num-seeds = 1", "num-seed = 1"), "fedkrso.num-seeds"),
        (("clients = 4", "rates = 2"), "leave out holdout"),
        (("clients = 4", "clients = "), "cannot be read"),
    ],
)
def test_a_wrong_study_is_refused_by_name_before_anything_runs(flwr, file, change, said):  # noqa: F811
    file.write_text(STUDY.replace(*change))
    options = ["--output", str(file.parent / "out"), *(["--set", "holdout=0.1"] if "rates" in change[1] else [])]
    result = CliRunner().invoke(cli.app, ["compare", str(file), *options])
    assert result.exit_code == 2 and said in result.stderr and not flwr()


def test_options_that_the_file_decides_are_refused(file):
    result = CliRunner().invoke(cli.app, ["compare", str(file), "--seeds", "0", "--sweep"])
    assert result.exit_code == 2 and "--seeds, --sweep" in result.stderr


@pytest.mark.parametrize("text", ["fedkrso", "one: fedkrso.rank=4", ": fedkrso", "a: fedkrso, rank 4"])
def test_an_arm_that_cannot_be_read_is_refused(text):
    with pytest.raises(ConfigError, match="--arm"):
        study.arm(text)


# --- runs ---


def test_arms_are_paired_over_the_draws(flwr, tmp_path):  # noqa: F811
    """The false engine's metric is 0.5 + seed/10 - |rate - best|: the arms differ by 0.002 in every draw."""
    flwr(best=1e-3)
    options = ["compare", "--output", str(tmp_path / "out"), "--seeds", "0,4", "--set", "local-steps=20"]
    options += ["--set", "num-server-rounds=4", "--vary", "partition-seed", "--set", "seed=2"]
    options += ["--arm", "slow: fedkrso, fedkrso.learning-rate=1e-3", "--arm", "one seed: fedkrso, fedkrso.num-seeds=1"]
    options += ["--set", "fedkrso.learning-rate=3e-3"]
    result = CliRunner().invoke(cli.app, [*options, "--json"])
    configs = started(flwr)
    assert [(c["run-name"], c["seed"], c["partition-seed"], c["fedkrso"]["num-seeds"]) for c in configs] == [
        ("slow-iid-draw0", 2, 0, 10),
        ("one-seed-iid-draw0", 2, 0, 1),
        ("slow-iid-draw4", 2, 4, 10),
        ("one-seed-iid-draw4", 2, 4, 1),
    ]
    facts = json.loads(result.stdout)
    for row in facts["pairs"]:
        assert (row["a"], row["b"], row["draws"]) == ("slow", "one seed", 2)
        assert row["mean"] == pytest.approx(0.002) and row["low"] == pytest.approx(0.002)
    printed = CliRunner().invoke(cli.app, options)
    assert "slow - one seed" in printed.stdout and "+0.0020" in printed.stdout


def test_two_arms_that_would_share_a_folder_are_refused(flwr, tmp_path):  # noqa: F811
    options = ["compare", "--output", str(tmp_path / "out"), "--arm", "a b: fedkrso", "--arm", "a-b: fedfft"]
    assert "give one another name" in CliRunner().invoke(cli.app, options).stderr


def test_a_study_grows_in_slices_on_any_machine_and_makes_no_run_twice(flwr, file):  # noqa: F811
    """The second slice has no folder of the first one, only its journal; the third finds nothing to do."""
    flwr(hang="ten-embedded-similarity-iid-seed1")
    slices = [["compare", str(file), "--output", str(file.parent / name), "--minutes", "0.05"] for name in "ab"]
    first = CliRunner().invoke(cli.app, slices[0])
    assert first.exit_code == 0 and "Out of time" in first.stderr
    assert flwr()[-1] == ["stop", "77"]
    before, lines = len(started(flwr)), (file.parent / "mine" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4  # two arms' settings, and of each one run
    assert [path.name for path in (file.parent / "a").glob("*seed*/")] == ["ten-embedded-similarity-iid-seed1"]
    flwr()
    shutil.rmtree(file.parent / "a")
    assert CliRunner().invoke(cli.app, [*slices[1][:-1], "9"]).exit_code == 0
    assert len(started(flwr)) == before + 6 * 2 * 3 - 2
    assert CliRunner().invoke(cli.app, [*slices[0][:-1], "9"]).exit_code == 0
    assert len(started(flwr)) == before + 6 * 2 * 3 - 2
    run = json.loads((file.parent / "mine" / "results.jsonl").read_text().splitlines()[1])
    assert {"device", "versions", "commit", "digest"} <= run.keys() and len(run["rounds"]) == 3
    assert run["rounds"][1][2:] == [10**6, 2 * 10**6]  # per client that was asked


def test_a_sweep_is_done_once_and_its_choice_holds_for_every_draw(flwr, file, tmp_path):  # noqa: F811
    head = "draws = 2\nrates = 2\nsweep-draws = [8, 9]\nsettings = { local-steps = 20, num-server-rounds = 2 }\n"
    file.write_text(head + STUDY[STUDY.index("[arms.ten]") : STUDY.index('[arms."one')])
    flwr(best=2e-3)
    for _ in range(2):
        CliRunner().invoke(cli.app, ["compare", str(file), "--output", str(tmp_path / "out")])
    configs = started(flwr)
    assert len(configs) == 2 * 2 + 2
    tried, made = ([c for c in configs if bool(c["holdout"]) == swept] for swept in (True, False))
    assert {c["seed"] for c in tried} == {8, 9} and {c["seed"] for c in made} == {0, 1}
    assert {c["fedkrso"]["learning-rate"] for c in made} == {2e-3}


def test_runs_at_another_rate_are_kept_and_not_counted(flwr, tmp_path):  # noqa: F811
    options = ["compare", "--output", str(tmp_path / "out"), "--strategies", "fedkrso", "--seeds", "0", "--json"]
    options += ["--set", "local-steps=20", "--set", "num-server-rounds=2"]
    CliRunner().invoke(cli.app, [*options, "--set", "fedkrso.learning-rate=1e-3"])
    shutil.rmtree(tmp_path / "out" / "fedkrso-iid-seed0")
    result = CliRunner().invoke(cli.app, [*options, "--set", "fedkrso.learning-rate=2e-3"])
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["learning_rate"], row["draws"]) == (2e-3, 1) and "1 runs of arm 'fedkrso'" in result.stderr
    report = tmp_path / "out" / "results.jsonl"
    assert CliRunner().invoke(cli.app, ["report", str(report)]).exit_code == 0
    assert "1 runs are not counted" in report.with_name("report.html").read_text()


# --- the journal ---


def entry(arm="a", model="m", **config) -> tuple[dict, dict]:
    settings = {"case": "c", "arm": arm, "task": "glue/sst2", "metric": "accuracy", "config": {"rank": 4} | config}
    return settings, {"draw": 0, "rate": 0.1, "sweep": False, "rounds": CURVE, "model": model}


@pytest.fixture
def written(tmp_path) -> Path:
    book = Journal(tmp_path / "results.jsonl")
    book.lock()
    book.add(*entry("a"))
    book.add(*entry("b"))
    book.close()
    return book.file


def test_a_journal_is_read_as_it_was_written(written):
    (line,) = Journal(written).find("c", "b")
    assert line.items() >= entry("b")[1].items()


@pytest.mark.parametrize("kept", [1, 20, -1], ids=["one byte", "some", "all but the line's end"])
def test_a_last_line_that_was_cut_short_is_dropped_and_said(written, kept):
    whole = written.read_bytes()
    *rest, last = whole.splitlines(keepends=True)
    written.write_bytes(b"".join(rest) + last[:kept])
    book = Journal(written)
    assert "cut short" in book.notes[0] and not book.find("c", "b")
    book.lock()
    book.add(*entry("b"))
    book.close()
    assert written.read_bytes() == whole


@pytest.mark.parametrize("line", ["{", '{"run": "unknown", "rounds": [[0, 1, 0, 0]]}', "[]"])
def test_a_damaged_line_in_the_middle_is_refused_by_number(written, line):
    first, *rest = written.read_text().splitlines()
    written.write_text("\n".join([first, line, *rest, ""]))
    with pytest.raises(ConfigError, match="line 2"):
        Journal(written)


def test_lines_of_other_settings_are_refused_and_those_of_other_arms_left_out_with_a_note(written):
    defaults = {"rank": 1, "new": 0}
    with pytest.raises(ConfigError, match=r"arm 'a' .* rank = 4, now it is 8"):
        Journal(written).expect([("c", "a", {"rank": 8}, defaults), ("c", "b", {"rank": 4}, defaults)])
    book = Journal(written)
    book.expect([("c", "a", {"rank": 4, "new": 0}, defaults)])  # a key that is newer than the line, at its default
    assert "1 runs of arm 'b'" in book.notes[0]
    with pytest.raises(ConfigError, match=r"new = 0, now it is 1"):
        book.expect([("c", "a", {"rank": 4, "new": 1}, defaults)])


def test_another_model_in_the_same_case_is_refused_and_leaves_the_file_as_it_was(written):
    book, before = Journal(written), written.read_bytes()
    book.lock()
    with pytest.raises(ConfigError, match="another model"):
        book.add(*entry("a", model="other"))
    book.close()
    assert written.read_bytes() == before


def test_two_comparisons_do_not_write_at_once(written):
    book, other = Journal(written), Journal(written)
    book.lock()
    with pytest.raises(ConfigError, match="another comparison"):
        other.lock()
    book.close()


def test_what_defines_a_run_is_its_method_and_neither_its_machine_nor_its_draw(run_config):
    base = journal.defining(run_config, 3, "seed")
    for change in (
        {"seed": 9},
        {"data-dir": "/x"},
        {"device": "cuda"},
        {"fedkrso.learning-rate": 7.0},
        {"lora.rank": 9},
    ):
        assert journal.defining(run_config | change, 3, "seed") == base
    for change in ({"fedkrso.rank": 9}, {"local-steps": 9}, {"partition-seed": 9}, {"server.optimizer": "fedadam"}):
        assert journal.defining(run_config | change, 3, "seed") != base
    assert journal.defining(run_config, 4, "seed") != base != journal.defining(run_config, 3, "partition-seed")


def test_a_real_run_leaves_its_digest_model_and_bytes(run_config, tmp_path):
    changes = {"num-server-rounds": 2, "output-dir": str(tmp_path)}
    made = compare.Comparison(
        study.Study(run_config | changes, {"c": {}}, {"a": {"strategy": "fedkrso"}}, (0,), clients=3, energy=True),
        tmp_path / "out",
        "process",
    )
    assert not made.make(Console(quiet=True))
    made.close()
    (line,) = Journal(tmp_path / "out" / "results.jsonl").find("c", "a")
    run = made._job("c", "a", 0).run
    assert line["digest"] and run.digest.startswith(line["digest"])
    assert [row[0] for row in line["rounds"]] == [0, 1, 2]
    assert [row[0] for row in line["energy"]] == [1, 2] and all(0 < share < 1 for _, share, _ in line["energy"])
    total = sum(figures["uplink_bytes"] for figures in run.metrics()) / 3
    assert sum(row[2] for row in line["rounds"]) == pytest.approx(total, abs=2)


# --- what the repository holds ---

STUDIES = [path for path in sorted((ROOT / "experiments").glob("*.toml")) if "[arms." in path.read_text()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_can_be_made_and_its_journal_is_its_own(path):
    found, defaults = study.load(path, []), study.settings(None, [])
    book = Journal(path.with_suffix("") / "results.jsonl")
    configs = {pair: journal.defining(found.settings(*pair), found.clients, found.vary) for pair in found.pairs()}
    book.expect((*pair, config, defaults) for pair, config in configs.items())
    assert not book.notes


# --- the page ---


def test_the_page_of_a_journal_shows_every_arm_every_difference_and_no_run_of_a_sweep(tmp_path):
    book = Journal(tmp_path / "mine" / "results.jsonl")
    book.lock()
    about = {"device": "a CPU", "versions": {"torch": "2"}, "commit": "c0ffee"}
    for arm, shift in (("first <b>", 0.0), ("second $x$", 0.1), ("third", 0.2)):
        for draw in range(3):
            rounds = [[n, metric + shift + draw * shift, up, down] for n, metric, up, down in CURVE]
            settings, run = entry(arm)
            energy = {"energy": [[1, 0.1, 4], [2, 0.2, 4]]} if arm == "third" else {}
            book.add(settings, run | about | energy | {"draw": draw, "rounds": rounds})
        book.add(settings, run | about | {"draw": 9, "sweep": True, "rate": 77.0})
    book.close()
    assert CliRunner().invoke(cli.app, ["report", str(book.file)]).exit_code == 0
    shown = Page(book.file.with_name("report.html").read_text())
    assert not shown.open and {"first <b>", "second $x$", "third"} <= set(shown.texts)
    cells = [text for text in shown.texts if "[" in text and "]" in text and "%" not in text]
    assert len(cells) == 2 * 3 and "77" not in shown.texts  # pairs × views
    mean, low, high = paired.interval([0.1, 0.2, 0.3])  # second minus first, by hand: 0.1 · (1 + draw)
    assert f"{-mean:+.4f} [{-high:+.4f}, {-low:+.4f}]" in " ".join(cells)
    assert len([tag for tag in shown.tags if tag == "img"]) == 4  # the last one is the third arm's energy


def test_a_journal_with_sweeps_alone_has_no_page(tmp_path):
    book = Journal(tmp_path / "results.jsonl")
    book.lock()
    settings, run = entry()
    book.add(settings, run | {"sweep": True})
    book.close()
    result = CliRunner().invoke(cli.app, ["report", str(book.file)])
    assert result.exit_code == 2 and "has no finished run yet" in result.stderr


def test_of_many_arms_the_differences_to_the_first_are_shown():
    def facts(count: int) -> dict:
        arms = [f"arm{i}" for i in range(count)]
        row = {"case": "c", "mean": 0.1, "low": None, "high": None, "draws": 1, "mb": 1.0}
        pairs = [row | {"a": a, "b": b, "view": v} for a, b in combinations(arms, 2) for v in ("steps", "bytes")]
        return {"rows": [{"arm": arm} for arm in arms], "pairs": pairs}

    assert tables.pairs(facts(6)).row_count == 15
    assert tables.pairs(facts(7)).row_count == 6 and "all are in results.json" in tables.pairs(facts(7)).caption
