"""What updates tell the server, and what is left of it in sums of updates: attacks measured on the clients' own code.

    python -m benchmarks.attacks [labels] [tokens] [--json]

labels  The share of label 1 among a client's rows, from the change of the output layer's bias in one update: FedKRSO,
        10 steps on 100 rows of the embedded task. ρ over 40 clients; "error" of a share is that of a line through the
        other clients' points, and "guess" that of their mean. Of sums of five updates: a member's share, the cohort's.
tokens  The word of a batch with one row, "<s> word </s>", from the update of one step. FedFFT: which row of the
        embedding moved. FedKRSO (rank 4): for each word of the vocabulary, how well the projected inputs that it would
        give explain the accumulators, by least squares over all layers. "first": how often the true word is the best
        of all; of sums of five, that of a given member, and of anybody in it.

benchmarks/audit.py has the attacks on what differential privacy bounds: membership, and a canary.
"""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import show
from fedkrso_app import data
from fedkrso_app.config import Config
from fedkrso_app.core.accounting import Releases, epsilon
from fedkrso_app.core.noise import NoiseStream, fresh_key
from fedkrso_app.core.projection import projection, stream
from fedkrso_app.core.subspace import matrix
from fedkrso_app.data.batching import batch, lengths
from fedkrso_app.runs.compare import settings
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Local
from fedkrso_app.strategies.fedkrso import FedKRSOSettings
from fedkrso_app.training import loop, model, per_example
from fedkrso_app.training.loop import Session
from fedkrso_app.training.per_example import Mechanism
from fedkrso_app.training.shapes import Shapes

Row = dict[str, Any]
Update = Mapping[str, np.ndarray]
COHORT = 5


# What a client sends


def client(loaded: model.LoadedModel, config: Config, partition: int, train: Callable[..., Any]) -> Update:
    """The update of one client's round from W^0: ``train`` gets its half, its session and its generator."""
    own = copy.deepcopy(loaded)
    method = make(config, Shapes.of(own))
    half, rng = method.local(own), stream(config.seed, "client", 1, partition)
    with half.session({**method.instructions(1), "partition": partition}, rng) as session:
        train(half, session, rng)
        return session.update()


def sums(updates: Sequence[Update], cohorts: Sequence[Sequence[int]]) -> list[Update]:
    """What secure sums leave to the server of each cohort: the sum of its members' arrays, which have equal shapes."""
    return [{name: sum(updates[i][name] for i in cohort) for name in updates[cohort[0]]} for cohort in cohorts]


def cohorts(clients: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.permutation(clients)[:COHORT] for _ in range(count)]


# Labels


def labels(clients: int = 40, rows: int = 100, steps: int = 10, changes: Sequence[str] = ()) -> list[Row]:
    """Clients whose shares of label 1 are drawn evenly from 0 to 1; ``changes`` of the settings, KEY=VALUE."""
    private = {"privacy.unit": "example", "privacy.clip": 1.0, "privacy.noise": 1.0}
    config = parse(
        settings(None, [f"local-steps={steps}", f"fedkrso.interval={steps}", "fedkrso.num-seeds=1", *changes])
    )
    by_row = parse(config.to_dict() | private)
    task = data.resolve(config)
    loaded, examples = model.of_run(config, task), data.load(task, config.data_dir, "train")
    answers, rng = np.array(examples[task.label]), np.random.default_rng(0)
    shares = rng.uniform(size=clients)
    ones = np.round(shares * rows).astype(int)
    held = [
        np.concatenate(
            [rng.choice(np.flatnonzero(answers == 1), k), rng.choice(np.flatnonzero(answers == 0), rows - k)]
        )
        for k in ones
    ]
    shares, start = ones / rows, flat_head(loaded)

    def one(config: Config, partition: int) -> Update:
        mine = examples.select(held[partition])

        def train(half: Local, session: Session, rng: np.random.Generator) -> None:
            if config is by_row:
                mechanism = Mechanism(rows, config.batch_size, 1.0, 1.0, NoiseStream(fresh_key()))
                read = lambda chosen: batch(mine, chosen, task, loaded.tokenizer, config.max_length)  # noqa: E731
                per_example.train(half.module, read, session, config, rng, mechanism, lengths(mine, task))
            else:
                batches = data.batches(mine, task, loaded.tokenizer, config.batch_size, config.max_length, rng)
                loop.train(half.module, batches, session, config, rng)

        return {"head": client(loaded, config, partition, train)["head"] - start}

    def points(updates: Sequence[Update]) -> np.ndarray:
        return np.array([bias_difference(update["head"]) for update in updates])

    plain, noisy = ([one(c, partition) for partition in range(clients)] for c in (config, by_row))
    drawn = cohorts(clients, 200)
    summed = points(sums(plain, drawn))
    spent = epsilon([Releases(1.0, min(1.0, config.batch_size / rows), steps)], 1e-3)
    return [
        line("one update", points(plain), shares),
        line(f"sum of {COHORT}: a member", summed, shares[[cohort[0] for cohort in drawn]]),
        line(f"sum of {COHORT}: the cohort", summed, np.array([shares[cohort].mean() for cohort in drawn])),
        line(f"one update, example-level ε = {spent:.1f}", points(noisy), shares),
    ]


def bias_difference(head: np.ndarray) -> float:
    """How much more the bias of label 1 rose than that of label 0: the last two values of the head."""
    return float(head[-1] - head[-2])


def flat_head(loaded: model.LoadedModel) -> np.ndarray:
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in loaded.head.values()])


def line(name: str, x: np.ndarray, share: np.ndarray) -> Row:
    """How well a straight line through the other points gives each share."""
    errors, guesses = [], []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        fitted = np.polyfit(x[others], share[others], 1)
        errors.append(abs(np.clip(np.polyval(fitted, x[i]), 0, 1) - share[i]))
        guesses.append(abs(share[others].mean() - share[i]))
    return {"seen": name, "ρ": float(np.corrcoef(x, share)[0, 1]), "error": np.mean(errors), "guess": np.mean(guesses)}


# Tokens


def tokens(count: int = 20, changes: Sequence[str] = ()) -> list[Row]:
    """``count`` clients, each with one word."""
    base = settings(None, ["local-steps=1", "batch-size=1", "fedkrso.interval=1", "fedkrso.num-seeds=1", *changes])
    task = data.resolve(parse(base))
    loaded = model.of_run(parse(base), task)
    words = [id for id in range(len(loaded.tokenizer)) if id not in loaded.tokenizer.all_special_ids]
    chosen = np.random.default_rng(1).permutation(words)[:count]
    found: list[Row] = []
    for strategy, score in (("fedfft", embedding_scores), ("fedkrso", residual_scores)):
        config = parse(base | {"strategy": strategy})
        updates = [word_update(loaded, config, int(word), label=i % 2) for i, word in enumerate(chosen)]
        start = word_update(loaded, config, None)
        updates = [{n: u[n] - start[n] if n in start else u[n] for n in u if n != "seeds"} for u in updates]
        drawn = cohorts(count, 2 * count)
        whole = score(loaded, config, words)
        one = [words[int(np.argmax(whole(update)))] == word for update, word in zip(updates, chosen, strict=True)]
        of_sum = [
            words[int(np.argmax(whole(s)))] == chosen[c[0]] for s, c in zip(sums(updates, drawn), drawn, strict=True)
        ]
        some = [words[int(np.argmax(whole(s)))] in chosen[c] for s, c in zip(sums(updates, drawn), drawn, strict=True)]
        common = {"words": len(words)}
        found += [
            {"seen": f"{strategy}: one update", "first": np.mean(one), "chance": 1 / len(words), **common},
            {
                "seen": f"{strategy}: sum of {COHORT}, a member's",
                "first": np.mean(of_sum),
                "chance": 1 / len(words),
                **common,
            },
            {
                "seen": f"{strategy}: sum of {COHORT}, anybody's",
                "first": np.mean(some),
                "chance": COHORT / len(words),
                **common,
            },
        ]
    return found


def word_batch(loaded: model.LoadedModel, word: int, label: int = 0) -> dict[str, Tensor]:
    t = loaded.tokenizer
    ids = torch.tensor([[t.bos_token_id, word, t.eos_token_id]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([label])}


def word_update(loaded: model.LoadedModel, config: Config, word: int | None, label: int = 0) -> Update:
    """A client's update from one step on one word; of no word, the arrays that it begins with."""
    if word is None:
        own = copy.deepcopy(loaded)
        return make(config, Shapes.of(own)).local(own).state()

    def train(half: Local, session: Session, rng: np.random.Generator) -> None:
        loop.train(half.module, iter([word_batch(loaded, word, label)]), session, config, rng)

    return client(loaded, config, 0, train)


Scores = Callable[[Update], np.ndarray]  # one for each word, the best highest


def embedding_scores(loaded: model.LoadedModel, config: Config, words: Sequence[int]) -> Scores:
    """FedFFT: the largest change in a word's row of the embedding."""
    parameters = sorted(loaded.module.named_parameters())
    start = 0
    for name, parameter in parameters:
        if name.endswith("word_embeddings.weight"):
            rows, width = parameter.shape
            break
        start += parameter.numel()
    return lambda update: np.abs(update["parameters"][start : start + rows * width]).reshape(rows, width)[words].max(1)


def residual_scores(loaded: model.LoadedModel, config: Config, words: Sequence[int]) -> Scores:
    """FedKRSO: minus the share of the accumulators that no dY explains in B = Σ_τ dY_τ (P x_τ)ᵀ, with the inputs x_τ
    that "<s> word </s>" gives each layer at W^0."""
    seed, rank = int(make(config, Shapes.of(loaded)).pool(1)[0]), config.of(FedKRSOSettings).rank
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given[0].detach()))
        for name, layer in loaded.targets.items()
    ]
    with torch.no_grad():
        batches = [word_batch(loaded, word) for word in words]
        loaded.module.eval()(**{key: torch.cat([each[key] for each in batches]) for key in batches[0]})
    for hook in hooks:
        hook.remove()
    beyond, outputs = {}, {}
    for name, layer in loaded.targets.items():
        m, n = matrix(layer).shape
        P = torch.from_numpy(projection(seed, name, rank, n, config.of(FedKRSOSettings).projection))
        basis = torch.linalg.qr((inputs[name] @ P.T).transpose(1, 2))[0]  # words × r × 3 tokens
        beyond[name], outputs[name] = (torch.eye(rank) - basis @ basis.transpose(1, 2)).numpy(), m

    def scores(update: Update) -> np.ndarray:
        total, begin = np.zeros(len(words)), 0
        for name, m in outputs.items():
            B = update["accumulators"][0, begin : begin + m * rank].reshape(m, rank)
            begin += m * rank
            total -= np.square(np.einsum("wrs,ms->wmr", beyond[name], B)).sum((1, 2)) / max(np.square(B).sum(), 1e-30)
        return total

    return scores


PARTS = {"labels": labels, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    torch.set_num_threads(1)
    for name in a.parts or PARTS:
        show(name, PARTS[name](), a.json)


if __name__ == "__main__":
    main()
