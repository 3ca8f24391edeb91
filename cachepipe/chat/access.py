"""Finds the client and the settings for calls in the caller's options, else in the environment."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping
from inspect import signature
from typing import Any, Final, Self, TypeVar

import anyio.to_thread

from cachepipe import context
from cachepipe.chat.kept import kept_store, located, on_portal, own_client, wrapped
from cachepipe.chat.options import NAMES
from cachepipe.context import Inherited
from cachepipe.portal import in_portal
from cachepipe.providers.presets import ollama_url
from cachepipe.sdk import internals
from cachepipe.sdk.mixins import AsyncCached, SyncCached
from cachepipe.services import Service, stripped
from cachepipe.typedefs import REPEATS, Repeat

T = TypeVar("T")
_logger = logging.getLogger(__name__)

DEFAULT_MODEL: Final = "gpt-4o-mini"
"""The default model, if neither the caller nor ``CACHEPIPE_MODEL`` names one."""

_SETTINGS: Final = ("namespace", "request_id", "replicate", "mode")
_ENDPOINTS: Final = ("client", "service", "api_key", "base_url")
_CLIENTS: Final = (
    "client= takes a client of openai, together, groq, huggingface_hub or cachepipe.clients (for a provider "
    "whose own client is another, give service=, such as Services.Gemini())"
)
_AT_MOST_ONE: Final = ([], *([name] for name in _ENDPOINTS), ["api_key", "base_url"])
"""The options of `_ENDPOINTS` that may be given together, as they name no more than one endpoint."""


class Environment:
    """The settings that options may leave out.

    Args:
        given: settings that override the environment of the process.
        taker: the name of the class that takes them, for the error.

    Raises:
        TypeError: when they are not a mapping.
    """

    def __init__(self, given: Mapping[str, Any] | None = None, taker: str = "Access") -> None:
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"{taker} takes a mapping of settings, and options by name; got {type(given).__name__}"
            )
        self._given = given or {}

    def found(self, name: str) -> str | None:
        """Return a setting by its name; None if it is not set, or empty."""
        value = self._given.get(name)
        return str(value) if value else os.environ.get(name) or None

    def located(self, cache: Any) -> Any:
        """Return what `located` returns; outside experiments, None is ``CACHEPIPE_DIR``."""
        cache = context.current().cache_of(cache)
        return located(self.found("CACHEPIPE_DIR") if cache is None else cache)


class Access:
    """The endpoint, the cache and the mode of calls.

    Args:
        options: the options for the client and the cache; missing ones are looked up.
        environment: the settings for missing options; default is the environment of the process.
        sdk: the SDK for the clients of a service; default is the service's.

    Attributes:
        client: the caller's client with its cache; None if the client is made here.
        service: the caller's service.
        settings: the settings for `context.using` that the options name.
        found: looks up a setting in the environment.

    Raises:
        TypeError, ValueError: for options that exclude each other, or are not valid.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        environment: Environment | None = None,
        *,
        sdk: str | None = None,
    ) -> None:
        environment = environment or Environment()
        self.found = environment.found
        self._sdk = sdk
        self._opened: Any = None
        self.service: Service | None = options.get("service")
        if not isinstance(self.service, Service | None):
            raise TypeError(f"service= takes a Service, such as Services.OpenAI(); got {self.service!r:.100}")
        self._repeat: Repeat | None = options.get("repeat")
        if self._repeat not in (None, *REPEATS):
            raise ValueError(f"repeat is 'fresh' or 'same'; got {self._repeat!r}")
        client, cache = options.get("client"), options.get("cache")
        self.settings = self._given(options, given=not keeps_cache(client))
        with self.using():
            pass  # invalid settings are refused
        where = [name for name in _ENDPOINTS if options.get(name) is not None]
        if where not in _AT_MOST_ONE:
            raise TypeError(f"give {where[0]}= or {where[1]}=, not both: each of them names an endpoint")
        self._cache = cache if keeps_cache(client) else environment.located(cache)
        self.client = self.api_key = self.base_url = None
        self._is_async = True
        if client is not None:
            self.client, self._is_async = self._with_cache(client), is_asynchronous(client)
        elif self.service is None:
            self.api_key, self.base_url = self._endpoint(options)

    def __repr__(self) -> str:
        return f"<Access {self.settings}>"  # never a key, nor a URL with one

    def __reduce__(self) -> Any:
        raise TypeError(
            "a chat holds a key, so it is not pickled; keep what was said: chat.conversation.to_json()"
        )

    def __deepcopy__(self, _: object) -> Self:
        return self  # its options do not change

    # Options.

    def _given(self, options: Mapping[str, Any], *, given: bool) -> dict[str, Any]:
        """Return the settings for `context.using`.

        Args:
            options: the caller's options.
            given: whether the environment may name the namespace.
        """
        settings = {name: options[name] for name in _SETTINGS if name in options}
        if settings.get("mode") is None:
            settings.pop("mode", None)
        inherits = "namespace" not in settings and isinstance(context.current().namespace, Inherited)
        if inherits and given and (named := self.found("CACHEPIPE_NAMESPACE")):
            settings["namespace"] = named
        return settings

    def _endpoint(self, options: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Return the key and the base URL.

        If no OpenAI key or URL is found, ``OLLAMA_HOST`` is used: a host, ``host:port`` or a URL. ``AUTH``
        contains the credentials for a gateway in front of it.
        """
        key = stripped(options.get("api_key")) or stripped(self.found("OPENAI_API_KEY")) or None
        url = options.get("base_url") or self.found("OPENAI_BASE_URL")
        host = self.found("OLLAMA_HOST")
        if key is not None or url is not None or host is None:
            return key, None if url is None else str(url)
        secret = self.found("AUTH")
        return secret or "ollama", ollama_url(host, secret)

    def _with_cache(self, client: Any) -> Any:
        """Return the caller's client with a cache: an SDK's client gets one, others have their own."""
        _check_completes(client, _CLIENTS)
        if not keeps_cache(client):
            return wrapped(client, self._cache, self._repeat)
        if self._cache is not None or (self._repeat is not None and not is_cached(client)):
            raise TypeError(
                "the client has its own cache; give cache= and repeat= to it, as in client.copy(cache=...)"
            )
        return client if self._repeat is None else client.copy(repeat=self._repeat)

    # Asking.

    def opened(self) -> Any:
        """Return the client; on the loop of its calls, and within `using`."""
        if self.client is not None:
            return self.client
        store, repeat = kept_store(self._cache), self._repeat or "fresh"
        mode = context.current().mode_of("read-write")
        if self.service is not None:
            client = self.service.lent(store, mode, repeat, self._sdk)
            _check_completes(client, "service= takes a service of chat completions")
            return client
        return own_client(store, mode, repeat, self.api_key, self.base_url)

    def using(self, **settings: Any) -> contextlib.AbstractContextManager[None]:
        """Return a block with the settings of the calls.

        Args:
            settings: override those in the options.
        """
        return context.using(**{**self.settings, **settings})

    async def check(self, body: Mapping[str, Any]) -> None:
        """Raise the errors that every call with such a body would raise, before anything is asked."""
        with self.using():
            _fitted(self.opened(), body)

    async def ask(self, body: Mapping[str, Any], **settings: Any) -> Any:
        """Make a chat request, and return the client's object for the answer.

        Args:
            body: the body.
            settings: override those in the options.
        """
        with self.using(**settings), sending():
            client = self._opened = self.opened()
            body = _fitted(client, body)
            if self._is_async:
                return await client.chat.completions.create(**body)
            # A limiter of its own, because the caller limits the number of calls.
            return await anyio.to_thread.run_sync(
                lambda: client.chat.completions.create(**body),
                abandon_on_cancel=True,
                limiter=anyio.CapacityLimiter(1),
            )

    def generated(self, key: str, index: int | None) -> tuple[float, float] | None:
        """Return when the generation of a sample began and ended, in seconds since 1970.

        None if it is not stored, or its times are unknown.
        """
        if index is None or index < 0 or not is_cached(self._opened):
            return None
        sample = self._opened._cachepipe.shared_store.store.sample(key, index)  # noqa: SLF001 - it is ours
        if sample is None or (seconds := sample.meta.get("seconds")) is None:
            return None
        return sample.at - seconds, sample.at

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the loop of the calls, and return its result.

        Calls run on the portal's loop, so callers of all loops share connections, and no connection belongs
        to a loop that has ended. Only those of the caller's asynchronous client run on the caller's loop.
        """
        return await (work() if self.client is not None and self._is_async else on_portal(work()))

    def wait(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the portal's loop for a caller without a loop, and return its result."""
        if self.client is not None and self._is_async:
            raise TypeError(
                "a synchronous function cannot use an asynchronous client, which has another event loop; "
                f"got {type(self.client).__name__}. Pass a synchronous client, "
                "or await the asynchronous function"
            )
        return in_portal(work())


def is_cached(client: Any) -> bool:
    """Return True if a client is one of cachepipe's, and so has a cache and a namespace."""
    return isinstance(client, AsyncCached | SyncCached)


def keeps_cache(client: Any) -> bool:
    """Return True if a client is used unchanged: one of cachepipe's, or no client of an SDK."""
    return client is not None and (is_cached(client) or not internals.package_of(client.__class__))


def is_asynchronous(client: Any) -> bool:
    """Return True if a client's calls are awaited."""
    request = getattr(type(client), "request", None)
    return inspect.iscoroutinefunction(client.chat.completions.create if request is None else request)


def completes(client: Any) -> bool:
    """Return True if a client has chat completions."""
    return hasattr(getattr(client, "chat", None), "completions")


def _check_completes(client: Any, told: str) -> None:
    if not completes(client):
        raise TypeError(f"{told}, with chat.completions; got {client!r:.200}")


def _fitted(client: Any, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a body in the form that the client accepts.

    Raises:
        TypeError: for a field that is not a parameter of the client's method, before anything is asked.
    """
    if "logprobs" in body and internals.package_of(client.__class__) == "together":
        body = {**body, "logprobs": body.get("top_logprobs") or 1}  # it takes one number for both
        body.pop("top_logprobs", None)
    create = client.chat.completions.create
    taken = _parameters(getattr(create, "__func__", create))
    if taken is not None and (wrong := next((name for name in body if name not in taken), None)):
        near = difflib.get_close_matches(wrong, {*taken, *NAMES} - {wrong}, 1)
        meant = f" Did you mean {near[0]}=?" if near else ""
        raise TypeError(
            f"{type(client).__name__} takes no {wrong}=.{meant} "
            "Pass a field that only the provider knows in extra_body="
        )
    return body


@functools.lru_cache(maxsize=16)
def _parameters(function: Any) -> frozenset[str] | None:
    """Return the names of a function's parameters; None if it accepts any."""
    try:
        parameters = signature(function).parameters
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def model_of(access: Access, model: str | None) -> str:
    """Return the model to use."""
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model= is the name of a model; got {model!r:.100}")
    own = None if access.service is None else access.service.model
    named = model or own or access.found("CACHEPIPE_MODEL")
    if named is None:
        say_default(DEFAULT_MODEL, "model= or CACHEPIPE_MODEL names another")
    return named or DEFAULT_MODEL


@functools.cache
def say_default(model: str, how: str) -> None:
    """Report once that the default model is used, and how to name another."""
    _logger.warning("no model is named, so %s is asked; %s", model, how)


@contextlib.contextmanager
def sending() -> Iterator[None]:
    """Explain an error of a text that UTF-8 cannot encode, without quoting the text."""
    try:
        yield
    except UnicodeEncodeError as error:
        if error.encoding != "utf-8":  # of a header
            raise
        raise ValueError(
            f"the request has {error.object[error.start]!r}, half of a character, which UTF-8 cannot encode; "
            "mend it, for example with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None
