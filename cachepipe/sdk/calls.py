"""Calls of the SDKs' clients as exchanges with the cache: one engine for all SDKs, synchronous or not.

The SDK makes each call upstream: with the caller's own arguments, in the caller's own context and, for a
synchronous client, in the caller's own thread. So retries, time-outs, hooks and errors are the SDK's own. The
SDK also parses every response, whether it arrived or was made from samples.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import json
import queue
import threading
import warnings
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Self

import orjson

from cachepipe import context, wire
from cachepipe.errors import NotStored, TooManySamples
from cachepipe.portal import check_elsewhere, submit
from cachepipe.providers import info
from cachepipe.providers.exchange import Exchange, check_size, id_header
from cachepipe.providers.generation import Answer
from cachepipe.providers.responses import BodySource, Received
from cachepipe.providers.stream_recorder import SyncRecordedStream
from cachepipe.sdk import http, internals
from cachepipe.typedefs import Ordered

STRICT = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_SUBCLASS
"""Encodes JSON values only; other values raise an error."""

receiving: contextvars.ContextVar[Any] = contextvars.ContextVar("cachepipe_receiving", default=None)
"""The client that must hand over its next response as it arrives, before the SDK parses it."""


def plain(value: Any) -> Any:
    """Return a value of a body as the SDKs send it: models as the fields that were set, times as text.

    Numbers that are keys of a mapping, such as the token ids of ``logit_bias``, become text as in JSON.
    """
    if isinstance(value, Mapping):
        return {
            json.dumps(name) if name is None or isinstance(name, int | float) else name: plain(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump") and not isinstance(value, type):
        return value.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value


def body_of(options: Any) -> dict[str, Any] | None:
    """Return the JSON object that a call sends, including ``extra_body``; None if it sends none."""
    body = options.json_data
    if getattr(options, "content", None) is not None or options.files or not isinstance(body, Mapping):
        return None
    extra = options.extra_json
    if extra is not None:
        if not isinstance(extra, Mapping):
            return None
        body = {**body, **extra}
    try:
        orjson.dumps(body, option=STRICT)
    except TypeError:
        body = plain(body)
    return dict(body)


def asks_of(api: wire.Api, body: Mapping[str, Any], *, stream: bool) -> tuple[wire.Ask, ...]:
    """Return the asks of a call's body; none if the call goes to the provider without the cache.

    Args:
        api: the API of the call.
        body: its body.
        stream: whether the client returns a stream.
    """
    try:
        asks = api.split(body)
        check_size(asks)
    except wire.BadRequest:
        return ()  # the provider says what is wrong with it
    except TooManySamples as error:
        message = f"{error}. The call is sent to the provider unchanged, and its answer is not cached"
        warnings.warn(message, NotStored, stacklevel=2)
        return ()
    return asks if asks[0].cacheable and asks[0].stream == stream else ()


class SdkCall(Exchange):
    """A call of a client that the cache may answer, through any SDK. Subclasses define `arguments`.

    Args:
        client: the client; its ``_receive`` makes a call through the SDK.
        parts: the other arguments of `Exchange`.
    """

    def __init__(self, client: Any, **parts: Any) -> None:
        self.client = client
        self.context: contextvars.Context = contextvars.copy_context()
        self.receive = client._receive  # noqa: SLF001 - it is ours
        super().__init__(client._cachepipe, **parts)  # noqa: SLF001 - likewise

    @classmethod
    def check_order(cls, ordered: Ordered) -> Ordered:
        """Return whether answers are handed over in order; a synchronous client refuses it."""
        return ordered

    def answer(self) -> Any:
        """Return a coroutine that draws the samples and returns the answer."""
        return self.drawn()

    def own_context(self) -> contextvars.Context | None:
        """Return a copy of the caller's context, in which the SDK makes its calls."""
        return self.context.copy()

    def send(self, body: Mapping[str, Any], *, stream: bool) -> Coroutine[Any, Any, Received]:
        """Return a coroutine of what the SDK receives."""
        received: Coroutine[Any, Any, Received] = self.receive(**self.arguments(body, stream=stream))
        return received

    def arguments(self, body: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
        """Return the arguments with which the client makes a call of this body."""
        raise NotImplementedError


class ClientCall(SdkCall):
    """One call of a client of one of the generated SDKs that the cache may answer.

    Args:
        client: the client.
        cast_to: the type into which the SDK parses the response.
        options: the SDK's own description of the request.
        target: its URL and its headers that count.
        stream_cls: the class of the stream that the caller wants.
        parts: the other arguments of `Exchange`.
    """

    def __init__(
        self,
        client: Any,
        cast_to: Any,
        options: Any,
        target: internals.CallTarget,
        *,
        stream_cls: Any = None,
        **parts: Any,
    ) -> None:
        self.cast_to = cast_to
        self.options = options
        self.stream_cls = stream_cls
        self.kept = True  # whether the answer is one, in or from the cache
        limit = client._max_n  # noqa: SLF001 - it is ours
        super().__init__(client, url=target.url, headers=target.headers, max_n=limit, **parts)

    @classmethod
    def of(
        cls, client: Any, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
    ) -> Self | None:
        """Return a request of the SDK as a call, or None if it cannot be cached."""
        view, using = client._cachepipe, context.current()  # noqa: SLF001 - it is ours
        mode = using.mode_of(view.mode)
        if mode == "bypass" or view.shared_store.closed:
            return None
        api = wire.api_for(options.method, str(options.url))
        body = None if api is None else body_of(options)
        if api is None or body is None:
            return None
        asks = asks_of(api, body, stream=stream)
        if not asks:
            return None
        return cls(
            client,
            cast_to,
            options,
            internals.target_of(client, options, body),
            stream_cls=stream_cls,
            api=api,
            body=body,
            asks=asks,
            stream=stream,
            alone=not internals.is_plain(options),
            mode=mode,
            claimant=using.claimant(view.namespace, view.replicate),
            ordered=cls.check_order(using.ordered_of(view.ordered)),
        )

    @functools.cached_property
    def max_retries(self) -> int | None:  # type: ignore[override]  # made when it is asked for
        """How often a call is made again, if the call or its client says so."""
        return internals.own_retries(self.client, self.options)

    @functools.cached_property
    def spans(self) -> bool:  # type: ignore[override]  # likewise
        """Whether calls make spans here, because the SDK makes none."""
        return not internals.traces_itself(self.client)

    def received(self, answer: Answer) -> Received:
        """Return an answer in the form that the SDK parses."""
        self.kept = answer.kept
        arrived, content = answer.arrived, answer.content
        if arrived is None:
            details = internals.made_details(
                self.client, self.cast_to, self.options, stream=self.stream, stream_cls=self.stream_cls
            )
            named = {} if answer.made_by is None else {id_header(self.api): answer.made_by}
            response = http.made_response(self.client, self.url, self.options, content, named)
            arrived = Received(response, details)
        elif isinstance(content, BodySource):
            arrived = Received(http.handed_on(self.client, arrived.response, content), arrived.details)
        if self.kept:
            info.note(arrived.response, self.record)
        return arrived

    def arguments(self, body: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
        """Return the arguments of the client's ``_receive``; see `SdkCall.arguments`."""
        return {
            "cast_to": self.cast_to,
            "options": internals.with_body(self.options, body, once=self.view.service is not None),
            "stream": stream,
            "stream_cls": self.stream_cls if stream else None,
        }


class CallInThread(SdkCall):
    """A synchronous client's call: the cache runs on the portal's loop, the SDK in the caller's thread."""

    recording = SyncRecordedStream
    in_turns = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = True

    @classmethod
    def check_order(cls, ordered: Ordered) -> Ordered:
        """Return False.

        Raises:
            ValueError: when answers are to be handed over in order.
        """
        if ordered:
            raise ValueError(
                "a synchronous client cannot hand over its answers in order, as threads have no order; use "
                "the asynchronous client, or ordered=False"
            )
        return False

    def answer(self) -> Answer:
        """Draw the samples and return the answer; this thread makes the calls while it waits."""
        work = self.drawn()
        check_elsewhere(work)
        future = submit(work)
        future.add_done_callback(lambda _: self._jobs.put(None))
        try:
            while (job := self._jobs.get()) is not None:
                job()
                with self._lock:
                    self._idle = True
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            with self._lock:
                self._idle = False
            while not self._jobs.empty():  # others wait for these calls
                left = self._jobs.get()
                if left is not None:
                    self._elsewhere(left)

    def _elsewhere(self, job: Callable[[], None]) -> None:
        """Make a call in another thread, since the caller's thread does not wait any more."""
        run = self.context.copy().run
        threading.Thread(target=run, args=(job,), name="cachepipe-call", daemon=True).start()

    def own_context(self) -> None:
        """Return None: the caller's thread makes the calls, in its own context."""

    async def send(self, body: Mapping[str, Any], *, stream: bool) -> Received:
        """Return what the SDK receives. A call that has begun is not stopped, and its answer is kept."""
        received: concurrent.futures.Future[Received] = concurrent.futures.Future()
        received.set_running_or_notify_cancel()  # so that it cannot be cancelled
        arguments = self.arguments(body, stream=stream)

        def job() -> None:
            try:
                received.set_result(self.receive(**arguments))
            except Exception as error:  # noqa: BLE001 - the draws that need the call get it
                received.set_exception(error)
            except BaseException:
                received.set_exception(asyncio.CancelledError())
                raise

        with self._lock:
            here, self._idle = self._idle, False
            if here:
                self._jobs.put(job)
        if not here:
            self._elsewhere(job)
        waiter = asyncio.wrap_future(received)
        while True:
            try:
                return await asyncio.shield(waiter)
            except asyncio.CancelledError:
                if stream:
                    received.add_done_callback(_close)
                if stream or waiter.done():
                    raise


class SyncClientCall(CallInThread, ClientCall):
    """A call of a synchronous client of one of the generated SDKs."""


def _close(received: concurrent.futures.Future[Received]) -> None:
    """Close a stream that nobody reads."""
    if received.exception() is None:
        received.result().response.close()
