"""The internals of the SDKs: this is the only module that uses their private names.

One generator makes all of the SDKs. They have in common: ``request(cast_to, options, *, stream,
stream_cls)``, which all resources call; ``_process_response(...)``, its last step, which makes models,
streams and raw responses from an HTTP response; ``_maybe_override_cast_to``; the HTTP client ``_client``; and
the default headers that the caller gave, ``_custom_headers``.
"""

from __future__ import annotations

import datetime as dt
import functools
import importlib
import inspect
import select
import sys
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cachepipe import wire
from cachepipe.providers.responses import BodySource

NAMES = ("request", "copy", "_process_response", "_maybe_override_cast_to")
"""The methods of an SDK's client that the cached clients use."""
ATTRIBUTES = ("_client", "_custom_headers")
"""The attributes of an SDK's client that the cached clients use."""

_ERRORS = {"openai": "OpenAIError", "together": "TogetherError", "anthropic": "AnthropicError"}
"""The SDKs, and the base classes of their errors."""

_USUAL_RETRIES = 2
"""The default number of retries of all SDKs: their DEFAULT_MAX_RETRIES."""

_DROPPED = frozenset({"content-length", "transfer-encoding", "content-encoding"})
"""Headers that describe the bytes on the wire, not the decoded bytes."""

RAW = "x-stainless-raw-response"
"""The header with which ``with_raw_response`` and ``with_streaming_response`` mark a call."""
_ABSENT = frozenset({"NotGiven", "Omit"})
"""The classes of the SDKs' values for "not given"."""
_EXTRAS = frozenset({"extra_headers", "extra_query", "extra_body"})
_OWN = frozenset({RAW, "x-stainless-helper-method", "x-stainless-stream-helper"})


def library_of(client: Any) -> Any:
    """Return the HTTP library that a client runs on, ``httpx2`` or ``httpx``."""
    http, url = client._client, client.base_url  # noqa: SLF001 - this is the place
    return _library_of(http.__class__, url.__class__)


@functools.lru_cache(maxsize=64)
def _library_of(http: Any, url: Any) -> Any:
    roots = (kind.__module__.partition(".")[0] for kind in (*http.__mro__, url))
    return importlib.import_module(next(root for root in roots if root in ("httpx2", "httpx")))


@functools.lru_cache(maxsize=256)
def package_of(kind: Any) -> str:
    """Return the name of a class's SDK, or an empty string."""
    roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return next((name for name in _ERRORS if name in roots), "")


def error_of(kind: Any) -> type[Exception]:
    """Return the base class of the errors of a class's SDK."""
    package = package_of(kind)
    error: type[Exception] = getattr(importlib.import_module(package), _ERRORS[package])
    return error


def drop_resources(client: Any, original: Any) -> None:
    """Drop the resources that a client has copied from another, since they call the other client."""
    cached = {
        name
        for base in type(client).__mro__
        for name, value in vars(base).items()
        if isinstance(value, functools.cached_property)
    }
    for name, value in list(vars(client).items()):
        if name in cached:
            del vars(client)[name]
        elif getattr(value, "_client", None) is original:  # as older SDKs keep them
            setattr(client, name, type(value)(client))
    if getattr(client, "_middleware_chain", None) is not None:
        client._middleware_chain = client._build_middleware_chain()  # noqa: SLF001 - likewise; it ends in the other


def replaced(client: Any) -> str | None:
    """Return the dotted name of a method that was replaced on a client or its resources, if any."""
    for name in NAMES:
        if name in vars(client):
            return name
    seen = {id(client)}
    found: list[tuple[str, Any]] = [("", client)]
    for place, owner in found:
        for name, value in getattr(owner, "__dict__", {}).items():
            if getattr(value, "_client", None) is client and id(value) not in seen:
                seen.add(id(value))
                found.append((f"{place}{name}.", value))
            elif owner is not client and inspect.isfunction(getattr(type(owner), name, None)):
                return f"{place}{name}"
    return None


def sent_headers(client: Any, options: Any) -> dict[str, str]:
    """Return the known headers of a call, by lower-case name.

    They are, in this order, the headers of its HTTP client, the client's default headers with those that
    Anthropic's client always sends, and the call's own. A later source may remove a header of an earlier one,
    except those of the HTTP client.
    """
    own = client.default_headers if package_of(client.__class__) == "anthropic" else client._custom_headers  # noqa: SLF001 - this is the place
    headers: dict[str, str] = {}
    for layer in (own, options.headers):
        for name, value in layer.items() if isinstance(layer, Mapping) else ():
            if isinstance(value, str):
                headers[name.lower()] = value
            elif type(value).__name__ == "Omit":
                headers.pop(name.lower(), None)
    return {**client._client.headers, **headers}  # noqa: SLF001 - likewise


def call_headers(options: Any) -> dict[str, str]:
    """Return the headers of one call, without those that it removes."""
    headers = options.headers
    if not isinstance(headers, Mapping):
        return {}
    return {name: value for name, value in headers.items() if isinstance(value, str)}


def is_plain(options: Any) -> bool:
    """Return True if a call has no headers or options of its own, so that it may be merged with others."""
    if isinstance(options.headers, Mapping) and any(name.lower() not in _OWN for name in options.headers):
        return False
    return not options.params and not any(
        _is_given(value) for value in (options.timeout, options.max_retries, options.idempotency_key)
    )


def with_body(options: Any, body: Mapping[str, Any], *, once: bool = False) -> Any:
    """Return the same options with another body, and without the SDK's own retries if ``once``."""
    changes = {"json_data": body, "extra_json": None}
    return options.model_copy(update={**changes, "max_retries": 0} if once else changes)


def sent_once(options: Any) -> Any:
    """Return options for a call that the SDK does not retry."""
    return options.model_copy(update={"max_retries": 0})


def traces_itself(client: Any) -> bool:
    """Return True if the SDK can make spans of its own, as those do that make attempts."""
    return _traces_itself(client.__class__)


@functools.lru_cache(maxsize=64)
def _traces_itself(kind: type) -> bool:
    return any(makes_attempts(base) for base in kind.__mro__ if base.__module__.partition(".")[0] in _ERRORS)


def own_retries(client: Any, options: Any) -> int | None:
    """Return how often a call may be retried, if the call or its client overrides the SDK's default."""
    for wanted in (options.max_retries, client.max_retries):
        if _is_given(wanted) and isinstance(wanted, int) and wanted != _USUAL_RETRIES:
            return wanted
    return None


def overridden(client: Any, cast_to: Any, options: Any) -> tuple[Any, Any]:
    """Return the type into which a response is parsed, and the options for it, as a copy."""
    options = options.model_copy()
    return client._maybe_override_cast_to(cast_to, options), options  # noqa: SLF001 - this is the place


def process(sdk: Any, response: Any, details: Mapping[str, Any]) -> Any:
    """Have the SDK parse a response; ``sdk`` is what ``super()`` returns in a client's class."""
    return sdk._process_response(response=response, **details)  # noqa: SLF001 - this is the place


def makes_attempts(sdk: Any) -> bool:
    """Return True if an SDK has a method that makes one attempt of a call: anthropic 2 and later."""
    return hasattr(sdk, "_attempt_request")


def attempt(sdk: Any, options: Any, details: Mapping[str, Any]) -> Any:
    """Have the SDK make one attempt of a call; ``sdk`` is what ``super()`` returns in a client's class."""
    return sdk._attempt_request(options, **details)  # noqa: SLF001 - this is the place


def count_as_base_clients(mixin: type, *kinds: type) -> None:
    """Make Anthropic's SDK look for credentials of cached clients as it does for its own classes.

    It recognises its classes by their exact type. Without this it would look neither for profiles nor for
    workload identity.

    Args:
        mixin: goes in front of the SDK's class in each cached class.
        kinds: the SDK's classes.
    """
    module: Any = importlib.import_module("anthropic._client")
    original = getattr(module, "_is_base_client", None)
    if original is None:  # older versions know no such credentials
        return

    @functools.wraps(original)
    def is_base_client(client: object) -> bool:
        first, *others = type(client).__bases__
        return original(client) or (issubclass(first, mixin) and others in [[kind] for kind in kinds])

    module._is_base_client = is_base_client  # noqa: SLF001 - likewise


def made_details(client: Any, cast_to: Any, options: Any, *, stream: bool, stream_cls: Any) -> dict[str, Any]:
    """Return the arguments of ``_process_response`` for a response without a call."""
    cast_to, options = overridden(client, cast_to, options)
    return {
        "cast_to": cast_to,
        "options": options,
        "stream": stream,
        "stream_cls": stream_cls,
        "retries_taken": 0,
    }


def kept_headers(response: Any) -> list[tuple[str, str]]:
    """Return the headers of a response that are still valid for its decoded body."""
    return [(name, value) for name, value in response.headers.multi_items() if name.lower() not in _DROPPED]


@functools.lru_cache(maxsize=8)
def _body_class(library: Any, asynchronous: bool) -> Callable[..., Any]:
    """Return the class of bodies for the responses of a kind of client.

    A body is read in one of two ways, synchronously or asynchronously, like one that arrived.
    """

    class Body(library.SyncByteStream):  # type: ignore[misc]  # chosen at run time
        def __init__(self, source: BodySource, ended: Callable[[], None] = lambda: None) -> None:
            self.source = source
            self.ended = ended

        def __iter__(self) -> Iterator[bytes]:
            return self.source.read()

        def close(self) -> None:
            self.source.leave()
            self.ended()

    class AsyncBody(library.AsyncByteStream):  # type: ignore[misc]  # likewise
        def __init__(self, source: BodySource, ended: Callable[[], None] = lambda: None) -> None:
            self.source = source
            self.ended = ended

        def __aiter__(self) -> AsyncIterator[bytes]:
            return self.source.aread()

        async def aclose(self) -> None:
            await self.source.aleave()
            self.ended()

    return AsyncBody if asynchronous else Body


def _body(client: Any, *arguments: Any) -> Any:
    library = library_of(client)
    return _body_class(library, isinstance(client._client, library.AsyncClient))(*arguments)  # noqa: SLF001 - this is the place


def made_response(
    client: Any, url: str, options: Any, content: bytes | BodySource, named: Mapping[str, str]
) -> Any:
    """Return a response without a call, with the request that it would have answered.

    Its headers contain its type and, if known, the id of the call that made its samples: ``named``. It needs
    neither credentials nor the SDK's preparations.
    """
    library = library_of(client)
    request = library.Request(options.method.upper(), url, headers=call_headers(options))
    raw = call_headers(options).get(RAW) or call_headers(options).get("X-Stainless-Raw-Response")
    headers = {"content-type": "application/json", **named}
    if isinstance(content, bytes) and raw != "stream":
        response = library.Response(200, headers=headers, content=content, request=request)
    else:
        if isinstance(content, bytes):
            content = BodySource([content])
        else:
            headers["content-type"] = "text/event-stream; charset=utf-8"
        response = library.Response(200, headers=headers, stream=_body(client, content), request=request)
        _watch_closing(response, content)
    response.elapsed = dt.timedelta(0)
    return response


def handed_on(client: Any, response: Any, source: BodySource) -> Any:
    """Return a response like the one that arrived, with a body from a source."""
    began = time.monotonic()

    def ended() -> None:
        whole = reference()
        if whole is not None:
            whole.elapsed = _elapsed(response, began)

    made = library_of(client).Response(
        response.status_code,
        headers=kept_headers(response),
        stream=_body(client, source, ended),
        request=response.request,
        extensions=response.extensions,
    )
    reference = weakref.ref(made)
    _watch_closing(made, source)
    made.history = response.history
    weakref.finalize(made, source.leave).atexit = False  # a stream that nobody reads or closes
    return made


def _watch_closing(response: Any, source: BodySource) -> None:
    """Have a source learn whenever its response is closed, also by the HTTP library or more than once."""
    reference, closing = weakref.ref(response), source.closing

    def close() -> None:
        closing()
        whole = reference()
        if whole is not None:
            type(whole).close(whole)

    async def aclose() -> None:
        closing()
        whole = reference()
        if whole is not None:
            await type(whole).aclose(whole)

    response.close, response.aclose = close, aclose


def when_read(response: Any, end: Callable[[], None]) -> None:
    """Call a function once a response has been read to its end, was closed, or is not referenced any more.

    Args:
        response: the HTTP response.
        end: the function, which may be called more than once; it must not refer to the response.
    """
    if response.is_closed:
        end()
        return
    reference = weakref.ref(response)

    def close() -> None:
        whole = reference()
        try:
            if whole is not None:
                type(whole).close(whole)
        finally:
            end()

    async def aclose() -> None:
        whole = reference()
        try:
            if whole is not None:
                await type(whole).aclose(whole)
        finally:
            end()

    response.close, response.aclose = close, aclose
    weakref.finalize(response, end).atexit = False


def _elapsed(response: Any, began: float) -> dt.timedelta:
    """Return how long a response took; for one that is still being read, the time since it began."""
    try:
        elapsed: dt.timedelta = response.elapsed
    except RuntimeError:
        return dt.timedelta(seconds=time.monotonic() - began)
    return elapsed


def ease_probes(client: Any) -> None:
    """Make the probes of idle connections cheap, in an asynchronous HTTP client that the SDK has made.

    The pool probes each idle connection whenever a call begins or ends. After a large transaction many
    connections are idle, and finding the socket, which never changes, takes most of a probe's time.
    """
    backend = client._client  # noqa: SLF001 - this is the place
    for name in ("_transport", "_pool", "_network_backend"):
        backend = getattr(backend, name, None)
    connect = getattr(backend, "connect_tcp", None)
    if not inspect.iscoroutinefunction(connect):
        return

    async def connect_tcp(*arguments: Any, **options: Any) -> Any:
        return _eased(await connect(*arguments, **options))

    backend.connect_tcp = connect_tcp


def _eased(stream: Any) -> Any:
    """Return a connection that looks its socket up once, with or without TLS."""
    about, start_tls, socket = stream.get_extra_info, stream.start_tls, stream.get_extra_info("socket")
    if not hasattr(select, "poll") or socket is None or socket.fileno() < 0:
        return stream
    poller = select.poll()
    poller.register(socket.fileno(), select.POLLIN)

    def get_extra_info(info: str) -> Any:
        if info == "is_readable":
            return socket.fileno() < 0 or bool(poller.poll(0))
        return about(info)

    async def started_tls(*arguments: Any, **options: Any) -> Any:
        return _eased(await start_tls(*arguments, **options))

    stream.get_extra_info, stream.start_tls = get_extra_info, started_tls
    return stream


def is_own(function: Any, kind: Any) -> bool:
    """Return True if a method is the SDK's own and was not wrapped."""
    code = getattr(function, "__code__", None)
    package: Any = sys.modules.get(package_of(kind))
    return (
        code is not None
        and package is not None
        and Path(package.__file__).parent in Path(code.co_filename).parents
    )


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a resource's call, without those that mean "not given"."""
    return {
        name: value
        for name, value in arguments.items()
        if type(value).__name__ not in _ABSENT and not (value is None and name in _EXTRAS)
    }


def client_of(resource: Any) -> Any:
    """Return the client of a resource."""
    return resource._client  # noqa: SLF001 - this is the place


def is_usual(client: Any) -> bool:
    """Return True if a client makes its calls as ours do, and keeps answers that do not fit its models."""
    return (
        _is_usual(client.__class__)
        and not client._strict_response_validation  # noqa: SLF001 - this is the place
        and "request" not in vars(client)
    )


@functools.lru_cache(maxsize=64)
def _is_usual(kind: Any) -> bool:
    return all(
        getattr(kind, name).__module__ == "cachepipe.sdk.mixins" for name in ("request", "_process_response")
    )


def is_parsed_once(options: Any) -> bool:
    """Return True if the SDK does not change the parsed answer once more."""
    return not _is_given(getattr(options, "post_parser", None))


def validated(cast_to: Any, content: bytes, made_by: str | None) -> Any:
    """Return the model that the SDK would make of an answer, or None if only the SDK can make it.

    The SDK constructs models without validation; an answer that validates strictly gives the same object.
    """
    try:
        made = cast_to.model_validate_json(content, strict=True)
    except (AttributeError, ValueError):
        return None
    if package_of(cast_to) == "openai":
        made._request_id = made_by  # noqa: SLF001 - this is the place
    return made


def unread(response: Any) -> bool:
    """Return True if the body of a response was not read yet."""
    try:
        response.content  # noqa: B018 - it raises
    except RuntimeError:  # the HTTP library's ResponseNotRead
        return True
    return False


def url_of(client: Any, options: Any, body: Mapping[str, Any]) -> str:
    """Return the full URL of a call with this body, including its query."""
    path = str(options.url)
    base = str(client.base_url).rstrip("/")
    if "://" in path:
        url = path
    elif _is_azure(client.__class__):
        url = wire.azure_url(base, path, body.get("model"), client)
    else:
        url = f"{base}/{path.lstrip('/')}"
    params = client._client.params  # noqa: SLF001 - this is the place; the HTTP client adds them
    query = {name: values[0] if len(values := params.get_list(name)) == 1 else values for name in params}
    query |= {**client.default_query, **(options.params or {})}
    query = {name: value for name, value in query.items() if _is_given(value)}
    if not query:
        return url
    text = client.qs.stringify(query)
    return f"{url}{'&' if '?' in url else '?'}{text}" if text else url


class CallTarget(NamedTuple):
    """Where a call goes.

    Attributes:
        url: the full URL, including its query.
        headers: the headers that change the answer.
        state: the settings of the client that both follow from.
    """

    url: str
    headers: Mapping[str, str]
    state: tuple[Any, ...] = ()


def target_of(client: Any, options: Any, body: Mapping[str, Any]) -> CallTarget:
    """Return where a call with this body goes."""
    return CallTarget(url_of(client, options, body), wire.answer_headers(sent_headers(client, options)))


def known_target(client: Any, options: Any, body: Mapping[str, Any]) -> CallTarget:
    """Return the same as `target_of`, which the client remembers by ``options`` until its settings change.

    Args:
        client: the client.
        options: the options of a call without headers or options of its own.
        body: the body of the call.
    """
    http = client._client  # noqa: SLF001 - this is the place
    targets: dict[int, CallTarget] = vars(client).setdefault("_cachepipe_targets", {})
    given = client._custom_headers  # noqa: SLF001 - likewise
    state = options, client.base_url, http.params, http.headers.raw, client.default_query, given
    target = targets.get(id(options))
    if target is None or target.state != state:
        state = *state[:-2], dict(client.default_query), dict(given)  # the client's own may change
        target = target_of(client, options, body)._replace(state=state)
        if not _is_azure(client.__class__):  # where the URL contains the model
            targets[id(options)] = target
    return target


@functools.lru_cache(maxsize=64)
def _is_azure(kind: Any) -> bool:
    return any(base.__module__ == "openai.lib.azure" for base in kind.__mro__)


def _is_given(value: Any) -> bool:
    """Return True if a value is not one of the SDKs' values for "not given"."""
    return value is not None and type(value).__name__ not in _ABSENT
