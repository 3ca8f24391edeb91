"""Groq's clients with a cache: change the import, and every call that can be cached is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

try:
    import groq
except ImportError as error:
    raise ImportError("the cached Groq clients need groq: pip install 'cachepipe[groq]'") from error

from cachepipe.replaying import NO_KEY
from cachepipe.sdk.mixins import AsyncCached, SyncCached, equip
from cachepipe.sdk.options import ClientOptions


class _Options(ClientOptions, total=False):
    api_key: str | None
    timeout: float | groq.Timeout | groq.NotGiven | None


class AsyncGroq(AsyncCached, groq.AsyncGroq):
    """``groq.AsyncGroq`` with a cache. The cache's parameters follow the SDK's own; see `AsyncOpenAI`.

    Groq answers one choice per call, and refuses ``n`` above 1. Here, a request with a larger ``n`` becomes
    as many calls as it lacks samples.
    """

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_Options]) -> None: ...


class Groq(SyncCached, groq.Groq):
    """``groq.Groq`` with a cache; it may be used from any number of threads. See `AsyncGroq`."""

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_Options]) -> None: ...


for _kind, _sdk in ((AsyncGroq, groq.AsyncGroq), (Groq, groq.Groq)):
    equip(_kind, _sdk, credentials={"api_key": NO_KEY}, error=groq.GroqError)
