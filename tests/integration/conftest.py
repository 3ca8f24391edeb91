"""What several integration tests share."""

from __future__ import annotations

import contextlib
import http.server
import inspect
import json
import threading

import httpx
import openai
import pytest

from cachepipe.testing import MockServer, MockSettings


def _response(answer):
    if isinstance(answer, BaseException):
        raise answer
    if isinstance(answer, str):
        return httpx.Response(200, html=answer)
    if isinstance(answer, dict):
        body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", **answer}
        return httpx.Response(200, content=json.dumps(body), headers={"content-type": "application/json"})
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    events = [json.dumps({**chunk, "choices": [{"index": 0, **choice}]}) for choice in answer]
    stream = "".join(f"data: {event}\n\n" for event in (*events, "[DONE]"))
    return httpx.Response(200, text=stream, headers={"content-type": "text/event-stream"})


@pytest.fixture(scope="module")
def server():
    """A mock server whose answers have 50 tokens at most."""
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=50)) as running:
        yield running


@pytest.fixture
def environment(monkeypatch, tmp_path, server):
    """The working folder is empty, and the default endpoint is that of the mock server."""
    monkeypatch.delenv("CACHEPIPE_DIR", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def answering():
    """A function that makes a client of a real SDK which gets the given answers, one after the other.

    A mapping is the body of an answer, a list has the choices of a stream's chunks, a text is what a website
    would answer, and an error is raised in the place of an answer.
    """
    opened = []

    def make(*answers, kind=openai.OpenAI):
        left = iter(answers)
        transport = httpx.MockTransport(lambda _: _response(next(left)))
        waits = not inspect.iscoroutinefunction(kind.request)
        http_client = (httpx.Client if waits else httpx.AsyncClient)(transport=transport)
        client = kind(api_key="x", base_url="http://server/v1", http_client=http_client, max_retries=0)
        if waits:
            opened.append(client)
        return client

    yield make
    for client in opened:
        client.close()


@pytest.fixture(scope="session")
def answering_with():
    """A context that runs an HTTP server around a handler class, and yields its URL."""

    @contextlib.contextmanager
    def serve(handler):
        class Quiet(handler):
            def log_message(self, *_):
                pass

        class Listener(http.server.ThreadingHTTPServer):
            request_queue_size = 128  # connections that wait; with the usual 5, a crowd is refused

        listener = Listener(("127.0.0.1", 0), Quiet)
        listener.daemon_threads = True
        thread = threading.Thread(target=lambda: listener.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.server_port}"
        finally:
            listener.shutdown()
            listener.server_close()
            thread.join()

    return serve


class Gated:
    """A server whose streams stop after the first content until ``gate`` is set.

    Attributes:
        gate: set it to let the streams go on.
        calls: how many have come.
        reached: set once a stream has come to the gate.
    """

    def __init__(self):
        self.gate = threading.Event()
        self.calls = 0
        self.url = ""
        self.reached = threading.Event()

    def events(self, path, number):
        """Return the events of a stream: those before the gate, and those after it."""
        if path.endswith("/messages"):
            usage = {"input_tokens": 1, "output_tokens": 1}
            message = {
                "id": f"m{number}",
                "type": "message",
                "role": "assistant",
                "model": "m",
                "content": [],
            }
            message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
            text = {"type": "content_block_delta", "index": 0}
            said = [f"sample{number}", " goes on"]
            deltas = [{**text, "delta": {"type": "text_delta", "text": part}} for part in said]
            block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
            end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
            before = [{"type": "message_start", "message": message}, block, deltas[0]]
            after = [deltas[1], {"type": "content_block_stop", "index": 0}, end, {"type": "message_stop"}]
            named = [
                [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in part] for part in (before, after)
            ]
            return ["".join(part).encode() for part in named]
        head = {"id": f"c{number}", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        made = [
            {**head, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}
            for text, reason in ((f"sample{number}", None), (" goes on", "stop"))
        ]
        before, after = (f"data: {json.dumps(chunk)}\n\n".encode() for chunk in made)
        return [before, after + b"data: [DONE]\n\n"]


@pytest.fixture
def gated(answering_with):
    """A server of OpenAI's chat and Anthropic's messages, whose streams stop after the first content."""
    made = Gated()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            made.calls += 1
            before, after = made.events(self.path, made.calls)
            self.send_response_only(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(before), before))
                made.reached.set()
                made.gate.wait(20)
                self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(after), after))

    with answering_with(Handler) as made.url:
        yield made
        made.gate.set()
