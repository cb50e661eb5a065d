"""Options that go with many methods: FedProx, server optimizers, SCAFFOLD.

Each is a class laid over a method's own (:func:`applied`), so that no method knows of them:

    FedProx (arXiv:1812.06127)               a client's gradient + µ (w − w^t)
    FedAvgM (1909.06335), FedAdam, FedYogi   w^{t+1} = w^t + the optimizer's step along mean_i(w_i − w^t)
      (2003.00295, Alg. 2)
    SCAFFOLD (1910.06378)                    every local step also moves by its share of d − d_i

The last two go by the mean difference to the start of the round, so they need a method whose entries are the means of
its replies and nothing else, and a server that knows that start.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedkrso_app.config import Config, ConfigError, Settings, choice, need, need_positive
from fedkrso_app.core.flat import flatten, storage, unflatten
from fedkrso_app.core.rso import RSO
from fedkrso_app.data import tasks
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.strategies import secure
from fedkrso_app.strategies.base import Arrays, Local, Means, Method
from fedkrso_app.strategies.label_skew import AdjustedLocal, HeadRateLocal
from fedkrso_app.strategies.local_head import LocalHead, LocalHeadLocal
from fedkrso_app.training.loop import Session, rate_factors
from fedkrso_app.training.model import LoadedModel
from fedkrso_app.training.shapes import Shapes

MOMENTS = {"fedavgm": ("m",), "fedadam": ("m", "v"), "fedyogi": ("m", "v")}  # that the server keeps


@dataclass(frozen=True)
class ClientOptions(Settings):
    table = "client"
    head: str
    proximal: float  # µ of FedProx
    correction: str
    head_rate: float
    logit_adjustment: float  # τ

    def __post_init__(self) -> None:
        choice("client.head", self.head, ["auto", "shared", "local"])
        need(0 <= self.proximal < float("inf"), "client.proximal", self.proximal, "0 (off) or above")
        choice("client.correction", self.correction, ["none", "scaffold"])
        need_positive("client.head-rate", self.head_rate)
        need(
            0 <= self.logit_adjustment < float("inf"),
            "client.logit-adjustment",
            self.logit_adjustment,
            "0 (off) or above",
        )


@dataclass(frozen=True)
class ServerOptions(Settings):
    table = "server"
    optimizer: str
    learning_rate: float  # of fedavgm
    adaptive_learning_rate: float  # of fedadam and fedyogi
    momentum: float  # β1
    beta2: float
    tau: float

    def __post_init__(self) -> None:
        choice("server.optimizer", self.optimizer, ["mean", *MOMENTS])
        need_positive("server.learning-rate", self.learning_rate)
        need_positive("server.adaptive-learning-rate", self.adaptive_learning_rate)
        need(0 <= self.momentum < 1, "server.momentum", self.momentum, "at least 0 and below 1")
        need(0 <= self.beta2 < 1, "server.beta2", self.beta2, "at least 0 and below 1")
        need_positive("server.tau", self.tau)


def check(method: type[Method], config: Config) -> None:
    """Raise :class:`ConfigError` where an option does not go with ``method`` or with the other settings."""
    client, server = config.of(ClientOptions), config.of(ServerOptions)
    if client.proximal and method.zeroth_order:
        raise _no_gradients(config)
    if client.head_rate != 1 and method.zeroth_order:
        raise ConfigError(
            f"client.head-rate = {client.head_rate:g} does not go with {config.strategy}, which has "
            "zeroth.head-learning-rate: set it to 1."
        )
    if client.logit_adjustment and tasks.declared(config).num_labels < 2:
        raise ConfigError(
            f"client.logit-adjustment = {client.logit_adjustment:g} is for classifiers, and task = {config.task!r} "
            "has no classes: set it to 0."
        )
    asked = {"server.optimizer": (server.optimizer, "mean"), "client.correction": (client.correction, "none")}
    for key, (value, off) in asked.items():
        if value == off:
            continue
        if method.conclude is not Method.conclude or method.summands is not Method.summands:
            raise ConfigError(
                f"{key} = {value!r} does not go with {config.strategy}, whose ledger entries are more than the means "
                f"of its replies: set it to {off!r}."
            )
        if config.evaluate != "server":
            raise ConfigError(
                f"{key} = {value!r} needs evaluate = 'server': it goes by differences to a start that only a server "
                "with the model knows."
            )
    if client.correction != "none" and config.aggregation != "mean":
        raise ConfigError(
            f"client.correction = {client.correction!r} needs aggregation = 'mean': clients correct towards the mean "
            "of what they did."
        )


def _no_gradients(config: Config) -> ConfigError:
    return ConfigError(
        f"client.proximal = {config.of(ClientOptions).proximal:g} does not go with {config.strategy}, which takes no "
        "gradients: set it to 0."
    )


def applied(method: type[Method], config: Config) -> type[Method]:
    """``method`` with the options of ``config`` laid over it; itself where there are none."""
    client, server = config.of(ClientOptions), config.of(ServerOptions)
    if client.logit_adjustment:  # first: the others then see no more of it than the method does
        method = _over(method, None, AdjustedLocal, tau=client.logit_adjustment)
    if client.head_rate != 1:
        method = _over(method, None, HeadRateLocal, head_rate=client.head_rate)
    if client.head == "local" or (client.head == "auto" and method.local_head):
        method = _over(method, LocalHead, LocalHeadLocal)
    if client.correction == "scaffold":
        method = _over(method, Scaffold, ScaffoldLocal)
    if client.proximal:
        method = _over(method, None, ProximalLocal)
    if server.optimizer != "mean":
        method = _over(method, ServerOptimizer, None)
    return method


def _over(method: type[Method], server: Any, client: Any, **given: Any) -> type[Method]:
    """``method`` with the class ``server`` laid over its half there and ``client``, whose settings are ``given``, over
    that beside the model."""
    half = type(client.__name__, (client, method.half), given) if client else method.half
    return type(method.__name__, (server, method) if server else (method,), {"half": half})


class ProximalLocal(Local):
    """FedProx's client half: µ (w − w^t) is added to the gradients of all tensors that travel, after any clipping.

    FedKRSO's are the accumulators along the projection it follows: µ B_k, the gradient of µ/2 ‖B_k‖².
    """

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        mu = self.config.of(ClientOptions).proximal
        shared = {storage(tensor) for tensor in self.shared()}
        with super().session(instructions, rng) as session:  # type: ignore[safe-super]
            if session.from_losses:
                raise _no_gradients(self.config)
            for optimizer in session.optimizers:
                optimizer.register_step_pre_hook(_pull(optimizer, mu, shared))
            yield session


def _pull(optimizer: torch.optim.Optimizer, mu: float, shared: set[int]) -> Callable[..., None]:
    """A hook that adds µ times the displacement since now to the gradients of those parameters that are ``shared``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if storage(p) in shared]
    start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def pull(*_: Any) -> None:
        if isinstance(optimizer, RSO):
            for layer, B in optimizer.followed():
                layer.B.grad.add_(B, alpha=mu)  # type: ignore[union-attr]
            return
        for parameter, before in zip(parameters, start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - before, alpha=mu)

    return pull


class _Moving(Method):
    """A method that knows the states of the newest entry, and so how far the means of a round moved."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.newest: dict[str, np.ndarray] = {}

    @property
    def averaged(self) -> list[str]:
        """The arrays that clients send, in the order of their schema."""
        return list(self.reply.travelling.fields)

    @property
    def _by_difference(self) -> bool:
        """Whether states travel as differences to the newest (:mod:`federation.transforms`), in entries too."""
        return secure.by_difference(self.config)

    def moves(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """What the means ``arrays`` come to as differences to the newest entry, float64."""
        states = [] if self._by_difference else self.reply.named("state")
        means = {name: arrays[name].astype(np.float64) for name in self.averaged if name in arrays}
        return {name: x - self.newest[name] if name in states else x for name, x in means.items()}

    def observe(self, version: int, arrays: Arrays) -> None:
        super().observe(version, arrays)
        self.newest |= {name: arrays[name] for name in self.entry.named("state") if name in arrays}


class ServerOptimizer(_Moving):
    """The server takes a step along the mean difference. Its moments are arrays of role "server"; an array that a round
    did not bring keeps its own. No bias correction, and v begins at τ², as in the paper."""

    @property
    def entry(self) -> Schema:
        entry = super().entry
        moments = {
            f"{moment}.{name}": Field("float32", entry.fields[name].shape, "server")
            for moment in MOMENTS[self.config.of(ServerOptions).optimizer]
            for name in self.averaged
        }
        return replace(entry, fields={**entry.fields, **moments})

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        arrays, kept = super().conclude(means, round), dict(self.kept)  # type: ignore[safe-super]
        for name, move in self.moves(arrays).items():
            step, moments = server_step(self.config.of(ServerOptions), move, kept, name)
            kept |= moments
            # As a change of the mean: at rate 1 without momentum it is 0, and the mean keeps its bits.
            arrays[name] = (arrays[name] + (step - move)).astype(np.float32)
        return arrays | kept


def server_step(
    options: ServerOptions, move: np.ndarray, kept: Arrays, name: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The step (float64) along the mean difference ``move`` of array ``name``, and its new moments (float32)."""
    b1, b2, tau = options.momentum, options.beta2, options.tau
    m = kept.get(f"m.{name}", np.zeros(move.shape)).astype(np.float64)
    if options.optimizer == "fedavgm":
        m = b1 * m + move
        return options.learning_rate * m, {f"m.{name}": m.astype(np.float32)}
    v = kept.get(f"v.{name}", np.full(move.shape, tau**2)).astype(np.float64)
    m, square = b1 * m + (1 - b1) * move, move**2
    v = b2 * v + (1 - b2) * square if options.optimizer == "fedadam" else v - (1 - b2) * square * np.sign(v - square)
    step = options.adaptive_learning_rate * m / (np.sqrt(v) + tau)
    return step, {f"m.{name}": m.astype(np.float32), f"v.{name}": v.astype(np.float32)}


def shares(config: Config, constant: bool) -> np.ndarray:
    """λ_j: each local step's share of the learning rates of all, as :func:`training.loop.train` sets them."""
    rates = np.array(rate_factors(constant, config))
    return rates / max(rates.sum(), 1e-300)


class ScaffoldLocal(Local):
    """SCAFFOLD's client half, in the space of what a session moves: step j adds λ_j (d − d_i).

    The paper's control variates times −Σ_j η_j: d for all, d_i for the client, which it keeps between its rounds
    (option II: d_i ← d_i − d + what its round moved). With SGD it is the paper's method; with Adam the correction is
    one of steps, not of gradients.
    """

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        self.drift = [torch.zeros_like(parameter) for parameter in self.optimized()]
        self.own: Arrays = {}

    def shared(self) -> list[torch.Tensor]:
        return super().shared() + self.drift

    def state(self) -> dict[str, np.ndarray]:
        return {**super().state(), "drift": flatten(self.drift)}  # type: ignore[safe-super]

    def apply(self, arrays: Arrays) -> None:
        super().apply({name: value for name, value in arrays.items() if name != "drift"})  # type: ignore[safe-super]
        if "drift" in arrays:
            unflatten(arrays["drift"], self.drift)

    def adopt(self, own: Arrays) -> None:
        super().adopt(own)
        self.own = own

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        moved, config = self.optimized(), self.config
        before = [parameter.detach().clone() for parameter in moved]
        own = [torch.zeros_like(parameter) for parameter in moved]  # d_i
        if self.own:
            unflatten(self.own["own-drift"], own)
        pull = [d.to(d_i.device) - d_i for d, d_i in zip(self.drift, own, strict=True)]
        with super().session(instructions, rng) as session:  # type: ignore[safe-super]
            each = iter(shares(config, session.constant_rate).tolist())

            @torch.no_grad()
            def correct(*_: Any) -> None:
                share = next(each)
                for parameter, towards in zip(moved, pull, strict=True):
                    parameter.add_(towards, alpha=share)

            session.optimizers[-1].register_step_post_hook(correct)  # the last of a step
            plain = session.update

            def update() -> dict[str, np.ndarray]:
                arrays = {name: value for name, value in plain().items() if name != "drift"}
                steps = [
                    after.detach() - start - towards for after, start, towards in zip(moved, before, pull, strict=True)
                ]
                return {**arrays, "own-drift": flatten(steps)}

            yield replace(session, update=update)


class Scaffold(_Moving):
    """SCAFFOLD's server half: d ← (1 − s) d + s · the mean move, with the share s of clients that a round asks. It
    follows from what the method sends anyway, so nothing more goes up; down goes d."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if any(f.optional for f in super().reply.travelling.fields.values()):  # type: ignore[safe-super]
            raise ConfigError(
                f"client.correction = 'scaffold' does not go with {config.strategy}, whose arrays take turns: set it "
                "to 'none'."
            )

    @property
    def moved(self) -> int:
        """How many values clients send of what they moved."""
        fields = super().reply.travelling.fields  # type: ignore[safe-super]
        return sum(math.prod(map(int, f.shape)) for f in fields.values())

    @property
    def reply(self) -> Schema:
        reply = super().reply  # type: ignore[safe-super]
        return replace(reply, fields={**reply.fields, "own-drift": Field("float32", (self.moved,), "memory")})

    @property
    def entry(self) -> Schema:
        entry = super().entry.travelling
        return replace(entry, fields={**entry.fields, "drift": Field("float32", (self.moved,), "state")})

    @property
    def weights_sizes(self) -> tuple[int, int]:
        weights, rest = super().weights_sizes
        return weights, rest + self.moved

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        arrays = super().conclude(means, round)
        moved = np.concatenate([move.reshape(-1) for move in self.moves(arrays).values()])
        before, s = self.newest["drift"], self.config.fraction_train
        drift = ((1 - s) * before + s * moved).astype(np.float32)
        return {**arrays, "drift": drift}  # no client sends it, so nobody adds a start to it
