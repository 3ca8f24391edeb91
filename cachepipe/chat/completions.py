"""Completions of prompts and conversations: one or many at once, with times, tokens and probabilities."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import itertools
import math
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self, TypedDict, Unpack, overload

import anyio.to_thread
import pydantic

from cachepipe import context, progress, terminal, wire
from cachepipe.chat import tools
from cachepipe.chat.access import NAMES, Access, ServiceLike, model_of
from cachepipe.chat.conversations import Conversation, Message, text_of
from cachepipe.context import INHERITED, Inherited
from cachepipe.errors import BadAnswer, CachepipeError
from cachepipe.parallel import alcall
from cachepipe.providers.info import Info, info
from cachepipe.typedefs import Mode, Repeat
from cachepipe.wire.sse import merge

_MOST_ALTERNATIVES: Final = 20
_COLOURS: Final = ((0.9, "32"), (0.6, "92"), (0.3, "33"), (0.1, "91"), (0.0, "31"))
"""The colours of tokens by their lowest probability, from green to red."""


class Options(TypedDict, total=False):
    """The options of every function here.

    All other parameters of the SDK's ``chat.completions.create`` are accepted too.

    Attributes:
        model: the model; else ``CACHEPIPE_MODEL`` of the environment, else `DEFAULT_MODEL`.
        log_probs: whether to get the log probabilities of the tokens.
        top_log_probs: how many of the most probable tokens to get at each position, at most 20.
        response_format: a pydantic class for ``completion.parsed``, or a mapping as the provider takes it.
        tools: Python functions that the model may call, or mappings as the provider takes them. The calls are
            in the completion's ``tool_calls``; `Chat` makes them.
        cache: a folder, a store, or a ``diskcache.Cache``; else ``CACHEPIPE_DIR``, else the default folder.
        namespace: the unit within which samples are independent; else ``CACHEPIPE_NAMESPACE``.
        request_id: which draw this is among equal questions of the namespace.
        mode: ``"read-write"``, ``"replay"`` (which needs no key), ``"refresh"`` or ``"bypass"``.
        repeat: ``"fresh"``: a repeated request gets a fresh sample; ``"same"``: it gets the same again.
        service: makes the client, and limits and retries its calls.
        client: a client to use, with or without a cache.
        api_key: the key; else ``OPENAI_API_KEY``.
        base_url: the base URL of the API; else ``OPENAI_BASE_URL``. If neither URL nor key is found,
            ``OLLAMA_HOST``.
        temperature: how much the samples vary.
        top_p: from how much of the probability they are drawn.
        max_tokens: the most tokens of an answer, by its old name.
        max_completion_tokens: the most tokens of an answer.
        stop: where an answer ends.
        seed: passed on; two draws stay independent.
        frequency_penalty: passed on.
        presence_penalty: passed on.
        logit_bias: passed on.
        reasoning_effort: passed on.
        verbosity: passed on.
        tool_choice: passed on.
        parallel_tool_calls: passed on.
        audio: passed on.
        modalities: passed on.
        prediction: passed on.
        web_search_options: passed on.
        extra_query: added to the URL.
        user: passed on, and not part of the question; this also holds for the following fields.
        service_tier: passed on.
        metadata: passed on.
        store: passed on.
        safety_identifier: passed on.
        prompt_cache_key: passed on.
        extra_body: further fields of the request's body.
        extra_headers: headers of this request.
        timeout: seconds after which a call is given up.
    """

    model: str | None
    log_probs: bool
    top_log_probs: int | None
    response_format: type[pydantic.BaseModel] | Mapping[str, Any] | None
    tools: Sequence[Callable[..., Any] | Mapping[str, Any]] | None
    cache: Any
    namespace: str | None
    request_id: str | None
    mode: Mode | None
    repeat: Repeat | None
    service: ServiceLike | None
    client: Any
    api_key: str | None
    base_url: str | None
    temperature: float
    top_p: float
    max_tokens: int
    max_completion_tokens: int
    stop: str | Sequence[str]
    seed: int
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[str, int]
    reasoning_effort: str
    verbosity: str
    tool_choice: Any
    parallel_tool_calls: bool
    audio: Any
    modalities: Sequence[str]
    prediction: Any
    web_search_options: Any
    extra_query: Mapping[str, Any]
    user: str
    service_tier: str
    metadata: Mapping[str, str]
    store: bool
    safety_identifier: str
    prompt_cache_key: str
    extra_body: Mapping[str, Any]
    extra_headers: Mapping[str, str]
    timeout: float


@dataclass(frozen=True)
class TokenLogProb:
    """A token and how probable it was.

    Attributes:
        token: the token.
        log_prob: the natural logarithm of its probability; nan if the provider does not report it.
        raw: its bytes, if they differ from those of ``token``, as for a part of a character.
    """

    token: str
    log_prob: float
    raw: bytes | None = field(default=None, repr=False)

    @property
    def probability(self) -> float:
        """The probability, limited to the range from 0 to 1; nan if it is unknown."""
        return math.exp(min(self.log_prob, 0.0))


def _characters(tokens: Iterable[TokenLogProb]) -> Iterator[tuple[str, list[TokenLogProb]]]:
    """Iterate over texts of complete characters with their tokens, usually one."""
    parts: list[TokenLogProb] = []
    for token in tokens:
        if token.raw is None:
            yield from ((part.token, [part]) for part in parts)  # they make no character
            parts = []
            yield token.token, [token]
            continue
        parts.append(token)
        with contextlib.suppress(UnicodeDecodeError):
            yield b"".join(part.raw or b"" for part in parts).decode(), parts
            parts = []
    yield from ((part.token, [part]) for part in parts)


class _Cost:
    """A field that may be given as an `Info`, whose price is looked up once somebody wants to know."""

    @overload
    def __get__(self, completion: None, _: type) -> None: ...
    @overload
    def __get__(self, completion: TextCompletion, _: type) -> float | None: ...
    def __get__(self, completion: TextCompletion | None, _: type) -> float | None:
        if completion is None:
            return None  # the field's default
        given = vars(completion)["cost"]
        if isinstance(given, Info):
            given = vars(completion)["cost"] = given.as_asked_cost
        return given  # type: ignore[no-any-return]

    def __set__(self, completion: TextCompletion, given: Info | float | None) -> None:
        vars(completion)["cost"] = given


@dataclass(frozen=True)
class TextCompletion:
    """An answer of a model, with its times, tokens and cost.

    Times are seconds since 1970. The times of the generation are stored with the sample: a cached completion
    has the times of the call that made it, and separate times of its retrieval.

    Attributes:
        conversation: the conversation that was completed.
        model: the model in the request.
        message: the text of the answer; empty if there is none, for example with tool calls.
        start_time: the start of its generation.
        end_time: the end of its generation.
        cached: False exactly if it was generated on this request's behalf.
        retrieval_start_time: the time of the request.
        retrieval_end_time: the time at which the answer was available.
        token_log_probs: the tokens of the answer with their log probabilities; None if not asked for.
        full_token_log_probs: the most probable tokens at each position; None if not asked for.
        usage: token counts as asked: those of the request alone, whether it was cached or not.
        cost: the price of ``usage`` in US dollars; None if it is unknown.
        finish_reason: why it ended, in the provider's words.
        refusal: the model's refusal message, if the provider reports refusals separately.
        tool_calls: the calls of tools that the model wants, as the provider's JSON has them.
        parsed: the answer as an instance of ``response_format``, if that was a class.
        key: the key of the question; None without a cache.
        index: the sample's index in the list of its key.
        namespace: the namespace of the draw.
        request_id: which draw it is among equal questions.
    """

    conversation: Conversation
    model: str
    message: str
    start_time: float
    end_time: float
    cached: bool = False
    retrieval_start_time: float = 0.0
    retrieval_end_time: float = 0.0
    token_log_probs: list[TokenLogProb] | None = field(default=None, repr=False)
    full_token_log_probs: list[list[TokenLogProb]] | None = field(default=None, repr=False)
    usage: Mapping[str, int] = field(default_factory=dict)
    cost: _Cost = _Cost()
    finish_reason: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    parsed: Any = None
    key: str | None = None
    index: int | None = None
    namespace: str | None = None
    request_id: str | None = None

    @property
    def duration(self) -> float:
        """The duration of its generation in seconds."""
        return self.end_time - self.start_time

    @property
    def retrieval_duration(self) -> float:
        """The duration of its retrieval in seconds; for a cached one, from the cache."""
        return self.retrieval_end_time - self.retrieval_start_time

    def to_message(self) -> Message:
        """Return the answer as an assistant message."""
        return said_by_model(self.message, self.refusal, self.tool_calls)

    def to_pretty_string(self, *, color: bool | None = None) -> str:
        """Return the conversation with the answer in readable form; see `Conversation.to_pretty_string`."""
        whole = Conversation([*self.conversation.messages, self.to_message()])
        return whole.to_pretty_string(color=color)

    def to_pretty_log_probs_string(
        self, *, show_probabilities: bool = False, color: bool | None = None
    ) -> str:
        """Return the answer's tokens, each coloured by its probability: green where it was sure, else red.

        Args:
            show_probabilities: write the probability after each token, such as ``Paris[0.9731]``.
            color: whether to use colours; None uses them on a terminal without NO_COLOR.

        Raises:
            ValueError: when the completion has no log probabilities.
        """
        if self.token_log_probs is None:
            raise ValueError("this completion has no log probabilities; ask for it with log_probs=True")
        color = terminal.shows_colours() if color is None else color
        pieces = []
        for text, tokens in _characters(self.token_log_probs):
            least = min(token.probability for token in tokens)
            codes = next((codes for bound, codes in _COLOURS if least >= bound), None)
            shown = terminal.visible(text, lines=True)
            pieces.append(shown if codes is None else terminal.coloured(shown, codes, color=color))
            if show_probabilities:
                told = (f"[{token.probability:.4f}]" for token in tokens)
                pieces += [terminal.coloured(probability, "2", color=color) for probability in told]
        return "".join(pieces)


def said_by_model(text: str, refusal: str | None, calls: list[dict[str, Any]]) -> Message:
    """Return a model's answer as a message, with the refusal message if there is no text."""
    return Message("assistant", text or refusal or (None if calls else ""), tool_calls=calls or None)


class CompletionsFailed(ExceptionGroup[Exception], CachepipeError):  # noqa: N818 - names what happened
    """Some of several completions failed; the others are there.

    Attributes:
        results: in input order, completions, and errors in the place of those that failed.
    """

    results: list[TextCompletion | Exception]

    @classmethod
    def of(cls, results: list[TextCompletion | Exception]) -> Self:
        """Return the error for the failures among results."""
        errors = [result for result in results if isinstance(result, Exception)]
        made = cls(
            f"{len(errors)} of {len(results)} completions failed; the others are in .results, and cached: "
            "a rerun generates what is missing. return_exceptions=True returns errors in their places",
            errors,
        )
        made.results = results
        return made

    def derive(self, excs: Sequence[Any], /) -> Any:
        """Return a group of some of the errors, as ``except*`` makes it."""
        made = type(self)(self.message, excs)
        made.results = getattr(self, "results", [])
        return made


# One question.


class Plan:
    """The common part of all completions with the same options.

    Args:
        options: see `Options`.
        environment: settings that override the environment of the process.

    Raises:
        TypeError, ValueError: for options that are not valid, before anything is asked.
    """

    def __init__(self, options: Mapping[str, Any], environment: Mapping[str, Any] | None = None) -> None:
        self.access = Access({name: options[name] for name in NAMES if name in options}, environment)
        body = {name: value for name, value in options.items() if name not in NAMES}
        extra = body.get("extra_body") or {}
        if not isinstance(extra, Mapping):
            raise TypeError(f"extra_body= is a mapping; got {extra!r:.100}")
        for name in ("n", "stream", "messages", "prompt"):
            if name in body or name in extra:
                raise TypeError(
                    f"{name}= is not taken here: ask several times for several samples, Chat streams"
                )
        self.model = model_of(self.access, body.pop("model", None))
        self.kind: type[pydantic.BaseModel] | None = None
        self.functions: dict[str, tools.Tool] = {}
        self._others: set[str | None] = set()
        wanted, top = body.pop("log_probs", None), body.pop("top_log_probs", None)
        if (form := body.pop("response_format", None)) is not None:
            body["response_format"], self.kind = tools.response_format(form)
        if given := body.pop("tools", None):
            body["tools"], self.functions = tools.as_tools(given)
            self._others = set(map(tools.name_of, body["tools"])) - self.functions.keys() - {None}
        self.body = {**body, **self._log_probs(wanted, top)}

    def _log_probs(self, wanted: Any, top: Any) -> dict[str, Any]:
        if top is not None and (type(top) is not int or not 0 <= top <= _MOST_ALTERNATIVES):
            raise ValueError(
                f"top_log_probs= is a whole number from 0 to {_MOST_ALTERNATIVES}; got {top!r:.100}"
            )
        if not (wanted or top):
            return {}
        if wanted is False:
            raise ValueError("top_log_probs= needs log_probs=True; got log_probs=False")
        return {"logprobs": True} if top is None else {"logprobs": True, "top_logprobs": top}

    def leaves(self, call: Mapping[str, Any]) -> bool:
        """Return True if a call is of a tool that was given as a mapping, so that the caller makes it."""
        return tools.name_of(call) in self._others

    async def complete(
        self, conversation: Conversation, request_id: str | Inherited | None = INHERITED
    ) -> TextCompletion:
        """Return the completion of a conversation."""
        begun = time.time()
        body = {"model": self.model, "messages": conversation.to_messages(), **self.body}
        answer = await self.access.ask(body, request_id)
        choice = choices_of(answer)[0]
        made = Answered(dumped(choice.message))
        made.finish_reason = choice.finish_reason
        made.add_log_probs(choice.logprobs)
        if answer.usage is not None:
            made.usage = dumped(answer.usage)
        return self.completion(conversation, made, info(answer), begun)

    async def streamed(
        self, conversation: Conversation, within: contextvars.Context
    ) -> AsyncGenerator[str | TextCompletion, None]:
        """Iterate over the text of a completion as it comes, and then the completion.

        Args:
            conversation: the conversation to complete.
            within: the context of the caller.
        """
        begun = time.time()
        body = {"model": self.model, "messages": conversation.to_messages(), **self.body, "stream": True}
        answer = await asyncio.create_task(self.access.ask(body), context=within)
        made = Answered()
        try:
            async for chunk in _chunks(answer):
                if text := made.add(chunk):
                    yield text
        finally:
            closing = answer.close()  # here, where it shows whether the reader is being cancelled
            if closing is not None:
                await closing
        made.check_ended()
        yield self.completion(conversation, made, info(answer), begun)

    def completion(
        self, conversation: Conversation, made: Answered, noted: Info | None, begun: float
    ) -> TextCompletion:
        """Return an answer as a completion.

        Args:
            conversation: the conversation that was completed; it is copied.
            made: the answer.
            noted: the client's facts about it.
            begun: the time of the request.
        """
        ended = time.time()
        text, refusal, calls = made.parts()
        start, end = begun, ended
        place: dict[str, Any] = {}
        usage = made.usage
        if noted is not None and noted.complete:
            index = None if noted.indices is None else noted.indices[0]
            place = {
                "cached": bool(noted.cached) and all(noted.cached),
                "cost": noted,
                "key": noted.key,
                "index": index,
                "namespace": noted.namespace,
                "request_id": noted.request_id,
            }
            usage = usage if noted.as_asked["unknown"] else noted.as_asked
            start, end = self.access.generated(noted.key, index) or (begun, ended)
        parsed = None
        if self.kind is not None and not refusal and not calls:
            parsed = parsed_answer(self.kind, text, made.finish_reason, place.get("key"), place.get("index"))
        return TextCompletion(
            conversation=conversation.copy(),
            model=self.model,
            message=text,
            start_time=start,
            end_time=end,
            retrieval_start_time=begun,
            retrieval_end_time=ended,
            token_log_probs=made.log_probs,
            full_token_log_probs=made.alternatives if self.body.get("top_logprobs") else None,
            usage={
                name: count
                for name, count in usage.items()
                if name.endswith("_tokens") and isinstance(count, int)
            },
            finish_reason=made.finish_reason,
            refusal=refusal,
            tool_calls=calls,
            parsed=parsed,
            **place,
        )


def parsed_answer(
    kind: type[pydantic.BaseModel], text: str, finish_reason: str | None, key: str | None, index: int | None
) -> pydantic.BaseModel:
    """Return an answer as an instance of a class.

    Args:
        kind: the class.
        text: the answer.
        finish_reason: why it ended.
        key: the key of the question, for the error message.
        index: the sample's index in the list of its key, for the error message.

    Raises:
        BadAnswer: when it does not fit.
    """
    try:
        return kind.model_validate_json(text)
    except pydantic.ValidationError as error:
        cut = " (it was cut off: raise max_completion_tokens)" if finish_reason == "length" else ""
        raise BadAnswer(
            f"the answer is no {kind.__name__}{cut}: {text!r:.200}. It stays in the cache as "
            f"sample {index} of key {key}; another request_id draws another"
        ) from error


class Answered:
    """A model's answer, complete or assembled from a stream as the cache does it.

    Args:
        said: the message, if it is complete.
    """

    def __init__(self, said: Mapping[str, Any] | None = None) -> None:
        self.said: dict[str, Any] = dict(said or {})
        self.finish_reason: str | None = None
        self.log_probs: list[TokenLogProb] | None = None
        self.alternatives: list[list[TokenLogProb]] | None = None
        self.usage: Mapping[str, Any] = {}

    def add(self, chunk: Any) -> str:
        """Add a chunk of a stream; return its text."""
        if chunk.usage is not None:
            self.usage = dumped(chunk.usage)
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        self.finish_reason = choice.finish_reason or self.finish_reason
        delta = {} if choice.delta is None else dumped(choice.delta)
        merge(self.said, delta)
        text = text_of(delta.get("content"))
        self.add_log_probs(choice.logprobs, text)
        return text or str(delta.get("refusal") or "")

    def check_ended(self) -> None:
        """Raise an error if the stream ended before the answer did.

        Raises:
            BadAnswer: when no chunk had a finish reason.
        """
        if self.finish_reason is None:
            raise BadAnswer("the stream ended before the answer did; expected a choice with a finish_reason")

    def parts(self) -> tuple[str, str | None, list[dict[str, Any]]]:
        """Return the text, the refusal, and the calls of tools as the provider's JSON has them.

        Raises:
            BadAnswer: for a content that is neither a text nor a list of parts.
        """
        message = wire.CHAT.settle(self.said)
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise BadAnswer(f"the content of an answer is a text or a list of parts; got {content!r:.100}")
        return text_of(content), message.get("refusal"), message.get("tool_calls") or []

    def add_log_probs(self, told: Any, text: str = "") -> None:
        """Add the log probabilities of a choice, or of a chunk of one."""
        if isinstance(told, int | float):  # Together's, of the one token that a chunk brings
            told = {"tokens": [text], "token_logprobs": [told]}
        told = {} if told is None else dumped(told)
        entries = told.get("content")
        if entries is None and told.get("tokens"):  # Together's
            values = told.get("token_logprobs") or ()
            tops = told.get("top_logprobs") or ()
            entries = [
                {"token": token, "logprob": value, "top_logprobs": _listed(top)}
                for token, value, top in itertools.zip_longest(told["tokens"], values, tops)
            ]
        if entries is None:
            return
        self.log_probs = self.log_probs or []
        self.alternatives = self.alternatives or []
        for entry in entries:
            self.log_probs.append(_token(entry))
            self.alternatives.append([_token(top) for top in entry.get("top_logprobs") or ()])


def _token(entry: Mapping[str, Any]) -> TokenLogProb:
    value, text = entry.get("logprob"), str(entry.get("token") or "")
    raw = None
    with contextlib.suppress(TypeError, ValueError):  # servers tell odd things
        raw = bytes(list(entry.get("bytes") or ())) or None
    if raw == text.encode("utf-8", "surrogatepass"):
        raw = None
    return TokenLogProb(text, math.nan if value is None else value, raw)


def _listed(top: Any) -> list[dict[str, Any]]:
    return [{"token": token, "logprob": value} for token, value in (top or {}).items()]


def choices_of(answer: Any) -> Sequence[Any]:
    """Return the choices of an answer.

    Raises:
        BadAnswer: when there is none, or one has no message; with the provider's text.
    """
    choices = getattr(answer, "choices", None)
    if not choices or any(getattr(choice, "message", None) is None for choice in choices):
        told = getattr(answer, "error", None)
        if isinstance(answer, str):  # as the SDK returns a page of a website
            told = f"{answer!r:.200}; does base_url end as the provider's does, often in /v1?"
        raise BadAnswer(
            "the provider answered without a choice that has a message; expected one"
            + ("" if told is None else f". It says: {told!s:.400}")
        )
    return choices  # type: ignore[no-any-return]


def dumped(thing: Any) -> dict[str, Any]:
    """Return the fields of an SDK's object."""
    dumped: dict[str, Any] = (
        thing if isinstance(thing, dict) else thing.model_dump(exclude_none=True, warnings=False)
    )
    return dumped


async def _chunks(stream: Any) -> AsyncIterator[Any]:
    """Iterate over an SDK's stream; over a synchronous one in threads."""
    if hasattr(stream, "__aiter__"):
        async for chunk in stream:
            yield chunk
        return
    while (chunk := await anyio.to_thread.run_sync(next, stream, None)) is not None:
        yield chunk


def conversation_of(prompt: Any) -> Conversation:
    """Return a conversation that begins with a prompt.

    Raises:
        TypeError: for a value that is not a string.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a string; got {prompt!r:.100}. For messages there is Conversation")
    return Conversation([Message("user", prompt)])


def checked(conversation: Any) -> Conversation:
    """Return a copy of a conversation that can be completed.

    Raises:
        TypeError: for a value that is not a conversation.
        ValueError: for a conversation without messages.
    """
    if not isinstance(conversation, Conversation):
        raise TypeError(f"expected a Conversation; got {conversation!r:.100}")
    if not conversation.messages:
        raise ValueError("the conversation has no messages; there is nothing to complete")
    return conversation.copy()


async def generate_text_completion(prompt: str, **options: Unpack[Options]) -> TextCompletion:
    """Return a completion of a prompt.

    Args:
        prompt: the user's message.
        **options: see `Options`.

    Raises:
        BadAnswer: when the answer does not fit ``response_format``.
    """
    return await generate_text_completion_for_conversation(conversation_of(prompt), **options)


async def generate_text_completion_for_conversation(
    conversation: Conversation, **options: Unpack[Options]
) -> TextCompletion:
    """Return a completion of a conversation, which is not changed. See `generate_text_completion`."""
    plan, conversation = Plan(options), checked(conversation)
    return await plan.access.run(lambda: plan.complete(conversation))


def generate_text_completion_sync(prompt: str, **options: Unpack[Options]) -> TextCompletion:
    """Do what `generate_text_completion` does, and wait for it; in any thread, notebooks included."""
    return generate_text_completion_for_conversation_sync(conversation_of(prompt), **options)


def generate_text_completion_for_conversation_sync(
    conversation: Conversation, **options: Unpack[Options]
) -> TextCompletion:
    """Do what `generate_text_completion_for_conversation` does, and wait for it."""
    plan, conversation = Plan(options), checked(conversation)
    return plan.access.wait(lambda: plan.complete(conversation))


# Many.


@overload
async def generate_text_completions(
    prompts: Iterable[str],
    *,
    n_parallel: int = ...,
    show_progress: bool = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options],
) -> list[TextCompletion]: ...
@overload
async def generate_text_completions(
    prompts: Iterable[str],
    *,
    n_parallel: int = ...,
    show_progress: bool = ...,
    return_exceptions: bool,
    **options: Unpack[Options],
) -> list[TextCompletion | Exception]: ...
async def generate_text_completions(
    prompts: Iterable[str],
    *,
    n_parallel: int = 5,
    show_progress: bool = True,
    return_exceptions: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Return the completions of prompts, in their order.

    A prompt that is in the list several times gets as many independent samples, and a rerun gets the same
    samples in the same order. The failure of one completion does not affect the others.

    Args:
        prompts: the user's messages.
        n_parallel: the number of concurrent requests.
        show_progress: show a progress bar, in terminals and notebooks.
        return_exceptions: return errors in the places of completions; otherwise they are raised together
            when all have ended.
        **options: see `Options`.

    Raises:
        CompletionsFailed: when some have failed; it contains the others.
    """
    return await _many(_begun(prompts), options, n_parallel, show_progress, return_exceptions)


@overload
async def generate_text_completions_for_conversations(
    conversations: Iterable[Conversation],
    *,
    n_parallel: int = ...,
    show_progress: bool = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options],
) -> list[TextCompletion]: ...
@overload
async def generate_text_completions_for_conversations(
    conversations: Iterable[Conversation],
    *,
    n_parallel: int = ...,
    show_progress: bool = ...,
    return_exceptions: bool,
    **options: Unpack[Options],
) -> list[TextCompletion | Exception]: ...
async def generate_text_completions_for_conversations(
    conversations: Iterable[Conversation],
    *,
    n_parallel: int = 5,
    show_progress: bool = True,
    return_exceptions: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Return the completions of conversations, in their order. See `generate_text_completions`."""
    return await _many(list(conversations), options, n_parallel, show_progress, return_exceptions)


@overload
def generate_text_completions_sync(
    prompts: Iterable[str],
    *,
    n_parallel: int = ...,
    show_progress: bool = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options],
) -> list[TextCompletion]: ...
@overload
def generate_text_completions_sync(
    prompts: Iterable[str],
    *,
    n_parallel: int = ...,
    show_progress: bool = ...,
    return_exceptions: bool,
    **options: Unpack[Options],
) -> list[TextCompletion | Exception]: ...
def generate_text_completions_sync(
    prompts: Iterable[str],
    *,
    n_parallel: int = 5,
    show_progress: bool = True,
    return_exceptions: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Do what `generate_text_completions` does, and wait for it."""
    return _many_waited(_begun(prompts), options, n_parallel, show_progress, return_exceptions)


@overload
def generate_text_completions_for_conversations_sync(
    conversations: Iterable[Conversation],
    *,
    n_parallel: int = ...,
    show_progress: bool = ...,
    return_exceptions: Literal[False] = ...,
    **options: Unpack[Options],
) -> list[TextCompletion]: ...
@overload
def generate_text_completions_for_conversations_sync(
    conversations: Iterable[Conversation],
    *,
    n_parallel: int = ...,
    show_progress: bool = ...,
    return_exceptions: bool,
    **options: Unpack[Options],
) -> list[TextCompletion | Exception]: ...
def generate_text_completions_for_conversations_sync(
    conversations: Iterable[Conversation],
    *,
    n_parallel: int = 5,
    show_progress: bool = True,
    return_exceptions: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Do what `generate_text_completions_for_conversations` does, and wait for it."""
    return _many_waited(list(conversations), options, n_parallel, show_progress, return_exceptions)


def _begun(prompts: Any) -> list[Conversation]:
    if isinstance(prompts, str):
        raise TypeError(
            "prompts is a list of strings; got one string. For one there is generate_text_completion"
        )
    return [conversation_of(prompt) for prompt in prompts]


class _Crowd:
    """Conversations to complete, a few at once."""

    def __init__(self, conversations: list[Any], options: Mapping[str, Any], n_parallel: int) -> None:
        if type(n_parallel) is not int or n_parallel < 1:
            raise ValueError(f"n_parallel= is a whole number, at least 1; got {n_parallel!r:.100}")
        self.plan = Plan(options)
        self.conversations = [checked(conversation) for conversation in conversations]
        self.n_parallel = n_parallel

    def request_ids(self) -> list[str | Inherited | None]:
        """Return a request id for each: equal questions differ by their order in the list."""
        given = self.plan.access.request_id
        if isinstance(given, Inherited):
            given = context.current().request_id
        seen: collections.Counter[tuple[Message, ...]] = collections.Counter()
        ids: list[str | Inherited | None] = []
        for conversation in self.conversations:
            said = tuple(conversation.messages)
            base = "" if isinstance(given, Inherited) or given is None else given
            ids.append(f"{base}#{seen[said] + 1}" if seen[said] else given)
            seen[said] += 1
        return ids

    def work(
        self, tick: progress.Tick
    ) -> Callable[[], Coroutine[Any, Any, list[TextCompletion | Exception]]]:
        """Return a coroutine that completes them all, and its results in input order."""
        ids = self.request_ids()

        async def complete() -> list[TextCompletion | Exception]:
            if self.conversations:
                await self.plan.access.fitted(self.plan.body)  # what is wrong for all of them is told once

            async def one(asked: tuple[Conversation, str | Inherited | None]) -> TextCompletion:
                try:
                    completion = await self.plan.complete(*asked)
                except BaseException:
                    tick(failed=True)
                    raise
                tick(cached=completion.cached)
                return completion

            results = await alcall(
                zip(self.conversations, ids, strict=True),
                one,
                max_concurrent=self.n_parallel,
                return_exceptions=True,
            )
            return [_cancelled(end) if isinstance(end, asyncio.CancelledError) else end for end in results]

        return complete


def _cancelled(error: asyncio.CancelledError) -> CachepipeError:
    """Return the error for a completion that its client has cancelled, not the caller."""
    made = CachepipeError("the call was cancelled by its client; was that closed meanwhile?")
    made.__cause__ = error
    return made


def _outcome(results: list[TextCompletion | Exception], *, return_exceptions: bool) -> Any:
    if not return_exceptions and any(isinstance(result, Exception) for result in results):
        raise CompletionsFailed.of(results)
    return results


async def _many(
    conversations: list[Any], options: Mapping[str, Any], n_parallel: int, show: bool, return_exceptions: bool
) -> Any:
    crowd = _Crowd(conversations, options, n_parallel)
    with progress.shown(len(conversations), "completions", show=show) as tick:
        results = await crowd.plan.access.run(crowd.work(tick))
    return _outcome(results, return_exceptions=return_exceptions)


def _many_waited(
    conversations: list[Any], options: Mapping[str, Any], n_parallel: int, show: bool, return_exceptions: bool
) -> Any:
    crowd = _Crowd(conversations, options, n_parallel)
    with progress.shown(len(conversations), "completions", show=show) as tick:
        results = crowd.plan.access.wait(crowd.work(tick))
    return _outcome(results, return_exceptions=return_exceptions)
