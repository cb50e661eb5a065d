"""What ``fedkrso privacy`` says of runs: plainly of unprotected ones, and of protected ones what the folder proves."""

import itertools
import json

import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from helpers import play
from test_card import read
from test_cli import call
from test_report import make, page

from fedkrso_app.core.shamir import honest, usual_threshold
from fedkrso_app.runs import privacy
from fedkrso_app.strategies.privacy import UNITS

EXAMPLE = {"privacy.unit": "example", "privacy.clip": 1.0, "privacy.noise": 1.0, "privacy.delta": 1e-3}
CLIENT = {"privacy.unit": "client", "privacy.clip": 1.0, "privacy.noise": 5.0}


def told(run) -> dict:
    result = call("privacy", run.path, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def line(number: int, clients: int = 4, **more) -> dict:
    figures = {"round": number, "version": number, "metric": 0.5, "eval_loss": 1.0, "train_loss": 0.7}
    figures |= {"uplink_bytes": 4 * 10**6, "downlink_bytes": 10**6, "paper_bytes": 10**6, "clients": clients}
    figures |= {"refused": 0, "failed": 4 - clients, "seconds": 1.0, "client_seconds": 1.0, "client_peak_bytes": 1}
    return figures | {"partitions": list(range(clients))} | more


def rewrite(run, lines, **logs):
    """Other lines of metrics.jsonl, and logs beside them (lists of events, or text as it is)."""
    for name, events in {"metrics": lines, **logs}.items():
        text = events if isinstance(events, str) else "".join(json.dumps(event) + "\n" for event in events)
        (run.path / f"{name}.jsonl").write_text(text)
    return run


def test_an_unprotected_run_is_called_that_and_says_what_the_server_could_read(run_config):
    run = play(run_config | {"num-server-rounds": 2}, nodes=2)
    facts = told(run)
    assert facts["guarantees"] == [] and "Nothing is protected" in facts["summary"]
    assert "4 updates of single clients" in facts["saw"]["server"][0]
    assert any("subtract its own" in each for each in facts["saw"]["other nodes"])
    assert {"its training loss", "the number of the client's training rows"} <= set(facts["clear"])
    text = call("privacy", run.path).stdout
    assert "Nothing is protected" in text and "Guarantee" not in text


def test_a_run_by_examples_says_epsilon_with_all_that_it_depends_on(run_config):
    run = play(run_config | EXAMPLE | {"num-server-rounds": 2, "privacy.max-epsilon": 50.0}, nodes=4)
    (guarantee,) = told(run)["guarantees"]
    by_round = {str(figures["round"]): figures["epsilon"] for figures in run.metrics()[1:]}
    assert guarantee["epsilon_by_round"] == by_round and len(by_round) == 2
    assert guarantee["epsilon_spent"] == max(by_round.values())
    assert guarantee["epsilon_left"] == pytest.approx(50 - guarantee["epsilon_spent"])
    assert (guarantee["clip"], guarantee["noise"], guarantee["delta"]) == (1.0, 1.0, 1e-3)
    assert guarantee["randomness"] == "os" and "dp-accounting 0." in guarantee["accountant"]
    assert "its training loss" not in told(run)["clear"]
    _, card = read(run.model)
    assert card["Privacy"].startswith(f"ε = {guarantee['epsilon_spent']:.2f} at δ = 0.001 for each training row")


def test_noise_from_the_seed_is_never_called_private(tmp_path):
    changes = EXAMPLE | {"privacy.randomness": "seed"}
    run = rewrite(make(tmp_path / "run", **changes), [line(0), line(1, epsilon=1.5)])
    facts = told(run)
    assert facts["summary"].startswith("NOT PRIVATE") and facts["guarantees"][0]["randomness"] == privacy.NOT_PRIVATE
    assert "which it can subtract" in facts["saw"]["server"][0]
    assert privacy.sentence(run, 1).startswith("none")


@pytest.mark.parametrize("unit", UNITS[1:])
def test_a_unit_without_a_trace_of_noise_has_protected_nothing(unit, tmp_path):
    run = rewrite(make(tmp_path / "run", **(CLIENT | {"privacy.unit": unit})), [line(0), line(1)])
    facts = told(run)
    assert facts["guarantees"] == [] and "has protected nothing" in facts["summary"]
    assert "Nothing is protected" in facts["summary"] and privacy.sentence(run, 1) == ""


def pld(rounds: int) -> float:
    accountant = PLDAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(5.0), rounds))
    return accountant.get_epsilon(1e-5)


def test_the_log_of_spending_counts_the_client_that_was_asked_most_and_repeated_rounds_twice(tmp_path):
    """Also for a round that was written down and never finished: its noise may have been released."""
    event = {"unit": "client", "noise": 5.0, "clip": 1.0}
    asked = [(1, [0, 1]), (2, [1, 2]), (2, [1, 2]), (3, [0, 3])]
    events = [event | {"round": number, "asked": clients} for number, clients in asked]
    run = make(tmp_path / "run", status="running", **CLIENT)
    cut = "".join(json.dumps(each) + "\n" for each in events) + '{"round": 4, "as'
    rewrite(run, [line(0), line(1), line(2)], privacy=cut)
    facts = told(run)
    (guarantee,) = facts["guarantees"]
    spent = {int(number): value for number, value in guarantee["epsilon_by_round"].items()}
    assert spent == {number: pytest.approx(pld(times), abs=2e-3) for number, times in ((1, 1), (2, 3), (3, 3))}
    assert facts["status"] == "interrupted" and guarantee["epsilon_left"] is None
    assert "before it added noise" in facts["saw"]["server"][0]


def test_openings_are_told_apart_by_what_came_of_them(tmp_path):
    settings = {"secure-aggregation": True, "secagg.bits": 64, "secagg.threshold": 0, "secagg.min-cohort": 3}
    openings = [{"round": number, "partitions": [0, 1, 2, 3][:size]} for number, size in ((1, 4), (2, 3), (4, 4))]
    lines = [line(0), line(1), line(2, clients=3), line(3, clients=0, version=2)]
    run = rewrite(make(tmp_path / "run", status="running", **settings), lines, openings=openings)
    facts = told(run)
    (guarantee,) = facts["guarantees"]
    assert guarantee["rounds_opened"] == 3 and guarantee["partitions_in_smallest_sum"] == 3
    assert guarantee["rounds_opened_without_result"] == [4] and guarantee["rounds_not_opened"] == [3]
    assert (guarantee["nodes"], guarantee["threshold"], guarantee["may_be_missing"]) == (4, 3, 1)
    assert "drawn by one of 3 clients alone" in facts["saw"]["server"][1]
    assert "no update alone" in facts["summary"] and "Nothing bounds" in facts["summary"]
    assert "the number of the client's training rows" not in facts["clear"]


def test_the_smallest_honest_group_is_that_of_the_protocols_table():
    """Thresholds, and groups without and with one colluding node, as found by maximum flows."""
    table = {3: (3, 3, 2), 4: (3, 3, 2), 5: (4, 4, 3), 6: (5, 5, 4), 8: (7, 7, 6), 10: (8, 8, 7)}
    table |= {16: (13, 13, 12), 32: (26, 25, 24), 100: (80, 75, 74)}
    for n, (t, alone, with_one) in table.items():
        assert (usual_threshold(n), honest(n, t, 0), honest(n, t, 1)) == (t, alone, with_one)
    assert (honest(10, 7, 3), honest(10, 8, 3), honest(10, 8, 8)) == (2, 5, 0)


def test_a_folder_without_rounds_or_of_older_settings_is_no_guarantee(tmp_path):
    run = rewrite(make(tmp_path / "run", status="failed: no"), [])
    info = json.loads((run.path / "config.json").read_text())
    kept = {key: value for key, value in info["config"].items() if not key.startswith("privacy.")}
    (run.path / "config.json").write_text(json.dumps(info | {"config": kept}))
    facts = told(run)
    assert facts["summary"].startswith("No round is recorded") and facts["guarantees"] == []
    nothing = call("privacy", tmp_path)
    assert nothing.exit_code == 2 and "is not a run's folder" in nothing.stderr


def test_a_damaged_log_is_an_error_and_not_a_smaller_epsilon(tmp_path):
    run = rewrite(make(tmp_path / "run", **CLIENT), [line(0), line(1)], privacy='{"round": 1\n{}\n')
    result = call("privacy", run.path)
    assert result.exit_code == 2 and "line 1 cannot be read" in result.stderr


def test_the_report_shows_epsilon_round_by_round_where_a_run_has_it(tmp_path):
    rounds = [line(number, epsilon=number / 2) for number in (1, 2, 3)]
    run = rewrite(make(tmp_path / "run", **EXAMPLE), [line(0), *rounds])
    texts = page([run], tmp_path).texts
    assert "ε at δ = 0.001, fedkrso" in texts and {"0.50", "1.00", "1.50"} <= set(texts)
    plain = page([make(tmp_path / "plain")], tmp_path).texts
    assert not any("ε" in text for text in plain)


def test_an_epsilon_is_shown_rounded_up():
    assert [privacy.shown(value) for value in (1.0, 1.2301, 0.001, 2.8)] == ["1.00", "1.24", "0.01", "2.80"]


def test_seeds_drawn_by_one_client_are_counted_as_they_are_expected(tmp_path):
    """By all draws of three clients among three seeds, two intervals each."""
    draws = list(itertools.product(itertools.product(range(3), repeat=2), repeat=3))
    alone = [sum(sum(seed in one for one in draw) == 1 for seed in range(3)) for draw in draws]
    changes = {"fedkrso.num-seeds": 3, "fedkrso.interval": 10, "local-steps": 20}
    run = rewrite(make(tmp_path / "run", **changes), [line(0), line(1, clients=3)])
    expected = sum(alone) / len(draws)
    assert f"About {expected:.1f} of 3 seeds" in told(run)["saw"]["other nodes"][1]
