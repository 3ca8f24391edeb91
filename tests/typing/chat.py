"""What type-checkers make of conversations and completions; mypy reads it, nothing runs it."""

from __future__ import annotations

from typing import Any, assert_type

from openai.types.chat import ChatCompletionMessage

from cachepipe import (
    Chat,
    Conversation,
    History,
    Message,
    Service,
    Session,
    TextCompletion,
    generate_text_completion_sync,
    generate_text_completions,
    generate_text_completions_for_conversations_sync,
    generate_text_completions_sync,
)


def complete() -> None:
    completion = generate_text_completion_sync("Hi!", temperature=1, extra_query={"a": 1}, metadata={})
    assert_type(completion, TextCompletion)
    assert_type(completion.cost, float | None)


async def complete_many() -> None:
    assert_type(await generate_text_completions(["Hi!"], n_parallel=2), list[TextCompletion])
    quiet = await generate_text_completions(["Hi!"], return_exceptions=False, replicate=2, mode="replay")
    assert_type(quiet, list[TextCompletion])
    some = await generate_text_completions(["Hi!"], return_exceptions=True)
    assert_type(some, list[TextCompletion | Exception])


def complete_many_and_wait() -> None:
    conversations = [Conversation([Message("user", "Hi!")])]
    found = generate_text_completions_for_conversations_sync(conversations, show_progress=False)
    assert_type(found, list[TextCompletion])
    some = generate_text_completions_sync(["Hi!"], return_exceptions=True)
    assert_type(some, list[TextCompletion | Exception])


def refuse_what_is_wrong() -> None:
    """Each line has the error that it ignores: mypy reports an ignored error that is not there."""
    generate_text_completion_sync("Hi!", temprature=1)  # type: ignore[call-arg]
    generate_text_completions_sync(["Hi!"], mode="reed")  # type: ignore[call-overload]
    Chat(replicate=1.5)  # type: ignore[arg-type]
    Session(mode="reed")  # type: ignore[arg-type]
    Service("https://host/v1", max_request=5)  # type: ignore[call-arg]


def limit() -> None:
    service = Service(
        "https://host/v1", max_requests=None, per_model={"m": {"max_tokens": 5}}, shared="folder"
    )
    Session(service=service, namespace="a", replicate="2", mode="refresh", repeat="same")


def converse() -> None:
    said = ChatCompletionMessage(role="assistant", content="Rome")
    chat = (
        Chat(model="m", extra_body={"a": 1}).add("user:Italy").add(said).add({"role": "user", "content": "a"})
    )
    History().save(*chat.messages, said, "user:France")
    assert_type(list(chat.stream()), list[str])


async def instruct() -> None:
    answer = await Session("You add.", llmconfig={"model": "m"}).initiate({"add": "x, y"}, context={"x": 1})
    assert_type(answer, Any)
