"""What a node says to the server when something fails.

Error messages quote what they are about: a cell of a table, the path of a file. A node whose data is its own
(``data-dir`` in its node config) says only what kind of thing failed and keeps the rest in its own log. The node
decides, not the server: ``share-errors=true`` in its node config sends the whole text.
"""

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Error, Message

from fedkrso_app.config import ConfigError

logger = logging.getLogger("flwr")

_RAISED = 2  # Flower's own code for an exception in a ClientApp
_ROOMS = {"fedkrso_app.data": "its data", "fedkrso_app.training.model": "its model"}


class Declined(ConfigError):
    """What this node does not take part in. The text says nothing of its data: the server sees it."""


def shares_errors(node_config: Mapping[str, Any]) -> bool:
    """Whether the texts of errors may leave the node: as ``share-errors`` says, else if the data is the run's."""
    return node_config.get("share-errors", "data-dir" not in node_config) is True


def shown_to_server(error: BaseException, node_config: Mapping[str, Any]) -> str:
    """What the server may know of ``error``. Where that is not its whole text, this node's log has it."""
    if shares_errors(node_config) or isinstance(error, Declined):
        return str(error)
    logger.error("The text of this error stays on this node:", exc_info=error)
    return f"something is wrong with {_kind(error)}; the node's own log says what"


def careful(message: Message, context: Context, handle: Callable[[Message, Context], Message]) -> Message:
    """A mod around all handlers of the ClientApp: Flower would send the text of what they raise."""
    try:
        return handle(message, context)
    except Exception as error:
        if shares_errors(context.node_config) or isinstance(error, Declined):
            raise
        return Message(Error(_RAISED, shown_to_server(error, context.node_config)), reply_to=message)


def _kind(error: BaseException) -> str:
    """What the node should look at: its data, its model, its settings, or the work (with the error's type)."""
    for each in _chain(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            name = frame.f_globals.get("__name__", "")
            for room, thing in _ROOMS.items():
                if name == room or name.startswith(room + "."):
                    return thing
    return "its settings" if isinstance(error, ConfigError) else f"its work ({type(error).__name__})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and those that it came from, also where a message leaves them out."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
