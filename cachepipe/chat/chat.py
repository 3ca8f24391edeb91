"""A chat: a conversation that grows with the user's messages, the model's answers, and calls of tools."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Final, Self, Unpack

import anyio.to_thread
import pydantic

from cachepipe.chat import tools
from cachepipe.chat.access import Access, Environment
from cachepipe.chat.answers import TextCompletion
from cachepipe.chat.completions import Plan, checked
from cachepipe.chat.conversations import Conversation, Message, Sayable
from cachepipe.chat.options import AccessOptions, CompletionOptions
from cachepipe.errors import CachepipeError
from cachepipe.portal import in_portal
from cachepipe.typedefs import describes

MOST_ROUNDS: Final = 8
"""The default number of rounds in which a model may call tools before it answers."""


class ToolLoopError(CachepipeError):
    """A model did not stop calling tools, or called a tool that cannot be called."""


@describes(AccessOptions, CompletionOptions)
class Chat:
    """A conversation with a model.

        chat = Chat(model="llama3.1:8b")
        chat.add("system:I tell the country and you tell me the capital.")
        chat.add("user:Italy")
        print(chat.complete())

    Messages are accepted in any order, because the histories of concurrent requests interleave.

    Args:
        environment: settings that override the environment of the process, such as the arguments of a
            serverless action: ``OPENAI_API_KEY``, ``OPENAI_BASE_URL``, ``OLLAMA_HOST``, ``AUTH``,
            ``CACHEPIPE_DIR``, ``CACHEPIPE_NAMESPACE``, ``CACHEPIPE_MODEL``.
        messages: the first messages.
        max_rounds: the number of rounds in which the model may call tools before it answers.
        **options: see `cachepipe.chat.options.Options`. Tools that are functions are called.

    Attributes:
        conversation: the messages so far.
        completions: the model's answers, with times, tokens and flags, including those of tool rounds.
    """

    def __init__(
        self,
        environment: Mapping[str, Any] | None = None,
        /,
        *,
        messages: Any = (),
        max_rounds: int = MOST_ROUNDS,
        **options: Unpack[CompletionOptions],
    ) -> None:
        if type(max_rounds) is not int or max_rounds < 0:
            raise ValueError(f"max_rounds= is a whole number, at least 0; got {max_rounds!r:.100}")
        self._plan = Plan.of(options, Environment(environment, "Chat"))
        self.conversation = Conversation(messages)
        self.completions: list[TextCompletion] = []
        self.max_rounds = max_rounds

    def __repr__(self) -> str:
        return f"<Chat {len(self.conversation)} messages, model={self._plan.model!r}>"

    @property
    def messages(self) -> list[Message]:
        """The messages, in order; the list itself."""
        return self.conversation.messages

    @property
    def model(self) -> str:
        """The model of the chat."""
        return self._plan.model

    def add(self, message: Sayable) -> Self:
        """Add a message: a `Message`, a mapping, or a text such as ``"user:Hello"``.

        Raises:
            ValueError: for a text that does not begin with a role and a colon.
        """
        self.messages.append(Message.of(message))
        return self

    def complete(self) -> Any:
        """Call the model, and the tools that it asks for; add the answer to the messages and return it.

        Returns the text, or with ``response_format=`` the instance of that class. If this fails, the
        messages do not change. The caller answers calls of tools that are mappings, and all calls beside
        them: they are in the last message, and a tool message answers each.

        Raises:
            ToolLoopError: when the model calls tools for too many rounds.
        """
        with contextlib.closing(self._spoken(streams=False)) as spoken:
            for _ in spoken:
                pass
            return spoken.result

    async def acomplete(self) -> Any:
        """Do what `complete` does, without blocking the loop."""
        async with contextlib.aclosing(self._spoken(streams=False)) as spoken:
            async for _ in spoken:
                pass
            return spoken.result

    def stream(self) -> Spoken:
        """Return the model's answer as it comes: iterate over its text with ``for`` or ``async for``.

        At the end, the answer is added to the messages. If the reader stops early, the messages do not
        change, and the rest is read in the background and stored.
        """
        return self._spoken(streams=True)

    def _spoken(self, *, streams: bool) -> Spoken:
        turns = self._turns(checked(self.conversation), contextvars.copy_context(), streams=streams)
        return Spoken(turns, self._plan.access)

    async def _turns(
        self, said: Conversation, within: contextvars.Context, *, streams: bool
    ) -> AsyncGenerator[str | _Due | TextCompletion, None]:
        """Iterate over the text of an answer, the tool calls to make before it continues, and the answer.

        Args:
            said: the messages to answer.
            within: the context of the caller, which may differ from the reader's.
            streams: whether the text comes in pieces.
        """
        begun = said
        added: list[Message] = []
        done: list[TextCompletion] = []
        for left in range(self.max_rounds, -1, -1):
            if streams:
                asked = self._plan.ask(said, {"stream": True})
                reply = await asyncio.create_task(asked, context=within)
                async with contextlib.aclosing(reply.parts()) as parts:
                    async for part in parts:
                        if isinstance(part, str):
                            yield part
                        else:
                            completion = part
            else:
                completion = await self._plan.complete(said)
            done.append(completion)
            added.append(completion.to_message())
            calls = completion.tool_calls
            if not calls or not self._plan.functions or any(map(self._plan.leaves, calls)):
                break
            if not left:
                raise ToolLoopError(
                    f"the model still called tools after {self.max_rounds} rounds; raise max_rounds=, "
                    "or tell it when to stop"
                )
            for call in calls:
                due = _Due(call, self._plan.functions)
                yield due
                added.append(Message("tool", due.result, tool_call_id=str(call.get("id"))))
            said = Conversation([*begun.messages, *added])
        self.messages.extend(added)
        self.completions.extend(done)
        yield completion


class Spoken:
    """The text of an answer as it comes: iterate with ``for`` or with ``async for``, once.

    Attributes:
        completion: the answer, with its times and flags, once it is complete; else None.
    """

    def __init__(self, turns: AsyncGenerator[str | _Due | TextCompletion, None], access: Access) -> None:
        self._turns = turns
        self._access = access
        self.completion: TextCompletion | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'under way' if self.completion is None else 'complete'}>"

    @property
    def result(self) -> Any:
        """The text, or the instance of ``response_format``; None until the answer is complete.

        If the model refuses, this is the refusal message.
        """
        whole = self.completion
        if whole is None:
            return None
        return whole.to_message().text if whole.parsed is None else whole.parsed

    async def _next(self) -> str | _Due | None:
        """Return the next piece of text, or the next tool call to make; None at the end."""
        item = await anext(self._turns, None)
        if isinstance(item, TextCompletion):
            self.completion = item
            return await self._next()
        return item

    async def _end(self) -> None:
        with contextlib.suppress(RuntimeError):  # a generator that is being cancelled ends by itself
            await self._turns.aclose()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while (item := self._access.wait(self._next)) is not None:
            if isinstance(item, str):
                return item
            try:
                item.make()
            except BaseException:
                self.close()  # a call that was not made is not reported to the model
                raise
        raise StopIteration

    def close(self) -> None:
        """Stop; the rest of the answer is read in the background and stored."""
        self._access.wait(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while (item := await self._access.run(self._next)) is not None:
            if isinstance(item, str):
                return item
            try:
                await item.amake()
            except BaseException:
                await self.aclose()
                raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Do what `close` does, on an event loop."""
        await self._access.run(self._end)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Due:
    """A tool call to make before the conversation continues, in the caller's thread or on its loop."""

    def __init__(self, call: Mapping[str, Any], functions: Mapping[str, tools.Tool]) -> None:
        function = call.get("function") or {}
        self.name = str(function.get("name"))
        self.arguments = str(function.get("arguments") or "")
        self.tool = functions.get(self.name)
        self.known = ", ".join(functions)
        self.result = f"There is no tool {self.name!r}; there are: {self.known}."

    def _given(self) -> Callable[[], Any] | None:
        """Return the function to call; None if the call is invalid and is reported back to the model."""
        if self.tool is None:
            return None
        try:
            return self.tool.given(self.arguments)
        except pydantic.ValidationError as error:
            self.result = f"The arguments do not fit: {tools.told(error)}"
            return None

    def make(self) -> None:
        """Call the tool in this thread; its exceptions propagate."""
        if (call := self._given()) is None:
            return
        try:
            result = call()
            self.result = tools.as_text(in_portal(result) if inspect.iscoroutine(result) else result)
        except (StopIteration, StopAsyncIteration) as error:
            raise self._failed(error) from error

    async def amake(self) -> None:
        """Call the tool without blocking the loop; its exceptions propagate."""
        if (call := self._given()) is None:
            return
        try:
            result = call() if inspect.iscoroutinefunction(call) else await anyio.to_thread.run_sync(call)
            self.result = tools.as_text(await result if inspect.iscoroutine(result) else result)
        except (StopIteration, StopAsyncIteration) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RuntimeError:
        """Return an error for an exception that would silently end the iteration over the answer."""
        return RuntimeError(f"the tool {self.name} raised {type(error).__name__}")
