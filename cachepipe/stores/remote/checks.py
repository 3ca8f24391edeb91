"""What must be true of a server so that it does not lose samples in silence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from cachepipe.errors import RiskyServer, warn

SETTINGS: Final = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy", "min-replicas-to-write")
"""The settings of a Valkey or Redis server that are looked at."""
DATABASE_SETTINGS: Final = ("fsync", "full_page_writes", "synchronous_standby_names")
"""The settings of a PostgreSQL server that are looked at."""

OLDEST: Final = (7, 0)
"""The oldest version of Valkey or Redis that can hold a cache."""
_OLDEST_DATABASE: Final = 13


_UNTRUSTED: Final = re.compile(
    r"certificate.verify.failed|does not match host name|certificate is not valid for", re.IGNORECASE
)


def tls_fault(told: str, option: str) -> str | None:
    """Return what is wrong with the TLS of a server, as the rest of a sentence about it.

    Args:
        told: what the client says of a connection that it could not make.
        option: the option of the URL that names the file of the authority.
    """
    if _UNTRUSTED.search(told):
        return (
            f"has a certificate that is not trusted: {told}. The certificate must name the host as the URL "
            f"does; name the file of the authority that has signed it with {option}=PATH"
        )
    if "does not support SSL" in told:
        return f"does not offer TLS on this port: {told}. Name its port for TLS in the URL"
    return None


_told: set[tuple[str, str]] = set()
"""What was told of the servers of caches in this process."""


def warn_once(where: str, fault: str) -> None:
    """Warn of a server that may lose samples, once per cache and process."""
    if (where, fault) not in _told:
        _told.add((where, fault))
        warn(f"the server at {where} {fault}", RiskyServer)


class Unfit(Exception):  # noqa: N818 - says what the server is
    """A server cannot hold a cache; the message is the rest of a sentence about it."""


def faults(info: Mapping[str, Any], settings: Mapping[str, str], *, full: bool = False) -> Iterator[str]:
    """Iterate over what a Valkey or Redis server may lose, each as the rest of a sentence about it.

    Args:
        info: what the server says of itself.
        settings: its settings; empty if it does not tell them.
        full: whether samples must survive a crash of its machine.

    Raises:
        Unfit: when it cannot be used at all.
    """
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        raise Unfit(f"has version {version}. A cache needs Valkey, or Redis 7.0 or later: update the server")
    if info.get("role") == "slave":
        raise Unfit("is a replica, which cannot be written. Name its primary in the URL")
    policy = settings.get("maxmemory-policy", "noeviction")
    if policy != "noeviction" and settings.get("maxmemory", "0") != "0":
        raise Unfit(
            f"has maxmemory-policy {policy}, which deletes paid samples when its memory is full. "
            "Run: CONFIG SET maxmemory-policy noeviction, and set it in the server's configuration"
        )
    if not settings:
        yield (
            "does not tell its settings (CONFIG GET is not allowed). Check that it has appendonly yes and "
            "maxmemory-policy noeviction"
        )
        return
    if settings.get("appendonly") != "yes":
        yield (
            "keeps samples in memory only: it loses them when it stops. Run: CONFIG SET appendonly yes, and "
            "set it in the server's configuration"
        )
    elif settings.get("appendfsync") == "no":
        yield ("leaves it to the system when samples go to the disk. Run: CONFIG SET appendfsync everysec")
    elif full and settings.get("appendfsync") != "always":
        yield (
            "may lose the samples of the last second when its machine crashes, and durability is 'full'. "
            "Run: CONFIG SET appendfsync always"
        )
    if int(info.get("connected_slaves", 0)) and settings.get("min-replicas-to-write", "0") == "0":
        yield (
            "confirms samples that no replica has, and a failover loses those. "
            "Run: CONFIG SET min-replicas-to-write 1, to lose fewer"
        )


def database_faults(
    version: int, settings: Mapping[str, str], *, replica: bool, replicas: int
) -> Iterator[str]:
    """Iterate over what a PostgreSQL server may lose, each as the rest of a sentence about it.

    Args:
        version: the number of its version, such as 150002 for 15.2.
        settings: its settings.
        replica: whether it is a replica.
        replicas: the number of its replicas.

    Raises:
        Unfit: when it cannot be used at all.
    """
    if version < _OLDEST_DATABASE * 10_000:
        raise Unfit(
            f"has version {version // 10_000}. A cache needs PostgreSQL {_OLDEST_DATABASE} or later: "
            "update the server"
        )
    if replica:
        raise Unfit("is a replica, which cannot be written. Name its primary in the URL")
    for name in ("fsync", "full_page_writes"):
        if settings.get(name) == "off":
            yield (
                f"has {name} off, and can lose everything when its machine stops. "
                f"Run: ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()"
            )
    if replicas and not settings.get("synchronous_standby_names"):
        yield (
            "confirms samples that no replica has, and a failover loses those. Name replicas in "
            "synchronous_standby_names if one of them may take over"
        )
