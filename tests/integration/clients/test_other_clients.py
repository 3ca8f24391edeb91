"""The clients of Azure, and `wrap` around clients that exist."""

from __future__ import annotations

import functools
import inspect
import typing

import openai
import pytest

from cachepipe import MemoryStore
from cachepipe.clients import AsyncAzureOpenAI, AzureOpenAI, OpenAI
from cachepipe.providers.info import info
from cachepipe.sdk import internals
from cachepipe.sdk import openai as clients
from cachepipe.sdk.internals import ATTRIBUTES, NAMES
from cachepipe.sdk.mixins import OURS
from cachepipe.sdk.wrapping import wrap

HELLO = [{"role": "user", "content": "Write a function that sorts a list."}]


def texts(response):
    return [choice.message.content for choice in response.choices]


def ask(client, **options):
    return client.chat.completions.create(**{"model": "m", "messages": HELLO, **options})


def read(stream):
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


@pytest.mark.parametrize(
    ("made", "written"),
    [
        (OpenAI.__init__, clients._Options),
        (OpenAI.copy, clients._CopyOptions),
        (AzureOpenAI.__init__, clients._AzureOptions),
    ],
)
def test_type_checkers_see_the_parameters_of_the_newest_sdk(made, written):
    if openai.__version__ >= "3.5":
        assert inspect.signature(made).parameters.keys() - {"self"} == written.__annotations__.keys()


@pytest.mark.parametrize("kind", [openai.OpenAI, "own"])
def test_a_wrapped_client_is_of_its_own_class_and_cached(server, kind):
    class Own(openai.OpenAI):
        greeting = "hello"

        @functools.cached_property
        def whole(self):
            return ask(self)

    kind = Own if kind == "own" else kind
    with kind(base_url=server.base_url, api_key="k") as plain:
        before = ask(plain)
        client = wrap(plain, cache=MemoryStore(), namespace="a")
        assert isinstance(client, kind)
        assert type(client).__name__ == kind.__name__
        first = ask(client, n=2)
        assert info(first).cached == (False, False)
        assert texts(ask(client.in_namespace("b"), n=2)) == texts(first)
        assert read(ask(client.with_options(timeout=5).in_namespace("c"), stream=True)) == texts(first)[0]
        assert info(before) is None
        assert info(ask(plain)) is None
        assert server.stats.requests == 3


def test_a_client_whose_class_takes_anything_is_wrapped(server):
    class Own(openai.OpenAI):
        def __init__(self, **options):
            super().__init__(**options)
            self.greeting = "hello"

        def copy(self, **options):
            return super().copy(**options)

        with_options = copy

    with Own(base_url=server.base_url, api_key="k") as plain:
        client = wrap(plain, cache=MemoryStore())
        first = ask(client)
        again = client.with_options(timeout=5, namespace="b")
        assert (again.greeting, again.timeout) == ("hello", 5)
        assert info(ask(again)).cached == (True,)
        assert texts(ask(again.copy(namespace="c"))) == texts(first)
    assert list(inspect.signature(type(client)).parameters) == [*OURS, "options"]


@pytest.mark.anyio
async def test_an_async_client_is_wrapped(server):
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="k") as plain:
        client = wrap(plain, cache=MemoryStore())
        assert isinstance(client, openai.AsyncOpenAI)
        first = await ask(client)
        assert await ask(client.in_namespace("b")) == first
        assert server.stats.requests == 1


def test_only_clients_are_wrapped(server):
    with pytest.raises(TypeError, match="takes a client"):
        wrap("client", cache=MemoryStore())
    with (
        OpenAI(base_url=server.base_url, api_key="k", cache=MemoryStore()) as client,
        pytest.raises(TypeError, match="has a cache already"),
    ):
        wrap(client, cache=MemoryStore())


@pytest.mark.parametrize("name", ["chat.completions.create", "models.list", "request"])
def test_a_client_whose_methods_somebody_has_replaced_is_refused_and_one_may_replace_them_later(server, name):
    *path, method = name.split(".")
    asked = []

    def trace(client):
        owner = functools.reduce(getattr, path, client)
        usual = getattr(owner, method)

        def traced(*arguments, **options):
            asked.append(name)
            return usual(*arguments, **options)

        setattr(owner, method, traced)

    with openai.OpenAI(base_url=server.base_url, api_key="k") as plain:
        plain.with_raw_response.models.list()
        ask(plain)
        wrapped = wrap(plain, cache=MemoryStore())
        trace(wrapped)
        assert texts(ask(wrapped)) == texts(ask(wrapped.in_namespace("b")))
        wrapped.models.list()
        assert asked[0] == name
        trace(plain)
        with pytest.raises(TypeError, match=f"the method {name} of this one was replaced"):
            wrap(plain, cache=MemoryStore())


@pytest.mark.parametrize("kind", [AzureOpenAI, AsyncAzureOpenAI])
def test_azures_deployments_are_part_of_the_scope(kind):
    azure = {"azure_endpoint": "https://name.openai.azure.com", "api_version": "2024-10-21", "api_key": "k"}
    client = kind(**azure, cache=MemoryStore())
    options = openai._models.FinalRequestOptions.construct(
        method="post", url="/chat/completions", json_data={"model": "m", "messages": HELLO}
    )
    assert isinstance(client, kind.__mro__[2])
    for path in ("/chat/completions", "/responses"):
        for made in (client, kind(azure_deployment="mine", cache=MemoryStore(), **azure)):
            options.url = path
            url = internals.url_of(made, options, options.json_data)
            assert url == str(made._build_request(options.model_copy()).url)
    assert client.copy(namespace="b")._cachepipe.namespace == "b"
    assert "azure_ad_token" in typing.get_type_hints(kind.copy)


@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
def test_the_sdks_still_have_what_the_clients_stand_on(kind):
    """The names on which the clients stand; an SDK without one of them needs other internals."""
    client = kind(api_key="k")
    for name in NAMES:
        assert callable(getattr(kind, name)), name
    for name in ATTRIBUTES:
        assert hasattr(client, name), name
