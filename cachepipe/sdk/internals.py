"""The internals of the SDKs: this is the only module that uses their private names.

One generator makes all of the SDKs but Hugging Face's, for which see `HUB_NAMES`. They have in common:
``request(cast_to, options, *, stream, stream_cls)``, which all resources call; ``_process_response(...)``,
its last step, which makes models, streams and raw responses from an HTTP response;
``_maybe_override_cast_to``; the HTTP client ``_client``; and the default headers that the caller gave,
``_custom_headers``.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cachepipe import wire

NAMES = ("request", "copy", "_process_response", "_maybe_override_cast_to")
"""The methods of an SDK's client that the cached clients use."""
ATTRIBUTES = ("_client", "_custom_headers")
"""The attributes of an SDK's client that the cached clients use."""

_ERRORS = {
    "openai": "OpenAIError",
    "together": "TogetherError",
    "anthropic": "AnthropicError",
    "groq": "GroqError",
}
"""The SDKs, and the base classes of their errors."""

_USUAL_RETRIES = 2
"""The default number of retries of all SDKs: their DEFAULT_MAX_RETRIES."""

RAW = "x-stainless-raw-response"
"""The header with which ``with_raw_response`` and ``with_streaming_response`` mark a call."""
_ABSENT = frozenset({"NotGiven", "Omit"})
"""The classes of the SDKs' values for "not given"."""
_EXTRAS = frozenset({"extra_headers", "extra_query", "extra_body"})
_OWN = frozenset({RAW, "x-stainless-helper-method", "x-stainless-stream-helper"})


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


HUB_NAMES = ("_inner_post", "close", "chat_completion", "text_generation", "feature_extraction")
"""The methods of Hugging Face's clients that the cached clients use.

All tasks call ``_inner_post(request_parameters, stream=…)``, which sends the request and returns
the body, or the lines of a stream. ``AsyncInferenceClient`` also has ``_get_async_client``.
"""
HUB_FIELDS = ("url", "task", "json", "data", "headers")
"""The fields of ``request_parameters``, a dataclass, that the cached clients use."""

hub_responses: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "cachepipe_hub_responses", default=None
)
"""Gets the HTTP responses to a call of Hugging Face's clients, which return no more than the body."""


def is_hub_client(kind: Any) -> bool:
    """Return True if a class is one of Hugging Face's clients for inference."""
    return any(base.__module__.startswith("huggingface_hub.inference.") for base in kind.__mro__)


def is_async_hub_client(kind: Any) -> bool:
    """Return True if a class of Hugging Face's is the asynchronous one."""
    return inspect.iscoroutinefunction(kind._inner_post)  # noqa: SLF001 - this is the place


def hub_post(sdk: Any, parameters: Any, *, stream: bool) -> Any:
    """Have Hugging Face's SDK make a call; ``sdk`` is what ``super()`` returns in a client's class."""
    return sdk._inner_post(parameters, stream=stream)  # noqa: SLF001 - this is the place


async def hub_session(client: Any) -> Any:
    """Return the HTTP client of an asynchronous client of Hugging Face's."""
    return await client._get_async_client()  # noqa: SLF001 - this is the place


def hub_library() -> Any:
    """Return the HTTP library of Hugging Face's SDK, ``httpx2`` or ``httpx``."""
    errors: Any = importlib.import_module("huggingface_hub.errors")
    roots = (base.__module__.partition(".")[0] for base in errors.HfHubHTTPError.__mro__)
    return importlib.import_module(next(root for root in roots if root in ("httpx2", "httpx")))


def observe(session: Any, hook: Any) -> None:
    """Make an HTTP client call a hook with each response. To repeat this changes nothing."""
    hooks = session.event_hooks["response"]
    if hook not in hooks:
        hooks.append(hook)


def drop_resources(client: Any, original: Any) -> None:
    """Drop the resources that a client has copied from another client, because they call that client."""
    cached = {
        name
        for base in type(client).__mro__
        for name, value in vars(base).items()
        if isinstance(value, functools.cached_property)
    }
    for name, value in list(vars(client).items()):
        if name in cached:
            del vars(client)[name]
        elif getattr(value, "_client", None) is original:  # older SDKs keep resources as attributes
            setattr(client, name, type(value)(client))
    if getattr(client, "_middleware_chain", None) is not None:
        client._middleware_chain = client._build_middleware_chain()  # noqa: SLF001 - this is the place; the old chain ends in the original


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
    always_sent = package_of(client.__class__) == "anthropic"
    own = client.default_headers if always_sent else client._custom_headers  # noqa: SLF001 - this is the place
    headers: dict[str, str] = {}
    for layer in (own, options.headers):
        for name, value in layer.items() if isinstance(layer, Mapping) else ():
            if isinstance(value, str):
                headers[name.lower()] = value
            elif type(value).__name__ == "Omit":
                headers.pop(name.lower(), None)
    return {**http_of(client).headers, **headers}


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

    module._is_base_client = is_base_client  # noqa: SLF001 - this is the place


def made_details(client: Any, cast_to: Any, options: Any, *, stream: bool, stream_cls: Any) -> dict[str, Any]:
    """Return the arguments of ``_process_response`` for a response without a call."""
    options = options.model_copy()
    return {
        "cast_to": client._maybe_override_cast_to(cast_to, options),  # noqa: SLF001 - this is the place
        "options": options,
        "stream": stream,
        "stream_cls": stream_cls,
        "retries_taken": 0,
    }


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


def http_of(client: Any) -> Any:
    """Return the HTTP client of a client."""
    return client._client  # noqa: SLF001 - this is the place


def client_of(resource: Any) -> Any:
    """Return the client of a resource."""
    return resource._client  # noqa: SLF001 - this is the place


def has_own_url(client: Any) -> bool | None:
    """Return whether a client was given a base URL; None if this does not change the paths of its calls.

    Without one, clients of together 3.1 and later send chats to another server than all else.
    """
    own: bool | None = getattr(client, "_base_url_overridden", None)
    return own


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
    params = http_of(client).params  # the HTTP client adds them
    query = {name: values[0] if len(values := params.get_list(name)) == 1 else values for name in params}
    query |= {**client.default_query, **(options.params or {})}
    query = {name: value for name, value in query.items() if _is_given(value)}
    text = client.qs.stringify(query)
    return f"{url}{'&' if '?' in url else '?'}{text}" if text else url


class CallTarget(NamedTuple):
    """The URL of a call, and the headers that belong to its key.

    Attributes:
        url: the full URL, including its query.
        headers: the headers that change the answer.
        state: the client's settings from which both were computed.
    """

    url: str
    headers: Mapping[str, str]
    state: tuple[Any, ...] = ()


def target_of(client: Any, options: Any, body: Mapping[str, Any]) -> CallTarget:
    """Return the URL of a call with this body, and its headers that change the answer."""
    return CallTarget(url_of(client, options, body), wire.answer_headers(sent_headers(client, options)))


def known_target(client: Any, options: Any, body: Mapping[str, Any]) -> CallTarget:
    """Return the same as `target_of`; the client keeps the result until its settings change.

    Args:
        client: the client.
        options: the options of a call without headers or options of its own.
        body: the body of the call.
    """
    http = http_of(client)
    targets: dict[int, CallTarget] = vars(client).setdefault("_cachepipe_targets", {})
    given = client._custom_headers  # noqa: SLF001 - this is the place
    state = options, client.base_url, http.params, http.headers.raw, client.default_query, given
    target = targets.get(id(options))
    if target is None or target.state != state:
        state = *state[:-2], dict(client.default_query), dict(given)  # the client's own may change
        target = target_of(client, options, body)._replace(state=state)
        if not _is_azure(client.__class__):  # the URL of Azure contains the model
            targets[id(options)] = target
    return target


@functools.lru_cache(maxsize=64)
def _is_azure(kind: Any) -> bool:
    return any(base.__module__ == "openai.lib.azure" for base in kind.__mro__)


def _is_given(value: Any) -> bool:
    """Return True if a value is not one of the SDKs' values for "not given"."""
    return value is not None and type(value).__name__ not in _ABSENT


# google-genai, which is not generated: a client and its parts share an object that makes the HTTP calls.

GOOGLE = "google.genai"
"""The package of Google's SDK."""
GOOGLE_NAMES = (
    "_request",
    "_async_request",
    "request_streamed",
    "async_request_streamed",
    "_verify_response",
)
"""The methods of the object that makes the calls that cached clients override.

The first two send a prepared request, with the SDK's own retries, and return its ``HttpResponse``. The next
two return the chunks of a stream, and the last one sees each parsed answer before it is returned.
"""


def google_kind(kind: type) -> str:
    """Return ``"Client"`` or ``"AsyncClient"`` for a class of google-genai's clients, else nothing."""
    names = (base.__name__ for base in kind.__mro__ if base.__module__ == f"{GOOGLE}.client")
    return next((name for name in names if name in ("Client", "AsyncClient")), "")


def api_of(client: Any) -> Any:
    """Return the object of a client that makes its HTTP calls."""
    return client._api_client  # noqa: SLF001 - this is the place


def rebound(part: Any, old: Any, new: Any) -> Any:
    """Return a copy of a client, or of a part of one, that makes its calls through another object."""
    twin = object.__new__(type(part))
    for name, value in vars(part).items():
        if value is old:
            vars(twin)[name] = new
        else:
            vars(twin)[name] = rebound(value, old, new) if _calls_through(value, old) else value
    return twin


def replaced_in(client: Any) -> str | None:
    """Return the dotted name of a method that was replaced on a client or its parts, if any."""
    api = api_of(client)
    parts = {name: value for name, value in vars(client).items() if _calls_through(value, api)}
    for place, owner in {"": client, "_api_client": api, **parts}.items():
        for name in vars(owner):
            if inspect.isfunction(getattr(type(owner), name, None)):
                return f"{place.lstrip('_')}.{name}".lstrip(".")
    return None


def _calls_through(value: Any, api: Any) -> bool:
    return getattr(value, "__dict__", {}).get("_api_client") is api


def google_library(api: Any) -> Any:
    """Return the HTTP library that google-genai runs on, ``httpx2`` or ``httpx``."""
    kind = type(api._httpx_client)  # noqa: SLF001 - this is the place
    roots = (base.__module__.partition(".")[0] for base in kind.__mro__)
    return importlib.import_module(next(root for root in roots if root in ("httpx2", "httpx")))


def google_once(sdk: Any, asynchronous: bool) -> Any:
    """Return the method of google-genai that makes one attempt; ``sdk`` is what ``super()`` returns."""
    once = sdk._async_request_once if asynchronous else sdk._request_once  # noqa: SLF001 - this is the place
    if "implicit_retry" in inspect.signature(once).parameters:
        return functools.partial(once, implicit_retry=False)
    return once


def google_retries(api: Any, http_options: Any) -> int | None:
    """Return how often a call may be retried, if the call or its client sets that."""
    for options in (http_options, api._http_options):  # noqa: SLF001 - this is the place
        retries = options.get("retry_options") if isinstance(options, Mapping) else None
        retries = getattr(options, "retry_options", retries)
        attempts = retries.get("attempts") if isinstance(retries, Mapping) else None
        attempts = getattr(retries, "attempts", attempts)
        if isinstance(attempts, int):
            return max(attempts, 1) - 1
    return None


def google_response(headers: Any, body: Any) -> Any:
    """Return google-genai's own response, from its headers and an HTTP response or a list of texts."""
    module: Any = importlib.import_module(f"{GOOGLE}._api_client")
    return module.HttpResponse(headers, body)
