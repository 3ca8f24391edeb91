"""Addresses of servers, as their clients write them."""

from __future__ import annotations

import socket
from typing import Final

_ALL: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - they are recognised, not listened on
"""The addresses of all interfaces, and where this machine reaches a server that listens there."""


def address_here(host: str) -> str:
    """Return the address at which this machine reaches a server that listens on ``host``."""
    return _ALL.get(host, host)


def name_for_others(host: str) -> str:
    """Return the name at which other machines reach a server that listens on ``host``.

    If the server listens on all interfaces, it is the name of this machine.
    """
    return socket.gethostname() if host in _ALL else host


def in_url(host: str) -> str:
    """Return a host as it is written in URLs: an IPv6 address is in brackets."""
    return f"[{host}]" if ":" in host else host
