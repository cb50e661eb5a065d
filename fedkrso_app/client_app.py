"""Message -> replica at W^t -> local update -> reply."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkrso_app.federation import client, discretion, masks

app = ClientApp(mods=[discretion.careful])


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say who this node is and what it holds, once its settings, data and model are known to be good."""
    return Message(client.join(message, context).content(), reply_to=message)


@app.query("leave")
def leave(message: Message, context: Context) -> Message:
    """Remove this run's files: it is over."""
    client.leave(message, context)
    return Message(RecordDict(), reply_to=message)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Say what opens the sum of those whose updates have arrived, where updates travel under masks."""
    return Message(masks.unmask(message.content, context), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this node's share, or on those of its partitions; the reply has the updates."""
    return Message(client.up_to_date(message, context, client.Workplace.train), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge the model on this node's share of the validation rows."""
    return Message(client.up_to_date(message, context, client.Workplace.evaluate), reply_to=message)
