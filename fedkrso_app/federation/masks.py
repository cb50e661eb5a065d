"""A node's part in secure sums, between Flower's messages and :mod:`federation.sealing`.

What it keeps from one message to the next is in ``context.state``, in the SuperNode's memory and gone with it: its
private key for this run's masks, and of the newest round what it takes to answer for it.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedkrso_app.config import Config
from fedkrso_app.federation import sealing, tallies
from fedkrso_app.federation.discretion import Declined
from fedkrso_app.federation.layout import Layout, Words
from fedkrso_app.federation.opened import Opened
from fedkrso_app.federation.policy import Policy, claim
from fedkrso_app.federation.released import add_share
from fedkrso_app.federation.workplace import Reply, Summed, Workplace
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.protocol import TALLY, TRAIN, Instructions
from fedkrso_app.records.schema import Schema
from fedkrso_app.records.sealed import Roster, Sealed, Shares, Unmask
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.strategies.secure import SecureSums

logger = logging.getLogger("flwr")

_STATE, _ROUND = "masks", "masked-round"  # records of the context's state
_PLACES = ("model", "model-revision", "dataset", "dataset-revision")  # with a commit where it is known
_TENS = 10  # seconds to which a training time is rounded up


def key_of(context: Any, policy: Policy, run: str) -> tuple[bytes, bytes]:
    """This node's public key for the masks of ``run``, made if it has none, and its signature."""
    if _STATE not in context.state:
        context.state[_STATE] = ConfigRecord({"key": sealing.new_key()})
    key = sealing.public(context.state[_STATE]["key"])
    return key, policy.sign(claim(run, context.node_id, key))


def lost_key(context: Any) -> bool:
    """Whether this node's process is not the one that joined: it says so with a new key (:func:`key_of`)."""
    return _STATE not in context.state


@dataclass(frozen=True)
class Session:
    """A message under masks that this node takes part in, found to be sound before any work is done."""

    context: Any
    roster: Roster
    place: int
    ctx: bytes

    def seal(self, vector: np.ndarray, tail: np.ndarray) -> Sealed:
        key = self.context.state[_STATE]["key"]
        return sealing.seal(vector, tail, key, self.place, self.roster, self.ctx)


def updates(session: Session, layout: Layout, replies: Iterable[Reply], config: Config, round: int) -> RecordDict:
    """The node's update under masks: the sum over those of its partitions that could be trained.

    Raises the last error if none could, and :class:`Declined` where their updates are too large.
    """
    words, seconds, epsilon, problem = Words(layout), 0.0, None, None
    for partition, reply in replies:
        try:
            if isinstance(reply, Exception):
                raise reply
            assert isinstance(reply, Summed)
            told = reply.figures
            words.add(reply.summands, reply.weight, told.train_loss or 0.0, reply.rounding)
            seconds += told.train_seconds
            epsilon = max(epsilon or 0.0, told.epsilon) if told.epsilon is not None else epsilon
        except Exception as error:
            logger.error("partition %d failed and is not in this node's sum", partition, exc_info=error)
            problem = error
    if isinstance(problem, OverflowError) and not words.tail[2]:
        raise Declined(
            f"its update is larger than sums of {layout.bits} bits allow for; set a larger secagg.range, or "
            "secagg.bits = 64."
        ) from problem
    if problem and not words.tail[2]:
        raise problem
    tens = math.ceil(seconds / _TENS) * _TENS
    vector, tail = words.finish()
    if config.of(Privacy).unit == "client":
        add_share(vector, config, session.roster.threshold, session.place, round)
    return replace(session.seal(vector, tail), seconds=tens, epsilon=epsilon).records()


def tallied(session: Session, schema: Schema, replies: Iterable[Reply]) -> RecordDict:
    """The node's tally under masks, as :func:`tallies.summed` has it. Raises the last error if no partition could be
    judged."""
    good, problem = [], None
    for partition, reply in replies:
        try:
            if isinstance(reply, Exception):
                raise reply
            assert isinstance(reply, RecordDict)
            good.append(wire.unpack(protocol.arrays(reply, TALLY), schema)["tally"])
        except Exception as error:
            logger.error("partition %d could not be judged and is not in this node's sum", partition, exc_info=error)
            problem = error
    if problem and not good:
        raise problem
    return session.seal(*tallies.summed(good)).records()


def model_of(context: Any, place: Workplace) -> str:
    """The digest of W^0, computed once: it takes seconds for a large model, and each message may meet a new process."""
    state, name = context.state[_STATE], place.config.model
    if state.get("name") != name:
        state["name"], state["model"] = name, place.digest
    return state["model"]


def enter(
    roster: Roster,
    context: Any,
    policy: Policy,
    config: Config,
    instructions: Instructions,
    held: Sequence[int],
    kind: str,
    story: str,
    shapes: str,
) -> Session:
    """Check the ``roster`` of a message (``kind``: train or evaluate) that asks for some of the partitions that this
    node ``held``. ``story`` is as :func:`story_of` tells it, ``shapes`` says what is sealed.

    Updates are sealed by round, and tallies by version: those of one version are the same in every round. Raises
    :class:`Declined`.
    """
    number = instructions.round if kind == TRAIN else instructions.version
    least = max(policy.least, config.of(SecureSums).min_cohort)
    key = context.state[_STATE]["key"]
    place = sealing.place_of(roster, key, instructions.partitions, least)
    if roster.parties[place].node != context.node_id:
        raise Declined("the roster has this node's key under another node's id.")
    policy.verify(instructions.run, roster.parties)
    opened = Opened(instructions.run, held[0], kind)
    opened.enter(number, instructions.version, sealing.members(roster).hex(), roster.session.hex())
    ctx = sealing.context(roster, number, kind, shapes, story)
    context.state[_ROUND] = ConfigRecord(
        {
            "run": instructions.run,
            "kind": kind,
            "round": number,
            "version": instructions.version,
            "partition": held[0],
            "session": roster.session,
            "context": ctx,
            "place": place,
            "keys": roster.keys,
            "least": max(roster.threshold, least),
        }
    )
    return Session(context, roster, place, ctx)


def story_of(instructions: Instructions, history: str, model: str, config: Config) -> str:
    """What the nodes of a round must all have been told, the same at the server: W^0 and every entry since, all
    settings but where the hub's model and data are, and the round's instructions. A server that trains one node at
    other settings, or on other rows, than the rest would read its update off the sum."""
    settings = {key: value for key, value in config.to_dict().items() if key not in _PLACES}
    i = instructions
    return repr((i.run, i.version, i.stamp, sorted(i.method.items()), model, history, sorted(settings.items())))


def unmask(content: RecordDict, context: Any) -> RecordDict:
    """This node's shares of what hides the sum of the survivors, and of no other sum of the round, ever.

    Raises :class:`Declined`.
    """
    asked = Unmask.read(content)
    if _ROUND not in context.state or context.state[_ROUND]["session"] != asked.session:
        raise Declined("this node has sealed nothing in the session that is to be opened.")
    sealed = context.state[_ROUND]
    keys = sealed["keys"]
    least = max(sealed["least"], Policy.of(context.node_config).least)
    sealing.survivors_of(asked.survivors, len(keys), least)
    bundles = dict(zip(asked.survivors, asked.bundles, strict=True))
    key = context.state[_STATE]["key"]
    shares = sealing.answer(asked.survivors, bundles, key, sealed["place"], keys, sealed["context"])
    statement = sealing.digest(sealed["context"], repr(asked.survivors), *asked.bundles).hex()
    Opened(sealed["run"], sealed["partition"], sealed["kind"]).note(sealed["round"], sealed["version"], statement)
    return Shares(asked.session, shares).content()
