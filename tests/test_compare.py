"""The comparison: what it starts, keeps, resumes and refuses, how it judges, and its table against a hand computation.

``flwr`` is played by a script that writes a run's folder as the real one would, and says what it was asked.
"""

import csv
import json
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import digest, play
from typer.testing import CliRunner

from fedkrso_app import cli
from fedkrso_app.config import ConfigError
from fedkrso_app.runs import compare, engines, study
from fedkrso_app.runs.folder import Run

FLWR = """#!{python}
import json, pathlib, shutil, sys, time, tomllib
calls = pathlib.Path({calls!r})
said = sys.argv[1:]
if said[0] == "run":  # a comparison may delete the file of settings
    said[said.index("--run-config") + 1] = shutil.copy(said[-1], f"{{calls}}-{{len(calls.read_text())}}")
with calls.open("a") as file:
    file.write(json.dumps(said) + "\\n")
if sys.argv[1] == "stop":
    sys.exit()
print("Successfully started run 77", flush=True)
config = {{}}
for key, value in tomllib.loads(pathlib.Path(sys.argv[sys.argv.index("--run-config") + 1]).read_text()).items():
    config |= {{f"{{key}}.{{k}}": v for k, v in value.items()}} if isinstance(value, dict) else {{key: value}}
folder = pathlib.Path(config["resume"] or pathlib.Path(config["output-dir"]) / config["run-name"])
plan = json.loads(calls.with_name("plan.json").read_text())
if plan.get("silent") == folder.name:
    print("\\x1b[92mERROR \\x1b[0m:  The run cannot start: no such <data>")
    sys.exit()
folder.mkdir(exist_ok=True)
if not (folder / "config.json").exists():
    facts = {{"config": config | {{"resume": ""}}, "libraries": {{}}, "model_digest": ""}}
    (folder / "config.json").write_text(json.dumps(facts))
(folder / "status").write_text("running")
if plan.get("hang") == folder.name:
    time.sleep(60)
rate = config["fedkrso.learning-rate"]
lines = []
for round in range(config["num-server-rounds"] + 1):
    metric = 0.5 + config["seed"] / 10 - abs(rate - plan.get("best", rate)) if round else 0.0
    metric = plan.get("curves", {{}}).get(f"{{rate:g}}", {{}}).get(str(round), metric)
    lines.append(dict(round=round, version=round, metric=metric, eval_loss=1.0, train_loss=1.0,
        uplink_bytes=4000000 * bool(round), downlink_bytes=8000000 * bool(round), paper_bytes=16000000 * bool(round),
        clients=3, refused=1, failed=0, partitions=[0, 1, 2], seconds=2.0 + config["seed"], client_seconds=1.0,
        client_peak_bytes=10**9))
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(folder / "status").write_text("failed: OSError: disk full" if plan.get("fail") == folder.name else "completed")
"""


@pytest.fixture
def flwr(tmp_path, monkeypatch):
    """Set what the false ``flwr`` does by ``flwr(hang=..., fail=..., silent=..., best=...)``; returns its calls."""
    calls, script = tmp_path / "calls", tmp_path / "flwr"
    calls.write_text("")
    script.write_text(FLWR.format(python=sys.executable, calls=str(calls)))
    script.chmod(0o755)
    monkeypatch.setattr(engines, "FLWR", script)

    def act(**plan) -> list[list[str]]:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        return [json.loads(line) for line in calls.read_text().splitlines()]

    act()
    return act


@pytest.fixture
def command(tmp_path):
    """Run ``fedkrso compare`` with the output folder set."""

    def run(*options):
        base = ["compare", "--strategies", "fedkrso", "--output", str(tmp_path / "out")]
        for assignment in ("num-server-rounds=4", "local-steps=20", "fedkrso.learning-rate=0.001"):
            base += ["--set", assignment]
        return CliRunner().invoke(cli.app, [*base, *options])

    return run


def started(flwr) -> list[dict]:
    """The run configs with which runs were started, in order."""
    files = [call[call.index("--run-config") + 1] for call in flwr() if call[0] == "run"]
    return [tomllib.loads(Path(file).read_text()) for file in files]


def test_every_method_partition_and_seed_is_run_once_with_only_that_changed(flwr, command):
    assert command("--partitions", "iid,dirichlet", "--seeds", "0,3", "--clients", "5").exit_code == 0
    configs = started(flwr)
    assert [(c["partition"], c["seed"], c["run-name"]) for c in configs] == [
        ("iid", 0, "fedkrso-iid-seed0"),
        ("iid", 3, "fedkrso-iid-seed3"),
        ("dirichlet", 0, "fedkrso-dirichlet-seed0"),
        ("dirichlet", 3, "fedkrso-dirichlet-seed3"),
    ]
    rest = [{k: v for k, v in c.items() if k not in ("partition", "seed", "run-name")} for c in configs]
    assert rest[0] == rest[1] == rest[2] == rest[3]
    call = flwr()[0]
    assert call[:3] == ["run", str(engines.APP), "--stream"] and "num-supernodes=5 client-resources-num-cpus=1" in call


def test_the_table_equals_a_hand_computation(flwr, command, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/fedkrso", "compare", "--seeds", "0,1,2"])
    result = command("--seeds", "0,1,2", "--json")
    facts = json.loads(result.stdout)
    (row,) = facts["rows"]
    assert row["metric"] == pytest.approx(0.6) and row["metric_sd"] == pytest.approx(0.1)  # 0.5, 0.6, 0.7
    assert (row["uplink_mb"], row["downlink_mb"], row["paper_mb"]) == (1, 2, 4)  # 4 clients were asked each round
    assert row["seconds_per_round"] == 3 and row["client_peak_mb"] == 1000 and row["draws"] == 3
    assert row["learning_rate"] == 1e-3 and facts["command"] == "fedkrso compare --seeds 0,1,2"
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == facts
    (line,) = csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines())
    assert float(line["metric_sd"]) == row["metric_sd"]
    printed = command("--seeds", "0,1,2").stdout
    assert "0.6000" in printed and "0.1000" in printed and "Made by: fedkrso" in printed


def test_complete_runs_are_kept(flwr, command):
    command("--seeds", "0")
    command("--seeds", "0,1")
    command("--seeds", "0,1", "--set", "tracker=tensorboard")  # which has no part in what comes out
    assert [c["seed"] for c in started(flwr)] == [0, 1]


def test_an_interrupted_run_is_stopped_and_resumed(flwr, command, tmp_path):
    command("--seeds", "0")
    (tmp_path / "out" / "fedkrso-iid-seed0" / "status").write_text("running\n")
    (tmp_path / "out" / "results.jsonl").unlink()
    assert command("--seeds", "0").exit_code == 0
    assert flwr()[1] == ["stop", "77"]
    assert started(flwr)[1]["resume"] == str(tmp_path / "out" / "fedkrso-iid-seed0")


def test_ctrl_c_stops_the_run_and_leaves_it_to_be_resumed(flwr, command, tmp_path, monkeypatch):
    flwr(hang="fedkrso-iid-seed1")
    last = compare._last

    def press(config):
        if (tmp_path / "out" / "fedkrso-iid-seed1" / "status").exists():
            raise KeyboardInterrupt
        return last(config)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "_last", press)
        result = command("--seeds", "0,1")
    assert result.exit_code == 130 and "continues from here" in result.stderr
    assert flwr()[-1] == ["stop", "77"]
    assert command("--seeds", "0,1").exit_code == 0
    assert started(flwr)[-1]["resume"].endswith("fedkrso-iid-seed1")


@pytest.mark.parametrize(
    "options, key",
    [
        (["--set", "local-steps=11"], "local-steps = 20, now it is 11"),
        (["--clients", "3"], "--clients 10, not 3"),
        (["--engine", "process"], "--clients 10, not 10 --engine process"),
    ],
)
def test_a_folder_with_other_settings_is_refused_by_name(flwr, command, options, key):
    command("--seeds", "0")
    result = command("--seeds", "0", *options)
    assert result.exit_code == 2 and key in result.stderr
    assert len(started(flwr)) == 1


@pytest.mark.parametrize(
    "plan, why",
    [({"fail": "fedkrso-iid-seed0"}, "OSError: disk full"), ({"silent": "fedkrso-iid-seed0"}, "no such <data>")],
)
def test_a_failed_run_says_why_and_the_others_are_made(flwr, command, plan, why):
    flwr(**plan)
    result = command("--seeds", "0,1")
    assert result.exit_code == 1 and why in result.stderr
    assert len(started(flwr)) == 2 and "0.6000" in result.stdout  # seed 1 alone
    flwr()
    assert command("--seeds", "0,1").exit_code == 0


def test_an_old_failure_is_not_taken_for_a_new_one(flwr, command):
    flwr(fail="fedkrso-iid-seed0")
    command("--seeds", "0")
    flwr(silent="fedkrso-iid-seed0")
    assert "no such <data>" in command("--seeds", "0").stderr


def test_the_sweep_takes_the_best_rate_and_never_sees_the_validation_rows(flwr, command, tmp_path):
    flwr(best=2e-3)
    result = command("--seeds", "1,2", "--sweep", "--json")
    configs = started(flwr)
    rates = [(c["fedkrso"]["learning-rate"], c["holdout"], c["seed"]) for c in configs]
    assert rates[:4] == [(rate, 0.2, 0) for rate in (5e-4, 1e-3, 2e-3, 4e-3)]
    assert rates[4:] == [(2e-3, 0.0, 1), (2e-3, 0.0, 2)]
    (choice,) = json.loads((tmp_path / "out" / "sweep" / "sweep.json").read_text())
    assert choice["best"] == 2e-3 and not choice["edge"]
    assert choice["scores"] == pytest.approx([0.4985, 0.499, 0.5, 0.498])
    assert json.loads(result.stdout)["rows"][0]["learning_rate"] == 2e-3


def test_the_result_is_the_last_round_and_a_sweep_goes_by_the_mean_of_the_last_three(flwr, command, tmp_path):
    """The rate with the best single round and the one with the best last round lose to the best mean."""
    peak, last = {"1": 0.1, "2": 0.9, "3": 0.1, "4": 0.1}, {"1": 0.9, "2": 0.1, "3": 0.1, "4": 0.6}
    steady = {"1": 0.1, "2": 0.5, "3": 0.5, "4": 0.45}
    flwr(curves={"0.0005": peak, "0.001": last, "0.002": steady, "0.004": {"1": 0.99, "2": 0.0, "3": 0.0, "4": 0.0}})
    result = command("--seeds", "1", "--sweep", "--json", "--partitions", "dirichlet")
    (choice,) = json.loads((tmp_path / "out" / "sweep" / "sweep.json").read_text())
    assert choice["best"] == 2e-3 and choice["scores"] == pytest.approx([1.1 / 3, 0.8 / 3, 1.45 / 3, 0.0])
    assert all(config["partition"] == "dirichlet" for config in started(flwr))
    assert json.loads(result.stdout)["rows"][0]["metric"] == 0.45


def test_of_perplexities_the_sweep_takes_the_lowest(flwr, command, tmp_path):
    flwr(best=5e-4)
    command("--seeds", "0", "--sweep", "--set", "task=causal-lm")
    (choice,) = json.loads((tmp_path / "out" / "sweep" / "sweep.json").read_text())
    assert choice["best"] == 4e-3 and choice["scores"][3] == min(choice["scores"])


def test_a_best_rate_at_the_edge_is_warned_about(flwr, command):
    flwr(best=8e-3)
    assert "at the edge" in " ".join(command("--seeds", "0", "--sweep", "--rates", "2").stderr.split())


def test_a_rate_whose_run_failed_is_never_taken(flwr, command, tmp_path):
    flwr(best=8e-3, fail="fedkrso-iid-rate0.004")
    result = command("--seeds", "0", "--sweep")
    (choice,) = json.loads((tmp_path / "out" / "sweep" / "sweep.json").read_text())
    assert choice["scores"][3] is None and choice["best"] == 2e-3 and "0.004: failed" in result.stderr


@pytest.mark.parametrize("count, factors", [(1, [1]), (2, [1, 2]), (3, [0.5, 1, 2]), (4, [0.5, 1, 2, 4])])
def test_the_grid_is_geometric_and_holds_the_rate(count, factors):
    assert study.grid(3e-4, count) == pytest.approx([3e-4 * factor for factor in factors])


def test_settings_are_defaults_then_file_then_assignments(tmp_path):
    file = tmp_path / "file.toml"
    file.write_text("local-steps = 7\nbatch-size = 3\n[lora]\nalpha = 2")
    base = study.settings(file, ["batch-size=5", "task=glue/sst2", "fedsrd.sparsify-head=true"])
    assert (base["local-steps"], base["batch-size"], base["lora.alpha"], base["task"]) == (7, 5, 2, "glue/sst2")
    assert base["fedsrd.sparsify-head"] is True and base["max-length"] == 128


def test_the_settings_of_methods_that_are_not_compared_do_not_matter(flwr, command):
    few = ["--seeds", "0", "--set", "local-steps=5"]  # fewer than fedkrso.interval
    assert command(*few, "--strategies", "fedfft").exit_code == 0
    assert command(*few, "--strategies", "fedkrso").exit_code == 2


@pytest.mark.parametrize(
    "options, said",
    [
        (["--set", "local-step=3"], "local-steps"),
        (["--set", "local-steps"], "is not key=value"),
        (["--strategies", "fedkro"], "Did you mean 'fedkrso'"),
        (["--set", "task=glue/sst"], "Did you mean 'glue/sst2'"),
        (["--seeds", "one"], "whole numbers"),
        (["--seeds", ""], "a seed at least"),
        (["--set", "evaluate=off"], "evaluate"),
        (["--set", "evaluate=off"], "evaluate"),
        (["--set", "holdout=0.1", "--sweep"], "leave out holdout"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_the_user_can_mend_ends_with_one_sentence_before_anything_runs(flwr, command, options, said):
    result = command(*options)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert not flwr()


def test_the_process_engine_survives_ctrl_c_and_a_failed_run_and_gives_the_bits_of_a_whole_run(
    run_config, tmp_path, monkeypatch
):
    file, out = tmp_path / "settings.toml", tmp_path / "out"
    run_config |= {"num-server-rounds": 24}  # so that it is under way for seconds, and is looked at twice in one
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in run_config.items()))
    options = ["compare", "--engine", "process", "--clients", "3", "--config", str(file), "--output", str(out)]
    options += ["--seeds", "0", "--set", "fedkrso.rank=999"]  # no layer has that

    def press(config):
        if compare._rounds(config) >= 1:
            raise KeyboardInterrupt
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(compare, "_last", press)
        assert CliRunner().invoke(cli.app, [*options, "--strategies", "fedfft"]).exit_code == 130
    run = Run(out / "fedfft-iid-seed0")
    assert run.status == "interrupted"
    options += ["--strategies", "fedkrso,fedfft"]
    monkeypatch.setattr("sys.argv", ["fedkrso", *options])
    result = CliRunner().invoke(cli.app, options)
    assert result.exit_code == 1 and "fedkrso-iid-seed0: failed: fedkrso.rank = 999" in result.stderr
    facts = json.loads((out / "results.json").read_text())
    assert facts["engine"] == "process" and "--engine process" in facts["command"]
    assert [(row["strategy"], row["draws"]) for row in facts["rows"]] == [("fedkrso", 0), ("fedfft", 1)]
    assert digest(run) == digest(play(run_config | {"strategy": "fedfft"}, nodes=3))


def test_a_plan_without_an_app_folder_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "APP", tmp_path)
    with pytest.raises(ConfigError, match=r"pyproject.toml"):
        study.settings(None, [])
