"""Clients of models on this machine: calls as in OpenAI's SDK, answered by a pipeline in true batches.

A stream begins with the first words that the model generates, if the model tells them (`Listener`), and ends
when the sample is stored. Where the words of a sample are not known before it is whole (a hit, equal requests
that share a call, a model that tells nothing), they come then.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools
import queue
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import orjson
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cachepipe import context, wire
from cachepipe.contract.draws import Claimant
from cachepipe.models.samples import Listened, Listener
from cachepipe.pipelines import LocalAPI
from cachepipe.portal import check_elsewhere, in_portal, run_now, submit
from cachepipe.prices import TABLE
from cachepipe.providers import info
from cachepipe.typedefs import Request, Response

_ROLES: Final = frozenset({"prompt", "n", "request_id", "namespace", "replicate"})
"""The fields of requests that are no settings."""


class _Kept(NamedTuple):
    """A sample as `cachepipe.info` reads it."""

    value: wire.Sample


class _Record(info.Record):
    """The facts about a call."""

    def responded(self, response: Response) -> None:
        """Note the response."""
        self.responses = [response._replace(data=[_Kept(sample) for sample in response.data])]


_begun: set[asyncio.Future[Any]] = set()
"""Requests of streams, which go on when their readers stop; the loop holds no reference to them."""


class _Form:
    """How a stream of a client is written.

    Attributes:
        api: the API whose form the answers have.
    """

    def __init__(self, api: wire.Api) -> None:
        self.api = api

    def whole(self, samples: Sequence[wire.Sample]) -> list[Any]:
        """Return the parts of a stream with these samples."""
        raise NotImplementedError

    def words(self, head: Mapping[str, Any], place: int, words: str, *, begun: bool) -> list[Any]:
        """Return the parts with the next words of a sample.

        Args:
            head: the fields that the samples have in common.
            place: the place of the sample.
            words: the words.
            begun: whether the sample has parts already.
        """
        raise NotImplementedError

    def place_of(self, part: Any) -> int | None:
        """Return the place of the sample of a part; None if it is not of one sample."""
        raise NotImplementedError


class _Words(_Form):
    """A stream of the words of one text."""

    def whole(self, samples: Sequence[wire.Sample]) -> list[str]:
        return wire.pieces(self.api.summary(samples[0])["text"])

    def words(self, head: Mapping[str, Any], place: int, words: str, *, begun: bool) -> list[str]:  # noqa: ARG002 - as above
        return wire.pieces(words)

    def place_of(self, part: str) -> int:  # noqa: ARG002 - as above
        return 0


class _Chunks(_Form):
    """A stream of objects of OpenAI's SDK."""

    def __init__(self, api: wire.Api, ask: wire.Ask, kind: Any) -> None:
        super().__init__(api)
        self._ask, self._kind = ask, kind

    def whole(self, samples: Sequence[wire.Sample]) -> list[Any]:
        datas = [event.removeprefix(b"data: ").strip() for event in self.api.stream(samples, self._ask)]
        return [self._kind.construct(**orjson.loads(data)) for data in datas if data != b"[DONE]"]

    def words(self, head: Mapping[str, Any], place: int, words: str, *, begun: bool) -> list[Any]:
        said = (
            {"message": {"role": "assistant", "content": words}} if self.api is wire.CHAT else {"text": words}
        )
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": None}
        parts = self.whole([{**head, "choices": [choice]}])[1 if begun else 0 : -1]  # without their end
        for part in parts:
            part.choices[0].index = place
        return parts

    def place_of(self, part: Any) -> int | None:
        return part.choices[0].index if part.choices else None


class _Live:
    """A request that passes words on while the model generates them.

    Attributes:
        item: what has come: the place of a sample and its next words; None once the request has ended.
        arrived: the queue of these.
        future: the response.
        record: the facts about the request for `cachepipe.info`.
    """

    def __init__(self, form: _Form, n: int, arrived: Any, put: Callable[[Any], None]) -> None:
        self.form = form
        self.item: tuple[int, str] | None = None
        self.arrived = arrived
        self.put = put
        self.future: Any = None
        self.record: Callable[[Response], None] = lambda _: None
        self.listener = Listener(n, lambda place, words: put((place, words)))
        self._sent: Counter[int | None] = Counter()

    def told(self) -> list[Any]:
        """Return the parts with the words that have come."""
        if self.item is None:
            return []
        place, words = self.item
        parts = self.form.words(self.listener.head, place, words, begun=place in self._sent)
        self._sent[place] += len(parts)
        return parts

    def ended(self) -> list[Any]:
        """Return the rest of the parts; raise the error of the request if it has failed.

        Raises:
            BadAnswer: when the answer does not go on from the words that were told.
        """
        response = self.future.result()
        self.record(response)
        texts = [self.form.api.summary(sample)["text"] for sample in response.data]
        if not all(text.startswith(told) for text, told in zip(texts, self.listener.texts, strict=True)):
            raise wire.BadAnswer(
                "the model has begun anew after the first words of this stream, so that the stream cannot go "
                "on; the whole answer is stored, and a rerun gets it"
            )
        rest, sent = [], self._sent.copy()
        for part in self.form.whole(response.data):
            place = self.form.place_of(part)
            if place is not None and sent[place]:
                sent[place] -= 1
            else:
                rest.append(part)
        return rest


class LocalCalls:
    """What the synchronous and the asynchronous client have in common; `AsyncLocalClient` documents both.

    Its methods are coroutines. In a synchronous client they never wait, and `run_now` makes plain methods of
    them.

    Attributes:
        _settled: returns an awaitable of the result of a coroutine.
        _listening: returns a `_Live` for a form and a number of samples.
        _begin: begins a coroutine and returns a future of its result, which calls a function when it is done.
        _come: returns an awaitable of what comes next of a `_Live`.
        _parts: returns an iterator over the parts of a stream.
    """

    _settled: Callable[[Any], Awaitable[Any]]
    _listening: Callable[[_Form, int], _Live]
    _begin: Callable[[Any, Callable[[], None]], Any]
    _come: Callable[[_Live], Awaitable[Any]]
    _parts: Callable[[_Live], Any]

    def __init__(
        self,
        model: Any,
        cache: Any = None,
        *,
        namespace: str | None = None,
        batch_size: int = 1,
        timeout: float = 0.0,
        replicate: str | int | None = None,
        **options: Any,
    ) -> None:
        self._check_order(options.setdefault("ordered", False))
        self.model = model
        self.pipeline = LocalAPI(model, cache, batch_size, timeout, **options)
        self._namespace, self._replicate = namespace, replicate

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model!r}, namespace {self._namespace!r}>"

    def _check_order(self, ordered: Any) -> None:
        """Check whether answers may be handed over in order."""

    @property
    def chat(self) -> Any:
        """The resource with ``completions.create(messages=…)``."""
        return _Chat(self)

    @property
    def completions(self) -> Any:
        """The resource with ``create(prompt=…)``."""
        return _made_for(self, _Completions)

    def in_namespace(self, namespace: str | None) -> Self:
        """Return this client in another namespace; the two share the pipeline."""
        twin = copy.copy(self)
        twin._namespace = namespace  # noqa: SLF001 - it is ours
        return twin

    def in_replicate(self, replicate: str | int | None) -> Self:
        """Return this client in another replicate; the two share the pipeline."""
        twin = copy.copy(self)
        twin._replicate = replicate  # noqa: SLF001 - it is ours
        return twin

    async def generate(
        self, prompt: Any, *, n: int | None = None, stream: bool = False, **settings: Any
    ) -> Any:
        """Return the text that the model generates; with ``n``, a list of n texts; or a stream of its words.

        Args:
            prompt: a text to continue, the ids of its tokens (a list, an array, or what a tokenizer returns),
                or a list of messages.
            n: the number of texts.
            stream: whether to return an iterator over the words; not with ``n``.
            settings: the other fields of a request, such as ``max_new_tokens`` and ``temperature``.

        Raises:
            ValueError: when a stream of several texts is asked for.
        """
        if stream and n is not None:
            raise ValueError("generate(stream=True) returns one text; leave out n")
        asked = prompt_of(prompt)
        api = wire.CHAT if _is_chat(asked) else wire.COMPLETIONS
        request = self._request(asked, n or 1, settings)
        if stream:
            return self._parts(await self._streamed(request, _Words(api)))
        response = await self._settled(self.pipeline.request(request))
        texts = [api.summary(sample)["text"] for sample in response.data]
        return texts if n is not None else texts[0]

    async def close(self) -> None:
        """Wait for what is in flight, and close the pipeline, also for copies of the client."""
        await self._settled(self.pipeline.close())

    def _request(self, prompt: Any, n: int, settings: Mapping[str, Any]) -> Any:
        """Return a call as a request of the pipeline."""
        if reserved := _ROLES & settings.keys():
            raise TypeError(f"{', '.join(sorted(reserved))}: set these with cachepipe.using(...)")
        kind = _request_class(tuple(sorted(settings)))
        whose = context.current().claimant(self._namespace, self._replicate)._asdict()
        return kind(prompt, n=n, **{**whose, "request_id": whose["request_id"] or ""}, **settings)

    async def _streamed(
        self, request: Any, form: _Form, record: Callable[[Response], None] | None = None
    ) -> _Live:
        """Begin a request; return it once there are words of it, or all.

        Args:
            request: the request.
            form: how its stream is written.
            record: called with the response.
        """
        live = self._listening(form, request.n)
        live.record = record or live.record
        work = self.pipeline.request(request.heard_by(live.listener))
        live.future = self._begin(work, lambda: live.put(None))
        try:
            live.item = await self._come(live)
        except BaseException:
            live.future.cancel()
            raise
        if live.item is None:
            live.record(live.future.result())
        return live


class AsyncLocalClient(LocalCalls):
    """A client of a model on this machine, for programs with an event loop.

    ``client.chat.completions.create(messages=…)`` and ``client.completions.create(prompt=…)`` return objects
    of OpenAI's SDK; `generate` returns text. Calls that are in flight together share batches. A stream brings
    words as the model generates them, and ends when the sample is stored. Equal calls that are in flight
    together get their words when all of them are there, because they share one call of the model.

    Args:
        model: an adapter with a ``name``, whose samples have the form of OpenAI's answers, such as
            `TransformersModel` with ``raw=True``.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        namespace: the unit within which samples are independent, in practice one experiment.
        batch_size: the largest number of samples that are generated together.
        timeout: seconds that a batch stays open for more after its first request.
        replicate: which of several independent repetitions of the experiment the calls belong to.
        options: the other parameters of `LocalAPI`.

    Attributes:
        model: the adapter.
        pipeline: the pipeline, a `LocalAPI`; copies of the client share it.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _settled(self, step: Any) -> Any:
        """Return an awaitable of the result of a coroutine: the coroutine itself."""
        return step

    @staticmethod
    def _listening(form: _Form, n: int) -> _Live:
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody reads any more
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        return _Live(form, n, arrived, put)

    @staticmethod
    def _begin(work: Any, done: Callable[[], None]) -> asyncio.Future[Any]:
        def ended(task: asyncio.Task[Any]) -> None:
            _begun.discard(task)
            if not task.cancelled():
                task.exception()  # else the loop reports it when nobody reads the stream any more
            done()

        task = asyncio.get_running_loop().create_task(work)
        _begun.add(task)
        task.add_done_callback(ended)
        return task

    @staticmethod
    async def _come(live: _Live) -> Any:
        return await live.arrived.get()

    @staticmethod
    async def _parts(live: _Live) -> AsyncIterator[Any]:
        try:
            while live.item is not None:
                for part in live.told():
                    yield part
                live.item = await live.arrived.get()
        except asyncio.CancelledError:  # a reader who only stops has had its draw
            live.future.cancel()
            raise
        for part in live.ended():
            yield part


class LocalClient(LocalCalls):
    """A client of a model on this machine, for programs without an event loop; see `AsyncLocalClient`.

    Any number of threads may use it. Their calls share batches if ``timeout`` leaves these open long enough.
    """

    generate = run_now(LocalCalls.generate)
    close = run_now(LocalCalls.close)

    def _check_order(self, ordered: Any) -> None:
        """Refuse to hand over answers in order.

        Raises:
            ValueError: when they are to be handed over in order.
        """
        if ordered:
            raise ValueError(
                "a synchronous client cannot hand over its answers in order, as threads have no order; use "
                "the asynchronous client, or ordered=False"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _settled(self, step: Any) -> Any:
        """Return the result of a coroutine, which runs on the portal's loop."""
        return in_portal(step)

    @staticmethod
    def _listening(form: _Form, n: int) -> _Live:
        arrived = queue.SimpleQueue[Any]()
        return _Live(form, n, arrived, arrived.put)

    @staticmethod
    def _begin(work: Any, done: Callable[[], None]) -> Any:
        check_elsewhere(work)
        future = submit(work)
        future.add_done_callback(lambda _: done())
        return future

    @staticmethod
    async def _come(live: _Live) -> Any:
        return live.arrived.get()

    @staticmethod
    def _parts(live: _Live) -> Iterator[Any]:
        while live.item is not None:
            yield from live.told()
            try:
                live.item = live.arrived.get()
            except BaseException:  # a reader who only stops has had its draw
                live.future.cancel()
                raise
        yield from live.ended()


class _Resource:
    """One resource of a client, as in OpenAI's SDK.

    Attributes:
        api: the API whose form the answers have.
        kinds: the classes of an answer and of a part of a stream.
    """

    api: wire.Api
    kinds: tuple[Any, Any]

    def __init__(self, client: LocalCalls) -> None:
        self._client = client

    async def _created(
        self,
        prompt: Any,
        *,
        n: int | None,
        stream: bool | None,
        stream_options: Mapping[str, Any] | None,
        model: str | None,
        settings: Mapping[str, Any],
    ) -> Any:
        client = self._client
        name = client.model.name
        if model not in (None, name):
            raise ValueError(f"this client's model is {name!r}, not {model!r}; leave out model=")
        given = {field: value for field, value in settings.items() if value is not None}
        request = client._request(prompt, n or 1, given)  # noqa: SLF001 - it is ours
        body = {"stream": bool(stream), "stream_options": stream_options or {}, "n": n or 1}
        [ask] = self.api.split(body)
        whole, part = self.kinds
        record = self._record(request)
        if stream:
            form = _Chunks(self.api, ask, part)
            live = await client._streamed(request, form, record.responded)  # noqa: SLF001 - it is ours
            made = client._parts(live)  # noqa: SLF001 - it is ours
        else:
            response = await client._settled(client.pipeline.request(request))  # noqa: SLF001 - it is ours
            record.responded(response)
            made = whole.construct(**self.api.answer(response.data, ask))  # as the SDK makes it
        info.note(made, record)
        return made

    def _record(self, request: Request) -> _Record:
        question = self._client.pipeline.question(request)
        claimant = Claimant(request.namespace, request.request_id or None, request.replicate)
        return _Record([question], claimant, question.scope or "", TABLE)


class _ChatCompletions(_Resource):
    api = wire.CHAT
    kinds = (ChatCompletion, ChatCompletionChunk)

    async def create(
        self,
        *,
        messages: Sequence[Mapping[str, Any]],
        n: int | None = None,
        stream: bool | None = None,
        stream_options: Mapping[str, Any] | None = None,
        model: str | None = None,
        **settings: Any,
    ) -> Any:
        """Return a ``ChatCompletion``, or an iterator over ``ChatCompletionChunk`` objects.

        Args:
            messages: the conversation; the tokenizer's chat template makes a prompt of it.
            n: the number of answers.
            stream: whether to return a stream.
            stream_options: ``{"include_usage": True}`` for a last part with the usage.
            model: the name of the client's model, or None.
            settings: the other fields of a request, such as ``max_new_tokens`` and ``temperature``; those
                that are None are left out.

        Raises:
            BadRequest: when the model does not take one of them.
            ValueError: when ``model`` is another model.
        """
        options: dict[str, Any] = {"n": n, "stream": stream, "stream_options": stream_options, "model": model}
        return await self._created([dict(message) for message in messages], **options, settings=settings)


class _Completions(_Resource):
    api = wire.COMPLETIONS
    kinds = (Completion, Completion)

    async def create(
        self,
        *,
        prompt: Any,
        n: int | None = None,
        stream: bool | None = None,
        stream_options: Mapping[str, Any] | None = None,
        model: str | None = None,
        **settings: Any,
    ) -> Any:
        """Return a ``Completion``, or an iterator over its parts.

        Args:
            prompt: a text, or the ids of its tokens.
            n: the number of answers.
            stream: whether to return a stream.
            stream_options: ``{"include_usage": True}`` for a last part with the usage.
            model: the name of the client's model, or None.
            settings: the other fields of a request, such as ``max_new_tokens`` and ``temperature``; those
                that are None are left out.

        Raises:
            BadRequest: when the model does not take one of them.
            ValueError: when ``model`` is another model, or the prompt is a list of messages.
        """
        asked = prompt_of(prompt)
        if _is_chat(asked):
            raise ValueError("completions take a text or its tokens; for messages use chat.completions")
        options: dict[str, Any] = {"n": n, "stream": stream, "stream_options": stream_options, "model": model}
        return await self._created(asked, **options, settings=settings)


class _Chat:
    """The resource ``client.chat``."""

    def __init__(self, client: LocalCalls) -> None:
        self._client = client

    @property
    def completions(self) -> Any:
        """The resource with ``create(messages=…)``."""
        return _made_for(self._client, _ChatCompletions)


def _made_for(client: LocalCalls, kind: type[_Resource]) -> _Resource:
    """Return a resource of a client, synchronous if the client is."""
    chosen: Any = kind
    made: _Resource = (_sync(chosen) if isinstance(client, LocalClient) else chosen)(client)
    return made


@functools.cache
def _sync(kind: Any) -> Any:
    """Return the synchronous form of a resource."""
    create: Callable[..., Any] = run_now(kind.create)
    return type(kind.__name__, (kind,), {"create": create})


@functools.lru_cache(maxsize=256)
def _request_class(names: tuple[str, ...]) -> Any:
    """Return a class of requests with these settings."""
    fields = [(name, Any, dataclasses.field(kw_only=True)) for name in names]
    return dataclasses.make_dataclass("LocalRequest", fields, bases=(Listened,), frozen=True, eq=False)


def prompt_of(prompt: Any) -> Any:
    """Return a prompt as requests hold it: a text, a list of token ids, or a list of messages."""
    if isinstance(prompt, Mapping) and "input_ids" in prompt:  # what a tokenizer returns
        prompt = prompt["input_ids"]
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, list | tuple):
        prompt = list(prompt)
        if len(prompt) == 1 and isinstance(prompt[0], list):  # a batch of one
            return prompt[0]
    return prompt


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)
