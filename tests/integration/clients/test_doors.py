"""Every door in every way: what one way or surface has paid for serves the others, and the SDK is whole.

`doors` has the table. The default profile tries one half of each SDK, the full one both halves of every
provider.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import forked
import pytest
import together
from doors import DOORS, KEY, NONE, asked, found, listed, placed, said_by_all, settled, told
from profiles import sized

import cachepipe
from cachepipe import Budget, MemoryStore, Prices, Services
from cachepipe.flow import Clock
from cachepipe.providers.info import info
from cachepipe.providers.presets import PRESETS
from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream
from cachepipe.testing import MockServer, MockSettings
from cachepipe.testing.server import Fault

pytestmark = pytest.mark.anyio
SETTINGS = MockSettings(seed=1, max_tokens=60)
HALVES = {"sync": False, "async": True}
SOME = ("AzureOpenAI", "Together", "Groq", "Anthropic", "Gemini", "HuggingFace", "HFTransformers")
"""One of each SDK; the ways of OpenAI's own are those of `test_matrix`."""
NAMES = [name for name in sized(SOME, DOORS) if name != "Together" or hasattr(together, "TogetherError")]
"""There is no client for version 1 of Together's SDK."""
REMOTE = [name for name in NAMES if DOORS[name].sdk is not None]


def cases(names):
    """Return the halves of doors as parameters; in the default profile, one half of each, in turn."""
    both = [(name, half) for name in names for half in HALVES]
    return sized([both[2 * place + place % 2] for place in range(len(names))], both)


WAYS = [
    (name, half, way)
    for name, half in cases(NAMES)
    for way, how in DOORS[name].ways.items()
    if how.arguments is not None
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("doors") / "cache")


@pytest.fixture(scope="module")
def server():
    with MockServer.in_thread(SETTINGS) as running_server:
        yield running_server


@pytest.fixture(autouse=True)
def _new(server):
    server.stats.reset()
    server.settings = SETTINGS


@pytest.fixture(scope="module")
def proxy(server, folder):
    """Return the URL of a proxy by the name of a door and a namespace."""
    upstreams = (
        Upstream.of("openai", server.base_url),
        Upstream.of("azure", f"{server.url}/openai", mount="/openai"),
        Upstream.of("groq", f"{server.url}/openai/v1", mount="/openai/v1"),
        Upstream.of("anthropic", server.url, kind="anthropic"),
        Upstream.of("gemini", server.url, kind="gemini"),
        Upstream.of("hub", server.url, mount=""),
    )
    others = {"AzureOpenAI": "azure", "HuggingFace": "hub"}
    others |= {name: name.lower() for name in ("Groq", "Anthropic", "Gemini")}
    with running(ProxySettings(upstreams, folder, port=0, log="off")) as serving:
        yield lambda name, space: f"{serving.url}/up/{others.get(name, 'openai')}/ns/{space}@1"


@pytest.fixture
async def make(server):
    """Make clients of a door that are closed in the end; several share a cache in memory."""
    store = MemoryStore()
    async with contextlib.AsyncExitStack() as opened:

        def made(name, half, **options):
            door = DOORS[name]
            if door.sdk is not None:
                pytest.importorskip(door.sdk)
            url = options.pop("url", server.url + door.place)
            if not options.get("plain"):
                options.setdefault("cache", store)
            client = door.made(url, asynchronous=HALVES[half], **options)
            close = getattr(client, "aclose", None) or client.close
            opened.push_async_callback(lambda: settled(close()))
            return client

        yield made


def needed(client, path):
    """Skip the test if this version of the SDK lacks a method."""
    if found(client, path) is None:
        pytest.skip(f"this SDK has no {path}")


async def said(client, name, way, prompt, server, *, stream=False):
    how = DOORS[name].ways[way]
    return told(await asked(placed(client, how, server.url), how, prompt, stream=stream))


@pytest.mark.parametrize(("name", "half", "way"), WAYS)
async def test_c10_all_ways_and_surfaces_share_samples(server, proxy, folder, make, name, half, way):
    how, prompt = DOORS[name].ways[way], f"Sort a list. {name} {half} {way}"
    streams = (False, True) if how.streamed else (False,)
    store = MemoryStore() if DOORS[name].sdk is None else folder
    client = make(name, half, cache=store, namespace=prompt)
    needed(client, how.method)

    async def ask(who, **options):
        return await said(who, name, way, prompt, server, **options)

    first = await ask(client, stream=how.streamed is not None)
    assert len(first) == {"`n` above 1": 2, "embeddings": 2}.get(way, 1)
    calls = server.stats.requests
    with cachepipe.run():
        assert await ask(client, stream=how.streamed is not None) == first
    for stream in streams:
        assert await ask(client.in_namespace(f"{prompt} {stream}"), stream=stream) == first
    for number, stream in enumerate(streams if DOORS[name].sdk is not None else ()):
        base = proxy(name, f"{name}-{half}-{WAYS.index((name, half, way))}-{number}")
        through = make(name, half, plain=True, url=base + DOORS[name].place)
        assert told(await asked(placed(through, how, base), how, prompt, stream=stream)) == first
    assert server.stats.requests == calls


@pytest.mark.parametrize("name", NAMES)
def test_what_the_table_says_is_missing_is_missing(server, name):
    door = DOORS[name]
    client = door.made(server.url + door.place, asynchronous=False, cache=MemoryStore())
    for way in door.ways.values():
        if way.cell == NONE:
            assert found(client, way.method) is None, way.method
    client.close()
    create = getattr(getattr(client, "messages", None), "create", None)
    assert create is None or "n" not in inspect.signature(create).parameters


async def failed(client, name, server, *, stream=False):
    """The error that the SDK raises for an ordinary chat."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is compared
        await said(client, name, "chat", "hello", server, stream=stream)
    return caught.value


@contextlib.asynccontextmanager
async def untidy():
    """Ignore that an SDK closes generators out of order.

    That of Hugging Face leaves the parts of a broken stream to garbage collection.
    """

    def ignore(loop, context):
        if "asynchronous generator is already running" not in str(context.get("exception")):
            handler(loop, context)

    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler() or asyncio.BaseEventLoop.default_exception_handler
    loop.set_exception_handler(ignore)
    try:
        yield
    finally:
        gc.collect()
        for _ in range(10):
            await asyncio.sleep(0)
        loop.set_exception_handler(handler)


@pytest.mark.parametrize(("name", "half"), cases(REMOTE))
async def test_c8_errors_and_time_outs_are_those_of_the_sdk_and_are_not_cached(server, make, name, half):
    ours, plain = make(name, half), make(name, half, plain=True)
    faults = [Fault(kind="status", status=status) for status in (400, 404, 429, 500)]
    faults += [Fault(kind=kind) for kind in ("error_200", "malformed", "drop")]
    for fault in faults:
        for stream in sized((False,), (False, True)):
            kinds = set()
            for client, around in ((plain, untidy), (ours, contextlib.nullcontext)):
                server.settings = SETTINGS.updated({"script": (fault,) * 9})
                answered = {"error_200", "malformed"} >= {fault.kind}
                with contextlib.suppress(pytest.fail.Exception) if answered else contextlib.nullcontext():
                    async with around():
                        error = await failed(client, name, server, stream=stream)
                        kinds.add((type(error), getattr(error, "status_code", None)))
                        del error  # it refers to the stream
            assert len(kinds) <= 1, fault
    server.settings = SETTINGS.updated({"paused": True})
    hasty = [make(name, half, timeout=0.05, plain=plain) for plain in (True, False)]
    errors = [await failed(client, name, server) for client in hasty]
    assert type(errors[0]) is type(errors[1])
    server.settings = SETTINGS
    assert await said(ours, name, "chat", "hello", server)
    with cachepipe.run():
        assert await said(ours, name, "chat", "hello", server)


@pytest.mark.parametrize(("name", "half"), cases(REMOTE))
async def test_answers_and_raw_responses_have_the_types_of_the_sdk(server, make, name, half):
    how, door = DOORS[name].ways["chat"], DOORS[name]
    ours, plain = make(name, half), make(name, half, plain=True)
    made = [await asked(placed(client, how, server.url), how, "hello") for client in (plain, ours)]
    again = await asked(placed(ours.in_namespace("b"), how, server.url), how, "hello")
    assert type(made[0]) is type(made[1]) is type(again)
    assert told(again) == told(made[1])
    assert (info(made[0]), info(made[1]).cached, info(again).cached) == (None, (False,), (True,))
    streams = []
    for client in (plain, ours):
        path, more = how.streamed
        stream = found(placed(client, how, server.url), path)(**how.arguments("a"), **more)
        streams.append({type(part) for part in await listed(await settled(stream))})
    assert streams[0] == streams[1]
    if "with_raw_response" in dir(ours):
        create = found(ours.in_namespace("c"), how.method.replace("create", "with_raw_response.create"))
        raw = await settled(create(**how.arguments("hello")))
        assert raw.status_code == 200
        assert told(await settled(raw.parse())) == told(again)
    if door.kind == "gemini":
        raw = {**how.arguments("hello"), "config": {"should_return_http_response": True}}
        answer = await settled(found(ours.in_namespace("c"), how.method)(**raw))
        [candidate] = json.loads(answer.sdk_http_response.body)["candidates"]
        assert candidate["content"]["parts"][0]["text"] == told(again)[0]


@pytest.mark.parametrize(("name", "half"), cases(NAMES))
async def test_copies_share_the_cache_and_the_connections(server, make, name, half):
    client = make(name, half)
    first = await said(client, name, "chat", "hello", server)
    copies = [client.in_namespace("b"), client.in_namespace("c").in_replicate(3)]
    if hasattr(client, "copy"):
        copies += [client.copy(namespace="d"), client.copy().in_namespace("e")]
    if hasattr(client, "with_options"):
        copies.append(client.with_options(max_retries=1, namespace="f"))
    for copied in copies:
        assert type(copied) is type(client)
        assert await said(copied, name, "chat", "hello", server) == first
    assert server.stats.requests == (0 if DOORS[name].sdk is None else 1)
    assert server.stats.connections <= 2  # one, and that of another half's pool


@pytest.mark.parametrize("name", NAMES)
async def test_c1_threads_and_tasks_get_samples_of_their_own(server, make, name):
    threads = make(name, "sync", namespace="threads")

    def one(_=None):
        return asyncio.run(said(threads, name, "chat", "hello", server))[0]

    def all_of_them():
        with ThreadPoolExecutor(4) as pool:
            first = sorted(pool.map(one, range(4)))
        with cachepipe.run():
            assert sorted(one() for _ in range(4)) == first
        return first

    first = await asyncio.to_thread(all_of_them)
    if DOORS[name].sdk is None:
        assert first == [f"This is {number}." for number in (1, 2, 3, 4)]
    tasks = make(name, "async", namespace="tasks")
    together = await asyncio.gather(*(said(tasks, name, "chat", "hello", server) for _ in range(4)))
    assert sorted(text for [text] in together) == first
    assert server.stats.samples_generated == (0 if DOORS[name].sdk is None else 4)


class Hurried(Clock):
    async def sleep(self, seconds):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("name", "half"), cases(REMOTE))
async def test_a_service_repeats_what_is_refused_and_money_is_counted(server, make, name, half):
    script = [Fault(kind="status", status=status, retry_after=0.01) for status in (429, 503)]
    server.settings = SETTINGS.updated({"script": tuple(script)})
    known = getattr(Services, name) if name in PRESETS else functools.partial(Services.custom, server.url)
    place = {"base_url": server.url + DOORS[name].place} if name in PRESETS else {}
    service = known(**place, api_key=KEY, max_tokens=None, adaptive=False, clock=Hurried())
    price = {"prompt": 1.0, "completion": 2.0, "max_tokens": 60}
    budget = Budget(1.0, prices=Prices({"m": price, "dummy": price}))  # Hugging Face's SDK asks a dummy
    client = make(name, half, service=service, budget=budget)
    how = DOORS[name].ways["chat"]
    answers = [
        await asked(placed(who, how, server.url), how, "hello") for who in (client, client.in_namespace("b"))
    ]
    stats = service.stats()
    assert (stats.calls, stats.refused, stats.overloaded, stats.answered) == (3, 1, 1, 1)
    billed, replayed = map(info, answers)
    assert billed.billed["total_tokens"] > 0
    assert billed.billed_cost > 0 == replayed.billed_cost
    assert replayed.saved_cost > 0
    await service.close()


async def test_a_rerun_in_a_new_process_makes_no_call(server, tmp_path):
    names = sized(("Groq", "Gemini", "HuggingFace"), [*SOME[:-1], "OpenAI", "OpenRouter"])
    names = [name for name in names if name in NAMES]
    for name in names:
        pytest.importorskip(DOORS[name].sdk)
    folder = tmp_path / "cache"
    first, calls = await said_by_all(server.url, str(folder), *names), server.stats.requests
    assert calls > 5 * len(names)
    command = [sys.executable, sys.modules["doors"].__file__, server.url, str(folder), *names]
    again = await asyncio.to_thread(
        forked.run, command, capture_output=True, text=True, check=False, timeout=100
    )
    assert (again.returncode, again.stdout.strip()) == (0, first), again.stderr
    assert server.stats.requests == calls
    for file in folder.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()
