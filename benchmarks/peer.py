"""The common pattern: a plain Flower FedAvg app that builds its model inside every ``train`` and sends the whole state
both ways. Model, partitions, batches, number of steps and evaluation are those of this app's FedFFT; torch's AdamW
trains every parameter. Rows and partitions are kept between messages, as in Flower's templates; the model is not.
"""

import functools
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedkrso_app import data
from fedkrso_app.config import Config
from fedkrso_app.core.projection import stream
from fedkrso_app.federation import evaluation
from fedkrso_app.strategies import parse
from fedkrso_app.strategies.fedfft import FedFFTSettings
from fedkrso_app.training import metrics
from fedkrso_app.training.model import LoadedModel, load

client, server = ClientApp(), ServerApp()


def build(config: Config) -> LoadedModel:
    task = data.resolve(config)
    return load(config.model, task.num_labels, config.seed, task.classes)


@functools.lru_cache(maxsize=1)
def shares(config: Config, partitions: int) -> list[Any]:
    task = data.resolve(config)
    rows = data.load(task, config.data_dir, "train")
    return data.partition(rows, task, partitions, config.partition, config.dirichlet_alpha, config.draw)


def restore(config: Config, record: ArrayRecord) -> LoadedModel:
    loaded = build(config)
    loaded.module.load_state_dict(record.to_torch_state_dict())
    return loaded


def fit(module: Any, batches: Any, config: Config) -> float:
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.of(FedFFTSettings).learning_rate)
    module.train()
    total = 0.0
    for _ in range(config.local_steps):
        loss = module(**next(batches)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / config.local_steps


def pack(module: Any) -> ArrayRecord:
    return ArrayRecord(module.state_dict())


@client.train()
def train(message: Message, context: Context) -> Message:
    config, node = parse(context.run_config), context.node_config
    partition, partitions = int(node["partition-id"]), int(node["num-partitions"])
    task = data.resolve(config)
    loaded = restore(config, message.content.array_records["arrays"])
    rows = data.load(task, config.data_dir, "train").select(shares(config, partitions)[partition])
    round = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    rng = stream(config.seed, "client", round, partition)
    batches = data.batches(rows, task, loaded.tokenizer, config.batch_size, config.max_length, rng)
    torch.manual_seed(int(rng.integers(2**63)))  # where FedFFT does, so that the batches are FedFFT's
    loss = fit(loaded.module, batches, config)
    figures = MetricRecord({"num-examples": len(rows), "train-loss": loss})
    return Message(RecordDict({"arrays": pack(loaded.module), "metrics": figures}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = parse(context.run_config)
    task, loaded = data.resolve(config), build(config)
    validation = data.load(task, config.data_dir, "validation")
    tokens = evaluation.batch_tokens(next(loaded.module.parameters()).device.type, 0)

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        loaded.module.load_state_dict(arrays.to_torch_state_dict())
        batches = data.evaluation_batches(validation, task, loaded.tokenizer, tokens, config.max_length)
        score, loss = metrics.result(task.metric, metrics.tally(loaded.module, batches, task.metric, task.num_labels))
        return MetricRecord({"metric": score, "loss": loss})

    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.start(grid, pack(loaded.module), config.num_server_rounds, config.round_timeout, evaluate_fn=evaluate)
