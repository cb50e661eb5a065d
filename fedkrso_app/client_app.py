"""Message -> replica at W^t -> local update -> reply.

What a message needs is imported when it comes: a device meets each one with a fresh process, and whoever only leaves
should not wait for the libraries that train.
"""

import logging

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkrso_app.federation import discretion

logger = logging.getLogger("flwr")

app = ClientApp(mods=[discretion.careful])


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say who this node is and what it holds, once its settings, data and model are known to be good."""
    from fedkrso_app.federation import client

    return Message(client.join(message, context).content(), reply_to=message)


@app.query("leave")
def leave(message: Message, context: Context) -> Message:
    """Remove this run's files: it is over."""
    from fedkrso_app.federation.store import NodeStore

    if released := NodeStore(str(message.content.config_records["leave"]["run"])).clear():
        logger.info("What partitions keep of the model to themselves is in %s", released)
    return Message(RecordDict(), reply_to=message)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Say what opens the sum of those whose updates have arrived, where updates travel under masks."""
    from fedkrso_app.federation import masks

    return Message(masks.unmask(message.content, context), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this node's share, or on those of its partitions; the reply has the updates."""
    from fedkrso_app.federation import client

    return Message(client.up_to_date(message, context, client.Workplace.train), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge the model on this node's share of the validation rows."""
    from fedkrso_app.federation import client

    return Message(client.up_to_date(message, context, client.Workplace.evaluate), reply_to=message)
