"""What each client did in a round: said only where it is asked for, and nothing else changes by it."""

import json

import pytest
from helpers import digest, play


def test_per_client_figures_are_those_of_the_replies_and_add_up(run_config):
    replies = {}

    def keep(partition, message, reply):
        replies[message.content["train"]["round"], str(partition)] = reply.content["metrics"]
        return reply

    run = play(run_config | {"client-metrics": True, "num-server-rounds": 2}, tamper=keep)
    for line in run.metrics()[1:]:
        clients = line["per_client"]
        assert list(clients) == ["0", "1", "2", "3"]
        for partition, client in clients.items():
            said = replies[line["round"], partition]
            names = {"num_examples", "train_loss", "train_seconds", "peak_bytes"}
            assert {name: client[name] for name in names} == {name: said[name.replace("_", "-")] for name in names}
            assert set(client) == names | {"uplink_bytes"}
        assert sum(client["uplink_bytes"] for client in clients.values()) == line["uplink_bytes"]
        mean = sum(client["train_loss"] for client in clients.values()) / 4
        assert line["train_loss"] == pytest.approx(mean, rel=1e-12)


def test_bytes_of_a_client_hold_its_evaluation_too(run_config):
    run = play(run_config | {"client-metrics": True, "evaluate": "clients", "num-server-rounds": 1})
    line = run.metrics()[-1]
    assert sum(client["uplink_bytes"] for client in line["per_client"].values()) == line["uplink_bytes"]


def test_a_reply_that_does_not_count_has_no_figures(run_config):
    run = play(
        run_config | {"client-metrics": True, "num-server-rounds": 1, "round-timeout": 0.3},
        tamper=lambda partition, message, reply: None if partition == 2 else reply,
    )
    assert list(run.metrics()[-1]["per_client"]) == ["0", "1", "3"]


def test_client_metrics_are_off_by_default_and_change_nothing_else(run_config):
    without = play(run_config | {"num-server-rounds": 1})
    on = play(run_config | {"num-server-rounds": 1, "run-name": "on", "client-metrics": True})
    assert digest(without) == digest(on)
    plain, more = without.metrics()[-1], on.metrics()[-1]
    assert set(more) - set(plain) == {"per_client"} and "per_client" not in json.dumps(without.metrics())
    same = set(plain) - {"seconds", "client_seconds", "client_peak_bytes"}
    assert {key: plain[key] for key in same} == {key: more[key] for key in same}
