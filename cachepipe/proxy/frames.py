"""Messages between the processes of a proxy: JSON values, each behind its length in 4 bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import orjson

_LENGTH: Final = struct.Struct("!I")


def frame(value: Any) -> bytes:
    """Return a message as it is sent."""
    content = orjson.dumps(value)
    return _LENGTH.pack(len(content)) + content


class FrameReader:
    """Cuts the bytes that come from another process into messages."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> Iterator[Any]:
        """Iterate over the messages that end within these bytes."""
        held = self._held + data
        place = 0
        while len(held) >= place + 4:
            end = place + 4 + _LENGTH.unpack_from(held, place)[0]
            if len(held) < end:
                break
            value = orjson.loads(held[place + 4 : end])
            place = end
            yield value
        self._held = held[place:]
