"""Anthropic's clients with a cache: change the import, and every message that can be cached is.

``client = Anthropic(cache="caches/exp", namespace="run-1")``

This SDK has layers between a call and its HTTP request: tracing, retries and middleware, which may change the
request. So the cache is below them, where the SDK makes one attempt (``_attempt_request``). The key is made
from what would be sent, and hits pass through the layers as the provider's answers do. Versions without these
layers are served as the other SDKs are.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack

try:
    import anthropic
except ImportError as error:
    raise ImportError(
        "the cached Anthropic clients need anthropic: pip install 'cachepipe[anthropic]'"
    ) from error

from cachepipe import outages
from cachepipe.errors import CachepipeError
from cachepipe.portal import run_now
from cachepipe.providers import info
from cachepipe.providers.generation import Made, Unkept
from cachepipe.providers.responses import Received, broken
from cachepipe.providers.stream_recorder import RecordedStream
from cachepipe.replaying import NO_KEY
from cachepipe.sdk import http, internals
from cachepipe.sdk.calls import ClientCall
from cachepipe.sdk.mixins import AsyncCached, Cached, SyncCached, equip
from cachepipe.sdk.options import ClientOptions

CREDENTIALS: dict[str, Any] = {
    "api_key": NO_KEY,
    "auth_token": None,
    "credentials": None,
    "config": None,
    "profile": None,
}
"""Placeholder credentials for a client in replay mode, if the SDK finds none."""

_AT_ITS_PLACE = frozenset({"anthropic.lib.aws", "anthropic.lib.foundry"})
"""The modules of classes that send calls unchanged to ``/v1/messages`` of their base URL."""


@dataclass
class _SdkCall:
    """One call of an SDK method, which makes one or more attempts.

    Attributes:
        max_retries: how often it may be retried, if the call sets this.
        records: the records of the attempts that were answered.
    """

    max_retries: int | None
    records: list[info.Record] = field(default_factory=list)


_sdk_call: contextvars.ContextVar[_SdkCall | None] = contextvars.ContextVar(
    "cachepipe_sdk_call", default=None
)
"""The call that is making its attempts now."""


class AttemptRefused(CachepipeError):  # noqa: N818 - it never reaches a caller
    """An attempt returned an error status; the SDK decides what to do.

    Attributes:
        status_code: the status.
        response: the response, its body read.
        prepared: the options that it was sent with.
    """

    def __init__(self, response: Any, prepared: Any) -> None:
        super().__init__(f"the provider answered with status {response.status_code}")
        self.status_code: int = response.status_code
        self.response = response
        self.prepared = prepared


class AttemptsCached(Cached):
    """Goes in front of a client's class whose SDK has layers; it puts the cache below them.

    `request` is above the SDK's layers, ``_attempt_request`` below them.
    """

    _read_to_end: Callable[[RecordedStream], Any]  # a step (see `Cached`)

    async def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """Return what the SDK makes of the answer, from the cache or not."""
        how = {"stream": stream, "stream_cls": stream_cls}
        sdk: Any = super(Cached, self)
        if not internals.makes_attempts(sdk):
            return await self._settled(super().request(cast_to, options, **how))
        sdk_call = _SdkCall(internals.own_retries(self, options))
        if self._limiting(options) is not None:
            options = internals.sent_once(options)
        token = _sdk_call.set(sdk_call)
        try:
            with self._explaining(reached=False):
                result = await self._settled(sdk.request(cast_to, options, **how))
            for record in sdk_call.records[-1:]:
                info.note(result, record)
            return result
        finally:
            _sdk_call.reset(token)

    async def _attempt_request(self, options: Any, **details: Any) -> tuple[Any, Any]:
        """Return the response of one attempt, and the options it was made with."""
        stream, flow = details["stream"], self._limiting(options)
        sdk_call = _sdk_call.get()
        retries = internals.own_retries(self, options) if sdk_call is None else sdk_call.max_retries
        call = self._call_class.of(self, None, options, stream=stream)
        try:
            if call is not None:
                call.receive = functools.partial(self._receive_attempt, **details)
                call.max_retries = retries
                received = await self._answered(call)
                if call.kept and sdk_call is not None:
                    sdk_call.records.append(call.record)
                return received.response, received.details.get("options", options)
            if flow is None:
                attempt: tuple[Any, Any] = await self._settled(internals.attempt(super(), options, details))
                return attempt
            about = {**self._passing(options), "max_retries": retries}
            passage, received = await self._settled(
                self._within_limits(flow, lambda: self._receive_attempt(options, **details), **about)
            )
        except AttemptRefused as refused:
            return refused.response, refused.prepared
        made = Made(passage, None, received)
        if stream:
            http.when_read(received.response, made.end)
        else:
            made.end_with(received.content if isinstance(received.content, bytes) else b"")
        return received.response, received.details["options"]

    async def _answered(self, call: ClientCall) -> Received:
        """Return the answer to an attempt, with the options in its details if the SDK has changed them."""
        answer = call.known() or await self._settled(call.answer())
        received, recording = answer.arrived, answer.content
        if (
            received is not None
            and isinstance(recording, RecordedStream)
            and not http.unread(received.response)
        ):  # a stream that is handed on as it comes
            await self._settled(self._read_to_end(recording))
            answer = answer._replace(content=b"", kept=recording.recorder.complete)
        if received is None:
            return call.received(answer)._replace(details={})
        return call.received(answer)

    async def _receive_attempt(
        self, options: Any, *, stream: bool, cast_to: Any = None, stream_cls: Any = None, **details: Any
    ) -> Received:
        """Return the response of an attempt as it arrives.

        Raises:
            AttemptRefused: when it has the status of an error.
        """
        del cast_to, stream_cls  # these are for `_receive`
        response, prepared = await self._settled(
            internals.attempt(super(), options, {"stream": stream, **details})
        )
        outages.reached(f"{response.url}")
        if not response.is_success:
            await self._settled(self._read(response))
            raise AttemptRefused(response, prepared)
        made_with = {"options": prepared}
        try:
            return await self._as_received(response, made_with, stream=stream)
        except Exception as error:
            received = Received(http.handed_on(self, response, broken(error)), made_with)
            raise Unkept(received, error) from error


class AsyncAttemptsCached(AttemptsCached, AsyncCached):
    """Goes in front of an asynchronous client's class."""

    async def _read_to_end(self, recording: RecordedStream) -> None:
        async for _ in recording.aread():
            pass


class SyncAttemptsCached(AttemptsCached, SyncCached):
    """Goes in front of a synchronous client's class."""

    request = run_now(AttemptsCached.request)
    _attempt_request = run_now(AttemptsCached._attempt_request)  # noqa: SLF001 - its own base
    _receive_attempt = run_now(AttemptsCached._receive_attempt)  # noqa: SLF001 - its own base

    def _read_to_end(self, recording: RecordedStream) -> None:
        for _ in recording.read():
            pass


class _Options(ClientOptions, total=False):
    api_key: str | None
    auth_token: str | None
    credentials: Any
    config: Mapping[str, Any] | None
    profile: str | None
    webhook_key: str | None
    timeout: float | anthropic.Timeout | anthropic.NotGiven | None
    open_telemetry: Any
    middleware: Sequence[Any] | None


class AsyncAnthropic(AsyncAttemptsCached, anthropic.AsyncAnthropic):
    """``anthropic.AsyncAnthropic`` with a cache. The cache's parameters follow the SDK's own.

    Args:
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        namespace: the unit within which samples are independent, in practice one experiment.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``.
        scope: replaces the endpoint's URL in keys.
        repeat: ``"fresh"``: a repeated request gets fresh samples; ``"same"``: it gets the same again.
        service: the endpoint and its limits, such as ``cachepipe.Services.Anthropic(max_requests=50)``; the
            service then schedules and retries calls, not the SDK.
        replicate: which of several independent repetitions of the experiment the calls belong to.
        ordered: hand over the answers in the order of the first run, one at a time, so that a rerun of a
            program with concurrent tasks takes the same course; for asynchronous clients.
        budget: the US dollars that each namespace may spend in this cache, over all runs, or a
            ``cachepipe.Budget``. A call that may exceed it raises ``cachepipe.BudgetExceeded``.
    """

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_Options]) -> None: ...


class Anthropic(SyncAttemptsCached, anthropic.Anthropic):
    """``anthropic.Anthropic`` with a cache, for any number of threads. See `AsyncAnthropic`."""

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[_Options]) -> None: ...


def check_wrappable(kind: Any) -> None:
    """Refuse the clients of platforms that rewrite calls before they are sent.

    Raises:
        TypeError: for those of Bedrock, Vertex and Google Cloud.
    """
    own = {base.__module__ for base in kind.__mro__ if base.__module__.startswith("anthropic.")}
    elsewhere = {name for name in own if name.startswith("anthropic.lib.")}
    direct = {anthropic.Anthropic, anthropic.AsyncAnthropic} & set(kind.__mro__)
    if not direct or not all(name.startswith(tuple(_AT_ITS_PLACE)) for name in elsewhere):
        raise TypeError(
            f"calls of {kind.__name__} cannot be cached: it rewrites them for its platform after they are "
            "made. Use cachepipe.clients.AsyncAnthropic or Anthropic, or wrap a client of Anthropic, "
            "AnthropicAWS or AnthropicFoundry"
        )


internals.count_as_base_clients(AttemptsCached, anthropic.Anthropic, anthropic.AsyncAnthropic)
for _kind, _sdk in ((AsyncAnthropic, anthropic.AsyncAnthropic), (Anthropic, anthropic.Anthropic)):
    equip(_kind, _sdk, credentials=CREDENTIALS, error=anthropic.AnthropicError)
