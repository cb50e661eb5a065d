"""How a node answers a server's messages: joining, and training and judging at the version asked for."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Message, RecordDict

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.projection import probe
from fedkrso_app.data import hub
from fedkrso_app.federation import masks
from fedkrso_app.federation.discretion import Declined, shown_to_server
from fedkrso_app.federation.evaluation import tally_schema
from fedkrso_app.federation.layout import Layout
from fedkrso_app.federation.policy import Policy
from fedkrso_app.federation.replica import NeedSync
from fedkrso_app.federation.store import NodeStore
from fedkrso_app.federation.workplace import Reply, Summed, Workplace, workplace
from fedkrso_app.records import protocol
from fedkrso_app.records.protocol import TRAIN, Answer, Instructions, Question, Status
from fedkrso_app.records.sealed import Roster
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import parse
from fedkrso_app.training import threads

logger = logging.getLogger("flwr")


def identity(node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """The ids of a node's partitions, ascending, and how many the federation has. Raises ConfigError where they are not
    set or cannot be.

    Node j of N holds ``clients-per-node`` = C of N·C, from C·j on; or those that its own node config names.
    """
    if not isinstance(share := node_config.get("share-errors", False), bool):
        raise ConfigError(f"share-errors = {share!r} is neither true nor false; write it without quotes.")
    if "num-partitions" not in node_config or not ("partition-id" in node_config or "partitions" in node_config):
        raise ConfigError(
            "this node has no partition-id (or partitions='0-4') and num-partitions; set them in the SuperNode's "
            "--node-config."
        )
    total = int(node_config["num-partitions"])
    if "partitions" in node_config:
        text = str(node_config["partitions"])
        if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
            raise ConfigError(f"partitions = {text!r} is no list of partition ids; write for instance '0-4' or '0,3'.")
        pairs = [(int(first), int(last or first)) for first, _, last in (p.partition("-") for p in text.split(","))]
        ids = sorted(id for first, last in pairs for id in range(first, min(last, total) + 1))
        if len(set(ids)) < len(ids) or any(last < first for first, last in pairs):
            raise ConfigError(f"partitions = {text!r} names a partition twice or none; write for instance '0-4'.")
        held = tuple(ids)
    else:
        each, node = int(run_config.get("clients-per-node", 1)), int(node_config["partition-id"])
        held, total = tuple(range(each * node, each * (node + 1))), each * total
    if not 0 <= held[-1] < total:
        raise ConfigError(f"partition {held[-1]} is not below the federation's {total} (num-partitions).")
    return held, total


def workplace_of(context: Any, config: Config, run: str, held: tuple[int, ...], total: int) -> Workplace:
    """That of a node with its :func:`identity`, in a run with this ``config``. A ``data-dir`` of its own wins over the
    run's, and is its own share as a whole."""
    config = hub.at(config, NodeStore(run).commits())
    threads.hold(config.torch_threads)
    if "data-dir" not in context.node_config:
        return bounded(workplace(run, config, total), context.node_config)
    folder = str(context.node_config["data-dir"])
    if len(held) > 1 and "{partition}" not in folder:
        raise ConfigError(
            f"this node holds {len(held)} partitions and one data-dir = {folder!r}; write {{partition}} into it where "
            "the folders of the partitions differ."
        )
    folders = tuple((partition, folder.replace("{partition}", str(partition))) for partition in held)
    return bounded(workplace(run, replace(config, data_dir=folders[0][1]), total, folders), context.node_config)


def bounded(place: Workplace, node_config: Mapping[str, Any]) -> Workplace:
    """``place`` with the node's own bound on ε."""
    if place.private:
        place.private.most = Policy.of(node_config).max_epsilon
    return place


def join(message: Message, context: Any) -> Answer:
    """Say who this node is and what it holds, once its settings, data and model are known to be good."""
    asked, answer = Question.read(message.content), Answer()
    try:
        policy, config = Policy.of(context.node_config), parse(context.run_config)
        policy.check(config)
        held, total = identity(context.node_config, context.run_config)
        answer = Answer(held, total)
        NodeStore(asked.run).pin(asked.commits)
        place = workplace_of(context, config, asked.run, held, total)
        place.check("train", held)
        if place.config.evaluate == "clients":
            try:
                place.check("validation", held)
            except ConfigError as error:
                raise ConfigError(f"evaluate = 'clients' reads validation rows here, and {error}") from None
        if asked.probe != probe():
            raise ConfigError(
                f"numpy generates different projections than the server's ({probe()}); install the server's numpy."
            )
        if asked.model not in ("", place.digest):
            classes = ", ".join(place.task.classes)
            labels = f" or label names ({classes}), which the key labels settles for all" if classes else ""
            raise ConfigError(f"model = {place.config.model!r} has other weights than the server's{labels}.")
        if place.private:
            place.private.check(held)
        version = place.store.version
        dataset = "" if "data-dir" in context.node_config else hub.rows_of(place.config)
        answer = replace(answer, model=place.digest, version=version, stamp=place.store.stamp(version), dataset=dataset)
        if not config.secure_aggregation:
            return answer
        key, signature = masks.key_of(context, policy, asked.run)
        masks.model_of(context, place)  # now that it is known
        return replace(answer, key=key, signature=signature)
    except ConfigError as error:
        return replace(answer, error=shown_to_server(error, context.node_config))


def up_to_date(
    message: Message, context: Any, work: Callable[[Workplace, Sequence[int], Instructions], Iterator[Reply]]
) -> RecordDict:
    """Bring W to the version that a train or evaluate message names and do the ``work`` of its partitions there; or ask
    to be brought up to date, or say that the key for masks is lost.

    Raises :class:`Declined` where this node does not take part in what the message asks for."""
    policy, config = Policy.of(context.node_config), parse(context.run_config)
    policy.check(config)
    instructions = Instructions.read(message.content, message.metadata.message_type)
    held, total = identity(context.node_config, context.run_config)
    place = workplace_of(context, config, instructions.run, held, total)
    partitions = instructions.partitions or held
    if strangers := set(partitions) - set(held):
        raise Refused(f"this node does not hold partition {min(strangers)}")
    instructions = replace(instructions, partitions=tuple(partitions))  # a clip is shared by those that are trained
    if instructions.afresh and place.store.version >= 0:  # the server has found that these files are not its run's
        place.forget()
        place = workplace_of(context, config, instructions.run, held, total)
    has_key = config.secure_aggregation and not masks.lost_key(context)
    if has_key and not place.store.begins(masks.model_of(context, place)):  # weights here may be of another W^0
        place.forget()
        place = workplace_of(context, config, instructions.run, held, total)
    try:
        place.take(message.content, instructions)
        history = place.history(instructions.version) if config.secure_aggregation else ""
    except NeedSync:
        return RecordDict({"status": Status(place.replica.version, need_sync=True).record()})
    if config.secure_aggregation:
        training = message.metadata.message_type == TRAIN
        if not training and config.evaluate != "clients":
            raise Declined("this node judges no model in this run: evaluate is not 'clients'.")
        if masks.lost_key(context):
            signed = masks.key_of(context, policy, instructions.run)
            return RecordDict({"status": Status(instructions.version, False, *signed).record()})
        roster, schema = Roster.read(message.content), tally_schema(place.task)
        layout = Layout(place.method, instructions.round, instructions.method, roster.partitions) if training else None
        story = masks.story_of(instructions, history, masks.model_of(context, place), config)
        about = message.metadata.message_type, story, str(layout or schema)
        session = masks.enter(roster, context, policy, config, instructions, held, *about)
        replies = work(place, partitions, instructions)
        if layout:
            sealed = masks.updates(session, layout, replies, config, instructions.round)
        else:
            sealed = masks.tallied(session, schema, replies)
        return RecordDict({"status": Status(instructions.version).record(), **sealed})
    answers = {}
    for partition, reply in work(place, partitions, instructions):
        assert not isinstance(reply, Summed)
        if isinstance(reply, Exception):
            if len(partitions) == 1:
                raise reply
            logger.error("partition %d failed", partition, exc_info=reply)
            reply = protocol.failed(shown_to_server(reply, context.node_config))
        answers[partition] = reply
    return protocol.together(answers)
