"""What a node's key can do at a SuperLink, one action per line of output: ``python node_key.py ADDRESS CA KEY OTHER``.

Run by tests/test_deployment.py with the Python of the flwr under test, by that flwr's own client; OTHER is another
node's id. Prints "<action>: done" or "<action>: <the error>".
"""

import sys
import time
from importlib.metadata import version
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes


def connect(address, ca, key):
    """An object with the Fleet API's methods, which signs what it sends with ``key``."""
    pair = (key, key.public_key())
    if version("flwr").startswith("1.39."):
        from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
        from flwr.proto.fleet_pb2_grpc import FleetStub
        from flwr.supercore.interceptors import RuntimeVersionClientInterceptor

        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(Path(ca).read_bytes()))
        signing = [RuntimeVersionClientInterceptor(component_name="SuperNode"), NodeAuthClientInterceptor(*pair)]
        return FleetStub(grpc.intercept_channel(channel, *signing))
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    signing = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*pair)]
    return FleetHttpClient.from_server_address(address, False, ca, interceptors=signing)


def attempt(action, call, request):
    try:
        answer = call(request)
    except Exception as error:
        told = getattr(getattr(error, "response", None), "text", None) or getattr(error, "details", error.__str__)()
        print(f"{action}: {' '.join(str(told).split())}")
    else:
        print(f"{action}: done")
        return answer


def message(author, to, reply_to):
    written = Metadata(
        run_id=7, src_node_id=author, dst_node_id=to, message_type="train", created_at=time.time(), ttl=60
    )
    written.reply_to_message_id = reply_to
    return Message(metadata=written)


def main(address, ca, key, other):
    key, other = load_ssh_private_key(Path(key).read_bytes(), None), int(other)
    fleet = connect(address, ca, key)
    request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30)
    activated = attempt("activate", fleet.ActivateNode, request)
    own = Node(node_id=activated.node_id if activated else 1)
    attempt("pull own", fleet.PullMessages, PullMessagesRequest(node=own))
    attempt("pull another's", fleet.PullMessages, PullMessagesRequest(node=Node(node_id=other)))
    heartbeat = SendNodeHeartbeatRequest(node=Node(node_id=other), heartbeat_interval=30)
    attempt("live for another", fleet.SendNodeHeartbeat, heartbeat)
    attempt("sign another off", fleet.DeactivateNode, DeactivateNodeRequest(node_id=other))
    for action, pushed in {
        "reply": message(own.node_id, 1, "x"),
        "reply as another": message(other, 1, "x"),
        "command another": message(1, other, ""),
        "write to another": message(own.node_id, other, ""),
    }.items():
        request = PushMessagesRequest(node=own, messages_list=[pushed], message_object_trees=[ObjectTree()])
        attempt(action, fleet.PushMessages, request)
    if activated:
        attempt("sign off", fleet.DeactivateNode, DeactivateNodeRequest(node_id=own.node_id))


if __name__ == "__main__":
    main(*sys.argv[1:])
