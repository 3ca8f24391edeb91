"""Outages are told once each, with the server's URL; errors name it, and what is wrong with it."""

import asyncio
import logging
import socket
from dataclasses import dataclass

import anthropic
import openai
import pytest
import together

from cachepipe import (
    MemoryStore,
    OnlineAPI,
    Request,
    Response,
    Service,
    Session,
    generate_text_completion,
    outages,
)
from cachepipe.clients import Anthropic, AsyncOpenAI, OpenAI, Together
from cachepipe.flow import AsyncRetrier, Retries
from cachepipe.models import AnthropicModel, OpenAIModel, TogetherModel
from cachepipe.testing import MockServer

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def nowhere():
    """The address of a port at which nobody listens, for a client that is to have credentials in its URL."""
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(autouse=True)
def new(monkeypatch):
    """No server is known to be down, and nothing waits between attempts."""
    monkeypatch.setattr(outages, "_down", set())
    for base in (openai, together, anthropic):
        monkeypatch.setattr(base._base_client, "INITIAL_RETRY_DELAY", 0.001)


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING, "cachepipe")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "cachepipe.outages"]


def ask(client, **more):
    if isinstance(client, anthropic.Anthropic):
        return client.messages.create(model="m", max_tokens=5, messages=HELLO, **more)
    return client.chat.completions.create(model="m", messages=HELLO, **more)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "base", "path", "error"),
    [
        (OpenAI, "/v1", "/chat/completions", openai.APIConnectionError),
        (Together, "/v1", "/chat/completions", together.APIConnectionError),
        (Anthropic, "", "/v1/messages", anthropic.APIConnectionError),
    ],
)
def test_a_client_tells_at_the_first_failure_and_its_error_names_the_url(
    nowhere, told, kind, base, path, error, stream
):
    with kind(base_url=nowhere + base, api_key="k", cache=MemoryStore(), max_retries=2) as client:
        with pytest.raises(error) as caught:
            ask(client, stream=stream)
        [once] = told()
        with pytest.raises(error):
            ask(client, stream=stream)
    assert f"{nowhere}{base}/" in str(caught.value)
    assert f"{path} cannot be reached (Connection refused)" in str(caught.value)
    assert caught.value.message == str(caught.value)
    assert once.startswith(f"the server at {nowhere}{base}/")
    assert "Connection refused; the next attempt is in" in once
    assert told() == [once], "once per outage"


def test_what_is_not_cached_names_the_url_too(nowhere, told):
    client = OpenAI(base_url=f"{nowhere}/v1", api_key="k", cache=MemoryStore(), max_retries=1)
    with client, pytest.raises(openai.APIConnectionError, match=f"{nowhere}/v1/models cannot be reached"):
        client.models.list()
    assert len(told()) == 1


@pytest.mark.parametrize("kind", [OpenAIModel, TogetherModel, AnthropicModel])
async def test_a_model_tells_at_the_first_failure_and_its_error_names_the_url(nowhere, told, kind):
    async with (
        kind("m", base_url=f"{nowhere}/v1", api_key="k") as model,
        OnlineAPI(model, MemoryStore()) as api,
    ):
        requests = (api.request(Hello(prompt)) for prompt in ("a", "b"))
        failures = await asyncio.gather(*requests, return_exceptions=True)
    assert all(f"{nowhere}/v1/" in str(failure) for failure in failures)
    assert all("cannot be reached (Connection refused)" in str(failure) for failure in failures)
    assert len(told()) == 1


async def test_a_session_tells_at_the_first_failure(nowhere, told):
    service = Service(f"{nowhere}/v1", max_retries=2, clock=NoWait())
    session = Session(llmconfig={"model": "m"}, service=service, cache=MemoryStore())
    with pytest.raises(openai.APIConnectionError, match=f"{nowhere}/v1/chat/completions cannot"):
        await session.initiate("hello")
    [once] = told()
    assert once.startswith(
        f"the server at {nowhere}/v1/chat/completions cannot be reached: Connection refused"
    )
    await service.close()


async def test_a_completion_tells_at_the_first_failure(nowhere, told):
    with pytest.raises(openai.APIConnectionError, match=f"{nowhere}/v1/chat/completions cannot"):
        await generate_text_completion("hello", base_url=f"{nowhere}/v1", api_key="k", cache=MemoryStore())
    assert len(told()) == 1


@dataclass(frozen=True)
class Hello(Request):
    max_tokens: int = 5


class NoWait:
    """A clock that sleeps no time."""

    def now(self):
        return 0.0

    async def sleep(self, seconds):
        await asyncio.sleep(0)


class Flaky:
    """An own model whose server fails in the given attempts."""

    model = "flaky"

    def __init__(self, *fails):
        self.fails = list(fails)

    async def request(self, request):
        if self.fails.pop(0):
            raise ConnectionRefusedError(111, "Connection refused")
        return Response(["x"] * request.n)


async def test_each_outage_of_an_own_model_is_told_once(told):
    retrier = AsyncRetrier(Flaky(1, 1, 0, 1, 0), retries=Retries(clock=NoWait()))
    await retrier.request(Request("p"))
    await retrier.request(Request("q"))
    assert len(told()) == 2, "it was back in between"
    assert all(
        text.startswith("the model cannot be reached: Connection refused; the next") for text in told()
    )


async def test_a_server_that_is_back_is_told_of_again_when_it_fails(told):
    async with MockServer() as server:
        client = AsyncOpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore(), max_retries=1)
        await client.chat.completions.create(model="ngram-1", messages=HELLO)
        outages.failed(ConnectionRefusedError(), server.base_url)
        outages.failed(ConnectionRefusedError(), server.base_url)
        assert len(told()) == 1
        await client.chat.completions.create(model="ngram-1", messages=HELLO)
        outages.failed(ConnectionRefusedError(), server.base_url)
        assert len(told()) == 2
        await client.close()


def test_two_servers_have_outages_of_their_own(told):
    for url in ("http://one:1/v1", "http://one:1/v2", "http://one:2/v1", "https://one:1/v1"):
        outages.failed(TimeoutError(), url)
    assert len(told()) == 3


def test_credentials_and_queries_are_never_told(told):
    outages.failed(ConnectionResetError(), "http://user:secret@host:1/v1/responses?key=secret#x")
    [once] = told()
    assert once.startswith("the server at http://host:1/v1/responses has not answered in time, or broke off")
    assert "secret" not in once


def test_an_error_of_another_kind_begins_no_outage(told):
    outages.failed(ValueError("x"), "http://host/v1")
    assert told() == []


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("http://h:1/chat/completions", "try http://h:1/v1."),
        ("http://h:1/embeddings", "try http://h:1/v1."),
        ("http://h:1/v1/v1/messages", "leave /v1 out"),
        ("http://h:1/v1/chat/completions/chat/completions", "must end before /chat/completions"),
        ("http://h:1/v1/responses/responses", "must end before /responses"),
        ("http://h:1/v1/chat/completions", ""),
        ("http://h:1/openai/deployments/x/chat/completions", ""),
        ("http://h:1/", ""),
        ("", ""),
    ],
)
def test_a_url_that_is_not_there_gets_advice_where_it_shows_what_is_wrong(url, advice):
    assert (advice in outages.advice_for(url)) if advice else outages.advice_for(url) == ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_without_v1_in_its_base_url_says_so(stream):
    with MockServer.in_thread() as server:
        client = OpenAI(base_url=server.url, api_key="k", cache=MemoryStore())
        with client, pytest.raises(openai.NotFoundError, match=f"usually end in /v1; try {server.url}/v1"):
            ask(client, stream=stream)


def test_a_client_that_adds_v1_itself_says_so():
    with MockServer.in_thread() as server:
        client = Anthropic(base_url=server.base_url, api_key="k", cache=MemoryStore())
        with client, pytest.raises(anthropic.NotFoundError, match="leave /v1 out of the base URL"):
            ask(client)


def test_a_model_that_is_not_there_gets_no_advice_on_the_url():
    error = openai.NotFoundError.__new__(openai.NotFoundError)
    error.code, error.request = "model_not_found", type("R", (), {"url": "http://h/chat/completions"})
    assert outages.advice_on(error) == ""
    error.code = None
    assert outages.advice_on(error)
