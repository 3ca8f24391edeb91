"""What ``cachepipe replay`` tells the program that it runs: which cache answers, and what its URLs stand for.

It sets one environment variable, which is read when a process starts. Then every cache of the program is the
replayed one, every mode is ``"replay"``, and each miss is noted in a file, for the report at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from cachepipe.errors import CachepipeError

VARIABLE: Final = "CACHEPIPE_REPLAY"
"""The environment variable."""
NO_KEY: Final = "none-needed-to-replay"
"""The API key of a client that replays and has none."""


class Replay(NamedTuple):
    """A replay.

    Attributes:
        caches: the bundles, folders and URLs that answer, the first one first.
        misses: the file that gets a line of JSON for each miss.
        bases: the base URL of a provider by that of the proxy which stands for it.
    """

    caches: Sequence[str]
    misses: str
    bases: Mapping[str, str]

    @property
    def cache(self) -> str | list[str]:
        """What answers, as `open_store` takes it."""
        return self.caches[0] if len(self.caches) == 1 else list(self.caches)

    def variable(self) -> dict[str, str]:
        """Return the environment variable for the program."""
        return {VARIABLE: json.dumps(self._asdict())}


def _read(text: str | None) -> Replay | None:
    if not text:
        return None
    try:
        return Replay(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise CachepipeError(
            f"{VARIABLE} is set by `cachepipe replay`, and cannot be read; unset it: {error}"
        ) from error


CURRENT: Final = _read(os.environ.get(VARIABLE))
"""The replay that this process is part of, or None."""


def original(url: str) -> str:
    """Return the provider's URL that a URL of the replay's proxy stands for; other URLs unchanged."""
    for base, provider in () if CURRENT is None else CURRENT.bases.items():
        if url == base or url.startswith(f"{base}/"):
            return provider + url[len(base) :]
    return url


_file: str | None = None if CURRENT is None else CURRENT.misses


@contextlib.contextmanager
def noting(file: str) -> Iterator[None]:
    """Note the misses of this process in a file, within the block."""
    global _file  # noqa: PLW0603 - misses come from every store and thread
    before, _file = _file, file
    try:
        yield
    finally:
        _file = before


def note(key: str, namespace: str | None, document: bytes, why: str) -> None:
    """Note a miss for the report; nothing happens outside a replay.

    Args:
        key: the key of the question.
        namespace: the namespace of the request.
        document: the question.
        why: what the cache holds instead.
    """
    if _file is None:
        return
    line = {"key": key, "namespace": namespace, "why": why, "document": document.decode("utf-8", "replace")}
    with Path(_file).open("ab", buffering=0) as lines:
        lines.write(json.dumps(line).encode() + b"\n")  # one write, so that processes may share the file
