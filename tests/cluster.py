"""What does a Redis Cluster look like on one machine? Three private servers that share the slots."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any
from uuid import uuid4

from redis import Redis
from redis.cluster import ClusterNode
from redis.crc import key_slot

from attune_worker.store.connection import Cluster
from attune_worker.store.embedded import EmbeddedRedis

SLOTS = 16384
BUS = 10_000
"""A node talks to the others on its port plus this."""

PORTS = range(12_000, 22_000)
"""Below those that the kernel gives out, as are the ports of the bus."""

START_SECONDS = 60.0

CONFIGURATION = """\
cluster-enabled yes
cluster-config-file nodes.conf
"""


@dataclass(frozen=True)
class LocalCluster:
    """Three nodes with one password; ``url`` names all of them."""

    nodes: list[EmbeddedRedis]
    password: str

    @property
    def url(self) -> str:
        """What ``redis_url`` has to be."""
        return f"redis+cluster://:{self.password}@{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    def client(self) -> ClusterClient:
        """Connect to the cluster, to look at what was written there."""
        return ClusterClient(url=self.nodes[0].url)

    def of_each_node(self) -> list[Redis]:
        """Connect to the nodes themselves."""
        return [Redis.from_url(node.url) for node in self.nodes]

    def move_slot(self, key: str, *, finish: bool) -> None:
        """Move the slot of ``key`` to another node; unless ``finish``, leave its first owner saying ASK."""
        slot = key_slot(key.encode())
        clients = self.of_each_node()
        ids = [client.execute_command("CLUSTER MYID").decode() for client in clients]
        source = next(i for i, client in enumerate(clients) if slot in _own_slots(client, ids[i]))
        target = (source + 1) % len(clients)
        clients[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        clients[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
        if keys := clients[source].execute_command("CLUSTER GETKEYSINSLOT", slot, 1000):
            clients[source].migrate("127.0.0.1", str(self.nodes[target].port), keys, 0, 60_000, auth=self.password)
        if finish:
            for client in (clients[target], clients[source]):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])
        for client in clients:
            client.close()


class ClusterClient(Cluster):
    """A client whose commands about servers are meant for all of them, as tests written for one server expect."""

    def config_set(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().config_set(name, value, *args, target_nodes=self.ALL_NODES, **kwargs)

    def client_kill_filter(self, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().client_kill_filter(target_nodes=self.ALL_NODES, **kwargs)

    def publish(self, channel: str, message: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Publish after everything that was published before: the order is kept only between two nodes."""
        barrier = f"barrier-{uuid4().hex}"
        heard_by = self.get_node_from_key(channel)
        assert isinstance(heard_by, ClusterNode)
        with self.pubsub(node=heard_by, ignore_subscribe_messages=True) as listener:
            listener.subscribe(barrier)
            listener.get_message(timeout=START_SECONDS)
            nodes = self.get_primaries()
            for node in nodes:
                self.execute_command("PUBLISH", barrier, node.name, target_nodes=node)
            heard = 0
            while heard < len(nodes):
                heard += listener.get_message(timeout=START_SECONDS) is not None
        return self.execute_command("PUBLISH", channel, message, target_nodes=heard_by, **kwargs)


@contextmanager
def local_cluster(folder: Path) -> Iterator[LocalCluster]:
    """Start three nodes, give each a third of the slots, and wait until all of them agree."""
    password = secrets.token_urlsafe(24)
    with ExitStack() as stack:
        nodes = []
        for port in _free_ports(3):
            node = EmbeddedRedis(folder / str(port), port=port, password=password, configuration=CONFIGURATION)
            nodes.append(stack.enter_context(node))
        cluster = LocalCluster(nodes, password)
        clients = [stack.enter_context(client) for client in cluster.of_each_node()]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            client.execute_command("CLUSTER ADDSLOTS", *range(number * SLOTS // 3, (number + 1) * SLOTS // 3))
            client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)
        ends = time.monotonic() + START_SECONDS
        while not all(_ready(client, len(nodes)) for client in clients):
            assert time.monotonic() < ends, "the nodes do not find each other"
            time.sleep(0.02)
        yield cluster


def _ready(client: Redis, size: int) -> bool:
    info = client.execute_command("CLUSTER INFO")
    return (info["cluster_state"], info["cluster_size"]) == ("ok", str(size))


def _own_slots(client: Redis, node_id: str) -> set[int]:
    slots: set[int] = set()
    for first, last, (_, _, owner, *_), *_ in Redis.execute_command(client, "CLUSTER SLOTS", NEVER_DECODE=True):
        if owner.decode() == node_id:
            slots.update(range(first, last + 1))
    return slots


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = SystemRandom().choice(PORTS)
        if port not in found and _is_free(port) and _is_free(port + BUS):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
