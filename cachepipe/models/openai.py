"""OpenAI and every endpoint that is compatible with it, as a model: one call through the real SDK.

A stored sample is what the wire layer makes of the answer, and the key is made of the endpoint's URL and the
body as the provider gets it. So a sample that came through this adapter is a hit for the drop-in
clients and the proxy, and theirs are hits here (C10).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import urlencode

from cachepipe import context, jsontext, loops, outages, telemetry, wire
from cachepipe.accounting import Account, noted, usage_of
from cachepipe.contract.keys import Question, provider_question
from cachepipe.typedefs import UNASKED, Request, Response, field_names
from cachepipe.values import Codec

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

CHAT_COMPLETIONS: Final = "/chat/completions"
"""The endpoint of requests that name none."""

_NO_KEY: Final = "EMPTY"  # servers that need no key get this; the SDK would refuse to send none
_ASKED_BY_MESSAGES: Final = (wire.CHAT, wire.MESSAGES)
_UNSENT: Final = UNASKED | {"prompt"}
_MOST_INPUTS: Final = 2048  # what OpenAI takes in one call for embeddings
_REFUSED: Final = frozenset({400, 413, 422})
_codec = Codec()


@dataclass(frozen=True)
class WireRequest(Request):
    """A request in a provider's own words: ``prompt`` is the body without ``n``, and asks one question.

    Attributes:
        endpoint: the path below the base URL, such as ``/chat/completions``; None is the model's own.
        headers: headers to send with it; those that change the answer are part of the key.
    """

    endpoint: str | None = dataclasses.field(default=None, kw_only=True)
    headers: Mapping[str, str] | None = dataclasses.field(default=None, kw_only=True, repr=False)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a request wants of which API."""

    api: wire.Api
    ask: wire.Ask
    endpoint: str
    headers: Mapping[str, str]


class Connection:
    """Where the SDK's client sends what, and the client of each event loop, made when it is first needed.

    An open connection belongs to the loop that opened it, so each loop has a client of its own, but for one
    that the caller has made.
    """

    package: ClassVar[str] = "openai"
    client_name: ClassVar[str] = "AsyncOpenAI"

    def __init__(
        self, client: Any, base_url: str | None, api_key: str | None, settings: Mapping[str, Any]
    ) -> None:
        self.calls = 0
        self.spent = Account()
        self.headers: dict[str, str] = {}
        self._client = client
        self._by_loop: dict[asyncio.AbstractEventLoop, Any] = {}
        self._api_key = api_key
        self._settings = settings
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self._query = ""
        self._azure: Any = None
        self._answer_class: Any = None
        if client is not None:
            self._learn(client)

    def _learn(self, client: Any) -> None:
        """Take from a client where it sends what, and with which headers that count."""
        self._base_url = str(client.base_url)
        query = {name: value for name, value in client.default_query.items() if value is not None}
        self._query = f"?{urlencode(query)}" if query else ""
        headers = {name: value for name, value in client.default_headers.items() if isinstance(value, str)}
        self.headers = wire.answer_headers(headers)
        self._azure = client if wire.azure_kinds(client) else None

    def scope_of(self, endpoint: str, model: Any) -> str:
        """Return the full URL of an endpoint without credentials."""
        if self._azure is None:
            return wire.scope_of(f"{self._base_url.rstrip('/')}{endpoint}{self._query}")
        return wire.scope_of(wire.azure_url(self._base_url, endpoint, model, self._azure) + self._query)

    async def post(self, endpoint: str, body: wire.Body, headers: Mapping[str, str]) -> bytes:
        """Return the bytes of an answer with a status of success."""
        client = await self._connected()
        if self._answer_class is None:
            # The class of raw answers is that of the HTTP library the SDK is built on, as the URL's is.
            library = type(client.base_url).__module__.partition(".")[0]
            self._answer_class = importlib.import_module(library).Response
        self.calls += 1
        options: dict[str, Any] = {"headers": dict(headers)} if headers else {}
        attempt = context.attempt.get()
        if attempt is not None and attempt.sole:
            options["max_retries"] = 0
        api = wire.api_for("POST", endpoint)
        span = None
        if not _replays(client):
            span = telemetry.begin(api.name if api is not None else endpoint, f"{client.base_url}", body)
        try:
            with _uncached(client):
                try:
                    answer = await client.post(
                        endpoint, body=body, cast_to=self._answer_class, options=options
                    )
                except UnicodeEncodeError:  # the SDK's own JSON cannot hold half of a character
                    content = jsontext.dumps(body)
                    answer = await client.post(
                        endpoint, content=content, cast_to=self._answer_class, options=options
                    )
        except BaseException as error:
            outages.explain(error)
            if span is not None:
                span.end(error=error)
            raise
        outages.reached(self._base_url)
        if attempt is not None:
            attempt.headers = answer.headers
        arrived: bytes = answer.content
        if span is not None:
            span.end_with(arrived)
        return arrived

    async def _connected(self) -> Any:
        """Return the client for this loop, made now if it has not been: replays never need it."""
        if self._client is not None:
            return self._client
        loop = loops.running()
        if loop not in self._by_loop:
            # It takes a second, in which the loop goes on.
            sdk = await asyncio.to_thread(importlib.import_module, self.package)
            if loop not in self._by_loop:
                self._forget_ended()
                self._by_loop[loop] = self._made(sdk)
        return self._by_loop[loop]

    def _made(self, sdk: Any) -> Any:
        """Return a new client."""
        key = os.environ.get("OPENAI_API_KEY") if self._api_key is None else self._api_key
        return outages.reporting(getattr(sdk, self.client_name))(
            base_url=self._base_url,
            api_key=_NO_KEY if key == "" else key,
            # The SDK's own would try to close itself on whatever loop runs when it is collected.
            http_client=sdk.DefaultAsyncHttpxClient(),
            **self._settings,
        )

    def _forget_ended(self) -> None:
        """Let go of the clients of loops that were closed, whose connections nobody can use any more."""
        for loop in [other for other in tuple(self._by_loop) if other.is_closed()]:
            self._by_loop.pop(loop, None)

    async def close(self) -> None:
        """Close the client of this loop if it was made here."""
        self._forget_ended()
        client = self._by_loop.pop(loops.running(), None)
        if client is not None:
            await client.close()


def _replays(client: Any) -> bool:
    """Tell whether a client has a cache of its own, and makes no calls."""
    surface = getattr(client, "_cachepipe", None)
    return surface is not None and surface.mode == "replay"


def _uncached(client: Any) -> contextlib.AbstractContextManager[None]:
    """Return what lets a client leave its own cache aside, unless it only replays.

    It would hold what is stored here once more, as further samples of the same question.
    """
    own = hasattr(client, "_cachepipe") and not _replays(client)
    return context.using(mode="bypass") if own else contextlib.nullcontext()


class EagerConnection(Connection):
    """The client of an SDK that alone knows where it sends what, so the first is made at once.

    Without credentials there are keys and replays, and the SDK's own error when a call is made.

    Args:
        client: the caller's own client, or None.
        base_url: where the API is.
        api_key: the key.
        settings: other parameters of the class.
    """

    def __init__(
        self, client: Any, base_url: str | None, api_key: str | None, settings: Mapping[str, Any]
    ) -> None:
        super().__init__(client, base_url, api_key, settings)
        self._refusal: Exception | None = None
        self._unused: list[Any] = []
        if client is not None:
            return
        try:
            sdk = importlib.import_module(self.package)
            http_client = sdk.DefaultAsyncHttpxClient()
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"this adapter needs a recent {self.package}: pip install -U {self.package}"
            ) from error
        kind = outages.reporting(getattr(sdk, self.client_name))
        given = {
            "base_url": base_url,
            "api_key": _NO_KEY if api_key == "" else api_key,
            "http_client": http_client,
            **settings,
        }
        try:
            self._first = kind(**given)
        except Exception as error:
            if api_key is not None:
                raise
            self._refusal = error
            self._first = kind(**{**given, "api_key": _NO_KEY})
        self._unused.append(self._first)
        self._learn(self._first)

    async def _connected(self) -> Any:
        if self._refusal is not None:
            raise self._refusal
        return await super()._connected()

    def _made(self, sdk: Any) -> Any:
        """Return the first client, and for further loops copies of it."""
        with contextlib.suppress(IndexError):
            return self._unused.pop()
        return self._first.copy(http_client=sdk.DefaultAsyncHttpxClient())


class OpenAIModel:
    """A model behind OpenAI's protocol, for every endpoint that speaks it.

    It takes plain requests, whose ``prompt`` is a string (one user message) or a list of messages and whose
    other fields go into the body unless they are None; and, with ``raw=True``, `WireRequest`.
    Errors are the SDK's own, and ``cachepipe.BadAnswer`` for what is no answer under status 200.

    Args:
        model: the name of the model, for requests that have no field of that name.
        client: an ``openai.AsyncOpenAI`` (or a subclass) to use; it stays the caller's to close.
        base_url: where the API is; default is ``OPENAI_BASE_URL``, then OpenAI.
        api_key: default is ``OPENAI_API_KEY``; an empty one is for servers that need none.
        timeout: seconds for one attempt of a call; default is the SDK's.
        max_retries: how often the SDK repeats a failed call; default is the SDK's.
        endpoint: where plain requests go.
        max_n: the most samples that the server gives in one call; default is OpenAI's own limit.
        raw: whether ``Response.data`` holds samples as they are stored, mappings in the form of whole
            answers, or else their text, an embedding's vector (a list of numbers), a moderation's result.

    It may be used on several event loops and in several threads; `close` closes what was opened on the
    loop that it is called on, and further calls open it again.

    Attributes:
        max_n: the most samples in one call.
    """

    _connection_class: ClassVar[type[Connection]] = Connection

    def __init__(
        self,
        model: str | None = None,
        *,
        client: Any = None,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        endpoint: str = CHAT_COMPLETIONS,
        max_n: int | None = None,
        raw: bool = False,
    ) -> None:
        given = {"timeout": timeout, "max_retries": max_retries}
        settings = {name: value for name, value in given.items() if value is not None}
        if client is not None and (settings or base_url is not None or api_key is not None):
            raise TypeError(
                "a client has its own base_url, api_key, timeout and max_retries; "
                "set them there, or pass no client"
            )
        if model is not None and not isinstance(model, str):
            raise TypeError(f"model is the name of a model, such as 'gpt-5-mini'; got {model!r:.200}")
        if client is not None and not inspect.iscoroutinefunction(getattr(client, "post", None)):
            raise TypeError(
                f"client is an asynchronous client, such as openai.AsyncOpenAI(); got {client!r:.200}"
            )
        if max_n is not None and (type(max_n) is not int or max_n < 1):
            raise ValueError(f"max_n must be a whole number of samples, at least 1; got {max_n!r}")
        self.model = model
        self.raw = raw
        self._limit = max_n
        self._connection = self._connection_class(client, base_url, api_key, settings)
        self._set_endpoint(endpoint)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model!r} at {self.cache_scope}, {self.calls} calls>"

    def _set_endpoint(self, endpoint: str) -> None:
        self.endpoint = self._path(endpoint)
        self.api = _api_of(self.endpoint)
        self.max_n = self.api.max_n if self._limit is None else min(self._limit, self.api.max_n)
        self.cache_scope = self._connection.scope_of(self.endpoint, self.model)

    def _path(self, endpoint: str) -> str:
        """Return an endpoint as the SDK's own resources write it."""
        return _normal(endpoint)

    def at(self, endpoint: str) -> Self:
        """Return this model at another endpoint, through the same client and with the same count of calls."""
        twin = copy.copy(self)
        twin._set_endpoint(endpoint)  # noqa: SLF001 - its own class
        return twin

    @property
    def calls(self) -> int:
        """How many calls were made; what the SDK repeats counts once."""
        return self._connection.calls

    @property
    def spent(self) -> Account:
        """The tokens of all samples that calls have brought."""
        return self._connection.spent

    # What is asked, and where.

    def question(self, request: Request, scope: str | None = None) -> Question:
        """Return what a request asks, keyed as the provider gets it.

        Args:
            request: a plain request, or a `WireRequest`.
            scope: what stands for the endpoint's URL in the key, if anything else does.

        Raises:
            BadRequest: when it cannot be told what is asked, or it cannot be answered from a cache.
        """
        wanted = self._wanted(request)
        scope, api = wire.named_scope(
            None if scope == self.cache_scope else scope, self._url(wanted), wanted.api
        )
        return provider_question(
            scope,
            wire.question_document(wanted.ask, {**self._connection.headers, **wanted.headers}, api),
            as_written=wanted.api.as_written,
            mergeable=wanted.ask.mergeable,
            function=wanted.ask.function,
        )

    def url_of(self, request: Request) -> str:
        """Return the URL that a request goes to, without credentials."""
        return self._url(self._wanted(request))

    def present(self, sample: wire.Sample) -> Any:
        """Return what ``Response.data`` holds of a stored sample: all of it if ``raw``, else what it says."""
        return sample if self.raw else self.api.plain(sample)

    def pack(self, sample: wire.Sample) -> tuple[bytes, Mapping[str, Any]]:
        """Return what is stored of a sample, and what is recorded beside it."""
        return _codec.encode(sample), noted(sample)

    def _wanted(self, request: Request) -> _Wanted:
        if not isinstance(request, WireRequest):
            wanted = _Wanted(*self._ask(self.endpoint, self._body(request), request.n), self.endpoint, {})
            if not self.raw and wanted.ask.question.get("encoding_format") == "base64":
                raise wire.BadRequest(
                    "beside another output type, base64 may hold other numbers than floats; make the "
                    f"{type(self).__name__} with raw=True to get it as it comes, or leave out encoding_format"
                )
            return wanted
        if not self.raw:
            raise TypeError(
                f"a WireRequest is answered with whole samples; make the {type(self).__name__} with raw=True"
            )
        if not isinstance(request.prompt, Mapping):
            raise wire.BadRequest(f"the prompt of a WireRequest is a body; got {request.prompt!r:.200}")
        endpoint = self.endpoint if request.endpoint is None else self._path(request.endpoint)
        return _Wanted(*self._ask(endpoint, request.prompt, request.n), endpoint, request.headers or {})

    def _body(self, request: Request) -> dict[str, Any]:
        """Return the body of a plain request, without the number of samples."""
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
        for name in field_names(type(request)):
            value = None if name in _UNSENT else getattr(request, name)
            if value is not None:
                body[name] = _plain(value)
        return body

    def _ask(self, endpoint: str, body: wire.Body, n: int) -> tuple[wire.Api, wire.Ask]:
        api = self.api if endpoint == self.endpoint else _api_of(endpoint)
        asks = api.split({**body, "n": n} if api.max_n > 1 else body)
        if len(asks) != 1:
            raise wire.BadRequest(
                f"a request to {api.name} asks one question here; got {len(asks)}. Send one request for each"
            )
        if not asks[0].cacheable:
            raise wire.BadRequest(
                f"a request to {api.name} cannot be answered from a cache: {asks[0].reason}"
            )
        return api, asks[0]

    # Calls.

    async def request(self, request: Request) -> Response:
        """Return up to ``request.n`` samples as they are stored, whatever ``raw`` says.

        Raises:
            BadAnswer: when what arrived under status 200 is no answer.
            openai.OpenAIError: whatever the SDK raises.
        """
        wanted = self._wanted(request)
        questions = (wanted.ask.question,)
        limit = self.max_n if wanted.api is self.api else wanted.api.max_n
        if request.n <= limit:
            return Response(await self._call(wanted, questions, request.n))
        sizes = [min(limit, request.n - begun) for begun in range(0, request.n, limit)]
        parts = await asyncio.gather(
            *(self._call(wanted, questions, size) for size in sizes), return_exceptions=True
        )
        samples = [sample for part in parts if isinstance(part, list) for sample in part]
        failures = [part for part in parts if isinstance(part, BaseException)]
        if failures and not samples:
            raise failures[0]
        return Response(samples)  # if they are too few, the rest is asked for again

    async def together(self, requests: Sequence[Request]) -> list[Sequence[wire.Sample]]:
        """Return the samples of each request from one call; they differ in the item of a list only.

        Raises:
            MixedAnswer: when it cannot be told which samples are whose.
        """
        wanted, n = self._wanted(requests[0]), requests[0].n
        questions = [self._wanted(request).ask.question for request in requests]
        return wire.by_question(await self._call(wanted, questions, n), len(requests), n)

    async def _call(self, wanted: _Wanted, questions: Sequence[wire.Body], n: int) -> list[wire.Sample]:
        body = wanted.api.merge_body(questions, n, transport=wanted.ask.transport)
        answer = await self._connection.post(wanted.endpoint, body, wanted.headers)
        samples = wanted.api.samples(answer, questions if len(questions) > 1 else ())
        self._connection.spent.spend(map(usage_of, samples), self._url(wanted))
        return samples

    def _url(self, wanted: _Wanted) -> str:
        return self._connection.scope_of(wanted.endpoint, wanted.ask.question.get("model"))

    async def close(self) -> None:
        """Close the client of this loop if it was made here. Idempotent."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Group:
    """Requests that came in one turn of the loop and share a call, and who waits for each."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.futures: list[asyncio.Future[Response]] = []
        self.task: asyncio.Task[None] | None = None


class ListModel:
    """The same model for APIs that take a list of questions: what one caller needs travels in one call.

    Requests that come in one turn of the loop share a call when they have the same request id and differ
    in their item only. A shared call that is refused or times out is halved, until each question has
    failed on its own. After one that was answered short, so that nobody knows which samples are whose, each
    request has a call of its own.

    Args:
        model: the adapter that makes the calls, with ``raw=True``.
    """

    def __init__(self, model: OpenAIModel) -> None:
        self.model = model
        self.question = model.question
        self.present = model.present
        self.pack = model.pack
        self.cache_scope = model.cache_scope
        self.max_n = model.max_n
        self._open: dict[Any, _Group] = {}
        self._shares = True

    def __repr__(self) -> str:
        return f"<ListModel of {self.model!r}>"

    async def request(self, request: Request) -> Response:
        """Return up to ``request.n`` samples as they are stored; see `OpenAIModel.request`."""
        wanted = self.model._wanted(request)  # noqa: SLF001 - its other half
        rest = _rest(request, wanted) if self._shares else None
        if rest is None:
            return await self.model.request(request)
        loop = loops.running()
        group = self._open.get((loop, rest))
        if group is None or len(group.requests) == _MOST_INPUTS:
            group = self._open[loop, rest] = _Group()
            loop.call_soon(self._start, loop, rest, group)
        future: asyncio.Future[Response] = loop.create_future()
        group.requests.append(request)
        group.futures.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if group.task is not None and all(waiting.done() for waiting in group.futures):
                group.task.cancel()
            raise

    def _start(self, loop: asyncio.AbstractEventLoop, rest: Any, group: _Group) -> None:
        if self._open.get((loop, rest)) is group:
            del self._open[loop, rest]
        waiting = [pair for pair in zip(group.requests, group.futures, strict=True) if not pair[1].done()]
        if waiting:
            group.task = loop.create_task(self._serve(*zip(*waiting, strict=True)))

    async def _serve(self, requests: Sequence[Request], futures: Sequence[asyncio.Future[Response]]) -> None:
        try:
            if len(requests) == 1:
                answers = [await self.model.request(requests[0])]
            else:
                answers = [Response(samples) for samples in await self.model.together(requests)]
        except wire.MixedAnswer:
            self._shares = False
            alone = zip(requests, futures, strict=True)
            await asyncio.gather(*(self._serve([request], [future]) for request, future in alone))
            return
        except Exception as error:  # noqa: BLE001 - it belongs to those who needed the call
            half = len(requests) // 2
            if half and _may_be_size(error):
                await asyncio.gather(
                    self._serve(requests[:half], futures[:half]), self._serve(requests[half:], futures[half:])
                )
                return
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future, answer in zip(futures, answers, strict=True):
            if not future.done():
                future.set_result(answer)


def _rest(request: Request, wanted: _Wanted) -> Any:
    """Return what requests that may share a call have in common, or None if this one goes alone."""
    listed = wanted.api.listed
    item = wanted.ask.question.get(listed) if listed is not None else None
    if item is None or not wanted.ask.mergeable or not _is_item(item):
        return None
    others = {name: value for name, value in wanted.ask.question.items() if name != listed}
    document = {"body": others, "transport": wanted.ask.transport, "headers": wanted.headers}
    shared = provider_question(wanted.endpoint, document, as_written=wanted.api.as_written)
    return request.request_id, request.namespace, request.n, type(item) is str, shared.key


def _is_item(item: Any) -> bool:
    """Tell whether an item can stand in a list of items: a text, or the numbers of tokens."""
    return isinstance(item, str) or (isinstance(item, list) and all(type(token) is int for token in item))


def _may_be_size(error: BaseException) -> bool:
    """Tell whether a call may have failed for holding too much, or one bad item among good ones."""
    return "Timeout" in type(error).__name__ or getattr(error, "status_code", None) in _REFUSED


def _normal(endpoint: str) -> str:
    """Return an endpoint with the one leading slash that the SDK's own resources write."""
    return "/" + endpoint.strip("/")


def _api_of(endpoint: str) -> wire.Api:
    api = wire.api_for("POST", endpoint)
    if api is None:
        known = ", ".join(sorted(ENDPOINTS.values()))
        raise wire.BadRequest(
            f"there is nothing that can be cached at {endpoint!r}; the endpoints are {known}"
        )
    return api


ENDPOINTS: Final[Mapping[wire.Api, str]] = {
    wire.CHAT: CHAT_COMPLETIONS,
    wire.COMPLETIONS: "/completions",
    wire.RESPONSES: "/responses",
    wire.EMBEDDINGS: "/embeddings",
    wire.MODERATIONS: "/moderations",
}
"""Where each of OpenAI's APIs is, below a base URL."""


def _plain(value: Any) -> Any:
    """Return a value as the SDK would send it: pydantic models as the fields that were set."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "model_dump") and not isinstance(value, type):
        return value.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return value
