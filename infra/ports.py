"""Addresses that a server of ours is to listen on."""

from __future__ import annotations

import socket

from infra.errors import EnvironmentFailure


def check_port(host: str, port: int) -> None:
    """Raises EnvironmentFailure when the address cannot be listened on."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot listen on {host}:{port}: {error}\nhint: name another port with --port, or stop what uses this one"
        ) from error
