"""The parameters of cached clients, for type checkers: the cache's own, and those that all SDKs have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from cachepipe.typedefs import Mode, Ordered, Repeat


class CacheOptions(TypedDict, total=False):
    """The parameters of a cached client in addition to the SDK's."""

    cache: Any
    namespace: str | None
    mode: Mode
    scope: str | None
    repeat: Repeat
    service: Any
    replicate: str | int | None
    ordered: Ordered
    budget: Any


class ClientOptions(CacheOptions, total=False):
    """The parameters that the clients of all SDKs have."""

    base_url: Any
    max_retries: int
    default_headers: Mapping[str, str] | None
    default_query: Mapping[str, object] | None
    http_client: Any
    _strict_response_validation: bool


class CopyOptions(CacheOptions, total=False):
    """The parameters that ``copy`` has in all SDKs."""

    base_url: Any
    max_retries: Any
    http_client: Any
    default_headers: Mapping[str, str] | None
    set_default_headers: Mapping[str, str] | None
    default_query: Mapping[str, object] | None
    set_default_query: Mapping[str, object] | None
    _extra_kwargs: Mapping[str, Any]
