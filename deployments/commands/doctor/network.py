"""Ports, and who can reach the server."""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from deployments.commands.doctor.findings import Finding, error, note, ok, warning
from deployments.commands.doctor.subject import Subject
from deployments.commands.serving import http_address
from deployments.config import AppArgs

# Of `ray start --head`; `selectn serve` has Ray choose free ones.
DASHBOARD_PORT, GCS_PORT = 8265, 6379
LOOPBACK = "127.0.0.1"


def check_ports(subject: Subject) -> Iterator[Finding]:
    """The port of the HTTP server, and those of a Ray head."""
    host, port = http_address(dict(subject.document))
    reason = subject.machine.why_port_is_not_free(host, port) if port else None
    if reason is None:
        yield ok("ports", f"HTTP: {host}:{port} is free")
    elif "is in use" in reason:
        yield warning("ports", f"HTTP: {reason}", "a server may be running here already; else choose another port")
    else:
        yield error("ports", f"HTTP: {reason}", "choose another http_options.host or port")
    for name, fixed in (("the dashboard", DASHBOARD_PORT), ("Ray's GCS", GCS_PORT)):
        if subject.machine.why_port_is_not_free(LOOPBACK, fixed) is not None:
            do = "a Ray may run here already: `selectn serve --address 127.0.0.1:6379` joins it"
            yield note("ports", f"{fixed}, which `ray start --head` takes for {name}, is not free", do)


def check_access(subject: Subject) -> Iterator[Finding]:
    """Whether machines other than this one can use the server without a key; and what is wrong with the keys' file."""
    host, _ = http_address(dict(subject.document))
    for args in subject.apps:
        limits = args.limits
        has_keys = limits.api_keys_file is not None or limits.api_keys_env is not None
        if not has_keys and not _is_loopback(host):
            do = "set limits.api_keys_file, and put a TLS proxy in front: docs/security.md"
            yield warning("access", f"the server listens on {host}, and every client may use it", do)
        elif not has_keys:
            yield ok("access", f"every client may use the server, which listens on {host} alone")
        else:
            yield _keys(subject, args)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _keys(subject: Subject, args: AppArgs) -> Finding:
    limits = args.limits
    if limits.api_keys_env is not None and not subject.machine.environment.get(limits.api_keys_env):
        do = "set it in the environment of Ray's processes, before `ray start`"
        return warning("access", f"limits.api_keys_env: {limits.api_keys_env} is not set here", do)
    if limits.api_keys_file is None:
        return ok("access", "requests need a key")
    path = Path(limits.api_keys_file)
    if not os.access(path, os.R_OK):
        do = "provide it on every node that runs an ingress"
        return error("access", f"limits.api_keys_file: {path} cannot be read by this user", do)
    if stat.S_IMODE(path.stat().st_mode) & 0o007:
        return warning("access", f"every user of this machine may read {path}", f"chmod o-rwx {path}")
    return ok("access", "requests need a key")
