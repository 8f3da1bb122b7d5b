"""Keeps Serve's replicas from listening on all interfaces.

Every Serve replica starts a gRPC server for calls of other replicas, on `[::]` whatever address its node has.
Callers reach it through the node's address, so that is the one address it needs.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.serve._private import replica as serve_replica

logger = logging.getLogger(__name__)

# The one private name this stands on; tests/integration/test_loopback.py fails when an upgrade moves it.
FUNCTION_NAME = "add_port_to_grpc_server"


def bind_to_node_address() -> None:
    """To be called in a replica's constructor, which runs before the server is started. Idempotent."""
    original = getattr(serve_replica, FUNCTION_NAME, None)
    if original is None:
        logger.warning("this release of Ray Serve cannot be kept from listening on all interfaces")
        return
    if getattr(original, "binds_to_node_address", False):
        return
    host = _bracketed(ray.util.get_node_ip_address())

    def add_port(server: Any, address: str) -> Any:
        return original(server, address.replace("[::]", host))

    add_port.binds_to_node_address = True  # type: ignore[attr-defined]
    setattr(serve_replica, FUNCTION_NAME, add_port)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
