"""Flower's SuperLink and SuperNode with the checks that they lack, for deploy/superlink.sh and deploy/supernode.sh.

    python guarded.py superlink OPTION...         flower-superlink OPTION...
    python guarded.py supernode HASH OPTION...    flower-supernode OPTION..., for one app; HASH "any": for every app

Both, who commands: their ports ask nobody who they are, and every account of the machine reaches loopback. Here all
but /v1/fleet/ and /health takes connections of the program's own account only, by what Linux knows of the socket.

SuperLink, who writes: a node's key signs for the node that sends, but Flower does not compare that node with the author
written into the message it sends, nor ask that it be a reply. With one node's key one could write to the other nodes in
the server's name. Here such a message is refused.

SuperNode, which app: Flower runs whatever app the SuperLink hands out. Here an app (a FAB) whose SHA-256 is not HASH is
refused when it arrives, before it is unpacked, and the server gets Flower's own reply "The FAB could not be verified".

These replace functions inside Flower, so they start only with the versions in which they were tested.
"""

import hashlib
import os
import re
import socket
import struct
import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

TESTED = ("1.39.", "1.40.", "1.41.", "1.42.")


class OwnerOnly:
    """ASGI middleware: 403 for what is not a SuperNode's request and comes from another account or by the proxy."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or scope["path"] == "/health" or scope["path"].startswith("/v1/fleet/"):
            return await self.app(scope, receive, send)
        # With this header scope["client"] is what the header says, not the connection's other end.
        forwarded = any(name == b"x-forwarded-for" for name, _ in scope["headers"])
        if scope["type"] == "http" and not forwarded and account(scope["client"], scope["server"]) == os.getuid():
            return await self.app(scope, receive, send)
        print(f"refused {scope['path']!r} from {scope['client']}: not this account", file=sys.stderr, flush=True)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
            return await send({"type": "http.response.body", "body": b""})
        return await send({"type": "websocket.close"})


def account(client, server, table="/proc/net/tcp") -> int | None:
    """The user id that owns the client's end of an open IPv4 connection on this machine; None: there is none.

    Only an established connection counts (state 01): the kernel shows a socket that was closed as root's.
    """

    def hexadecimal(host, port):
        return f"{struct.unpack('=I', socket.inet_aton(host))[0]:08X}:{port:04X}"

    try:
        ends = [hexadecimal(*client), hexadecimal(*server)]
    except OSError:  # not IPv4
        return None
    for line in Path(table).read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:4] == [*ends, "01"]:
            return int(fields[7])
    return None


def guard_port(side: str) -> None:
    """Commands by this account only."""
    module = import_module(f"flwr.{side}.main")
    create = module.create_app

    def create_guarded(*arguments, **options):
        app = create(*arguments, **options)
        app.add_middleware(OwnerOnly)
        return app

    module.create_app = create_guarded


def guard_authors() -> None:
    """From a node nothing but replies in its own name."""
    from flwr.supercore.error import ApiErrorCode, FlowerError

    if version("flwr").startswith("1.39."):
        from flwr.server.superlink.fleet.message_handler import message_handler as handlers
    else:
        from flwr.superlink.servicer.fleet import fleet_handlers as handlers
    push = handlers.push_messages

    def push_own_replies(request, state):
        for message in request.messages_list:
            written = message.metadata
            if written.src_node_id != request.node.node_id or not written.reply_to_message_id:
                raise FlowerError(
                    ApiErrorCode.NO_PERMISSIONS,
                    f"SuperNode {request.node.node_id} pushed a message of node {written.src_node_id} that replies to "
                    f"{written.reply_to_message_id or 'nothing'!r}",
                )
        return push(request=request, state=state)

    handlers.push_messages = push_own_replies


def guard_app(pin: str) -> None:
    """Refuse every app but the one whose FAB has the SHA-256 ``pin``, 64 hexadecimal digits."""
    from flwr.supercore.fab import Fab

    internal = import_module("flwr.supernode.start_client_internal")
    command = import_module("flwr.supernode.cli.flower_supernode")
    connect, start = internal._init_connection, command.start_client_internal

    def is_pinned(fab, _trusted=None) -> bool:
        return hashlib.sha256(fab.content).hexdigest() == pin

    @contextmanager
    def connection(*arguments, **options):
        with connect(*arguments, **options) as (node_id, receive, send, get_run, get_fab, *rest):

            def get_pinned_fab(fab_hash, run_id):
                fab = get_fab(fab_hash, run_id)
                if is_pinned(fab):
                    return Fab(pin, fab.content, {"valid_license": "pinned"})
                print(
                    f"refused an app with SHA-256 {hashlib.sha256(fab.content).hexdigest()}",
                    file=sys.stderr,
                    flush=True,
                )
                return Fab(pin, b"", {})  # Flower refuses what brings no verification; there is nothing left to run

            yield (node_id, receive, send, get_run, get_pinned_fab, *rest)

    internal._init_connection = connection
    internal._verify_fab = is_pinned
    command.start_client_internal = lambda **options: start(**options | {"trusted_entities": {"sha256": pin}})


def main() -> None:
    side, *options = sys.argv[1:]
    if not version("flwr").startswith(TESTED):
        sys.exit(f"flwr {version('flwr')} was not tested with these checks: install one of {', '.join(TESTED)}x")
    if sys.platform == "linux":
        guard_port(side)
    elif side == "superlink":
        sys.exit("the SuperLink's check of who commands needs Linux")
    if side == "superlink":
        guard_authors()
    else:
        pin, *options = options
        if not re.fullmatch("[0-9a-f]{64}|any", pin):
            sys.exit(f"{pin!r} is neither the SHA-256 of an app, 64 hexadecimal digits, nor 'any'")
        if pin != "any":
            guard_app(pin)
    command = import_module(f"flwr.{side}.cli.flower_{side}")
    sys.argv = [f"flower-{side}", *options]
    getattr(command, f"flower_{side}")()


if __name__ == "__main__":
    main()
