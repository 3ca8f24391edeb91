"""Completions of prompts and conversations: one or many at once."""

from __future__ import annotations

import asyncio
import collections
import contextlib
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
from typing import Any, Final, Self, Unpack, overload

import anyio.to_thread
import pydantic

from cachepipe import context, progress
from cachepipe.chat import tools
from cachepipe.chat.access import Access, Environment, model_of
from cachepipe.chat.answers import AnsweredCall, TextCompletion, choices_of, parsed_answer
from cachepipe.chat.conversations import Conversation, Message
from cachepipe.chat.options import NAMES, AccessOptions, CompletionOptions, ManyOptions, StrictOptions
from cachepipe.contract.draws import COPY
from cachepipe.errors import CachepipeError
from cachepipe.parallel import alcall
from cachepipe.providers.info import Info, info
from cachepipe.typedefs import describes

_MOST_ALTERNATIVES: Final = 20
_NOT_TAKEN: Final = {
    "n": "ask several times for several samples",
    "stream": "Chat streams",
    "messages": "they are those of the conversation",
    "prompt": "it is a message of the conversation",
}
"""The fields of a body that are not options, and what to do instead."""


class CompletionsFailed(ExceptionGroup[Exception], CachepipeError):  # noqa: N818 - names what happened
    """Some of several completions failed; the others are in ``results``.

    Attributes:
        results: in input order, completions, and errors in the place of those that failed.
    """

    results: list[TextCompletion | Exception] = []  # noqa: RUF012 - each error gets its own

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
        made.results = self.results
        return made


# One question.


class Plan:
    """The common part of all completions with the same options.

    Args:
        access: the endpoint and the cache.
        options: see `CompletionOptions`, without those for the client and the cache.

    Raises:
        TypeError, ValueError: for options that are not valid, before anything is asked.
    """

    def __init__(self, access: Access, options: Mapping[str, Any]) -> None:
        self.access = access
        body = dict(options)
        extra = body.get("extra_body") or {}
        if not isinstance(extra, Mapping):
            raise TypeError(f"extra_body= is a mapping; got {extra!r:.100}")
        if wrong := next((name for name in _NOT_TAKEN if name in body or name in extra), None):
            raise TypeError(f"{wrong}= is not taken here: {_NOT_TAKEN[wrong]}")
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
        self.body = {**body, **_log_probs(wanted, top)}

    @classmethod
    def of(cls, options: Mapping[str, Any], environment: Environment | None = None) -> Self:
        """Return a plan with an access of its own.

        Args:
            options: see `CompletionOptions`.
            environment: the settings for missing options.
        """
        body = {name: value for name, value in options.items() if name not in NAMES}
        return cls(Access(options, environment), body)

    def leaves(self, call: Mapping[str, Any]) -> bool:
        """Return True if a call is of a tool that was given as a mapping, so that the caller makes it."""
        return tools.name_of(call) in self._others

    async def ask(
        self, conversation: Conversation, fields: Mapping[str, Any] | None = None, **settings: Any
    ) -> Reply:
        """Return the reply to a conversation.

        Args:
            conversation: the conversation.
            fields: further fields of the body.
            settings: settings as for `cachepipe.using`, which override those in the options.
        """
        begun = time.time()
        body = {"model": self.model, "messages": conversation.to_messages(), **self.body, **(fields or {})}
        return Reply(self, conversation, await self.access.ask(body, **settings), begun)

    async def complete(self, conversation: Conversation, **settings: Any) -> TextCompletion:
        """Return the completion of a conversation; see `ask`."""
        return (await self.ask(conversation, **settings)).completions()[0]


class Reply:
    """The reply of a provider to a conversation: complete, or a stream.

    Args:
        plan: what was asked.
        conversation: the conversation.
        answer: the client's object.
        begun: the time of the request.
    """

    def __init__(self, plan: Plan, conversation: Conversation, answer: Any, begun: float) -> None:
        self._plan = plan
        self.conversation = conversation
        self._answer = answer
        self._begun = begun

    @property
    def info(self) -> Info | None:
        """The client's facts about the reply."""
        return info(self._answer)

    def completions(self) -> list[TextCompletion]:
        """Return the completions in a complete reply: one, or ``n`` of them."""
        choices, noted = choices_of(self._answer), self.info
        return [
            self._completion(AnsweredCall.of(choice, self._answer.usage), noted, place)
            for place, choice in enumerate(choices)
        ]

    async def parts(self) -> AsyncGenerator[str | TextCompletion, None]:
        """Iterate over the text of a stream as it comes, and then the completion."""
        made = AnsweredCall()
        try:
            async for chunk in _chunks(self._answer):
                if text := made.add(chunk):
                    yield text
        finally:
            await self.close()  # here, where it shows whether the reader is being cancelled
        made.check_ended()
        yield self._completion(made, self.info)

    async def close(self) -> None:
        """Stop reading a stream."""
        closing = self._answer.close()
        if closing is not None:
            await closing

    def _completion(self, made: AnsweredCall, noted: Info | None, place: int = 0) -> TextCompletion:
        """Return an answer as a completion.

        Args:
            made: the answer.
            noted: the client's facts about the reply.
            place: the place of the answer in the reply.
        """
        start, end = self._begun, time.time()
        text, refusal, calls = made.parts()
        usage, kind = made.usage, self._plan.kind
        facts: dict[str, Any] = {"retrieval_start_time": start, "retrieval_end_time": end}
        if noted is not None and noted.complete:
            facts |= _drawn(noted, place)
            usage = usage if noted.as_asked["unknown"] else noted.as_asked
            start, end = self._plan.access.generated(noted.key, facts["index"]) or (start, end)
        if kind is not None and not refusal and not calls:
            facts["parsed"] = parsed_answer(
                kind, text, made.finish_reason, facts.get("key"), facts.get("index")
            )
        return TextCompletion(
            conversation=self.conversation.copy(),
            model=self._plan.model,
            message=text,
            start_time=start,
            end_time=end,
            token_log_probs=made.log_probs,
            full_token_log_probs=made.alternatives if self._plan.body.get("top_logprobs") else None,
            usage=_token_counts(usage),
            finish_reason=made.finish_reason,
            refusal=refusal,
            tool_calls=calls,
            **facts,
        )


def _drawn(noted: Info, place: int) -> dict[str, Any]:
    """Return which draw and sample an answer is."""
    names = "key", "namespace", "request_id", "replicate"
    index = None if noted.indices is None else noted.indices[place]
    cached = bool(noted.cached) and all(noted.cached)
    return {"cached": cached, "cost": noted, "index": index, **{name: getattr(noted, name) for name in names}}


def _token_counts(usage: Mapping[str, Any]) -> dict[str, int]:
    counts = usage.items()
    return {name: count for name, count in counts if name.endswith("_tokens") and isinstance(count, int)}


def _log_probs(wanted: Any, top: Any) -> dict[str, Any]:
    if top is not None and (type(top) is not int or not 0 <= top <= _MOST_ALTERNATIVES):
        raise ValueError(f"top_log_probs= is a whole number from 0 to {_MOST_ALTERNATIVES}; got {top!r:.100}")
    if not (wanted or top):
        return {}
    if wanted is False:
        raise ValueError("top_log_probs= needs log_probs=True; got log_probs=False")
    return {"logprobs": True} if top is None else {"logprobs": True, "top_logprobs": top}


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


@describes(AccessOptions, CompletionOptions)
async def generate_text_completion(prompt: str, **options: Unpack[CompletionOptions]) -> TextCompletion:
    """Return a completion of a prompt.

    Args:
        prompt: the user's message.
        **options: see `CompletionOptions`.

    Raises:
        BadAnswer: when the answer does not fit ``response_format``.
    """
    return await generate_text_completion_for_conversation(conversation_of(prompt), **options)


@describes(AccessOptions, CompletionOptions)
async def generate_text_completion_for_conversation(
    conversation: Conversation, **options: Unpack[CompletionOptions]
) -> TextCompletion:
    """Return a completion of a conversation, which is not changed. See `generate_text_completion`."""
    plan, conversation = Plan.of(options), checked(conversation)
    return await plan.access.run(lambda: plan.complete(conversation))


@describes(AccessOptions, CompletionOptions)
def generate_text_completion_sync(prompt: str, **options: Unpack[CompletionOptions]) -> TextCompletion:
    """Do what `generate_text_completion` does, and wait for it; in any thread, notebooks included."""
    return generate_text_completion_for_conversation_sync(conversation_of(prompt), **options)


@describes(AccessOptions, CompletionOptions)
def generate_text_completion_for_conversation_sync(
    conversation: Conversation, **options: Unpack[CompletionOptions]
) -> TextCompletion:
    """Do what `generate_text_completion_for_conversation` does, and wait for it."""
    plan, conversation = Plan.of(options), checked(conversation)
    return plan.access.wait(lambda: plan.complete(conversation))


# Many.

Completions = list[TextCompletion]
Results = list[TextCompletion | Exception]


@overload
async def generate_text_completions(
    prompts: Iterable[str], **options: Unpack[StrictOptions]
) -> Completions: ...
@overload
async def generate_text_completions(prompts: Iterable[str], **options: Unpack[ManyOptions]) -> Results: ...
@describes(AccessOptions, CompletionOptions, ManyOptions)
async def generate_text_completions(prompts: Iterable[str], **options: Unpack[ManyOptions]) -> Any:
    """Return the completions of prompts, in their order.

    A prompt that is in the list several times gets as many independent samples, and a rerun gets the same
    samples in the same order. The failure of one completion does not affect the others.

    Args:
        prompts: the user's messages.
        **options: see `ManyOptions`.

    Raises:
        CompletionsFailed: when some have failed; it contains the others.
    """
    return await generate_text_completions_for_conversations(_begun(prompts), **options)


@overload
async def generate_text_completions_for_conversations(
    conversations: Iterable[Conversation], **options: Unpack[StrictOptions]
) -> Completions: ...
@overload
async def generate_text_completions_for_conversations(
    conversations: Iterable[Conversation], **options: Unpack[ManyOptions]
) -> Results: ...
@describes(AccessOptions, CompletionOptions, ManyOptions)
async def generate_text_completions_for_conversations(
    conversations: Iterable[Conversation], **options: Any
) -> Any:
    """Return the completions of conversations, in their order. See `generate_text_completions`."""
    crowd = _Crowd(conversations, options)
    with crowd.shown() as work:
        return crowd.outcome(await crowd.plan.access.run(work))


@overload
def generate_text_completions_sync(
    prompts: Iterable[str], **options: Unpack[StrictOptions]
) -> Completions: ...
@overload
def generate_text_completions_sync(prompts: Iterable[str], **options: Unpack[ManyOptions]) -> Results: ...
@describes(AccessOptions, CompletionOptions, ManyOptions)
def generate_text_completions_sync(prompts: Iterable[str], **options: Unpack[ManyOptions]) -> Any:
    """Do what `generate_text_completions` does, and wait for it."""
    return generate_text_completions_for_conversations_sync(_begun(prompts), **options)


@overload
def generate_text_completions_for_conversations_sync(
    conversations: Iterable[Conversation], **options: Unpack[StrictOptions]
) -> Completions: ...
@overload
def generate_text_completions_for_conversations_sync(
    conversations: Iterable[Conversation], **options: Unpack[ManyOptions]
) -> Results: ...
@describes(AccessOptions, CompletionOptions, ManyOptions)
def generate_text_completions_for_conversations_sync(
    conversations: Iterable[Conversation], **options: Any
) -> Any:
    """Do what `generate_text_completions_for_conversations` does, and wait for it."""
    crowd = _Crowd(conversations, options)
    with crowd.shown() as work:
        return crowd.outcome(crowd.plan.access.wait(work))


def _begun(prompts: Any) -> list[Conversation]:
    if isinstance(prompts, str):
        raise TypeError(
            "prompts is a list of strings; got one string. For one there is generate_text_completion"
        )
    return [conversation_of(prompt) for prompt in prompts]


class _Crowd:
    """Conversations to complete concurrently."""

    def __init__(self, conversations: Iterable[Any], options: Mapping[str, Any]) -> None:
        own = {"n_parallel": 5, "show_progress": True, "return_exceptions": False}
        self.n_parallel, self._shows, self._returns = (options.get(name, own[name]) for name in own)
        if type(self.n_parallel) is not int or self.n_parallel < 1:
            raise ValueError(f"n_parallel= is a whole number, at least 1; got {self.n_parallel!r:.100}")
        self.plan = Plan.of({name: value for name, value in options.items() if name not in own})
        self._asked = self._told_apart([checked(conversation) for conversation in conversations])

    def _told_apart(self, conversations: list[Conversation]) -> list[tuple[Conversation, dict[str, str]]]:
        """Return each conversation with its settings: the order of equal ones is in their request ids."""
        with self.plan.access.using():
            given = context.current().request_id
        base = given if isinstance(given, str) else ""
        seen: collections.Counter[tuple[Message, ...]] = collections.Counter()
        asked = []
        for conversation in conversations:
            said = tuple(conversation.messages)
            asked.append(
                (conversation, {"request_id": f"{base}{COPY}{seen[said] + 1}"} if seen[said] else {})
            )
            seen[said] += 1
        return asked

    @contextlib.contextmanager
    def shown(self) -> Iterator[Callable[[], Coroutine[Any, Any, Results]]]:
        """Return a function that completes them all, and its results in input order, with a progress bar."""
        with progress.shown(len(self._asked), "completions", show=self._shows) as tick:
            yield lambda: self._complete(tick)

    async def _complete(self, tick: progress.Tick) -> Results:
        if self._asked:
            await self.plan.access.check(self.plan.body)  # an error that all would raise is raised once

        async def one(asked: tuple[Conversation, dict[str, str]]) -> TextCompletion:
            try:
                completion = await self.plan.complete(asked[0], **asked[1])
            except BaseException:
                tick(failed=True)
                raise
            tick(cached=completion.cached)
            return completion

        results = await alcall(self._asked, one, max_concurrent=self.n_parallel, return_exceptions=True)
        return [_cancelled(end) if isinstance(end, asyncio.CancelledError) else end for end in results]

    def outcome(self, results: Results) -> Results:
        """Return the results, or raise the error for those that failed."""
        if not self._returns and any(isinstance(result, Exception) for result in results):
            raise CompletionsFailed.of(results)
        return results


def _cancelled(error: asyncio.CancelledError) -> CachepipeError:
    """Return the error for a completion that its client has cancelled, not the caller."""
    made = CachepipeError("the call was cancelled by its client; was that closed meanwhile?")
    made.__cause__ = error
    return made
