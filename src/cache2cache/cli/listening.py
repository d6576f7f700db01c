"""Where a server listens."""

from __future__ import annotations

import ipaddress
import socket

import typer


def only_this_machine(host: str) -> bool:
    """Whether nobody else can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; a free port for port 0. Nobody can connect before a server listens.

    Raises:
        typer.BadParameter: there is no such address here, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise typer.BadParameter(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
    return bound


def url(bound: socket.socket) -> str:
    """What clients connect to."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
