"""A Flower federation inside this process: no Ray, no ports. Server and client apps are plain callables.

Messages are sent as protocol buffers, as between machines. It uses Flower's internals (a message's number, the identity
of a task), so it may have to change with Flower.
"""

import traceback

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


def crossed(content):
    """A message's content as it is on the other side of a wire."""
    return recorddict_from_proto(type(proto := recorddict_to_proto(content)).FromString(proto.SerializeToString()))


class LocalGrid(Grid):
    """Nodes 100 + i with a context each, in any order; replies come back last first.

    ``fault(client, message)`` may raise, or return a reply of its own; ``nodes`` may change while a run goes on.
    """

    run = None

    def __init__(self, client_app, nodes, config, fault=lambda client, message: None, run_id=1):
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.app, self.config, self.run_id, self.fault = client_app, config, run_id, fault
        self.nodes, self.count, self.log = {}, 0, []
        for client, node_config in nodes.items():
            self.add(100 + client, {"partition-id": client} | node_config)

    def add(self, node, node_config):
        self.nodes[node] = Context(self.run_id, node, node_config, RecordDict(), self.config)

    def get_node_ids(self):
        return sorted(self.nodes, key=lambda node: (node * 7) % 11)

    def send_and_receive(self, messages, *, timeout=None):
        return [reply for message in list(messages) if (reply := self.answer(message)) is not None][::-1]

    def answer(self, message):
        self.count += 1
        message.metadata.__dict__["_message_id"] = str(self.count)
        context = self.nodes[message.metadata.dst_node_id]
        kind, client = message.metadata.message_type, context.node_config.get("partition-id")
        sent = message.content = crossed(message.content)
        try:
            reply = self.fault(client, message) or self.handle(message, context)
        except Exception:
            reply = Message(Error(1, traceback.format_exc()), reply_to=message)
        if reply == "silence":
            return None
        if not reply.has_error():
            reply.content = crossed(reply.content)
        self.log.append((kind, client, sent, None if reply.has_error() else reply.content))
        return reply

    def handle(self, message, context):
        return self.app(message, context)

    def set_run(self, run): ...

    def create_message(self, *args, **options):
        raise NotImplementedError

    push_messages = pull_messages = create_message
