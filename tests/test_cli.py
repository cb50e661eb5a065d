"""The commands on a real in-process run: export and ledger, on the run's own folder and on a copy of it."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import digest, play, replayed, replica
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from fedkrso_app import cli, data
from fedkrso_app.core import lora
from fedkrso_app.core.projection import projection
from fedkrso_app.core.subspace import matrix
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies.fedkrso import FedKRSOSettings
from fedkrso_app.training import model


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def played() -> list[Run]:
    """The run that was played for the first test that needs one; the others get copies of it."""
    return []


@pytest.fixture
def run(played, run_config, tmp_path, tmp_path_factory) -> Run:
    if not played:
        played.append(play(run_config | {"output-dir": str(tmp_path_factory.mktemp("played"))}))
    return Run(shutil.copytree(played[0].path, tmp_path / "run"))


def exported(folder) -> str:
    return model.state_digest(AutoModelForSequenceClassification.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("command", [[], ["plan"], ["compare"], ["report"], ["export"], ["ledger"], ["privacy"]])
def test_every_command_has_help(command):
    result = call(*command, "--help")
    assert result.exit_code == 0 and "Usage" in result.stdout


def test_export_is_the_runs_model_and_any_rounds(run, tmp_path):
    assert call("export", run.path, tmp_path / "newest").exit_code == 0
    assert exported(tmp_path / "newest") == digest(run)
    for round in (0, 2):
        assert call("export", run.path, "--round", round, tmp_path / str(round)).exit_code == 0
        assert exported(tmp_path / str(round)) == replayed(run, round)


def test_export_of_a_round_that_published_nothing_is_the_version_before(run_config, tmp_path):
    settings = run_config | {"min-replies": 2, "round-timeout": 0.3, "num-server-rounds": 2}
    run = play(settings, tamper=lambda p, m, reply: reply if m.content["train"]["round"] == 1 or p == 0 else None)
    assert call("export", run.path, "--round", 2, tmp_path / "two").exit_code == 0
    assert exported(tmp_path / "two") == replayed(run, 1)


def test_export_refuses_a_folder_that_is_not_empty(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    result = call("export", run.path, tmp_path / "full")
    assert result.exit_code == 2 and "not empty" in result.stderr
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine"]


def test_export_names_the_rounds_that_are_left(run_config, tmp_path):
    run = play(run_config | {"strategy": "fedit"})
    result = call("export", run.path, "--round", 1, tmp_path / "one")
    assert result.exit_code == 2 and "these rounds: 2, 3." in result.stderr and not (tmp_path / "one").exists()
    assert call("export", run.path, "--round", 2, tmp_path / "two").exit_code == 0
    assert exported(tmp_path / "two") == replayed(run, 2)


def test_export_needs_all_entries_where_one_builds_on_another(run, tmp_path):
    (run.ledger / "000002.safetensors").unlink()
    result = call("export", run.path, "--round", 3, tmp_path / "three")
    assert result.exit_code == 2 and "these rounds: 0, 1." in result.stderr


def test_a_damaged_entry_is_named_and_its_file_stays(run, tmp_path):
    file = run.ledger / "000002.safetensors"
    damaged = file.read_bytes()[:-1] + b"?"
    file.write_bytes(damaged)
    result = call("export", run.path, "--round", 3, tmp_path / "three")
    assert result.exit_code == 2 and "entry 2 is damaged" in result.stderr
    assert file.read_bytes() == damaged


def test_the_ledger_tells_what_every_round_did(run):
    shown = json.loads(call("ledger", run.path, "--json").stdout)["entries"]
    assert [entry["version"] for entry in shown] == [entry["round"] for entry in shown] == [0, 1, 2, 3]
    assert all(entry["partitions"] == [0, 1, 2, 3] for entry in shown[1:])
    entries = Ledger(run.ledger)
    for before, entry in pairwise(shown):
        arrays, older = entries.read(entry["version"]).arrays, entries.read(before["version"]).arrays
        assert entry["norms"]["accumulators"] == pytest.approx(np.linalg.norm(arrays["accumulators"]), rel=1e-6)
        assert entry["norms"]["head"] == pytest.approx(np.linalg.norm(arrays["head"] - older["head"]), rel=1e-6)
        assert "seeds" not in entry["norms"]
        assert entry["disk_bytes"] == (run.ledger / f"{entry['version']:06d}.safetensors").stat().st_size
    table = call("ledger", run.path)
    assert table.exit_code == 0 and "completed" in table.stdout


def moved(run, *options) -> dict[int, dict[str, float]]:
    entries = json.loads(call("ledger", run.path, "--layers", "--json", *options).stdout)["entries"]
    return {entry["version"]: entry["layers"] for entry in entries}


def test_the_way_of_each_layer_equals_the_gram_matrices_of_seeds_and_accumulators(run):
    """‖Σ_k B_k P_k‖² = Σ_kj tr(B_kᵀ B_j · P_j P_kᵀ), from the entry alone: no weight and no product of m × n."""
    shapes = {name: matrix(layer).shape for name, layer in replica(run).targets.items()}
    r, told = run.info["config"]["fedkrso.rank"], moved(run)
    assert list(told) == [0, 1, 2, 3] and told[0] == {}
    for version in (1, 2, 3):
        arrays, start = Ledger(run.ledger).read(version).arrays, 0
        for name, (m, n) in shapes.items():
            B = [row[start : start + m * r].reshape(m, r).astype(np.float64) for row in arrays["accumulators"]]
            P = [projection(int(seed), name, r, n, "gaussian").astype(np.float64) for seed in arrays["seeds"]]
            K = range(len(B))
            squared = sum(np.trace((B[k].T @ B[j]) @ (P[j] @ P[k].T)) for k in K for j in K)
            assert told[version][name] == pytest.approx(np.sqrt(squared), rel=1e-4)
            start += m * r
        change = arrays["head"].astype(np.float64) - Ledger(run.ledger).read(version - 1).arrays["head"]
        assert told[version]["head"] == pytest.approx(np.linalg.norm(change), rel=1e-6)
        assert set(told[version]) == {*shapes, "head"}


def test_the_energy_is_that_in_the_span_of_the_entrys_projections(run, run_config):
    """Against autograd at the version before, and the projector Pᵀ(PPᵀ)⁻¹P of the seeds' stacked P."""
    told = {
        e["version"]: e["energy"] for e in json.loads(call("ledger", run.path, "--energy", "--json").stdout)["entries"]
    }
    half, config = replica(run, 1), run.config
    task = data.resolve(config)
    train = data.load(task, config.data_dir, "train")
    rows = np.sort(np.random.default_rng(0).permutation(len(train))[:128])
    loaded = model.load(config.model, 2, config.seed, task.classes)
    loaded.module.load_state_dict(half.plain_state())
    whole = next(data.evaluation_batches(train.select(rows), task, loaded.tokenizer, 10**6, config.max_length))
    weights = [layer.weight for layer in loaded.targets.values()]
    gradients = torch.autograd.grad(loaded.module.eval()(**whole).loss, weights)
    seeds = Ledger(run.ledger).read(2).arrays["seeds"]
    kept, total = 0.0, 0.0
    for (name, layer), gradient in zip(loaded.targets.items(), gradients, strict=True):
        P = np.concatenate(
            [projection(int(s), name, config.of(FedKRSOSettings).rank, layer.in_features) for s in seeds]
        )
        G, P = gradient.double().numpy(), P.astype(np.float64)
        inside = np.trace(G @ P.T @ np.linalg.solve(P @ P.T, P @ G.T))
        assert told[2][name] == [pytest.approx(inside / (G**2).sum(), rel=1e-3), len(P)]
        kept, total = kept + inside, total + (G**2).sum()
    assert told[2]["all"][0] == pytest.approx(kept / total, rel=1e-3) and told[0] == {}
    assert "Share of the gradient" in " ".join(call("ledger", run.path, "--energy").stdout.split())


def test_full_fine_tuning_sees_all_of_a_square_layers_gradient(run_config):
    run = play(run_config | {"strategy": "fedfft"}, nodes=2)
    energy = json.loads(call("ledger", run.path, "--energy", "--json").stdout)["entries"][-1]["energy"]
    square = [energy[name] for name, layer in replica(run).targets.items() if layer.in_features == layer.out_features]
    assert square and all(share == pytest.approx(1, abs=1e-6) and count == 16 for share, count in square)


@pytest.mark.parametrize("strategy", ["fedit", "ffa-lora", "fedsrd", "fedsrd-e"])
def test_the_way_of_each_layer_is_that_of_the_product_of_the_factors(run_config, strategy):
    run = play(run_config | {"strategy": strategy}, nodes=2)
    products = {}
    for version in (2, 3):
        pairs = {name: lora.factors(layer) for name, layer in replica(run, version).layers.items()}
        settings = run.info["config"]
        scale = settings["lora.alpha"] / settings["lora.rank"]
        products[version] = {name: scale * B.detach().double() @ A.detach().double() for name, (A, B) in pairs.items()}
    told = moved(run)[3]
    for name, product in products[3].items():
        assert told[name] == pytest.approx(float((product - products[2][name]).norm()), rel=1e-4)


def test_the_way_of_each_layer_in_full_fine_tuning_is_that_of_its_parameters(run_config):
    run = play(run_config | {"strategy": "fedfft"}, nodes=2)
    before, after = (Ledger(run.ledger).read(version).arrays["parameters"].astype(np.float64) for version in (2, 3))
    told, start, heads = moved(run)[3], 0, []
    method = replica(run)
    for name, parameter in sorted(method.module.named_parameters()):
        change = np.linalg.norm((after - before)[start : start + parameter.numel()])
        if name.removesuffix(".weight") in method.targets:
            assert told[name.removesuffix(".weight")] == pytest.approx(change, rel=1e-6)
        if name in method.head:
            heads.append(change)
        start += parameter.numel()
    assert told["head"] == pytest.approx(np.linalg.norm(heads), rel=1e-6)


def test_the_table_of_layers_has_a_row_for_each_and_reads_as_the_json(run):
    told = moved(run)
    table = call("ledger", run.path, "--layers", "--verify")
    assert table.exit_code == 0
    rows = {cells[1].strip(): cells[2:5] for line in table.stdout.splitlines() if len(cells := line.split("│")) == 6}
    for name in told[3]:
        assert [cell.strip() for cell in rows[name]] == [f"{told[version][name]:.4g}" for version in (1, 2, 3)]


def test_layers_name_an_entry_that_is_missing(run):
    (run.ledger / "000002.safetensors").unlink()
    answer = call("ledger", run.path, "--layers")
    assert answer.exit_code == 2 and "entry 2 is missing" in answer.stderr


def test_verify_holds_on_a_copied_folder_and_writes_nothing(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path / "copy")
    shutil.rmtree(run.path)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    result = call("ledger", copy, "--verify", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0 and facts["verified"] and facts["digest"] == digest(Run(copy))
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


def test_verify_finds_another_result(run):
    result = json.loads((run.path / "result.json").read_text())
    (run.path / "result.json").write_text(json.dumps(result | {"digest": "0" * 64}))
    answer = call("ledger", run.path, "--verify")
    assert answer.exit_code == 1 and "another model" in answer.stderr


def test_verify_names_a_damaged_entry(run):
    file = run.ledger / "000002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    answer = call("ledger", run.path, "--verify")
    assert answer.exit_code == 2 and "entry 2 is damaged" in answer.stderr


def test_an_unfinished_run_has_nothing_to_verify_against(run):
    (run.path / "result.json").unlink()
    run.set_status("running")
    answer = call("ledger", run.path, "--verify")
    assert answer.exit_code == 2 and "no result.json" in answer.stderr


def test_a_run_whose_server_made_no_model_is_not_taken_for_one_that_was_changed(run_config):
    run = play(run_config | {"evaluate": "off", "num-server-rounds": 1}, nodes=2)
    answer = call("ledger", run.path, "--verify")
    assert answer.exit_code == 2 and "no result.json with a digest to compare with: completed" in answer.stderr


@pytest.mark.parametrize("options", [["ledger", "--verify"], ["ledger", "--layers"], ["export", "x"]])
def test_an_empty_ledger_is_named(run, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in run.ledger.iterdir():
        file.unlink()
    answer = call(options[0], run.path, *options[1:])
    assert answer.exit_code == 2 and answer.stderr == f"Error: {run.path} has no ledger, or an empty one.\n"


@pytest.mark.parametrize("options", [["export", "/dev/null/x"], ["report", "--output", "/dev/null/x"]])
def test_a_place_that_cannot_be_written_to_is_named_in_one_sentence(run, options):
    answer = call(options[0], run.path, *options[1:])
    assert answer.exit_code == 2
    assert answer.stderr.strip() == "Error: [Errno 20] Not a directory: '/dev/null/x'"


def test_another_base_model_is_refused(run, tmp_path):
    info = run.info
    changed = shutil.copytree(info["config"]["model"], tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    info["config"]["model"] = str(changed)
    (run.path / "config.json").write_text(json.dumps(info))
    answer = call("ledger", run.path, "--verify")
    assert answer.exit_code == 2 and "other weights" in answer.stderr


@pytest.mark.parametrize("command", [["report"], ["ledger"], ["export", "x"]])
def test_what_is_no_run_is_said_in_one_sentence(command, tmp_path):
    answer = call(command[0], tmp_path, *command[1:])
    assert answer.exit_code == 2 and str(tmp_path) in answer.stderr and answer.stderr.count("\n") == 1
    for content in ("{}", "[]", "1", "{"):
        (tmp_path / "config.json").write_text(content)
        answer = call(command[0], tmp_path, *command[1:])
        assert answer.exit_code == 2 and "config.json" in answer.stderr and answer.stderr.count("\n") == 1


def test_report_writes_into_the_folder_it_was_given(run):
    answer = call("report", run.path)
    assert answer.exit_code == 0 and (run.path / "report.html").is_file() and "report.html" in answer.stdout
