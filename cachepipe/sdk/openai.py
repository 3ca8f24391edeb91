"""OpenAI's clients with a cache: change the import, and every call that can be cached is.

``client = OpenAI(cache="caches/exp", namespace="run-1")``

The constructor and ``copy`` are made at import from those of the installed SDK. Type checkers see the
signatures of openai 3, which are written out here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import openai

from cachepipe.sdk.mixins import NO_KEY, AsyncCached, SyncCached, equip
from cachepipe.typedefs import Mode, Repeat


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
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            api_key: str | Callable[[], Awaitable[str]] | None = None,
            admin_api_key: str | None = None,
            workload_identity: Any = None,
            organization: str | None = None,
            project: str | None = None,
            webhook_secret: str | None = None,
            provider: Any = None,
            base_url: Any = openai.not_given,
            data_residency: Any = None,
            websocket_base_url: Any = None,
            timeout: float | openai.Timeout | openai.NotGiven | None = openai.not_given,
            max_retries: int = openai.DEFAULT_MAX_RETRIES,
            default_headers: Mapping[str, str] | None = None,
            default_query: Mapping[str, object] | None = None,
            http_client: Any = None,
            _strict_response_validation: bool = False,
            _enforce_credentials: bool = True,
            cache: Any = None,
            namespace: str | None = None,
            mode: Mode = "read-write",
            scope: str | None = None,
            repeat: Repeat = "fresh",
            service: Any = None,
        ) -> None: ...

        def copy(
            self,
            *,
            api_key: str | Callable[[], Awaitable[str]] | None = None,
            admin_api_key: str | None = None,
            workload_identity: Any = None,
            provider: Any = openai.not_given,
            organization: str | None = None,
            project: str | None = None,
            webhook_secret: str | None = None,
            websocket_base_url: Any = None,
            base_url: Any = openai.not_given,
            data_residency: Any = None,
            timeout: float | openai.Timeout | openai.NotGiven | None = openai.not_given,
            http_client: Any = None,
            max_retries: int | openai.NotGiven = openai.not_given,
            default_headers: Mapping[str, str] | None = None,
            set_default_headers: Mapping[str, str] | None = None,
            default_query: Mapping[str, object] | None = None,
            set_default_query: Mapping[str, object] | None = None,
            _enforce_credentials: bool | None = None,
            _extra_kwargs: Mapping[str, Any] = ...,
            cache: Any = openai.not_given,
            namespace: str | openai.NotGiven | None = openai.not_given,
            mode: Mode | openai.NotGiven = openai.not_given,
            scope: str | openai.NotGiven | None = openai.not_given,
            repeat: Repeat | openai.NotGiven = openai.not_given,
            service: Any = openai.not_given,
        ) -> Self:
            """Return a client with the same options except those given; it shares connections and cache."""
            ...

        with_options = copy


class OpenAI(SyncCached, openai.OpenAI):
    """``openai.OpenAI`` with a cache; it may be used from any number of threads. See `AsyncOpenAI`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            api_key: str | Callable[[], str] | None = None,
            admin_api_key: str | None = None,
            workload_identity: Any = None,
            organization: str | None = None,
            project: str | None = None,
            webhook_secret: str | None = None,
            provider: Any = None,
            base_url: Any = openai.not_given,
            data_residency: Any = None,
            websocket_base_url: Any = None,
            timeout: float | openai.Timeout | openai.NotGiven | None = openai.not_given,
            max_retries: int = openai.DEFAULT_MAX_RETRIES,
            default_headers: Mapping[str, str] | None = None,
            default_query: Mapping[str, object] | None = None,
            http_client: Any = None,
            _strict_response_validation: bool = False,
            _enforce_credentials: bool = True,
            cache: Any = None,
            namespace: str | None = None,
            mode: Mode = "read-write",
            scope: str | None = None,
            repeat: Repeat = "fresh",
            service: Any = None,
        ) -> None: ...

        def copy(
            self,
            *,
            api_key: str | Callable[[], str] | None = None,
            admin_api_key: str | None = None,
            workload_identity: Any = None,
            provider: Any = openai.not_given,
            organization: str | None = None,
            project: str | None = None,
            webhook_secret: str | None = None,
            websocket_base_url: Any = None,
            base_url: Any = openai.not_given,
            data_residency: Any = None,
            timeout: float | openai.Timeout | openai.NotGiven | None = openai.not_given,
            http_client: Any = None,
            max_retries: int | openai.NotGiven = openai.not_given,
            default_headers: Mapping[str, str] | None = None,
            set_default_headers: Mapping[str, str] | None = None,
            default_query: Mapping[str, object] | None = None,
            set_default_query: Mapping[str, object] | None = None,
            _enforce_credentials: bool | None = None,
            _extra_kwargs: Mapping[str, Any] = ...,
            cache: Any = openai.not_given,
            namespace: str | openai.NotGiven | None = openai.not_given,
            mode: Mode | openai.NotGiven = openai.not_given,
            scope: str | openai.NotGiven | None = openai.not_given,
            repeat: Repeat | openai.NotGiven = openai.not_given,
            service: Any = openai.not_given,
        ) -> Self:
            """Return a client with the same options except those given; it shares connections and cache."""
            ...

        with_options = copy


class AsyncAzureOpenAI(AsyncCached, openai.AsyncAzureOpenAI):
    """``openai.AsyncAzureOpenAI`` with a cache. See `AsyncOpenAI`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            azure_endpoint: str | None = None,
            azure_deployment: str | None = None,
            api_version: str | None = None,
            api_key: str | Callable[[], Awaitable[str]] | None = None,
            azure_ad_token: str | None = None,
            azure_ad_token_provider: Callable[[], str | Awaitable[str]] | None = None,
            organization: str | None = None,
            project: str | None = None,
            webhook_secret: str | None = None,
            websocket_base_url: Any = None,
            base_url: str | None = None,
            timeout: float | openai.Timeout | openai.NotGiven | None = openai.not_given,
            max_retries: int = openai.DEFAULT_MAX_RETRIES,
            default_headers: Mapping[str, str] | None = None,
            default_query: Mapping[str, object] | None = None,
            http_client: Any = None,
            _strict_response_validation: bool = False,
            cache: Any = None,
            namespace: str | None = None,
            mode: Mode = "read-write",
            scope: str | None = None,
            repeat: Repeat = "fresh",
            service: Any = None,
        ) -> None: ...


class AzureOpenAI(SyncCached, openai.AzureOpenAI):
    """``openai.AzureOpenAI`` with a cache. See `OpenAI`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            azure_endpoint: str | None = None,
            azure_deployment: str | None = None,
            api_version: str | None = None,
            api_key: str | Callable[[], str] | None = None,
            azure_ad_token: str | None = None,
            azure_ad_token_provider: Callable[[], str] | None = None,
            organization: str | None = None,
            project: str | None = None,
            webhook_secret: str | None = None,
            websocket_base_url: Any = None,
            base_url: str | None = None,
            timeout: float | openai.Timeout | openai.NotGiven | None = openai.not_given,
            max_retries: int = openai.DEFAULT_MAX_RETRIES,
            default_headers: Mapping[str, str] | None = None,
            default_query: Mapping[str, object] | None = None,
            http_client: Any = None,
            _strict_response_validation: bool = False,
            cache: Any = None,
            namespace: str | None = None,
            mode: Mode = "read-write",
            scope: str | None = None,
            repeat: Repeat = "fresh",
            service: Any = None,
        ) -> None: ...


for _kind, _sdk in (
    (AsyncOpenAI, openai.AsyncOpenAI),
    (OpenAI, openai.OpenAI),
    (AsyncAzureOpenAI, openai.AsyncAzureOpenAI),
    (AzureOpenAI, openai.AzureOpenAI),
):
    equip(_kind, _sdk, credentials={"api_key": NO_KEY}, error=openai.OpenAIError)
