"""Calls through the client of an SDK: where they go, and the client of each event loop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict
from urllib.parse import urlencode

from cachepipe import context, jsontext, loops, outages, wire
from cachepipe.accounting import Account, usage_of
from cachepipe.providers.generation import Calls, Made, Unkept
from cachepipe.providers.responses import Received

_GOOGLE: Final = "https://generativelanguage.googleapis.com"
_GOOGLE_KEYS: Final = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
_HUB: Final = "https://router.huggingface.co/hf-inference"
_HUB_KEY: Final = "HF_TOKEN"
_NO_KEY: Final = "EMPTY"  # for servers that need no key; the SDK would refuse to send none


class ConnectionSettings(TypedDict, total=False):
    """The settings of a connection.

    Attributes:
        client: an asynchronous client of the SDK to use; its owner closes it.
        base_url: where the API is.
        api_key: the key.
        timeout: seconds for one attempt of a call; default is the SDK's.
        max_retries: how often the SDK repeats a failed call; default is the SDK's.
    """

    client: Any
    base_url: str | None
    api_key: str | None
    timeout: float | None
    max_retries: int | None


class Connection:
    """The clients of an SDK, and what they have cost.

    An open connection belongs to the event loop that opened it, so each loop has a client of its own, made
    when it is first needed. A client that the caller has made serves all loops.

    Args:
        package: the SDK's package.
        client_name: its asynchronous client.
        settings: see `ConnectionSettings`.

    Attributes:
        headers: the headers of the calls that change the answer.
        calls: how many calls were made; what the SDK repeats counts once.
        spent: the tokens of all samples that calls have returned.
    """

    def __init__(self, package: str, client_name: str, settings: ConnectionSettings) -> None:
        given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        client = given.pop("client", None)
        if client is not None:
            if given:
                raise TypeError(
                    "a client has its own base_url, api_key, timeout and max_retries; "
                    "set them there, or pass no client"
                )
            if not inspect.iscoroutinefunction(getattr(client, "post", None)):
                raise TypeError(
                    f"client is an asynchronous client, such as openai.AsyncOpenAI(); got {client!r:.200}"
                )
        self.package = package
        self.client_name = client_name
        self.calls = 0
        self.spent = Account()
        self.headers: dict[str, str] = {}
        self._client = client
        self._by_loop: dict[asyncio.AbstractEventLoop, Any] = {}
        self._api_key = given.pop("api_key", None)
        base_url = given.pop("base_url", None) or os.environ.get("OPENAI_BASE_URL")
        self._is_named = base_url is not None or client is not None
        self._base_url = base_url or "https://api.openai.com/v1"
        self._settings = given
        self._query = ""
        self._azure: Any = None
        self._answer_class: Any = None
        if client is not None:
            self._learn(client)

    @property
    def only_replays(self) -> bool:
        """Whether the caller's client has a cache of its own, and makes no calls."""
        view = getattr(self._client, "_cachepipe", None)
        return view is not None and view.mode == "replay"

    def _learn(self, client: Any) -> None:
        """Take from a client where it sends what, and with which headers that count."""
        self._base_url = str(client.base_url)
        query = {name: value for name, value in client.default_query.items() if value is not None}
        self._query = f"?{urlencode(query)}" if query else ""
        headers = {name: value for name, value in client.default_headers.items() if isinstance(value, str)}
        self.headers = wire.answer_headers(headers)
        self._azure = client if wire.azure_kinds(client) else None

    def place_of(self, path: str) -> str:
        """Return where an API of Gemini's or Hugging Face's is: a path below the base URL.

        If no base URL is given, it is a URL of Google's, or of the hub's router.

        Args:
            path: its path, with the version, which a base URL may end with too.
        """
        if not self._is_named:
            return (_HUB if wire.api_for("POST", path) in wire.INFERENCE else _GOOGLE) + path
        version = "/" + path.split("/", 2)[1]
        return path.removeprefix(version) if self._base_url.rstrip("/").endswith(version) else path

    def scope_of(self, endpoint: str, model: Any) -> str:
        """Return the full URL of an endpoint without credentials."""
        if "://" in endpoint:
            return wire.scope_of(endpoint + self._query)
        if self._azure is None:
            return wire.scope_of(f"{self._base_url.rstrip('/')}{endpoint}{self._query}")
        return wire.scope_of(wire.azure_url(self._base_url, endpoint, model, self._azure) + self._query)

    async def post(self, endpoint: str, body: wire.Body) -> Received:
        """Return a response with a status of success."""
        client = await self._connected()
        if self._answer_class is None:
            # The class of raw answers is that of the HTTP library the SDK is built on, as the URL's is.
            library = type(client.base_url).__module__.partition(".")[0]
            self._answer_class = importlib.import_module(library).Response
        self.calls += 1
        attempt = context.attempt.get()
        options: dict[str, Any] = {"max_retries": 0} if attempt is not None and attempt.sole else {}
        if wire.api_for("POST", endpoint) in (wire.GENERATE_CONTENT, wire.EMBED_CONTENT):
            options["headers"] = self._google_headers(client)
        elif wire.api_for("POST", endpoint) in wire.INFERENCE:
            options["headers"] = self._hub_headers()
        sent: dict[str, Any] = {"cast_to": self._answer_class, "options": options}
        try:
            with self._uncached():
                try:
                    answer = await client.post(endpoint, body=body, **sent)
                except UnicodeEncodeError:  # the SDK's own JSON cannot hold half of a character
                    answer = await client.post(endpoint, content=jsontext.dumps(body), **sent)
        except BaseException as error:
            outages.explain(error)
            raise
        outages.reached(self._base_url)
        if attempt is not None:
            attempt.headers = answer.headers
        return Received(answer, {}, answer.content)

    def _google_headers(self, client: Any) -> dict[str, Any]:
        """Return the headers of a call to Gemini: its own key, and not that of OpenAI."""
        named = next(filter(None, map(os.environ.get, _GOOGLE_KEYS)), None)
        key = self._api_key or (named if self._client is None else client.api_key)
        absent = importlib.import_module(f"{self.package}._types").Omit()
        return {"x-goog-api-key": key or absent, "Authorization": absent}

    def _hub_headers(self) -> dict[str, Any]:
        """Return the headers of a call to Hugging Face's own routes: its token, and not the key of OpenAI."""
        if self._client is not None:  # it has a token of its own
            return {}
        key = self._api_key or os.environ.get(_HUB_KEY)
        absent = importlib.import_module(f"{self.package}._types").Omit()
        return {"Authorization": f"Bearer {key}" if key else absent}

    def _uncached(self) -> contextlib.AbstractContextManager[None]:
        """Make the caller's client bypass its own cache, unless it only replays.

        Its cache would store the samples again, as further samples of the same question.
        """
        cached = hasattr(self._client, "_cachepipe") and not self.only_replays
        return context.using(mode="bypass") if cached else contextlib.nullcontext()

    async def _connected(self) -> Any:
        """Return the client for this loop; the first call makes it, because replays never need it."""
        if self._client is not None:
            return self._client
        loop = loops.running()
        if loop not in self._by_loop:
            # The import takes a second; it runs in a thread, so that the loop goes on.
            sdk = await asyncio.to_thread(importlib.import_module, self.package)
            if loop not in self._by_loop:
                self._forget_ended()
                self._by_loop[loop] = self._made(sdk)
        return self._by_loop[loop]

    def _made(self, sdk: Any) -> Any:
        """Return a new client."""
        key = os.environ.get("OPENAI_API_KEY") if self._api_key is None else self._api_key
        if key is None and any(map(os.environ.get, (*_GOOGLE_KEYS, _HUB_KEY))):
            key = _NO_KEY  # all lines may be Gemini's or Hugging Face's
        return self._client_of(sdk, self._base_url, key)

    def _client_of(self, sdk: Any, base_url: str | None, api_key: str | None) -> Any:
        return outages.reporting(getattr(sdk, self.client_name))(
            base_url=base_url,
            api_key=_NO_KEY if api_key == "" else api_key,
            # The SDK's own would try to close itself on whatever loop runs when it is collected.
            http_client=sdk.DefaultAsyncHttpxClient(),
            **self._settings,
        )

    def _forget_ended(self) -> None:
        """Remove the clients of closed loops; nobody can use their connections any more."""
        for loop in [other for other in tuple(self._by_loop) if other.is_closed()]:
            self._by_loop.pop(loop, None)

    async def close(self) -> None:
        """Close the client of this loop if it was made here."""
        self._forget_ended()
        client = self._by_loop.pop(loops.running(), None)
        if client is not None:
            await client.close()


class EagerConnection(Connection):
    """A connection of an SDK that alone knows its URL, so the first client is made at once.

    Without credentials there are keys and replays, and a call raises the SDK's own error.
    """

    def __init__(self, package: str, client_name: str, settings: ConnectionSettings) -> None:
        super().__init__(package, client_name, settings)
        self._refusal: Exception | None = None
        self._unused: list[Any] = []
        if self._client is not None:
            return
        try:
            sdk = importlib.import_module(package)
            _ = sdk.DefaultAsyncHttpxClient
        except (ImportError, AttributeError) as error:
            raise ImportError(f"this adapter needs a recent {package}: pip install -U {package}") from error
        base_url = settings.get("base_url")
        try:
            self._first = self._client_of(sdk, base_url, self._api_key)
        except Exception as error:
            if self._api_key is not None:
                raise
            self._refusal = error
            self._first = self._client_of(sdk, base_url, _NO_KEY)
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


class SdkCalls(Calls):
    """The calls of one request through the client of an SDK.

    Attributes:
        connection: the connection.
        endpoint: the path of the calls below the base URL.
    """

    connection: Connection
    endpoint: str

    async def send(self, body: Mapping[str, Any], *, stream: bool) -> Received:  # noqa: ARG002 - it never streams
        """Make a call; its error is the SDK's own."""
        return await self.connection.post(*self.api.sent(self.endpoint, body))

    def most(self) -> int:
        """Return no limit: the SDK has read the whole answer already, which may be that of a long list."""
        return sys.maxsize

    async def paid(self, asks: Sequence[wire.Ask], n: int) -> tuple[list[wire.Sample], Made]:
        """Make one call as `Calls.call` does, and count what it has cost.

        Raises:
            BadAnswer: when the response is not an answer.
        """
        try:
            samples, made = await self.call(asks, n)
        except Unkept as unkept:
            raise unkept.error from unkept.error.__cause__
        self.connection.spent.spend(map(usage_of, samples), self.url)
        return samples, made
