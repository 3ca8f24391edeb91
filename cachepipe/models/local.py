"""Clients of models on this machine: calls as in OpenAI's SDK, answered by a pipeline in true batches."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import orjson
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cachepipe import context, wire
from cachepipe.contract.draws import Claimant
from cachepipe.pipelines import LocalAPI
from cachepipe.portal import in_portal, run_now
from cachepipe.prices import TABLE
from cachepipe.providers import info
from cachepipe.typedefs import Request, Response

_ROLES: Final = frozenset({"prompt", "n", "request_id", "namespace", "replicate"})
"""The fields of requests that are no settings."""


class _Kept(NamedTuple):
    """A sample as `cachepipe.info` reads it."""

    value: wire.Sample


class LocalCalls:
    """What the synchronous and the asynchronous client have in common; `AsyncLocalClient` documents both.

    Its methods are coroutines. In a synchronous client they never wait, and `run_now` makes plain methods of
    them.

    Attributes:
        _settled: returns an awaitable of the result of a coroutine.
        _stream: returns an iterator over the parts of a stream.
    """

    _settled: Callable[[Any], Awaitable[Any]]
    _stream: Callable[[Sequence[Any]], Any]

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
        samples = await self._samples(asked, n or 1, settings)
        api = wire.CHAT if _is_chat(asked) else wire.COMPLETIONS
        texts = [api.summary(sample)["text"] for sample in samples.data]
        if stream:
            return self._stream(wire.pieces(texts[0]))
        return texts if n is not None else texts[0]

    async def close(self) -> None:
        """Wait for what is in flight, and close the pipeline, also for copies of the client."""
        await self._settled(self.pipeline.close())

    async def _samples(self, prompt: Any, n: int, settings: Mapping[str, Any]) -> Response:
        """Return a response with n samples."""
        return (await self._answered(prompt, n, settings))[1]

    async def _answered(self, prompt: Any, n: int, settings: Mapping[str, Any]) -> tuple[Request, Response]:
        if reserved := _ROLES & settings.keys():
            raise TypeError(f"{', '.join(sorted(reserved))}: set these with cachepipe.using(...)")
        kind = _request_class(tuple(sorted(settings)))
        whose = context.current().claimant(self._namespace, self._replicate)._asdict()
        request = kind(prompt, n=n, **{**whose, "request_id": whose["request_id"] or ""}, **settings)
        response: Response = await self._settled(self.pipeline.request(request))
        return request, response


class AsyncLocalClient(LocalCalls):
    """A client of a model on this machine, for programs with an event loop.

    ``client.chat.completions.create(messages=…)`` and ``client.completions.create(prompt=…)`` return objects
    of OpenAI's SDK; `generate` returns text. Calls that are in flight together share batches. A stream brings
    the words of an answer that has been generated: a batch has no answer before its end.

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
    async def _stream(items: Sequence[Any]) -> AsyncIterator[Any]:
        for item in items:
            yield item


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
    def _stream(items: Sequence[Any]) -> Iterator[Any]:
        yield from items


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
        request, response = await client._answered(prompt, n or 1, given)  # noqa: SLF001 - it is ours
        body = {"stream": bool(stream), "stream_options": stream_options or {}, "n": n or 1}
        [ask] = self.api.split(body)
        whole, part = self.kinds
        if stream:
            events = self.api.stream(response.data, ask)
            datas = (event.removeprefix(b"data: ").strip() for event in events)
            parts = [part.construct(**orjson.loads(data)) for data in datas if data != b"[DONE]"]
            made = client._stream(parts)  # noqa: SLF001 - it is ours
        else:
            made = whole.construct(**self.api.answer(response.data, ask))  # as the SDK makes it
        info.note(made, self._record(request, response))
        return made

    def _record(self, request: Request, response: Response) -> info.Record:
        pipeline = self._client.pipeline
        question = pipeline.question(request)
        claimant = Claimant(request.namespace, request.request_id or None, request.replicate)
        record = info.Record([question], claimant, question.scope or "", TABLE)
        record.responses = [response._replace(data=[_Kept(sample) for sample in response.data])]
        return record


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
    return dataclasses.make_dataclass("LocalRequest", fields, bases=(Request,), frozen=True, eq=False)


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
