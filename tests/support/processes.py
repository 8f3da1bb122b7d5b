"""What processes are there, and what they listen on."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def listening_addresses(processes: Iterable[psutil.Process]) -> dict[str, str]:
    """Every TCP address that one of the processes listens on, with the process's name."""
    addresses = {}
    for process in processes:
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                addresses[f"{connection.laddr.ip}:{connection.laddr.port}"] = process.name()
    return addresses


def is_loopback(address: str) -> bool:
    """Whether "ip:port" can be reached from this machine only."""
    return address.startswith(("127.", "::ffff:127.", "::1:"))


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run; a zombie has ended, and waits for its parent to notice."""
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
