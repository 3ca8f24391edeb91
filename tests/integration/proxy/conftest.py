"""Proxies in front of the mock server, each on a port of its own."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import socket
import time
import types

import httpx2
import pytest

from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.testing import MockServer

ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
).encode()


@pytest.fixture
def upstream():
    """The provider: a mock server, nothing of which is cached yet."""
    with MockServer.in_thread() as server:
        yield server


@pytest.fixture
def serve(upstream, tmp_path):
    """Start a proxy in front of the mock server; its events are in ``logged``."""
    with contextlib.ExitStack() as stack:

        def start(**options):
            options.setdefault("upstreams", (Upstream.of("mock", upstream.base_url),))
            options.setdefault("cache", str(tmp_path / "cache"))
            logged = []
            settings = ProxySettings(port=0, log="all", **options)
            server = stack.enter_context(running(settings, logged.append))
            server.logged = logged
            return server

        yield start


@pytest.fixture
def proxy(serve):
    """A proxy in front of the mock server."""
    return serve()


@pytest.fixture(name="http")
def _http():
    """An HTTP client that shows a key, as tools do."""
    with httpx2.Client(headers={"authorization": "Bearer k-client"}, timeout=20) as client:
        yield client


_prompts = itertools.count()


@pytest.fixture
def asked():
    """The body of a chat request that nobody has made before."""
    return {"model": "m", "messages": [{"role": "user", "content": f"hello {next(_prompts)}"}]}


class Recorder:
    """An upstream that records what it gets, byte for byte, and answers as it is told.

    Attributes:
        requests: what has come, each with ``method``, ``target``, ``headers`` (pairs) and ``body``.
        answers: what to answer next: a status, pairs of headers, and pieces of a body; None closes the
            connection instead. Without any, a chat completion.
    """

    def __init__(self, url):
        self.url = url
        self.base_url = f"{url}/v1"
        self.requests = []
        self.answers = []


@contextlib.contextmanager
def recording(answering_with):
    """Run an upstream that records what it gets, and answers as it is told."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            if self.headers.get("transfer-encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
            made.requests.append(
                types.SimpleNamespace(
                    method=self.command,
                    target=self.path,
                    headers=[(name.lower(), value) for name, value in self.headers.items()],
                    body=body,
                )
            )
            if made.answers:
                status, pairs, pieces = made.answers.pop(0)
            else:
                status, pairs, pieces = 200, [("content-type", "application/json")], [ANSWER]
            self.send_response_only(status)
            for name, value in pairs:
                self.send_header(name, value)
            if None in pieces or any(name == "x-open" for name, _ in pairs):
                self.send_header("connection", "close")
                self.close_connection = True
            elif status not in (204, 304):
                self.send_header("content-length", str(sum(map(len, pieces))))
            self.end_headers()
            for piece in pieces:
                if piece is None:
                    return
                if self.command != "HEAD":
                    self.wfile.write(piece)

        def __getattr__(self, name):  # every method is answered alike
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

    with answering_with(Handler) as url:
        made = Recorder(url)
        yield made


@pytest.fixture
def recorder(answering_with):
    """An upstream that records what it gets, and answers as it is told."""
    with recording(answering_with) as made:
        yield made


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, answering_with):
    """A proxy for many tests, and the upstream that records what comes through it."""
    with recording(answering_with) as made:
        upstreams = (Upstream.of("recorder", made.base_url),)
        options = {"cache": str(tmp_path_factory.mktemp("cache")), "port": 0, "log": "off"}
        with running(ProxySettings(upstreams=upstreams, **options)) as server:
            yield server, made


@pytest.fixture
def behind(recorded):
    """That proxy and its upstream, which has recorded nothing yet."""
    _, upstream = recorded
    upstream.requests.clear()
    upstream.answers.clear()
    return recorded


@pytest.fixture
def raw():
    """Send bytes to a server as they are, and return all that it answers until it closes."""

    def send(server, data, *, end=True):
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(data)
            if end:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            parts = []
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    parts.append(part)
        return b"".join(parts)

    return send


def chat_url(server, namespace=None, run=None):
    """Return where chat completions are at a proxy."""
    label = f"@{run}" if run is not None else ""
    prefix = f"/ns/{namespace or ''}{label}" if namespace is not None or run is not None else ""
    return f"{server.url}{prefix}/v1/chat/completions"


def text_of(response):
    """Return the texts of an answer, whether it was streamed or not."""
    if response.headers["content-type"].startswith("text/event-stream"):
        texts = {}
        for line in response.text.splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    index, part = choice["index"], choice["delta"].get("content") or ""
                    texts[index] = texts.get(index, "") + part
        return [text for _, text in sorted(texts.items())]
    return [choice["message"]["content"] for choice in response.json()["choices"]]


def until(condition):
    """Wait until another thread has done something."""
    last = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.001)


@pytest.fixture(scope="session")
def helpers():
    """Functions that several files use."""
    return types.SimpleNamespace(chat_url=chat_url, text_of=text_of, until=until)
