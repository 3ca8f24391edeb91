"""Together's clients with a cache: change the import, and every call that can be cached is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import together

from cachepipe.replaying import NO_KEY
from cachepipe.sdk.mixins import AsyncCached, SyncCached, equip
from cachepipe.sdk.options import ClientOptions

if not hasattr(together, "TogetherError"):
    raise ImportError(
        f"the cached Together clients need together>=2; {together.__version__} is installed, whose clients"
        " are not made as those of later versions are. Upgrade it, or use cachepipe.clients.OpenAI(base_url="
        '"https://api.together.xyz/v1", api_key=...), which asks the same server'
    )


class _Options(ClientOptions, total=False):
    project_id: str | None
    api_key: str | None
    timeout: float | together.Timeout | together.NotGiven | None


class AsyncTogether(AsyncCached, together.AsyncTogether):
    """``together.AsyncTogether`` with a cache. The cache's parameters follow the SDK's own.

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

        def __init__(self, **options: Unpack[_Options]) -> None: ...


class Together(SyncCached, together.Together):
    """``together.Together`` with a cache; it may be used from any number of threads. See `AsyncTogether`."""

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_Options]) -> None: ...


for _kind, _sdk in ((AsyncTogether, together.AsyncTogether), (Together, together.Together)):
    equip(_kind, _sdk, credentials={"api_key": NO_KEY}, error=together.TogetherError)
