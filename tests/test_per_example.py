"""DP-SGD's steps: the plain one where nothing is clipped, noise where nobody was drawn, and fair coins."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from test_families import build
from test_together import ends, exact
from torch import nn

from fedkrso_app.config import ConfigError
from fedkrso_app.core.accounting import gaussian_epsilon
from fedkrso_app.core.noise import NoiseStream
from fedkrso_app.training import loop, per_example
from fedkrso_app.training.loop import Session
from fedkrso_app.training.per_example import Mechanism

KEY = bytes(range(32))
ROWS, STEPS = 6, 4


def reader(labels=2):
    """Rows by position, shorter ones among a classifier's."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 40, (ROWS, 8), generator=generator)
    lengths = torch.tensor([8, 5, 7, 4, 8, 6] if labels else [8] * ROWS)
    answers = torch.randint(0, max(labels, 1), (ROWS,), generator=generator)

    def read(rows):
        rows = torch.as_tensor(rows)
        mask = (torch.arange(8) < lengths[rows, None]).long()[:, : int(lengths[rows].max())]
        own = torch.where(mask.bool(), ids[rows, : mask.shape[1]], 1)
        asked = answers[rows] if labels else torch.where(mask.bool(), own, -100)
        return {"input_ids": own, "attention_mask": mask, "labels": asked}

    return read


def everyone(clip=float("inf"), noise=0.0):
    return Mechanism(ROWS, ROWS, clip, noise, NoiseStream(KEY))


def trained(folder, settings, mechanism=None, labels=2, **changes):
    """What a session's optimizers moved, in float64 and without dropout; by the plain loop without a mechanism."""
    settings = settings | {"local-steps": STEPS, "fedkrso.interval": 2, "batch-size": ROWS}
    local, instructions, config = exact(folder, labels, settings)
    config, rng = replace(config, **changes), np.random.Generator(np.random.Philox(0))
    started = []
    with local.session(instructions, rng) as session:
        before = session.before_step
        session.before_step = lambda j: (started.append(j), before(j))
        if mechanism is None:
            whole = reader(labels)(np.arange(ROWS))
            loop.train(local.module, iter(lambda: whole, None), session, config, rng)
        else:
            lengths = np.array([8, 5, 7, 4, 8, 6])
            per_example.train(local.module, reader(labels), session, config, rng, mechanism, lengths)
        assert started == list(range(STEPS))  # logical steps, however many parts they had
        return ends(session)


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("strategy", ["fedkrso", "fedit", "ffa-lora"])
def test_without_clip_and_noise_and_with_all_rows_it_is_the_plain_loop(strategy, model_folder, run_config):
    settings = run_config | {"strategy": strategy}
    wanted = trained(model_folder, settings)
    for size in (1, 4, ROWS):  # parts of a step change nothing
        close(trained(model_folder, settings, everyone(), batch_size=size), wanted)


def test_a_language_models_rows_of_one_length_have_the_plain_loss(model_folder, run_config, tmp_path):
    """Without its logits, as it trains: a row's loss is the mean over its own tokens."""
    folder = build(tmp_path, model_folder, "gpt2", True)
    wanted = trained(folder, run_config, labels=0)
    close(trained(folder, run_config, everyone(), labels=0, batch_size=4), wanted)


def test_parts_change_nothing_where_rows_are_clipped_and_noise_is_added(model_folder, run_config):
    one, other = (trained(model_folder, run_config, everyone(0.1, 0.5), batch_size=size) for size in (1, 4))
    close(one, other)
    assert not torch.allclose(one[0], trained(model_folder, run_config, everyone(0.1))[0])


class Net(nn.Module):
    """Token ids -> logits; ``mix`` may let rows see one another."""

    def __init__(self, mix=lambda x: x, norm=nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.norm, self.out = nn.Embedding(40, 6), nn.Linear(6, 6), norm(), nn.Linear(6, 2)
        self.requires_grad_(False)
        self.mix = mix

    def forward(self, input_ids, attention_mask=None):
        x = torch.tanh(self.hidden(self.embed(input_ids)))
        x = x if attention_mask is None else x * attention_mask[..., None]
        return SimpleNamespace(logits=self.out(self.norm(self.mix(x.mean(1)))))

    def session(self, **more):
        optimizer = torch.optim.SGD([*self.hidden.parameters(), *self.out.parameters()], lr=1.0)
        return Session([optimizer], dict, constant_rate=True, **more)


def test_a_batch_of_nobody_is_a_step_along_noise(config):
    net, rows, clip, noise = Net(), 1000, 0.3, 2.0
    keys = (bytes([i] * 32) for i in range(99))
    key = next(key for key in keys if (NoiseStream(key).uniform(rows) >= 1 / rows).all())  # nobody is drawn
    same = NoiseStream(key)
    same.uniform(rows)
    session = net.session()
    wanted = [
        p - torch.from_numpy(same.normal(*p.shape) * noise * clip).float() for p in map(torch.clone, session.parameters)
    ]
    mechanism = Mechanism(rows, 1, clip, noise, NoiseStream(key))
    per_example.train(net, None, session, replace(config, local_steps=1), np.random.default_rng(0), mechanism)
    close([p.detach() for p in session.parameters], wanted)


def test_every_row_has_its_own_fair_coin():
    mechanism, steps = Mechanism(50, 10, 1.0, 1.0, NoiseStream(KEY)), 2000
    coins = np.zeros((steps, 50))
    for row in coins:
        row[mechanism.drawn()] = 1
    sizes = np.bincount(coins.sum(1).astype(int), minlength=51)
    expected = scipy.stats.binom.pmf(np.arange(51), 50, 0.2) * steps
    assert ((sizes - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 5].sum() < 40  # about 18 values
    assert scipy.stats.binomtest(int(coins.sum()), coins.size, 0.2).pvalue > 1e-3
    neighbours = np.corrcoef(coins.T)
    assert np.abs(neighbours[~np.eye(50, dtype=bool)]).max() < 5 / np.sqrt(steps)
    assert Mechanism(5, 10, 1.0, 1.0, NoiseStream(KEY)).drawn().tolist() == [0, 1, 2, 3, 4]  # no more than all


def test_a_row_that_cannot_be_read_leaves_the_others(config):
    def read(rows):
        if 2 in rows:
            raise ValueError("there is no token to predict")
        return {name: value[torch.as_tensor(rows)] for name, value in reader()(np.arange(ROWS)).items()}

    def moved(stream):
        session = (net := Net()).session()
        mechanism = Mechanism(ROWS, ROWS, float("inf"), 0.0, stream)
        per_example.train(net, read, session, replace(config, local_steps=1), np.random.default_rng(0), mechanism)
        return [p.detach() for p in session.parameters]

    without = SimpleNamespace(uniform=lambda n: np.isin(np.arange(n), 2) * 2.0)  # the coin of row 2 does not fall
    torch.testing.assert_close(moved(NoiseStream(KEY)), moved(without), rtol=1e-5, atol=1e-6)


def looked_at(net, config, **more):
    per_example.check(net, reader(), ROWS, net.session(**more), config)


REFUSED = {
    "rows that see their mean": (lambda: Net(mix=lambda x: x - x.mean(0)), "depends on the rows beside it"),
    "a norm over the batch": (lambda: Net(norm=lambda: nn.BatchNorm1d(6)), "norm normalises over a batch"),
    "rows in another order": (lambda: Net(mix=lambda x: x.flip(0)), "depends on the rows beside it"),
}


@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_a_model_whose_rows_are_coupled_is_refused(make, reason, config):
    looked_at(Net(), config)
    with pytest.raises(ConfigError, match=reason):
        looked_at(make(), config)


def test_a_weight_that_is_used_outside_its_layer_is_refused(config):
    net = Net()
    net.mix = lambda x: x @ net.hidden.weight
    with pytest.raises(ConfigError, match=r"hidden\.weight is used outside its layer"):
        looked_at(net, config)
    with pytest.raises(ConfigError, match="takes no gradients"):
        looked_at(Net(), config, from_losses=True)


@pytest.mark.parametrize("family, refused", [("distilbert", ""), ("llama", ""), ("deberta-v2", "is not the batch")])
def test_families_are_looked_at_before_they_train(family, refused, model_folder, run_config, tmp_path):
    folder = build(tmp_path, model_folder, family, family == "llama")
    local, instructions, config = exact(folder, 0 if family == "llama" else 2, run_config)
    with local.session(instructions, np.random.default_rng(0)) as session:
        if not refused:
            return per_example.check(local.module, reader(0 if family == "llama" else 2), ROWS, session, config)
        with pytest.raises(ConfigError, match=refused):
            per_example.check(local.module, reader(), ROWS, session, config)


def test_what_an_attacker_sees_of_a_row_stays_below_the_epsilon_claimed(config):
    """An audit: steps with and without a canary of full clip, told apart by the move along its gradient.

    Of all thresholds, the best lower bound on ε (log of true over false positives, less than their 99 % limits allow)
    must stay below what the accountant says; without noise it does not.
    """
    net, games, delta = Net(), 100, 1e-2
    config = replace(config, local_steps=1)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    along = None

    def moved(rows, key, noise):
        nonlocal along
        net.load_state_dict(start)
        session = net.session()
        before = torch.cat([p.detach().flatten().clone() for p in session.parameters])
        mechanism = Mechanism(rows, rows, 0.05, noise, NoiseStream(key))
        per_example.train(net, reader(), session, config, np.random.default_rng(0), mechanism)
        return before - torch.cat([p.detach().flatten() for p in session.parameters])

    def bound(noise):
        scores = np.zeros((2, games))
        for game in range(games if noise else 1):  # without noise all games are the same
            for there in (0, 1):
                key = np.random.default_rng([game, there]).bytes(32)
                # with the divisor of one row less, as both worlds have it
                scores[there, game] = moved(ROWS - 1 + there, key, noise) @ along * (ROWS - 1 + there)
        scores = scores if noise else np.repeat(scores[:, :1], games, axis=1)
        best = 0.0
        for threshold in np.quantile(scores, [0.05, 0.2, 0.5, 0.8, 0.95]):
            hits, alarms = (scores[1] > threshold).sum(), (scores[0] > threshold).sum()
            least = scipy.stats.beta.ppf(0.01, hits, games - hits + 1) if hits else 0.0
            most = scipy.stats.beta.ppf(0.99, alarms + 1, games - alarms) if alarms < games else 1.0
            best = max(best, np.log(max(least - delta, 1e-12) / most))
        return best

    with_it, without = moved(ROWS, KEY, 0.0) * ROWS, moved(ROWS - 1, KEY, 0.0) * (ROWS - 1)
    along = (with_it - without) / (with_it - without).norm()
    claimed = gaussian_epsilon(1.0, delta)
    assert 0 < bound(1.0) < claimed < bound(0.0)
