"""The config's door: good settings get types, bad ones one sentence that names the key and the fix."""

import pytest
from helpers import default_config

from fedkrso_app.config import ConfigError
from fedkrso_app.strategies import parse


def test_the_defaults_are_valid_and_come_back_as_they_were():
    assert parse(default_config()).to_dict() == default_config()


def test_every_key_is_needed_and_named_when_it_is_missing():
    for key in default_config():
        with pytest.raises(ConfigError, match=f"'{key}' is missing"):
            parse({name: value for name, value in default_config().items() if name != key})


def test_whole_numbers_serve_where_a_fraction_is_meant():
    assert parse(default_config() | {"round-timeout": 60}).round_timeout == 60.0


BAD = {
    "unknown key": ({"fedkrso.num-seed": 3}, "unknown key 'fedkrso.num-seed'.*did you mean 'fedkrso.num-seeds'"),
    "unknown strategy": ({"strategy": "fedkros"}, "strategy = 'fedkros'.*Did you mean 'fedkrso'"),
    "text for a number": ({"batch-size": "16"}, "batch-size = '16' is not a int"),
    "fraction for a whole number": ({"local-steps": 1.5}, "local-steps = 1.5 is not a int"),
    "truth for a number": ({"seed": True}, "seed = True is not a int"),
    "number for a text": ({"model": 7}, "model = 7 is not a str"),
    "K below 1": ({"fedkrso.num-seeds": 0}, "fedkrso.num-seeds = 0 is impossible"),
    "rank below 1": ({"fedkrso.rank": 0}, "fedkrso.rank = 0 is impossible"),
    "interval beyond the steps": (
        {"fedkrso.interval": 21, "local-steps": 20},
        "fedkrso.interval = 21 is impossible: it must be at least 1 and at most local-steps = 20",
    ),
    "no rounds": ({"num-server-rounds": 0}, "num-server-rounds = 0"),
    "negative rate": ({"fedkrso.learning-rate": -1e-3}, "fedkrso.learning-rate = -0.001"),
    "rate that is no number": ({"fedfft.learning-rate": float("nan")}, "fedfft.learning-rate = nan"),
    "everybody and more": ({"fraction-train": 1.5}, "fraction-train = 1.5"),
    "nobody": ({"fraction-train": 0.0}, "fraction-train = 0.0"),
    "unknown partition": ({"partition": "dirchlet"}, "Did you mean 'dirichlet'"),
    "alpha of 0": ({"dirichlet-alpha": 0.0}, "dirichlet-alpha = 0.0"),
    "unknown projection": ({"fedkrso.projection": "gauss"}, "fedkrso.projection = 'gauss'"),
    "unknown weighting": ({"weighting": "size"}, "weighting = 'size' is not one of uniform, examples"),
    "unknown evaluation": ({"evaluate": "client"}, "evaluate = 'client'"),
    "unknown memory setting": ({"activation-memory": "keeps"}, "Did you mean 'keep'"),
    "no threads": ({"torch-threads": 0}, "torch-threads = 0 is impossible: it must be between 1 and 1024"),
    "negative seed": ({"seed": -1}, "seed = -1"),
    "partition seed below -1": ({"partition-seed": -2}, "partition-seed = -2"),
    "all held out": ({"holdout": 1.0}, "holdout = 1.0"),
    "folder in the run's name": ({"run-name": "a/b"}, "run-name = 'a/b'"),
    "sparsity below its least": ({"fedsrd.alpha": 0.98}, "fedsrd.max-sparsity = 0.96"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_setting_is_named_with_its_mend(case):
    changes, sentence = BAD[case]
    with pytest.raises(ConfigError, match=sentence):
        parse(default_config() | changes)


def test_an_interval_matters_to_fedkrso_only():
    assert parse(default_config() | {"strategy": "fedit", "local-steps": 2}).local_steps == 2
