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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

try:
    import anthropic
except ImportError as error:
    raise ImportError(
        "the cached Anthropic clients need anthropic: pip install 'cachepipe[anthropic]'"
    ) from error

import anthropic._client

from cachepipe import jsontext, outages
from cachepipe.errors import CachepipeError
from cachepipe.flow.flow import Passage
from cachepipe.portal import in_portal
from cachepipe.providers import info
from cachepipe.providers.exchange import Answer, Unkept
from cachepipe.providers.responses import BodySource, Received, broken
from cachepipe.providers.stream_recorder import RecordedStream
from cachepipe.sdk import internals
from cachepipe.sdk.calls import ClientCall, SyncClientCall
from cachepipe.sdk.mixins import NO_KEY, AsyncCached, SyncCached, equip
from cachepipe.typedefs import Mode, Repeat

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
class _Request:
    """One call of an SDK method, which makes one or more attempts.

    Attributes:
        max_retries: how often it may be retried, if the call sets this.
        records: the records of the attempts that were answered.
    """

    max_retries: int | None
    records: list[info.Record] = field(default_factory=list)


_request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("cachepipe_request", default=None)
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


def _noted(result: Any, request: _Request) -> Any:
    """Return what a call returns, noting where its last answer came from."""
    for record in request.records[-1:]:
        info.note(result, record)
    return result


def _passed(call: ClientCall, answer: Answer, options: Any) -> tuple[Any, Any]:
    """Return the response of an attempt that was answered, and the options that it was made with."""
    arrived = call.arrived(answer)
    request = _request.get()
    if call.kept and request is not None:
        request.records.append(call.record)
    return arrived.response, options if answer.arrived is None else arrived.details["options"]


class _Layered:
    """What synchronous and asynchronous clients with a cache below the SDK's layers have in common."""

    def _call(self, kind: Any, options: Any, details: dict[str, Any]) -> Any:
        """Return one attempt as a call of the cache, or None if it cannot be cached."""
        client: Any = self
        call = kind.of(client, client._cachepipe, None, options, stream=details["stream"], stream_cls=None)  # noqa: SLF001 - its other half
        if call is not None:
            call.receive = functools.partial(client._receive_attempt, **details)  # noqa: SLF001 - likewise
            call.max_retries = self._retries(options)
        return call

    def _read_before(self, answer: Answer) -> RecordedStream | None:
        """Return the recording of a stream that is handed on as it comes, or None."""
        recording = answer.content
        if (
            answer.arrived is None
            or not isinstance(recording, RecordedStream)
            or internals.unread(self, answer.arrived.response)
        ):
            return None
        return recording

    def _retries(self, options: Any) -> int | None:
        """Return how often a call may be retried, if it sets this; the SDK may have changed its options."""
        request = _request.get()
        return internals.own_retries(self, options) if request is None else request.max_retries


class AsyncLayered(_Layered, AsyncCached):
    """Goes in front of an asynchronous client's class."""

    async def request(
        self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Any:
        """Return what the SDK makes of the answer, from the cache or not."""
        sdk: Any = super(AsyncCached, self)
        if not hasattr(sdk, "_attempt_request"):
            return await super().request(cast_to, options, stream=stream, stream_cls=stream_cls)
        request = _Request(internals.own_retries(self, options))
        if self._limiting(options) is not None:
            options = internals.sent_once(options)
        token = _request.set(request)
        try:
            with self._explaining(reached=False):
                result = await sdk.request(cast_to, options, stream=stream, stream_cls=stream_cls)
            return _noted(result, request)
        finally:
            _request.reset(token)

    async def _attempt_request(self, options: Any, **details: Any) -> tuple[Any, Any]:
        """Return the response of one attempt, and the options it was made with."""
        call = self._call(ClientCall, options, details)
        flow = self._limiting(options)
        try:
            if call is not None:
                answer = call.known() or await call.drawn()
                recording = self._read_before(answer)
                if recording is not None:
                    async for _ in recording.aread():
                        pass
                    answer = answer._replace(content=b"", kept=recording.recorder.complete)
                return _passed(call, answer, options)
            if flow is None:
                sdk: Any = super()
                attempt: tuple[Any, Any] = await sdk._attempt_request(options, **details)  # noqa: SLF001 - see above
                return attempt
            about = {**self._passing(options), "max_retries": self._retries(options)}
            passage, arrived = await flow.call(lambda: self._receive_attempt(options, **details), **about)
        except AttemptRefused as refused:
            return refused.response, refused.prepared
        _end(passage, arrived, stream=details["stream"])
        return arrived.response, arrived.details["options"]

    async def _receive_attempt(
        self, options: Any, *, stream: bool, cast_to: Any = None, stream_cls: Any = None, **details: Any
    ) -> Received:
        """Return the response of an attempt as it arrives.

        Raises:
            AttemptRefused: when it has the status of an error.
        """
        del cast_to, stream_cls  # these are for `_receive`
        sdk: Any = super()
        response, prepared = await sdk._attempt_request(options, stream=stream, **details)  # noqa: SLF001 - see above
        outages.reached(f"{response.url}")
        if not response.is_success:
            await response.aread()
            raise AttemptRefused(response, prepared)
        made_with = {"options": prepared}
        if stream:
            return Received(response, made_with)
        if not internals.unread(self, response):
            return Received(response, made_with, response.content)
        try:
            content = await response.aread()
        except Exception as error:
            arrived = Received(internals.handed_on(self, response, broken(error)), made_with)
            raise Unkept(arrived, error) from error
        return Received(internals.handed_on(self, response, BodySource([content])), made_with, content)


class SyncLayered(_Layered, SyncCached):
    """Goes in front of a synchronous client's class."""

    def request(self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None) -> Any:
        """Return what the SDK makes of the answer, from the cache or not."""
        sdk: Any = super(SyncCached, self)
        if not hasattr(sdk, "_attempt_request"):
            return super().request(cast_to, options, stream=stream, stream_cls=stream_cls)
        request = _Request(internals.own_retries(self, options))
        if self._limiting(options) is not None:
            options = internals.sent_once(options)
        token = _request.set(request)
        try:
            with self._explaining(reached=False):
                result = sdk.request(cast_to, options, stream=stream, stream_cls=stream_cls)
            return _noted(result, request)
        finally:
            _request.reset(token)

    def _attempt_request(self, options: Any, **details: Any) -> tuple[Any, Any]:
        """Return the response of one attempt, and the options it was made with."""
        call = self._call(SyncClientCall, options, details)
        flow = self._limiting(options)
        try:
            if call is not None:
                answer = call.known() or call.wait()
                recording = self._read_before(answer)
                if recording is not None:
                    for _ in recording.read():
                        pass
                    answer = answer._replace(content=b"", kept=recording.recorder.complete)
                return _passed(call, answer, options)
            if flow is None:
                sdk: Any = super()
                attempt: tuple[Any, Any] = sdk._attempt_request(options, **details)  # noqa: SLF001 - see above
                return attempt
            about = {**self._passing(options), "max_retries": self._retries(options), "wait": in_portal}
            passage, arrived = flow.call_in_thread(lambda: self._receive_attempt(options, **details), **about)
        except AttemptRefused as refused:
            return refused.response, refused.prepared
        _end(passage, arrived, stream=details["stream"])
        return arrived.response, arrived.details["options"]

    def _receive_attempt(
        self, options: Any, *, stream: bool, cast_to: Any = None, stream_cls: Any = None, **details: Any
    ) -> Received:
        """Return the response of an attempt as it arrives.

        Raises:
            AttemptRefused: when it has the status of an error.
        """
        del cast_to, stream_cls  # these are for `_receive`
        sdk: Any = super()
        response, prepared = sdk._attempt_request(options, stream=stream, **details)  # noqa: SLF001 - see above
        outages.reached(f"{response.url}")
        if not response.is_success:
            response.read()
            raise AttemptRefused(response, prepared)
        made_with = {"options": prepared}
        if stream:
            return Received(response, made_with)
        if not internals.unread(self, response):
            return Received(response, made_with, response.content)
        try:
            content = response.read()
        except Exception as error:
            arrived = Received(internals.handed_on(self, response, broken(error)), made_with)
            raise Unkept(arrived, error) from error
        return Received(internals.handed_on(self, response, BodySource([content])), made_with, content)


class AsyncAnthropic(AsyncLayered, anthropic.AsyncAnthropic):
    """``anthropic.AsyncAnthropic`` with a cache. The cache's parameters follow the SDK's own.

    Args:
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        namespace: the unit within which samples are independent, in practice one experiment.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``.
        scope: replaces the endpoint's URL in keys.
        repeat: ``"fresh"``: a repeated request gets fresh samples; ``"same"``: it gets the same again.
        service: the endpoint and its limits, such as ``cachepipe.Services.Anthropic(max_requests=50)``; the
            service then schedules and retries calls, not the SDK.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            api_key: str | None = None,
            auth_token: str | None = None,
            credentials: Any = None,
            config: Mapping[str, Any] | None = None,
            profile: str | None = None,
            webhook_key: str | None = None,
            base_url: Any = None,
            timeout: float | anthropic.Timeout | anthropic.NotGiven | None = anthropic.not_given,
            max_retries: int = anthropic.DEFAULT_MAX_RETRIES,
            default_headers: Mapping[str, str] | None = None,
            default_query: Mapping[str, object] | None = None,
            open_telemetry: Any = None,
            http_client: Any = None,
            middleware: Sequence[Any] | None = None,
            _strict_response_validation: bool = False,
            cache: Any = None,
            namespace: str | None = None,
            mode: Mode = "read-write",
            scope: str | None = None,
            repeat: Repeat = "fresh",
            service: Any = None,
        ) -> None: ...


class Anthropic(SyncLayered, anthropic.Anthropic):
    """``anthropic.Anthropic`` with a cache, for any number of threads. See `AsyncAnthropic`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            api_key: str | None = None,
            auth_token: str | None = None,
            credentials: Any = None,
            config: Mapping[str, Any] | None = None,
            profile: str | None = None,
            webhook_key: str | None = None,
            base_url: Any = None,
            timeout: float | anthropic.Timeout | anthropic.NotGiven | None = anthropic.not_given,
            max_retries: int = anthropic.DEFAULT_MAX_RETRIES,
            default_headers: Mapping[str, str] | None = None,
            default_query: Mapping[str, object] | None = None,
            open_telemetry: Any = None,
            http_client: Any = None,
            middleware: Sequence[Any] | None = None,
            _strict_response_validation: bool = False,
            cache: Any = None,
            namespace: str | None = None,
            mode: Mode = "read-write",
            scope: str | None = None,
            repeat: Repeat = "fresh",
            service: Any = None,
        ) -> None: ...


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
            "made. Use cachepipe.sdk.AsyncAnthropic or Anthropic, or wrap a client of Anthropic, "
            "AnthropicAWS or AnthropicFoundry"
        )


def _stand_for_the_sdks() -> None:
    """Make the SDK look for credentials as it does for its own classes, which it recognises by their type.

    Without this it would look neither for profiles nor for workload identity.
    """
    module: Any = anthropic._client  # noqa: SLF001 - there is no other way
    original = getattr(module, "_is_base_client", None)
    if original is None:  # older versions know no such credentials
        return

    stood_for = {(anthropic.Anthropic,), (anthropic.AsyncAnthropic,)}

    @functools.wraps(original)
    def is_base_client(client: object) -> bool:
        bases = type(client).__bases__
        return original(client) or (issubclass(bases[0], _Layered) and bases[1:] in stood_for)

    module._is_base_client = is_base_client  # noqa: SLF001 - likewise


_stand_for_the_sdks()
for _kind, _sdk in ((AsyncAnthropic, anthropic.AsyncAnthropic), (Anthropic, anthropic.Anthropic)):
    equip(_kind, _sdk, credentials=CREDENTIALS, error=anthropic.AnthropicError)


def _end(passage: Passage, arrived: Received, *, stream: bool) -> None:
    """Report the end of a call: for a stream, when it has been read."""
    headers = arrived.response.headers
    if stream:
        internals.when_read(arrived.response, functools.partial(passage.end, headers=headers))
    else:
        passage.end(usage=_usage(arrived.content), headers=headers)


def _usage(content: bytes | BodySource) -> Any:
    """Return the usage in an answer, or None."""
    try:
        answer = jsontext.loads(content) if isinstance(content, bytes) else None
    except ValueError:
        return None
    return answer.get("usage") if isinstance(answer, dict) else None
