"""Recorded steps as CUDA graphs: what only a GPU can show."""

import numpy as np
import pytest
import torch
from helpers import digest, play, replayed
from test_static import CLIENTS, RUNS, repeats

from fedkrso_app.training import graphs
from fedkrso_app.training.device import device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def recorder():
    return graphs.Graphs(device("cuda"))


@pytest.mark.parametrize("clients", [1, CLIENTS])
@pytest.mark.parametrize("strategy, dtype", RUNS)
def test_a_graph_has_the_bits_of_steps_that_are_not_captured(
    strategy, dtype, clients, recorder, model_folder, run_config
):
    if clients > 1 and strategy == "fedfft":
        pytest.skip("its clients have nothing in common to share a pass")
    changes = {"strategy": strategy, "compute-dtype": dtype, "max-grad-norm": 1.0}
    repeats(model_folder, 2, run_config, clients, recorder.place, recorder, **changes)


def test_torchs_generator_is_left_as_it_was(recorder, model_folder, run_config):
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    repeats(model_folder, 2, run_config, 1, recorder.place, recorder)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_capture_that_fails_leaves_a_device_that_works(recorder):
    x = torch.ones(4, device=recorder.place)
    with recorder.at_work():
        assert recorder.first(lambda: x.add_(x.sum().item())) is None and recorder.record is None
        torch.nn.functional.dropout(x)
    np.testing.assert_array_equal(x.cpu(), np.full(4, 5.0))


def test_whole_runs_have_the_same_bits_twice(run_config):
    settings = run_config | {"captured-steps": "on", "device": "cuda", "clients-per-node": 4}
    runs = [play(settings | {"run-name": str(i), "batch-clients": "2"}, run_id=i) for i in (1, 2)]
    assert digest(runs[0]) == digest(runs[1]) == replayed(runs[0])
    assert runs[0].metrics()[-1]["clients"] == 4
