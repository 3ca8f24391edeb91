"""Plain Python functions as tools: their schemas for the model, and their calls with its arguments."""

from __future__ import annotations

import collections
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pydantic
from pydantic_core import to_json


class Tool:
    """A function that a model may call.

    pydantic makes its schema from its annotations; ``Annotated[str, Field(description="…")]`` describes a
    parameter, and the docstring describes the function.

    Args:
        function: the function, synchronous or not; parameters can be given by name.

    Raises:
        TypeError: for a value that is not a function, or a function with parameters without a JSON schema.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        name: Any = getattr(function, "__name__", None)
        named = isinstance(name, str) and name != "<lambda>"
        if not named or not callable(function) or isinstance(function, type):
            raise TypeError(
                "a tool is a function with a name, or a mapping as the provider takes it; "
                f"got {function!r:.100}"
            )
        self.name = name
        self.function = function
        try:
            # A stand-in with the same parameters, so that errors of calls are not taken for wrong arguments.
            given: Any = functools.wraps(function)(lambda *args, **named: (args, named))
            given.__annotations__ = typing.get_type_hints(function, include_extras=True)
            self._adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(given)
            self.parameters = self._adapter.json_schema()
        except (pydantic.errors.PydanticUserError, NameError) as error:
            raise TypeError(f"the parameters of the tool {name} have no JSON schema: {error}") from error
        if self.parameters.get("type") != "object":
            raise TypeError(
                f"the tool {name} has parameters that cannot be given by name; drop the '/' or '*args'"
            )

    def __repr__(self) -> str:
        return f"<Tool {self.name}>"

    @functools.cached_property
    def description(self) -> str:
        """The function's docstring."""
        return inspect.getdoc(self.function) or ""

    def to_dict(self) -> dict[str, Any]:
        """Return the tool as a provider takes it."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.parameters}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function}

    def given(self, arguments: str) -> Callable[[], Any]:
        """Return the function bound to its arguments, from the model's JSON.

        Raises:
            pydantic.ValidationError: when the arguments do not fit.
        """
        args, named = self._adapter.validate_json(arguments or "{}")
        return functools.partial(self.function, *args, **named)


def as_tools(
    tools: Iterable[Callable[..., Any] | Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, Tool]]:
    """Return tools as a provider takes them, and the functions among them by name.

    Args:
        tools: functions, and mappings as the provider takes them.

    Raises:
        TypeError: for anything else.
        ValueError: for two tools of one name.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise TypeError(f"tools= is a list of functions; got {tools!r:.100}")
    told, functions = [], {}
    for tool in tools:
        if isinstance(tool, Mapping):
            told.append(dict(tool))
            continue
        made = Tool(tool)
        functions[made.name] = made
        told.append(made.to_dict())
    names = collections.Counter(map(name_of, told))
    twice = [name for name, count in names.items() if name is not None and count > 1]
    if twice:
        raise ValueError(f"two tools have the name {twice[0]!r}; a model could not tell them apart")
    return told, functions


def name_of(tool: Mapping[str, Any]) -> str | None:
    """Return the name of a tool, or of a tool call, from the provider's mapping."""
    detail = tool.get(str(tool.get("type", "function")))
    name: str | None = (detail if isinstance(detail, Mapping) else tool).get("name")
    return name


def told(error: pydantic.ValidationError) -> str:
    """Return what is wrong with arguments, without pydantic's URLs, which depend on its version."""
    wrong = error.errors(include_url=False, include_context=False, include_input=False)
    pairs = ((".".join(map(str, one["loc"])), one["msg"]) for one in wrong)
    return "; ".join(": ".join(filter(None, pair)) for pair in pairs)


def as_text(result: Any) -> str:
    """Return the result of a tool in the form for the model: a string unchanged, any other value as JSON.

    Equal results give equal texts in every process, so that questions with them are found in the cache.

    Raises:
        ValueError: for an object with only its address as text.
    """
    return result if isinstance(result, str) else to_json(_ordered(result), fallback=_as_told).decode()


def _ordered(value: Any) -> Any:
    """Return a value with its sets in a stable order."""
    if isinstance(value, Mapping):
        return {name: _ordered(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_ordered(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_ordered, value), key=as_text)
    return value


def _as_told(value: Any) -> str:
    text = str(value)
    if f"{id(value):x}" in text.lower():
        raise TypeError(  # pydantic makes a ValueError of it
            f"a tool returned {text:.100}, which a model cannot use; return text, numbers, lists, "
            "mappings, dataclasses or pydantic models"
        )
    return text


def response_format(wanted: Any) -> tuple[Any, type[pydantic.BaseModel] | None]:
    """Return a response format as a provider takes it, and the class for the answers, if any.

    A pydantic class gives the same body as the SDK's own ``parse``, and so the same key.

    Raises:
        TypeError: for a value that is neither a pydantic class nor a mapping.
    """
    if isinstance(wanted, Mapping):
        return dict(wanted), None
    if not (isinstance(wanted, type) and issubclass(wanted, pydantic.BaseModel)):
        raise TypeError(f"response_format= is a pydantic model's class, or a mapping; got {wanted!r:.100}")
    import openai  # noqa: PLC0415 - loads the SDK

    schema = openai.pydantic_function_tool(wanted)["function"]["parameters"]
    return {
        "type": "json_schema",
        "json_schema": {"schema": schema, "name": wanted.__name__, "strict": True},
    }, wanted
