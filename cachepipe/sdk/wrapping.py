"""Gives an existing client a cache."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, TypeVar

from cachepipe.providers.exchange import CacheView
from cachepipe.replaying import NO_KEY
from cachepipe.sdk import internals
from cachepipe.sdk.mixins import AsyncCached, SyncCached, Viewing, equip
from cachepipe.typedefs import Mode, Ordered, Repeat

C = TypeVar("C")


def wrap(
    client: C,
    *,
    cache: Any = None,
    namespace: str | None = None,
    mode: Mode = "read-write",
    scope: str | None = None,
    repeat: Repeat = "fresh",
    service: Any = None,
    replicate: str | int | None = None,
    ordered: Ordered = False,
    budget: Any = None,
) -> C:
    """Return a copy of a client, with a cache. The two share connections, so closing one closes both.

    The original client is not changed. The copy is an instance of its class, with the same attributes.

    Args:
        client: a client of the openai, together, groq, anthropic or google-genai package, of any class that
            sends its calls unchanged (not Anthropic's classes for Bedrock, Vertex and Google Cloud), or one
            of huggingface_hub's for inference.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        namespace: the unit within which samples are independent, in practice one experiment.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``.
        scope: replaces the endpoint's URL in keys.
        repeat: ``"fresh"``: a repeated request gets fresh samples; ``"same"``: it gets the same again.
        service: limits and retries the client's calls, which still go to the client's own URL.
        replicate: which of several independent repetitions of the experiment the calls belong to.
        ordered: hand over answers in the order of the first run; for asynchronous clients.
        budget: the US dollars that each namespace may spend in this cache, over all runs, or a
            ``cachepipe.Budget``.

    Raises:
        TypeError: for any other object, for a client with a cache, and for a client with a replaced method
            (by a tracing tool, for example), because the copy would not have the replacement.
    """
    if internals.google_kind(type(client)):
        gemini = importlib.import_module("cachepipe.sdk.gemini")
        gemini.check_wrappable(client, ordered)
        view = CacheView.of(cache, namespace, mode, scope, repeat, service, replicate, ordered, budget)
        twin: C = gemini.viewing(client, view)
        return twin
    made: Any = object.__new__(_cached_class(_checked(client)))
    vars(made).update(vars(client))
    if not internals.is_hub_client(type(client)):
        internals.drop_resources(made, client)
    made._call_class.check_order(ordered)  # noqa: SLF001 - it is ours
    view = CacheView.of(cache, namespace, mode, scope, repeat, service, replicate, ordered, budget)
    made._cachepipe = view  # noqa: SLF001 - it is ours
    wrapped: C = made
    return wrapped


def check_uncached(client: Any) -> None:
    """Refuse a client that has a cache.

    Raises:
        TypeError: when it has one.
    """
    if isinstance(client, Viewing):
        raise TypeError(
            f"this {type(client).__name__} has a cache already; use its copy(cache=...) or in_namespace(...)"
        )


def check_unchanged(name: str | None) -> None:
    """Refuse a client with a replaced method.

    Args:
        name: the name of the method, or None.

    Raises:
        TypeError: when there is one.
    """
    if name is not None:
        raise TypeError(
            f"wrap() takes a client as its SDK made it; the method {name} of this one was replaced, and "
            "would be lost. Wrap the client first, then let the other tool have what wrap() returns"
        )


def _checked(client: Any) -> Any:
    kind: Any = type(client)
    check_uncached(client)
    if internals.is_hub_client(kind):
        check_unchanged(next((name for name in internals.HUB_NAMES if name in vars(client)), None))
        return kind
    package = internals.package_of(kind)
    if not package or not all(callable(getattr(kind, name, None)) for name in internals.NAMES):
        raise TypeError(
            "wrap() takes a client of openai>=1.60, together>=2, groq>=1, anthropic>=0.49, google-genai>=3 "
            "or huggingface_hub>=1; "
            f"got {client!r:.200} of {kind.__module__}"
        )
    if package == "anthropic":
        _anthropic().check_wrappable(kind)
    check_unchanged(internals.replaced(client))
    return kind


def _anthropic() -> Any:
    """Return the module of Anthropic's clients; the other clients do not need it."""
    return importlib.import_module("cachepipe.sdk.anthropic")


@functools.lru_cache(maxsize=64)
def _cached_class(kind: Any) -> Any:
    """Return the cached subclass of a client class."""
    if internals.is_hub_client(kind):
        return importlib.import_module("cachepipe.sdk.huggingface").cached_class(kind)
    asynchronous = inspect.iscoroutinefunction(kind.request)
    mixin: Any = AsyncCached if asynchronous else SyncCached
    credentials: dict[str, Any] = {"api_key": NO_KEY}
    if internals.package_of(kind) == "anthropic":
        ours = _anthropic()
        mixin = ours.AsyncAttemptsCached if asynchronous else ours.SyncAttemptsCached
        credentials = ours.CREDENTIALS
    about = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made = type(kind.__name__, (mixin, kind), about)
    equip(made, kind, credentials=credentials, error=internals.error_of(kind))
    return made
