"""The engine in one process: every client of a run here, one after another, to the same bits as in Flower's engine."""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedkrso_app.config import ConfigError
from fedkrso_app.training import threads

_APP_RAISED = 2  # Flower's code of an error in a ClientApp


def nodes_of(clients: int, each: int) -> int:
    """How many nodes hold ``clients`` where one holds ``each``. Raises ConfigError where that leaves a rest."""
    if clients % each:
        raise ConfigError(f"clients-per-node = {each} does not divide {clients} clients evenly; choose another number.")
    return clients // each


class LocalGrid:
    """A Flower grid of nodes with ids 100, 101, … that hold ``clients`` partitions, ``clients-per-node`` each, and run
    the ClientApp ``app`` in this process. Raises ConfigError where that leaves a rest.

    A client works when its reply is pulled, so no more replies are in memory than the server asks for at once.
    """

    def __init__(
        self, app: Callable[[Message, Context], Message], run_config: Mapping[str, Any], clients: int, run_id: int = 1
    ) -> None:
        # Flower's own processes set these before any message is made.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, 1
        self.app = app
        nodes = nodes_of(clients, int(run_config["clients-per-node"]))
        self.contexts = {
            100 + i: Context(
                run_id=run_id,
                node_id=100 + i,
                node_config={"partition-id": i, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(nodes)
        }
        self._ids = (f"message-{number}" for number in itertools.count())
        self._unanswered: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages; returns their ids."""
        pushed = {next(self._ids): message for message in messages}
        for id, message in pushed.items():
            message.metadata.__dict__["_message_id"] = id
        self._unanswered |= pushed
        return list(pushed)

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        """The replies to the messages ``ids`` that were not pulled before."""
        replies = [self.reply(self._unanswered.pop(id)) for id in ids if id in self._unanswered]
        return [reply for reply in replies if reply is not None]

    def reply(self, message: Message) -> Message | None:
        """What the node answers; an error message where its app raises."""
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            logging.getLogger("flwr").error("ClientApp raised an exception", exc_info=error)
            return Message(Error(code=_APP_RAISED, reason=str(error)), reply_to=message)


def play(server: Callable[[Any, Context], None], grid: LocalGrid, run_config: Mapping[str, Any]) -> None:
    """One run of the ServerApp ``server`` on ``grid``. Raises what the app raises; torch has its threads of before."""
    with threads.given_back():
        server(grid, Context(TaskIdentity.run_id, TaskIdentity.node_id, {}, RecordDict(), dict(run_config)))
