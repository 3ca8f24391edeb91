"""Which of the offered tools an answer calls, in all dialects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cachepipe.testing.server.calls import bad

if TYPE_CHECKING:
    from cachepipe.testing.server.settings import Settings

__all__ = ["tool_of"]


def tool_of(body: Mapping[str, Any], settings: Settings, schema_field: str) -> dict[str, Any]:
    """Return the `tool` and `schema` of the tool that the answer calls, or nothing."""
    wanted, kind = _choice(body.get("tool_choice") or "auto")
    forced = wanted is not None or kind in ("required", "any")
    if not forced and not (kind == "auto" and settings.uses_tools):
        return {}
    tools = _offered(body.get("tools") or (), wanted)
    if forced and not tools:
        raise bad("tool_choice", "one of the tools given in tools", body.get("tool_choice"))
    tool = _next(tools, body.get("messages", body.get("input")), forced=forced)
    if tool is None:
        return {}
    return {"tool": str(tool.get("name")), "schema": tool.get(schema_field) or {"type": "object"}}


def _next(tools: list[Mapping[str, Any]], messages: object, *, forced: bool) -> Mapping[str, Any] | None:
    """Return the first tool that was not called yet, or the last one if a call is required."""
    called = set(_called(messages))
    for tool in tools:
        if tool.get("name") not in called:
            return tool
    return tools[-1] if forced else None


def _object(value: object) -> Mapping[str, Any]:
    """Return a value that is an object, else an empty object."""
    return value if isinstance(value, dict) else {}


def _choice(choice: object) -> tuple[object, object]:
    """Return the name of the required tool, if any, and the kind of choice."""
    if not isinstance(choice, dict):
        return None, choice
    return choice.get("name") or _object(choice.get("function")).get("name"), choice.get("type")


def _offered(tools: Any, wanted: object) -> list[Mapping[str, Any]]:
    """Return the tools that are offered; with a name, only those of that name."""
    offered = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    return [tool for tool in offered if wanted in {None, tool.get("name")}]


def _called(messages: object) -> Iterator[object]:
    """Yield the names of the tools that a conversation has called."""
    for message in map(_object, messages if isinstance(messages, list) else ()):
        blocks = message.get("content")
        for item in [message, *map(_object, blocks if isinstance(blocks, list) else ())]:
            if item.get("type") in ("function_call", "tool_use"):
                yield item.get("name")
        for call in message.get("tool_calls") or ():
            yield _object(_object(call).get("function")).get("name")
