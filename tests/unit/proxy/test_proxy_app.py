"""The application by itself, without a server in front of it."""

from __future__ import annotations

import asyncio
import json
import types
import warnings

import pytest

from cachepipe import MemoryStore
from cachepipe.contract.draws import Identity
from cachepipe.errors import NotStored, StageClosed
from cachepipe.proxy import app, server
from cachepipe.proxy.app import Proxy
from cachepipe.proxy.http_exchange import ClientGone, HttpExchange
from cachepipe.proxy.idempotency import ProxyRun, RequestCounter
from cachepipe.proxy.responder import AnswerSender
from cachepipe.proxy.settings import ProxySettings, Upstream


@pytest.mark.anyio
async def test_the_time_of_a_shutdown_runs_from_its_beginning(monkeypatch):
    """The server waits for its connections first; what it has used up is not given again."""
    monkeypatch.setattr(app, "_LAST_SECONDS", 0.0)
    loop = asyncio.get_running_loop()
    proxy = Proxy(
        ProxySettings(upstreams=(Upstream.of("a", "http://127.0.0.1:9/v1"),), cache=MemoryStore(), log="off")
    )
    await proxy.startup()
    forever = loop.create_task(asyncio.Event().wait())
    proxy.background.add(forever)
    proxy.stopping()
    assert not proxy.ready
    late = loop.time() + proxy.settings.shutdown_timeout + 1
    monkeypatch.setattr(loop, "time", lambda: late)
    await proxy.shutdown()
    with pytest.raises(asyncio.CancelledError):
        await forever


@pytest.mark.anyio
async def test_a_stream_that_is_withdrawn_holds_its_number_no_longer():
    """Also where its draw stands, as its samples came in that moment."""
    proxy = Proxy(
        ProxySettings(upstreams=(Upstream.of("a", "http://127.0.0.1:9/v1"),), cache=MemoryStore(), log="off")
    )
    run = ProxyRun()
    counter, identity = RequestCounter(run), Identity("=a", "k", "")
    number = counter.take(identity)
    task = asyncio.get_running_loop().create_task(asyncio.Event().wait())
    AnswerSender(proxy, None, types.SimpleNamespace(stream=True), counter).leave(task)
    await asyncio.wait([task])
    assert not run.live
    assert RequestCounter(run).take(identity) == number


@pytest.mark.anyio
async def test_an_answer_that_comes_just_as_its_client_leaves_is_for_the_next_of_its_kind():
    proxy = Proxy(
        ProxySettings(upstreams=(Upstream.of("a", "http://127.0.0.1:9/v1"),), cache=MemoryStore(), log="off")
    )
    await proxy.startup()
    run, leaves, sent = ProxyRun(), asyncio.Event(), []
    counter, identity = RequestCounter(run), Identity("=a", "k", "")
    number = counter.take(identity)

    async def receive():
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    http = HttpExchange({"method": "POST", "headers": []}, receive, send, 1.0)
    exchange = types.SimpleNamespace(stream=False, record=types.SimpleNamespace(responses=None))
    answered = asyncio.get_running_loop().create_future()  # as the task of a draw
    waiting = asyncio.create_task(AnswerSender(proxy, http, exchange, counter).drawn(answered))
    for _ in range(20):  # more turns than it waits before it watches
        await asyncio.sleep(0)
    http._watch.add_done_callback(lambda _: answered.set_result(types.SimpleNamespace(content=b"{}")))
    leaves.set()
    with pytest.raises(ClientGone):
        await waiting
    assert not sent
    assert RequestCounter(run).take(identity) == number
    await proxy.shutdown()


@pytest.mark.anyio
async def test_it_opens_with_the_first_request_and_never_again_after_its_end():
    proxy = Proxy(
        ProxySettings(upstreams=(Upstream.of("a", "http://127.0.0.1:9/v1"),), cache=MemoryStore(), log="off")
    )
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/readyz", "query_string": b"", "headers": []}
    await proxy(scope, receive, send)
    assert sent[0]["status"] == 200
    await proxy.shutdown()
    await proxy.shutdown()
    with pytest.raises(StageClosed):
        await proxy(scope, receive, send)


def test_warnings_are_lines_of_the_log(monkeypatch, capsys):
    """So that whoever reads the log learns of a full disk."""

    def run(_, sockets):
        assert sockets
        warnings.warn("a sample was not cached", NotStored, stacklevel=1)

    monkeypatch.setattr(server.Server, "run", run)
    upstreams = (Upstream.of("a", "http://127.0.0.1:9/v1"),)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        server.serve(ProxySettings(upstreams=upstreams, cache=MemoryStore(), port=0, log="off"))
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["warning"]) == ("warning", "NotStored")
    assert line["message"] == "a sample was not cached"
