"""A chat completions server that costs next to nothing: ``python -m benchmarks.server`` prints its port.

Answers are 1 KB and all different: each begins with a number that is never used again. The mock server of
``cachepipe.testing`` samples from a language model, which takes more time than what is measured here.

A question that holds ``[fail]`` is refused with 400, one that holds ``[slow]`` is answered after a second.
``POST /delay`` sets the seconds that others take; ``POST /reset`` returns the calls and samples so far, and
counts from 0 again.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

import orjson

from benchmarks import data

_TEXT = data.text("answer", data.SIZE - 10)


class _Served:
    delay = 0.0
    calls = 0
    samples = 0
    numbers = itertools.count(1)


def _answer(path: bytes, body: bytes) -> tuple[bytes, object, float]:
    """Return the status, what is said, and after how many seconds."""
    asked = orjson.loads(body or b"{}")
    if path == b"/delay":
        _Served.delay = asked["seconds"]
        return b"200 OK", {}, 0.0
    if path == b"/reset":
        told = {"calls": _Served.calls, "samples": _Served.samples}
        _Served.calls = _Served.samples = 0
        return b"200 OK", told, 0.0
    _Served.calls += 1
    if b"[fail]" in body:
        return b"400 Bad Request", {"error": {"message": "as asked", "type": "invalid_request_error"}}, 0.0
    n = asked.get("n") or 1
    _Served.samples += n
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": f"{next(_Served.numbers)} {_TEXT}", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
        for index in range(n)
    ]
    usage = {"prompt_tokens": 200, "completion_tokens": 200 * n, "total_tokens": 200 + 200 * n}
    told = {
        "id": f"chatcmpl-{_Served.calls}",
        "object": "chat.completion",
        "created": 1,
        "model": asked.get("model"),
        "choices": choices,
        "usage": usage,
    }
    return b"200 OK", told, 1.0 if b"[slow]" in body else _Served.delay


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            head = self._read[:end]
            at = head.lower().find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._read) < end + 4 + length:
                return
            body, self._read = self._read[end + 4 : end + 4 + length], self._read[end + 4 + length :]
            status, told, delay = _answer(head.split(b" ", 2)[1], body)
            content = orjson.dumps(told)
            written = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
                status,
                len(content),
                content,
            )
            if delay:
                asyncio.get_running_loop().call_later(delay, self._write, written)
            else:
                self._write(written)

    def _write(self, written: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(written)  # type: ignore[attr-defined]


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until whoever started it is gone


if __name__ == "__main__":
    asyncio.run(_serve())
