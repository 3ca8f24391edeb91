"""OpenAI and every endpoint that is compatible with it, as a model: calls through the real SDK.

A stored sample has the form of an answer, and the key is made of the endpoint's URL and the body as the
provider receives it. So a sample that came through this adapter is a hit for the drop-in clients and the
proxy, and theirs are hits here (C10).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Unpack

from cachepipe import wire
from cachepipe.accounting import Account
from cachepipe.contract.keys import Question
from cachepipe.models.connection import Connection, ConnectionSettings, SdkCalls
from cachepipe.models.samples import ProviderSamples, fields_of
from cachepipe.providers import presets
from cachepipe.providers.exchange import questions_of
from cachepipe.providers.generation import in_parts
from cachepipe.typedefs import Request, Response

if TYPE_CHECKING:
    from typing import Self

CHAT_COMPLETIONS: Final = "/chat/completions"
"""The default endpoint."""

ENDPOINTS: Final[Mapping[wire.Api, str]] = {
    wire.CHAT: CHAT_COMPLETIONS,
    wire.COMPLETIONS: "/completions",
    wire.RESPONSES: "/responses",
    wire.EMBEDDINGS: "/embeddings",
    wire.MODERATIONS: "/moderations",
}
"""Where each of OpenAI's APIs is, below a base URL."""

_ASKED_BY_MESSAGES: Final = (wire.CHAT, wire.MESSAGES)


class _ModelCalls(SdkCalls):
    """The calls for one request of a pipeline."""

    def __init__(self, model: OpenAIModel, body: Mapping[str, Any], asks: Sequence[wire.Ask]) -> None:
        self.connection, self.endpoint, self.api = model.connection, model.endpoint, model.api
        self.body = body
        self.asks = asks
        self.url = self.connection.scope_of(self.endpoint, body.get("model"))
        self.spans = not self.connection.only_replays

    async def samples(self, n: int) -> Sequence[wire.Sample]:
        """Return the samples of one call."""
        return (await self.paid(self.asks, n))[0]


class OpenAIModel(ProviderSamples):
    """A model behind OpenAI's protocol, for every endpoint that speaks it.

    The ``prompt`` of a request is a string (one user message) or a list of messages. Its other fields go into
    the body unless they are None. Errors are the SDK's own, and ``cachepipe.BadAnswer`` for a response under
    status 200 that is not an answer.

    Args:
        model: the name of the model, for requests that have no field of that name.
        endpoint: the path of the calls below the base URL.
        max_n: the largest number of samples that the server returns in one call; default is that of
            the provider.
        raw: whether ``Response.data`` holds samples as they are stored, mappings in the form of whole
            answers. By default it holds their text, an embedding's vector (a list of numbers), a
            moderation's result.
        settings: ``client`` (an ``openai.AsyncOpenAI`` to use; its owner closes it), or ``base_url`` (default
            is ``OPENAI_BASE_URL``, then OpenAI), ``api_key`` (default is ``OPENAI_API_KEY``; an empty one is
            for servers that need none), ``timeout`` (seconds for one attempt of a call) and ``max_retries``
            (how often the SDK repeats a failed call).

    It may be used on several event loops and in several threads. `close` closes what was opened on the loop
    that it is called on, and further calls open it again.

    Attributes:
        max_n: the largest number of samples in one call.
        cache_scope: the default scope: the URL of the endpoint.
    """

    _connect: ClassVar[tuple[Callable[..., Connection], str, str]] = (Connection, "openai", "AsyncOpenAI")

    def __init__(
        self,
        model: str | None = None,
        *,
        endpoint: str = CHAT_COMPLETIONS,
        max_n: int | None = None,
        raw: bool = False,
        **settings: Unpack[ConnectionSettings],
    ) -> None:
        if model is not None and not isinstance(model, str):
            raise TypeError(f"model is the name of a model, such as 'gpt-5-mini'; got {model!r:.200}")
        if max_n is not None and (type(max_n) is not int or max_n < 1):
            raise ValueError(f"max_n must be a whole number of samples, at least 1; got {max_n!r}")
        self.model = model
        self.raw = raw
        self._limit = max_n
        connect, package, client_name = self._connect
        self.connection = connect(package, client_name, settings)
        self._set_endpoint(endpoint)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model!r} at {self.cache_scope}, {self.calls} calls>"

    def _set_endpoint(self, endpoint: str) -> None:
        self.endpoint = self._path(endpoint)
        self.api = _api_of(self.endpoint)
        self.cache_scope = self.connection.scope_of(self.endpoint, self.model)
        known = presets.at(self.cache_scope)
        limits = (self.api.max_n, self._limit, None if known is None else known.max_n)
        self.max_n = min(limit for limit in limits if limit is not None)

    def _path(self, endpoint: str) -> str:
        """Return an endpoint as the SDK's own resources write it, with one leading slash."""
        return "/" + endpoint.strip("/")

    def at(self, endpoint: str) -> Self:
        """Return this model at another endpoint, through the same client and with the same count of calls."""
        twin = copy.copy(self)
        twin._set_endpoint(endpoint)  # noqa: SLF001 - its own class
        return twin

    @property
    def calls(self) -> int:
        """How many calls were made; what the SDK repeats counts once."""
        return self.connection.calls

    @property
    def spent(self) -> Account:
        """The tokens of all samples that calls have returned."""
        return self.connection.spent

    def question(self, request: Request, scope: str | None = None) -> Question:
        """Return what a request asks, keyed as the provider receives it.

        Args:
            request: the request.
            scope: replaces the endpoint's URL in the key.

        Raises:
            BadRequest: when the request is not valid, or cannot be answered from a cache.
        """
        calls = self._calls(request)
        scope = None if scope == self.cache_scope else scope
        (question,) = questions_of(self.api, calls.asks, calls.url, self.connection.headers, scope=scope)
        return question

    def present(self, sample: wire.Sample) -> Any:
        """Return what ``Response.data`` holds of a stored sample: all of it if ``raw``, else its content."""
        return sample if self.raw else self.api.plain(sample)

    async def request(self, request: Request) -> Response:
        """Return up to ``request.n`` samples as they are stored, whatever ``raw`` is.

        Raises:
            BadAnswer: when a response under status 200 is not an answer.
            openai.OpenAIError: whatever the SDK raises.
        """
        return Response(list(await in_parts(self._calls(request).samples, request.n, self.max_n)))

    def _calls(self, request: Request) -> _ModelCalls:
        """Return the calls of a request."""
        api, body = self.api, self._body(request)
        if request.n != 1 and api.max_n > 1:
            body = self._asking(body, request.n)
        asks = api.split(body)
        if len(asks) != 1:
            raise wire.BadRequest(
                f"a request to {api.name} asks one question here; got {len(asks)}. Send one request for each"
            )
        if not asks[0].cacheable:
            raise wire.BadRequest(
                f"a request to {api.name} cannot be answered from a cache: {asks[0].reason}"
            )
        if not self.raw and asks[0].question.get("encoding_format") == "base64":
            raise wire.BadRequest(
                "beside another output type, base64 may hold other numbers than floats; make the "
                f"{type(self).__name__} with raw=True to get it as it comes, or leave out encoding_format"
            )
        return _ModelCalls(self, body, asks)

    def _asking(self, body: dict[str, Any], n: int) -> dict[str, Any]:
        """Return a body that asks for n samples."""
        return {**body, "n": n}

    def _body(self, request: Request) -> dict[str, Any]:
        """Return the body of a request, without the number of samples."""
        body: dict[str, Any] = {} if self.model is None else {"model": self.model}
        prompt = request.prompt
        if self.api in _ASKED_BY_MESSAGES:
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            elif not isinstance(prompt, list | tuple):
                raise TypeError(f"a prompt is a string or a list of messages; got {prompt!r:.200}")
            body["messages"] = _plain(prompt)
        else:
            body[self.api.listed or "input"] = _plain(prompt)
        return {**body, **{name: _plain(value) for name, value in fields_of(request).items()}}

    async def close(self) -> None:
        """Close the client of this loop if it was made here. Idempotent."""
        await self.connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _api_of(endpoint: str) -> wire.Api:
    api = wire.api_for("POST", endpoint)
    if api is None:
        known = ", ".join(sorted(ENDPOINTS.values()))
        raise wire.BadRequest(
            f"there is nothing that can be cached at {endpoint!r}; the endpoints are {known}"
        )
    return api


def _plain(value: Any) -> Any:
    """Return a value as the SDK would send it: pydantic models as the fields that were set."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "model_dump") and not isinstance(value, type):
        return value.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return value
