"""OpenAI's clients with a cache: change the import, and every call that can be cached is.

``client = OpenAI(cache="caches/exp", namespace="run-1")``

The constructor and ``copy`` are made at import from those of the installed SDK. Type checkers see the
parameters of openai 3, which are listed here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, Self, TypedDict, TypeVar, Unpack

import openai

from cachepipe.providers import presets
from cachepipe.replaying import NO_KEY
from cachepipe.sdk.mixins import AsyncCached, SyncCached, equip
from cachepipe.sdk.options import ClientOptions, CopyOptions

Key = TypeVar("Key")
"""The result of a function that stands for an API key: text, or an awaitable of it."""


class _Account(TypedDict, Generic[Key], total=False):
    api_key: str | Callable[[], Key] | None
    admin_api_key: str | None
    workload_identity: Any
    organization: str | None
    project: str | None
    webhook_secret: str | None
    websocket_base_url: Any
    timeout: float | openai.Timeout | openai.NotGiven | None
    _enforce_credentials: bool | None


class _Platform(_Account[Key], total=False):
    provider: Any
    data_residency: Any


class _Options(ClientOptions, _Platform[Key], total=False):
    """The parameters of the constructors."""


class _CopyOptions(CopyOptions, _Platform[Key], total=False):
    """The parameters of ``copy``."""


class _AzureOptions(ClientOptions, _Account[Key], total=False):
    azure_endpoint: str | None
    azure_deployment: str | None
    api_version: str | None
    azure_ad_token: str | None
    azure_ad_token_provider: Callable[[], str | Key] | None


class AsyncOpenAI(AsyncCached, openai.AsyncOpenAI):
    """``openai.AsyncOpenAI`` with a cache.

    Args:
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        namespace: the unit within which samples are independent, in practice one experiment.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``.
        scope: replaces the endpoint's URL in keys.
        repeat: ``"fresh"``: a repeated request gets fresh samples; ``"same"``: it gets the same again.
        service: the endpoint and its limits, such as ``cachepipe.Services.OpenAI(max_requests=500)``; the
            service then schedules and retries calls, not the SDK.
        replicate: which of several independent repetitions of the experiment the calls belong to.
        ordered: hand over the answers in the order of the first run, one at a time, so that a rerun of a
            program with concurrent tasks takes the same course; for asynchronous clients.
        budget: the US dollars that each namespace may spend in this cache, over all runs, or a
            ``cachepipe.Budget``. A call that may exceed it raises ``cachepipe.BudgetExceeded``.
    """

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_Options[Awaitable[str]]]) -> None: ...

        def copy(self, **options: Unpack[_CopyOptions[Awaitable[str]]]) -> Self:
            """Return a client with the same options except those given; it shares connections and cache."""
            ...

        with_options = copy


class OpenAI(SyncCached, openai.OpenAI):
    """``openai.OpenAI`` with a cache; it may be used from any number of threads. See `AsyncOpenAI`."""

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_Options[str]]) -> None: ...

        def copy(self, **options: Unpack[_CopyOptions[str]]) -> Self:
            """Return a client with the same options except those given; it shares connections and cache."""
            ...

        with_options = copy


class AsyncAzureOpenAI(AsyncCached, openai.AsyncAzureOpenAI):
    """``openai.AsyncAzureOpenAI`` with a cache. See `AsyncOpenAI`."""

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_AzureOptions[Awaitable[str]]]) -> None: ...


class AzureOpenAI(SyncCached, openai.AzureOpenAI):
    """``openai.AzureOpenAI`` with a cache. See `OpenAI`."""

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_AzureOptions[str]]) -> None: ...


def preset_class(name: str) -> type[Any]:
    """Return a new class of clients of an OpenAI-compatible provider.

    Args:
        name: the name of the class: that of a row of `presets`, or the same with ``Async`` in front.

    Raises:
        AttributeError: when there is none.
    """
    preset = presets.compatible().get(name)
    if preset is None:
        raise AttributeError(f"there is no client {name!r}; there are {', '.join(presets.compatible())}")
    base = AsyncOpenAI if name.startswith("Async") else OpenAI
    needed = "" if preset.needs_key else " if it needs one"
    doc = (
        f"`{base.__name__}` for {preset.name}: at ``{preset.url}`` or ``{preset.variable}``, "
        f"with the key in ``{preset.key}``{needed}."
    )
    about = {"_preset": preset, "__doc__": doc, "__module__": "cachepipe.clients", "__qualname__": name}
    return type(name, (base,), about)


for _kind, _sdk in (
    (AsyncOpenAI, openai.AsyncOpenAI),
    (OpenAI, openai.OpenAI),
    (AsyncAzureOpenAI, openai.AsyncAzureOpenAI),
    (AzureOpenAI, openai.AzureOpenAI),
):
    equip(_kind, _sdk, credentials={"api_key": NO_KEY}, error=openai.OpenAIError)
