"""Histories on a Redis or Valkey server."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from cachepipe.errors import StoreError

try:
    import redis
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError("a history on a server needs redis: pip install 'cachepipe[redis]'") from error

_PATIENCE: Final = 5.0  # seconds to wait for the server, unless its URL says otherwise
_SCHEMES = ("redis", "rediss", "valkey", "valkeys", "unix")


class ServerKeeper:
    """Messages as lists on a server, each under a name with a prefix, appended in transactions.

    Args:
        url: the server; a password in it is never shown.
        prefix: the prefix of all keys.

    Raises:
        ValueError: for an invalid URL, or an empty prefix.
    """

    def __init__(self, url: str, prefix: str) -> None:
        if not prefix:
            raise ValueError(
                "a history needs a prefix for its keys, since other programs may use the server; got ''"
            )
        self._prefix = prefix
        parts = _parts(url)
        if parts.scheme not in _SCHEMES:
            raise ValueError(
                f"the URL of a history's server begins with {', '.join(f'{s}://' for s in _SCHEMES)}; "
                "the given URL does not (it is not shown here)"
            )
        self._where = parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
        self._client = _client(
            url.replace("valkey", "redis", 1) if parts.scheme.startswith("valkey") else url
        )

    def __repr__(self) -> str:
        return f"on {self._where}, {self._prefix!r}"

    def _key(self, name: str) -> str:
        return f"{self._prefix}history:{name}"

    @contextlib.contextmanager
    def _asking(self) -> Iterator[Any]:
        try:
            yield self._client
        except (redis.RedisError, OSError) as error:
            # Errors of transactions quote the command, with the secret id and the messages.
            told = str(error).rpartition("of pipeline caused error: ")[2]
            raise StoreError(f"the history's server at {self._where} failed: {told}") from None

    def append(self, name: str, lines: Sequence[str], ttl: int) -> None:
        """Append lines in one transaction, which also sets when they expire."""
        with self._asking() as client, client.pipeline(transaction=True) as pipeline:
            pipeline.rpush(self._key(name), *lines)
            pipeline.expire(self._key(name), ttl)
            pipeline.execute()

    def read(self, name: str) -> list[str]:
        """Return the lines of a name in their order."""
        with self._asking() as client:
            return [line.decode() for line in client.lrange(self._key(name), 0, -1)]

    def delete(self, name: str) -> None:
        """Delete the lines of a name."""
        with self._asking() as client:
            client.delete(self._key(name))


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("the URL of a history's server has an invalid host or port") from None
    return parts


@functools.lru_cache(maxsize=16)
def _client(url: str) -> Any:
    """Return the client of a server: one for the process, which is thread-safe."""
    try:
        return redis.Redis.from_url(url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE)
    except ValueError as error:
        raise ValueError(f"the URL of a history's server is not valid: {type(error).__name__}") from None
