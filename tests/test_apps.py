"""Both apps on an in-process grid: a run from its config to its model."""

import json

import numpy as np
import pytest
import torch
from conftest import InProcessGrid
from flwr.app import Context, RecordDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedkrso_app import client_app, server_app
from fedkrso_app.config import ConfigError
from fedkrso_app.run import Run


def play(run_config, nodes=4, run_id=1, **options) -> tuple[Run, InProcessGrid]:
    """One whole run; the folder it made and the grid it used."""
    client_app.workplace.cache_clear()
    grid = InProcessGrid(client_app.app, run_config, nodes, run_id=run_id, **options)
    context = Context(run_id=run_id, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)
    server_app.app(grid, context)
    return Run(server_app.run.resolved_path(run_config["output-dir"]) / run_config["run-name"]), grid


def digest(run: Run) -> str:
    return json.loads((run.path / "result.json").read_text())["digest"]


def test_a_run_leaves_what_a_user_expects(run_config):
    run, _ = play(run_config)
    assert run.status == "completed"
    metrics = run.metrics()
    print(json.dumps(metrics, indent=1))
    assert [line["round"] for line in metrics] == [0, 1, 2, 3]
    model = AutoModelForSequenceClassification.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert model(**tokenizer("w1 w2", return_tensors="pt")).logits.shape == (1, 2)
