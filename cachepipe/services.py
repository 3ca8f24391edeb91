"""Endpoints with their limits: made once, shared by the clients, pipelines and sessions that call them.

    service = Services.OpenAI(max_requests=500, max_tokens=200_000)
    client = service.client(cache="caches/exp", namespace="run-1")

The object is shared: two services have two sets of limits, even for the same endpoint, unless ``shared=``
names a folder in which all processes of the machine keep one set.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import functools
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, TypedDict, Unpack
from urllib.parse import unquote, urlsplit, urlunsplit

from cachepipe import context, forks, loops
from cachepipe.flow import Clock, Estimator, FlowStats, Limits, Quota, Retries
from cachepipe.flow.clock import CLOCK
from cachepipe.flow.flow import Flow
from cachepipe.portal import submit
from cachepipe.providers import presets
from cachepipe.providers.presets import NO_KEY, Preset
from cachepipe.stores import Store
from cachepipe.typedefs import Mode, Repeat, describes

_CLIENTS: Final = {
    "openai": ("AsyncOpenAI", "OpenAI"),
    "together": ("AsyncTogether", "Together"),
    "anthropic": ("AsyncAnthropic", "Anthropic"),
    "groq": ("AsyncGroq", "Groq"),
    "google": ("AsyncGemini", "Gemini"),
}
_CHATS: Final = frozenset({"openai", "together", "groq"})
"""The SDKs with chat completions, which sessions and completions need."""
_PREFIXES: Final = {**{preset.sdk: preset.prefix for preset in presets.PRESETS.values()}, "google": "/v1"}
"""By SDK, the end of the base URL that it writes into its paths; Google's writes another version there."""


class LimitOptions(TypedDict, total=False):
    """The limits of a service.

    Attributes:
        max_requests: calls within any interval, 1,000 by default; None means no limit.
        max_tokens: tokens within any interval, 100,000 by default; None means no limit.
        interval: seconds; 60 by default.
        max_concurrency: calls in flight; None, the default, means no limit.
        per_model: further limits by model name: mappings of ``max_requests``, ``max_tokens``,
            ``interval`` and ``max_concurrency``.
        adaptive: whether 429s and overloads slow the calls down; True by default.
        transit: seconds that a request may be on its way; see ``cachepipe.flow.Limits``.
        shared: a folder in which the processes of this machine share the quotas; None shares nothing.
    """

    max_requests: float | None
    max_tokens: float | None
    interval: float
    max_concurrency: int | None
    per_model: Mapping[str, Quota | Mapping[str, Any]] | None
    adaptive: bool
    transit: float | None
    shared: str | os.PathLike[str] | None


@describes(LimitOptions)
class Service:
    """An endpoint, with limits for all calls through this object.

    Args:
        base_url: the base URL. A user and a key in it (``https://user:key@host/v1``) are sent as HTTP
            Basic credentials; they are never shown, stored or part of a cache key.
        api_key: the API key; default is the value of the environment variable ``key_scheme``.
        key_scheme: the name of that variable; None if the endpoint needs no key.
        name: its display name; default is the host.
        sdk: the SDK of its clients: ``"openai"``, ``"together"``, ``"anthropic"``, ``"groq"`` or
            ``"google"``.
        model: the default model of sessions.
        max_retries: the largest number of retries of a failed call. The SDK does not retry by itself.
        max_time: seconds after a call's first failure after which it is not retried.
        token_encoding_name: the encoding with which tiktoken, if installed, counts tokens.
        clock: returns the time.
        **limits: see `LimitOptions`.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        key_scheme: str | None = None,
        name: str | None = None,
        sdk: str = "openai",
        model: str | None = None,
        max_retries: int = 8,
        max_time: float = 600.0,
        token_encoding_name: Any = "cl100k_base",  # noqa: S107 - tokens of text
        clock: Clock = CLOCK,
        **limits: Unpack[LimitOptions],
    ) -> None:
        texts = {"api_key": api_key, "key_scheme": key_scheme, "name": name, "model": model}
        for option, value in texts.items():
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{option} is a string or None; got a {type(value).__name__}")
        self.base_url, self._basic = _parted(base_url)
        if self._basic is not None and api_key is not None:
            raise ValueError(
                "the base URL has credentials already; remove them from the URL, or leave out api_key="
            )
        self.key_scheme = key_scheme
        self.name = name if name is not None else urlsplit(self.base_url).netloc
        self.sdk = _checked(sdk)
        self.model = model
        self._api_key = api_key
        quotas: LimitOptions = {"max_requests": 1000, "max_tokens": 100_000, **limits}
        self.flow = Flow(
            Limits(**quotas, name=self.base_url, clock=clock),
            Retries(max_retries, max_time, clock=clock),
            Estimator(token_encoding_name),
        )
        self._lent: Loan | None = None
        self._preset: Preset | None = None

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"<Service {self.name} at {self.base_url}, {self.flow.limits.describe()}; "
            f"{stats.waiting} waiting, {stats.in_flight} in flight>"
        )

    def __reduce__(self) -> Any:
        raise TypeError("a Service holds a key and live limits, so it is not pickled; make another one there")

    def stats(self) -> FlowStats:
        """Return the figures: calls, refusals, retries, tokens, time in the queue and in calls."""
        return self.flow.limits.stats()

    # Clients.

    def client(
        self,
        cache: Any = None,
        namespace: str | None = None,
        *,
        sdk: str | None = None,
        **options: Any,
    ) -> Any:
        """Return a new asynchronous drop-in client of this endpoint, bound to its limits.

        Args:
            cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
            namespace: the unit within which samples are independent, in practice one experiment.
            sdk: the SDK of the client; default is the service's. The endpoint must speak its protocol.
            options: further arguments of the drop-in client: ``replicate``, ``mode``, ``scope``, ``repeat``,
                and those of the SDK's client.

        Raises:
            ValueError: when there is no key, and one is needed.
        """
        return self._made(0, sdk, cache=cache, namespace=namespace, **options)

    def sync_client(
        self, cache: Any = None, namespace: str | None = None, *, sdk: str | None = None, **options: Any
    ) -> Any:
        """Return a new synchronous drop-in client of this endpoint, bound to its limits; see `client`."""
        return self._made(1, sdk, cache=cache, namespace=namespace, **options)

    def _made(self, which: int, sdk: str | None, **options: Any) -> Any:
        from cachepipe import clients  # noqa: PLC0415 - each needs its SDK

        names = _CLIENTS[_checked(sdk or self.sdk)]
        if self._preset is not None and (sdk or self.sdk) == self._preset.sdk == "openai":
            names = f"Async{self._preset.name}", self._preset.name
        kind = getattr(clients, names[which])
        return kind(**{"service": self, **options})

    def client_options(self, sdk: str = "openai", *, replays: bool = False) -> dict[str, Any]:
        """Return the constructor arguments of an SDK's client for this endpoint, including the API key.

        Args:
            sdk: the SDK.
            replays: whether the client will make no calls, so that it needs no key.

        Raises:
            ValueError: when there is no key, and one is needed.
        """
        url = self.base_url.removesuffix(_PREFIXES[sdk])
        if sdk == "openai" and self._preset is not None:
            url += self._preset.chat
        options: dict[str, Any] = {"base_url": url}
        if self._basic is not None:
            return {**options, "api_key": NO_KEY, "default_headers": {"Authorization": self._basic}}
        key = stripped(self._api_key)
        if key is None and self.key_scheme is not None:
            key = stripped(os.environ.get(self.key_scheme))
            if not key and not replays:
                raise ValueError(
                    f"{self.name} needs a key: set the environment variable {self.key_scheme}, "
                    "or pass api_key=, or the name of another variable as key_scheme="
                )
        return {**options, "api_key": key or NO_KEY}

    def lent(self, cache: Store, mode: Mode, repeat: Repeat, sdk: str | None = None) -> Any:
        """Return the shared client of sessions and completions for a store; on the portal's loop only.

        A known provider whose own SDK has no chat completions is asked by OpenAI's protocol. The client is
        closed with this service, or when the service is no longer referenced.
        """
        if sdk is None and self.sdk not in _CHATS and self._preset is not None:
            sdk = "openai"
        if self._lent is None or not self._lent.holds:
            self._lent = Loan(self.flow)
            weakref.finalize(self, self._lent.end).atexit = False
        loan = self._lent

        how: dict[str, Any] = {"mode": mode, "repeat": repeat, "budget": context.current().budget_of(None)}

        def make() -> Any:
            options = self.client_options(sdk or self.sdk, replays=mode == "replay")
            return self._made(0, sdk, cache=cache, service=loan, **how, **options)

        return loan.client((id(cache), sdk, *how.values()), make)

    async def close(self) -> None:
        """Close the clients of sessions and completions. The caller closes all other clients."""
        loops.running()  # fails without a loop, before anything is closed
        if self._lent is not None and (ended := self._lent.end()) is not None:
            await asyncio.wrap_future(ended)
        self.flow.limits.close()


class Loan:
    """The shared clients of an endpoint. They do not refer to its service, so that it can be collected.

    Args:
        flow: the limits of the service; None means none.
    """

    def __init__(self, flow: Flow | None = None) -> None:
        self.flow = flow
        self.clients: dict[Any, Any] = {}
        self._fork = forks.count
        self._closing = asyncio.Lock()

    @property
    def holds(self) -> bool:
        """Whether this process made the clients; a forked child leaves them to its parent."""
        return self._fork == forks.count

    def client(self, name: Any, make: Callable[[], Any]) -> Any:
        """Return the client with this name; call ``make`` for a new one. On the portal's loop only."""
        if name not in self.clients:
            self.clients[name] = make()
            _loans.add(self)
        return self.clients[name]

    def end(self) -> concurrent.futures.Future[None] | None:
        """Close the clients, from any thread or finalizer."""
        return submit(self.close()) if self.holds and not sys.is_finalizing() else None

    async def close(self) -> None:
        """Wait for what is in flight, and close the clients; on the portal's loop."""
        async with self._closing:
            ended, self.clients = self.clients, {}  # the service may lend others meanwhile
            for client in ended.values():
                await client.close()
            if not self.clients:
                _loans.discard(self)


_loans: set[Loan] = set()


async def close_lent() -> None:
    """Close the clients of all services that sessions and completions have used; on the portal's loop."""
    await asyncio.gather(*(loan.close() for loan in list(_loans) if loan.holds), return_exceptions=True)


def _checked(sdk: str) -> str:
    """Return the name of an SDK.

    Raises:
        ValueError: when there are no drop-in clients for it.
    """
    if sdk not in _CLIENTS:
        raise ValueError(f"sdk is one of {', '.join(_CLIENTS)}; got {sdk!r}")
    return sdk


def stripped(key: Any) -> Any:
    """Return a key without its file's line break, which a header cannot contain."""
    return key.strip() if isinstance(key, str) else key


def _parted(url: str) -> tuple[str, str | None]:
    """Return a URL without its credentials, and the header with these credentials."""
    if not isinstance(url, str):
        raise TypeError(f"base_url is a string such as 'https://host/v1'; got {type(url).__name__}")
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise ValueError(
            "base_url must be of the form https://host/v1; the given URL is not (it is not shown here)"
        )
    user, at, place = parts.netloc.rpartition("@")
    bare = urlunsplit((parts.scheme, place, parts.path.rstrip("/"), parts.query, ""))
    if not at:
        return bare, None
    name, _, word = user.partition(":")
    credentials = f"{unquote(name)}:{unquote(word)}".encode()
    return bare, f"Basic {base64.b64encode(credentials).decode()}"


class _Known(type):
    """Makes an attribute of each known provider: a function that returns its service."""

    def __getattr__(cls, name: str) -> Callable[..., Service]:
        preset = presets.PRESETS.get(name)
        if preset is None:
            known = ", ".join(presets.PRESETS)
            raise AttributeError(f"there is no service {name!r}; there are {known} and custom(base_url)")
        made = functools.partial(_service, preset)
        made.__doc__ = f"Return {name}, at ``{preset.url}``; the key is in ``{preset.key}``."
        return made

    def __dir__(cls) -> list[str]:
        return [*super().__dir__(), *presets.PRESETS]


class Services(metaclass=_Known):
    """The known providers, such as ``Services.OpenAI()``; each takes the parameters of `Service`.

    The API key is in the provider's own environment variable, such as ``OPENROUTER_API_KEY``. A variable such
    as ``OPENROUTER_BASE_URL`` names another server. Servers that need no key have no quota by default.
    """

    @staticmethod
    def custom(base_url: str, **options: Any) -> Service:
        """Return any endpoint that speaks OpenAI's protocol.

        Args:
            base_url: its base URL, which usually ends in ``/v1``.
            options: as for `Service`; a key is sent only with ``api_key`` or ``key_scheme``.
        """
        return Service(base_url, **options)


def _service(preset: Preset, **options: Any) -> Service:
    """Return a service with the defaults of a provider."""
    url = preset.base_url
    if preset.prefix and not urlsplit(url).path.rstrip("/"):
        url += preset.prefix  # as its own SDK does
    known: dict[str, Any] = {"base_url": url, "name": preset.name, "model": preset.model}
    known["sdk"] = preset.protocol
    if preset.needs_key:
        known["key_scheme"] = preset.key
    else:
        known |= {"max_requests": None, "max_tokens": None, "api_key": preset.api_key}
    service = Service(**{**known, **options})
    service._preset = preset  # noqa: SLF001 - the clients are those of the provider
    return service
