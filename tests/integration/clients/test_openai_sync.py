"""OpenAI with a cache, in threads: the SDK runs in the caller's, the cache on a loop of its own."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import forked
import openai
import pytest
from openai import Stream
from pydantic import BaseModel

from cachepipe import CacheMiss, MemoryStore, NotStored
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.context import using
from cachepipe.providers.info import info
from cachepipe.sdk.http import library_of

HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]


@pytest.fixture
def client(server):
    with OpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore(), max_retries=0) as made:
        yield made


def texts(response):
    return [choice.message.content for choice in response.choices]


def ask(client, prompt=None, **options):
    messages = HELLO if prompt is None else [{"role": "user", "content": prompt}]
    return client.chat.completions.create(**{"model": "m", "messages": messages, **options})


def read(stream):
    """The content of each choice of a stream, joined."""
    parts = {}
    for chunk in stream:
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + (choice.delta.content or "")
    return [parts[index] for index in sorted(parts)]


def test_it_is_the_sdks_own_class(client):
    assert isinstance(client, openai.OpenAI)
    assert type(ask(client)) is openai.types.chat.ChatCompletion


def test_n_is_topped_up_exactly(server, client):
    two = ask(client, n=2)
    five = ask(client.in_namespace("b"), n=5)
    assert [entry.n for entry in server.stats.log] == [2, 3]
    assert texts(five)[:2] == texts(two)
    assert [choice.index for choice in five.choices] == list(range(5))
    assert five.usage.total_tokens == five.usage.prompt_tokens + five.usage.completion_tokens


def test_c1_eight_threads_get_samples_of_their_own(server, client):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client, n=2), range(40)))
    indices = sorted(index for answer in answers for index in info(answer).indices)
    assert indices == list(range(80))
    assert server.stats.samples_generated == 80
    with ThreadPoolExecutor(8) as pool:
        again = list(pool.map(lambda _: ask(client.in_namespace("b"), n=2), range(40)))
    assert server.stats.samples_generated == 80
    assert sorted(map(str, map(texts, answers))) == sorted(map(str, map(texts, again)))


def test_eight_threads_and_a_loop_share_one_folder(server, tmp_path):
    questions = [(f"Write {i % 10}", f"r{i // 10}", i % 2 == 0) for i in range(80)]

    def sync(client, namespace):
        def one(question):
            prompt, request_id, stream = question
            with using(namespace=namespace, request_id=request_id):
                answer = ask(client, prompt, stream=stream)
                return read(answer) if stream else texts(answer)

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, questions))

    async def concurrently(client, namespace):
        async def one(prompt, request_id, stream):
            with using(namespace=namespace, request_id=request_id):
                answer = await ask(client, prompt, stream=stream)
                if not stream:
                    return texts(answer)
                parts = [chunk.choices[0].delta.content or "" async for chunk in answer]
                return ["".join(parts)]

        return await asyncio.gather(*(one(*question) for question in questions))

    async def both(namespace):
        async with AsyncOpenAI(base_url=server.base_url, api_key="k", cache=tmp_path) as theirs:
            with OpenAI(base_url=server.base_url, api_key="k", cache=tmp_path) as client:
                threads = asyncio.to_thread(sync, client, "s" + namespace)
                first, second = await asyncio.gather(threads, concurrently(theirs, "a" + namespace))
                return first, second

    before = asyncio.run(both("1"))
    generated = server.stats.samples_generated
    after = asyncio.run(both("2"))
    assert server.stats.samples_generated == generated
    assert before == after


@pytest.mark.parametrize("first", [True, False])
def test_streamed_and_unstreamed_requests_share_samples(server, client, first):
    def get(who, stream):
        answer = ask(who, n=2, stream=stream)
        assert (type(answer) is Stream) is stream
        return read(answer) if stream else texts(answer)

    before = get(client, first)
    assert get(client.in_namespace("b"), not first) == before
    assert get(client.in_namespace("c"), first) == before
    assert server.stats.requests == 1


def test_c7_the_rest_of_an_abandoned_stream_is_read_and_stored(server, client):
    server.settings = server.settings.updated({"stream_delay": 0.01})
    stream = ask(client, stream=True)
    next(stream)
    next(stream)
    stream.close()
    assert info(ask(client.in_namespace("b"))).cached == (True,)
    assert server.stats.requests == 1


def test_c7_a_stream_that_nobody_holds_is_read_to_its_end(server, client):
    server.settings = server.settings.updated({"stream_delay": 0.01})
    stream = ask(client, stream=True)
    next(stream)
    next(stream)
    del stream
    gc.collect()
    ask(client.in_namespace("b"))
    assert server.stats.requests == 1


def test_c7_a_stalled_reader_does_not_block_others(server, client):
    server.settings = server.settings.updated({"stream_delay": 0.005})
    stalled = ask(client, stream=True)
    next(stalled)
    other = texts(ask(client.in_namespace("b")))
    assert server.stats.requests == 1
    assert other[0].endswith(read(stalled)[0])


def test_a_stream_that_is_left_before_any_content_is_undone(server, client):
    server.settings = server.settings.updated({"latency": 0.0, "stream_delay": 0.2})
    stream = ask(client, stream=True)
    stream.close()
    server.settings = server.settings.updated({"stream_delay": 0.0})
    assert len(texts(ask(client))) == 1


CHUNK = (
    b'data: {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": '
    b'[{"index": 0, "delta": {"content": "a"}, "finish_reason": null}]}\n\n'
)


def test_c7_the_rest_of_a_stalled_stream_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr("cachepipe.providers.stream_recorder.ABANDONED_SECONDS", 0)
    library, going_on, late = library_of(openai.OpenAI(api_key="k")), threading.Event(), []

    class Stalled(library.SyncByteStream):
        def __iter__(self):
            yield CHUNK
            late.append(not going_on.wait(20))

    headers = {"content-type": "text/event-stream"}
    answer = lambda _: library.Response(200, headers=headers, stream=Stalled())  # noqa: E731
    http = library.Client(transport=library.MockTransport(answer))
    with (
        OpenAI(base_url="http://h/v1", api_key="k", http_client=http, cache=MemoryStore()) as client,
        ask(client, stream=True) as stream,
    ):
        assert next(stream).choices[0].delta.content == "a"
    assert not late
    going_on.set()


class OddError(BaseException):
    """Neither an Exception, nor one of those that stop a loop."""


class TooLongError(Exception):
    """What a signal handler of the user's raises."""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), OddError(), TooLongError()])
@pytest.mark.parametrize("raw", [False, True])
def test_c8_a_stream_whose_reader_is_interrupted_is_undone_and_later_calls_work(error, raw):
    """The error comes from where a signal handler would raise it: from the wait for the next bytes."""
    library, calls = library_of(openai.OpenAI(api_key="k")), []

    class Interrupted(library.SyncByteStream):
        def __iter__(self):
            yield CHUNK
            if len(calls) == 1:
                raise error
            yield CHUNK.replace(b"null", b'"stop"') + b"data: [DONE]\n\n"

    def answer(request):
        calls.append(request)
        return library.Response(200, headers={"content-type": "text/event-stream"}, stream=Interrupted())

    def read_all():
        if not raw:
            return read(ask(client, stream=True))
        with client.chat.completions.with_streaming_response.create(
            model="m", messages=HELLO, stream=True
        ) as response:
            return read(response.parse())

    http = library.Client(transport=library.MockTransport(answer))
    with OpenAI(base_url="http://h/v1", api_key="k", http_client=http, cache=MemoryStore()) as client:
        with pytest.raises(type(error)) as caught:
            read_all()
        assert caught.value is error
        assert read_all() == ["aa"]
        assert len(calls) == 2
        assert info(ask(client.in_namespace("b"))).indices == (0,)


FINISHED = CHUNK + CHUNK.replace(b"null", b'"stop"')


def odd_server(library, content):
    """An HTTP client of a server that answers every stream with these bytes; a list has no length."""
    calls = []

    class Open(library.SyncByteStream):
        def __iter__(self):
            yield from content

    def answer(request):
        calls.append(request)
        body = {"content": content} if isinstance(content, bytes) else {"stream": Open()}
        return library.Response(200, headers={"content-type": "text/event-stream"}, **body)

    return library.Client(transport=library.MockTransport(answer)), calls


@pytest.mark.parametrize(
    ("content", "paid"), [(FINISHED, 1), ([FINISHED], 2), (CHUNK, 2), (FINISHED[:-9], 2)]
)
@pytest.mark.parametrize("raw", [False, True])
def test_c7_a_stream_without_its_last_event_is_stored_only_if_its_body_ended_in_order(content, paid, raw):
    http, calls = odd_server(library_of(openai.OpenAI(api_key="k")), content)
    with OpenAI(base_url="http://h/v1", api_key="k", http_client=http, cache=MemoryStore()) as client:
        for who in (client, client.in_namespace("b")):
            if raw:
                how = {"model": "m", "messages": HELLO, "stream": True}
                with who.chat.completions.with_streaming_response.create(**how) as response:
                    assert b"".join(response.iter_bytes()).startswith(b"data: ")
            else:
                assert read(ask(who, stream=True))[0].strip("a") == ""
        assert len(calls) == paid


def test_c7_a_stream_without_its_last_event_is_stored_before_its_end_is_seen():
    http, calls = odd_server(library_of(openai.OpenAI(api_key="k")), FINISHED)
    store = MemoryStore()
    with OpenAI(base_url="http://h/v1", api_key="k", http_client=http, cache=store) as client:
        for _ in ask(client, stream=True):
            pass
        with OpenAI(base_url="http://h/v1", mode="replay", cache=store, namespace="b") as other:
            assert texts(ask(other)) == ["aa"]
    assert len(calls) == 1


def test_c7_closing_a_client_waits_for_the_rest_of_a_stream_as_long_as_it_is_told():
    library, going_on = library_of(openai.OpenAI(api_key="k")), threading.Event()

    class Stalled(library.SyncByteStream):
        def __iter__(self):
            yield CHUNK
            going_on.wait(60)

    headers = {"content-type": "text/event-stream"}
    answer = lambda _: library.Response(200, headers=headers, stream=Stalled())  # noqa: E731
    http = library.Client(transport=library.MockTransport(answer))
    client = OpenAI(base_url="http://h/v1", api_key="k", http_client=http, cache=MemoryStore())
    for _ in ask(client, stream=True):
        break
    client.close(timeout=0)
    assert not going_on.is_set()
    assert client.is_closed()
    going_on.set()


def test_closing_the_client_ends_what_is_in_flight(server):
    server.settings = server.settings.updated({"stream_delay": 0.01})
    store = MemoryStore()
    with OpenAI(base_url=server.base_url, api_key="k", cache=store) as client:
        stream = ask(client, stream=True)
        next(stream)
        next(stream)
    with OpenAI(base_url=server.base_url, api_key="k", cache=store, mode="replay", namespace="b") as client:
        assert texts(ask(client))


def test_errors_are_the_sdks_own_and_not_cached(server, client):
    server.settings = server.settings.updated({"script": (400, 429, "error", "drop")})
    for kind in (
        openai.BadRequestError,
        openai.RateLimitError,
        openai.InternalServerError,
        openai.APIConnectionError,
    ):
        with pytest.raises(kind):
            ask(client)
    assert info(ask(client)).indices == (0,)


def test_the_sdks_retries_are_unchanged_on_a_miss(server, client):
    server.settings = server.settings.updated({"script": ({"kind": "rate_limit", "retry_after": 0.0}, None)})
    raw = client.with_options(max_retries=2).chat.completions.with_raw_response.create(
        model="m", messages=HELLO
    )
    assert raw.retries_taken == 1
    hit = client.in_namespace("b").chat.completions.with_raw_response.create(model="m", messages=HELLO)
    assert hit.retries_taken == 0
    assert hit.parse() == raw.parse()


def test_streaming_responses_on_miss_and_hit(server, client):
    for who in (client, client.in_namespace("b")):
        with who.chat.completions.with_streaming_response.create(model="m", messages=HELLO) as response:
            assert b"chat.completion" in b"".join(response.iter_bytes())
        with who.chat.completions.with_streaming_response.create(
            model="m", messages=HELLO, stream=True
        ) as response:
            assert read(response.parse())
    assert server.stats.requests == 2


class Word(BaseModel):
    word: str


def test_parse_and_the_stream_helper(server, client):
    server.settings = server.settings.updated({"max_tokens": 200})
    for who in (client, client.in_namespace("b")):
        chat = who.chat if hasattr(who.chat.completions, "parse") else who.beta.chat  # before openai 1.92
        parsed = chat.completions.parse(model="m", messages=HELLO, response_format=Word)
        assert isinstance(parsed.choices[0].message.parsed, Word)
        with chat.completions.stream(model="m", messages=HELLO, response_format=Word) as stream:
            for _ in stream:
                pass
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, Word)
    assert server.stats.requests == 2


@pytest.mark.skipif(not hasattr(openai.types, "responses"), reason="came with openai 1.66")
def test_responses(server, client):
    first = client.responses.create(model="m", input="hello")
    assert client.in_namespace("b").responses.create(model="m", input="hello") == first
    assert server.stats.requests == 1


def test_embeddings_are_cached_per_item(server, client):
    first = client.embeddings.create(model="m", input=["a", "b"])
    again = client.in_namespace("x").embeddings.create(model="m", input=["b", "c", "a"])
    assert server.stats.samples_generated == 3
    assert again.data[2].embedding == first.data[0].embedding


def test_replay_needs_no_key(server, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with OpenAI(base_url=server.base_url, api_key="k", cache=tmp_path) as client:
        stored = ask(client)
    with OpenAI(base_url=server.base_url, cache=tmp_path, mode="replay") as client:
        assert ask(client) == stored
        with pytest.raises(CacheMiss):
            ask(client, "Something new")
        with pytest.raises(CacheMiss, match=r"differs in logit_bias \(asked: \{\}, stored: nothing\)"):
            ask(client, logit_bias={})
    elsewhere = {"base_url": "http://localhost:1/v1", "cache": tmp_path, "mode": "replay"}
    with OpenAI(**elsewhere) as client, pytest.raises(CacheMiss, match=f"scope to '{server.base_url}/chat"):
        ask(client)
    with OpenAI(**elsewhere, scope=server.base_url) as client:
        assert ask(client) == stored


@pytest.mark.skipif(not hasattr(openai.OpenAI, "_refresh_api_key"), reason="came with openai 1.106")
def test_a_callable_key_is_not_called_on_a_hit(server):
    calls = []

    def key():
        calls.append(1)
        return "k"

    with OpenAI(base_url=server.base_url, api_key=key, cache=MemoryStore()) as client:
        ask(client)
        ask(client.in_namespace("b"))
    assert calls == [1]


def test_the_sdk_runs_in_the_callers_thread_and_context(client):
    variable = contextvars.ContextVar("variable")
    seen = []
    client._client.event_hooks["request"].append(
        lambda _: seen.append((threading.get_ident(), variable.get(None)))
    )
    variable.set("here")
    ask(client)
    read(ask(client, stream=True))
    assert seen == [(threading.get_ident(), "here")] * 2


def test_what_a_hook_sets_in_its_context_is_seen_by_the_caller_as_with_the_sdk(client):
    variable = contextvars.ContextVar("variable", default=0)
    client._client.event_hooks["response"].append(lambda _: variable.set(variable.get() + 1))
    for number in range(3):
        ask(client, stream=number == 2)
        assert variable.get() == number + 1


def test_a_known_draw_is_answered_in_the_calling_thread(server, client, monkeypatch):
    ask(client)
    ask(client.in_namespace("b"))
    import cachepipe  # noqa: PLC0415 - only here

    def refuse(_):
        raise AssertionError("a hit must not need the portal")

    monkeypatch.setattr("cachepipe.sdk.calls.submit", refuse)
    with cachepipe.run():
        assert info(ask(client.in_namespace("b"))).cached == (True,)


def test_it_works_where_a_loop_runs(client):
    async def notebook():
        return texts(ask(client)), read(ask(client, stream=True))

    assert all(asyncio.run(notebook()))


def test_an_interrupted_call_is_undone_and_its_answer_kept(server, client):
    server.settings = server.settings.updated({"paused": True})
    heard = threading.Event()

    def once(_number, _frame):
        if not heard.is_set():
            heard.set()
            raise KeyboardInterrupt

    def interrupt():
        server.wait_until(lambda stats: stats.in_flight == 1)
        while not heard.is_set():  # one that comes just before the main thread begins to wait goes unheard
            os.kill(os.getpid(), signal.SIGINT)
            heard.wait(0.1)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, once)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            ask(client)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    server.settings = server.settings.updated({"paused": False})
    assert info(ask(client)).indices == (0,)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_closes_its_copy_and_leaves_what_is_in_flight_to_its_parent(server, client):
    stream = ask(client, "streamed", stream=True)
    first = next(stream).choices[0].delta.content or ""
    server.settings = server.settings.updated({"paused": True})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client)
        server.wait_until(lambda stats: stats.in_flight >= 1)
        child = os.fork()
        if not child:
            signal.alarm(30)  # ends a child that waits for its parent's loop
            client.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        server.settings = server.settings.updated({"paused": False})
        assert info(answer.result()).indices == (0,)
    text = first + "".join(read(stream))
    assert [text] == texts(ask(client.in_namespace("b"), "streamed"))


def run(code, *arguments):
    """Run a program with warnings as errors; return its exit code, its output and its errors."""
    done = forked.run([sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


SCRIPT = """
import atexit, sys
from cachepipe.clients import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="k", cache=sys.argv[2])
def ask(prompt):
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}])
    print(answer.choices[0].message.content)
atexit.register(ask, "at exit")
ask("before")
"""


def test_calls_at_interpreter_exit_are_answered(server, tmp_path):
    code, printed, errors = run(SCRIPT, server.base_url, str(tmp_path / "cache"))
    assert (code, errors) == (0, "")
    assert len(printed.splitlines()) == 2


@pytest.mark.parametrize("name", ["__init__", "copy", "with_options"])
def test_signatures_are_the_sdks_with_ours_last(name):
    ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (OpenAI, openai.OpenAI))
    added = ["cache", "namespace", "mode", "scope", "repeat", "service", "replicate", "ordered", "budget"]
    assert list(ours.parameters) == [*theirs.parameters, *added]


def test_copies_in_a_crowd_share_the_cache(server, client):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ask(client.with_options(timeout=10 + i), f"{i % 4}"), range(32)))
    assert server.stats.samples_generated == 32
    answers = [info(ask(client.copy(namespace="b"), f"{i % 4}")) for i in range(32)]
    assert all(told.cached == (True,) for told in answers)


def test_a_hook_that_raises_stop_iteration_hangs_nobody(client):
    client._client.event_hooks["request"].append(lambda _: next(iter(())))
    with pytest.raises((RuntimeError, openai.APIConnectionError)) as caught:  # the latter before openai 3.1
        ask(client)
    assert isinstance(caught.value.__cause__, StopIteration)


@pytest.mark.parametrize("name", [50256, 1.5, True, None])
def test_names_that_are_no_text_are_keyed_and_sent_as_json_has_them(client, name):
    sent = []
    client._client.event_hooks["request"].append(lambda request: sent.append(json.loads(request.content)))
    one = ask(client, logit_bias={name: -100})
    assert sent[0]["logit_bias"] == {json.dumps(name): -100}
    two = ask(client.in_namespace("b"), logit_bias={json.dumps(name): -100})
    assert info(two).cached == (True,)
    assert two == one


def test_what_an_http_client_adds_to_every_request_is_part_of_the_key(server):
    library, store, keys = library_of(openai.OpenAI(api_key="k")), MemoryStore(), []
    ways = [
        {},
        {"headers": {"OpenAI-Beta": "a"}},
        {"params": {"q": "a"}},
        {"params": [("q", "a"), ("q", "b")]},
    ]
    for way in ways:
        http = library.Client(**way)
        with OpenAI(base_url=server.base_url, api_key="k", http_client=http, cache=store) as client:
            keys.append(info(ask(client)).key)
    assert len(set(keys)) == len(ways)
    with OpenAI(base_url=server.base_url, api_key="k", cache=store, namespace="b") as client:
        for way in ({"extra_headers": {"OpenAI-Beta": "a"}}, {"extra_query": {"q": "a"}}):
            assert info(ask(client, **way)).cached == (True,)


EXITS = {
    "break": "for chunk in ask(): break",
    "exception": "try:\n    for chunk in ask(): raise ValueError\nexcept ValueError: pass",
    "next": "stream = ask(); next(stream)",
    "iterator": "stream = iter(ask()); next(stream)",
    "unread": "stream = ask()",
    "generator": "def texts():\n    for chunk in ask(): yield chunk\ntold = texts(); next(told)",
    "cycle": "stream = ask(); next(stream); stream.me = stream; del stream",
    "let go": "stream = ask(); next(stream); del stream; import gc; gc.collect()",
    "raw": "stream = client.chat.completions.with_raw_response.create(**how).parse(); next(stream)",
    "thread": "import threading\nt = threading.Thread(target=lambda: next(ask())); t.start(); t.join()",
    "exit": "next(ask()); sys.exit(0)",
    "object": "class Held:\n    def __del__(self): client.close()\no = Held(); o.s = ask(); next(o.s)",
}
"""Ways to leave a stream before its end, as the last thing that a program does."""
LEAVES = """
import sys
from cachepipe.clients import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="k", cache=sys.argv[2])
how = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True}
def ask():
    return client.chat.completions.create(**how)
exec(sys.argv[3])
"""


@pytest.mark.parametrize("way", EXITS)
def test_a_program_ends_at_once_and_quietly_though_it_has_left_a_stream(server, tmp_path, way):
    events = 0.0 if way == "unread" else 600.0
    server.settings = server.settings.updated({"stream_delay": events, "max_tokens": 50})
    code, printed, errors = run(LEAVES, server.base_url, str(tmp_path / "cache"), EXITS[way])
    assert (code, printed, errors) == (0, "", "")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_for_too_many_samples_goes_to_the_provider_as_it_is(server, client, stream):
    """As with the plain client, the provider says what it thinks of it."""
    for _ in range(2):  # the second takes the fast path
        with pytest.warns(NotStored, match="at most 10000 samples"), pytest.raises(openai.BadRequestError):
            ask(client, "many", n=10**9, stream=stream)
    assert server.stats.requests == 2
    assert texts(ask(client, "many", n=2))
    assert client._cachepipe.shared_store.store.totals()["samples"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_larger_than_what_is_kept_is_the_callers_alone(
    server, client, monkeypatch, stream, until
):
    monkeypatch.setattr("cachepipe.providers.generation.max_answer", lambda: 300)
    for _ in range(2):
        answer = ask(client, "large", stream=stream)
        assert len((read(answer) if stream else texts(answer))[0]) > 20
        assert info(answer) is None or stream
    store = client._cachepipe.shared_store.store
    asyncio.run(until(lambda: store.totals()["pending"] == 0))  # a thread gives the draw up
    assert store.totals()["samples"] == 0
    assert server.stats.requests == 2
    monkeypatch.undo()
    assert ask(client, "large")
    assert store.totals()["samples"] == 1


def test_the_rest_of_a_stream_that_is_too_large_is_not_read_once_its_reader_left(server, client, monkeypatch):
    monkeypatch.setattr("cachepipe.providers.generation.max_answer", lambda: 300)
    with ask(client, "large", stream=True) as stream:
        for number, _ in enumerate(stream):
            if number == 4:
                break
    server.wait_until(lambda stats: stats.in_flight == 0)
    client.close()  # waits until the draw is undone
    assert client._cachepipe.shared_store.store.totals()["draws"] == 0
