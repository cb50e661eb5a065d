"""What a model is worth on some rows, whatever batches it is judged by."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from fedkrso_app import data
from fedkrso_app.data import batching
from fedkrso_app.federation import evaluation
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.training import metrics, model


@pytest.fixture
def judged(run_config, monkeypatch):
    """What :func:`evaluation.tally` is given."""
    monkeypatch.setattr(evaluation, "_limits", {})
    config = parse(run_config)
    task = data.resolve(config)
    loaded = model.of_run(config, task)
    local = make(config, Shapes.of(loaded)).local(loaded)
    return local, data.load(task, config.data_dir, "validation"), task, loaded.tokenizer


def test_batches_of_any_size_find_the_same_and_those_of_training_do_not_count(judged, monkeypatch):
    local, examples, task, tokenizer = judged
    rows = [examples[i : i + 1] for i in range(len(examples))]
    one_by_one = [evaluation.tally(local, Dataset.from_dict(row), task, tokenizer) for row in rows]
    for tokens in (1, 50, 2**12):
        monkeypatch.setattr(evaluation, "batch_tokens", lambda kind, wide, tokens=tokens: tokens)
        found = evaluation.tally(local, examples, task, tokenizer)
        np.testing.assert_allclose(found, sum(one_by_one), rtol=1e-5)
        assert np.array_equal(found[1:], sum(one_by_one)[1:])
    monkeypatch.undo()
    whole = evaluation.tally(local, examples, task, tokenizer)
    local.config = parse({**local.config.to_dict(), "batch-size": 3})
    assert evaluation.tally(local, examples, task, tokenizer).tobytes() == whole.tobytes()


def test_what_does_not_fit_into_memory_is_judged_by_half_as_much_and_so_is_what_follows(judged, monkeypatch, caplog):
    sizes, real = [], metrics.tally

    def scarce(module, batches, *given):
        made = list(batches)
        sizes.append(max(batch["input_ids"].numel() for batch in made))
        if sizes[-1] > 100:
            raise torch.OutOfMemoryError("out of memory")
        return real(module, made, *given)

    wanted = evaluation.tally(*judged)
    monkeypatch.setattr(metrics, "tally", scarce)
    monkeypatch.setattr(evaluation, "batch_tokens", lambda kind, wide: 256)
    np.testing.assert_allclose(evaluation.tally(*judged), wanted, rtol=1e-5)
    assert sizes[0] > 100 and 50 < sizes[-1] <= 64 and "does not fit into memory: 128 from now on" in caplog.text
    evaluation.tally(*judged)
    assert sizes[-1] == sizes[-2]
    monkeypatch.setattr(metrics, "tally", lambda *given: (_ for _ in ()).throw(MemoryError("always")))
    with pytest.raises(MemoryError, match="always"):
        evaluation.tally(*judged)


@pytest.mark.parametrize("free, again", [(10**9, 0), (10**4, 1), (0, 1)], ids=["room", "little", "unknown"])
def test_batches_stay_on_a_device_with_room_for_them(judged, free, again, monkeypatch):
    made, real = [], data.evaluation_batches
    monkeypatch.setattr(evaluation, "free_bytes", lambda device: free)
    monkeypatch.setattr(data, "evaluation_batches", lambda *given: made.append(given) or real(*given))
    first = evaluation.tally(*judged)
    assert evaluation.tally(*judged).tobytes() == first.tobytes()
    assert len(made) == 1 + again


def test_what_stays_is_bounded_by_a_share_of_the_free_memory():
    assert evaluation.stays(2**20, 2**24) and not evaluation.stays(2**20 + 1, 2**24) and not evaluation.stays(1, 0)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_language_models_logits_bound_a_batch_and_a_classifiers_rows_do_not(kind):
    plain = evaluation.batch_tokens(kind, 0)
    assert evaluation.batch_tokens(kind, 2) == plain >= 2**12
    assert evaluation.batch_tokens(kind, 128256) * 128256 <= 2**24 and evaluation.batch_tokens(kind, 2**40) == 1
    assert plain // 128 <= batching._LOOK
