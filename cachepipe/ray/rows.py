"""Rows as requests: which columns say what is asked and who draws, and how samples are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from functools import lru_cache
from typing import Any, Final

from cachepipe import jsontext
from cachepipe.typedefs import UNASKED, Request, check_replicate

OUTPUT: Final = ("completions", "cached", "duplicated", "error")
"""The columns that a stage adds."""

_PROMPTS: Final = ("prompt", "messages", "input")
"""The fields of a body of which exactly one holds the prompt."""

_STREAMED: Final = ("stream", "stream_options")
"""The fields of a body that are left out, because answers come whole."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a row asks, and who draws.

    Attributes:
        id: the column whose value identifies the row. Rows with different ids get independent samples, and
            the same id gets the same samples again. It is needed unless the settings have ``repeat="same"``.
        prompt: the column with the prompt: a text, or a list of messages.
        body: the column with the whole body of a request, as a struct or a JSON text, instead of a prompt.
            Fields of a struct that are null are left out, because Arrow adds them to every row that lacks
            them. A body's own ``n`` overrides ``n``.
        fields: further fields of every request, such as ``{"temperature": 0.5}``.
        n: samples per row.
        namespace: the experiment; samples are independent within it.
        replicate: which of several independent repetitions of the experiment the pass is.
        prefix: what the names of the added columns begin with.
    """

    id: str | None = None
    prompt: str = "prompt"
    body: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    namespace: str | None = None
    replicate: str | int | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        """Refuse what no request can have."""
        check_replicate(self.replicate)
        if wrong := sorted({*self.fields}.intersection({*UNASKED, *_PROMPTS})):
            raise ValueError(f"fields are what all rows ask beside their prompts; got {wrong[0]!r}")
        Request("", n=self.n, namespace=self.namespace)

    def columns(self) -> list[str]:
        """Return the columns that are read."""
        read = [self.prompt if self.body is None else self.body]
        return read if self.id is None else [self.id, *read]

    def request(self, row: Mapping[str, Any]) -> Request:
        """Return the request of a row.

        Args:
            row: the values of ``columns``.

        Raises:
            ValueError: when the row is no request.
            TypeError: when a value has another type.
        """
        request_id = None if self.id is None else row[self.id]
        if self.id is not None and request_id is None:
            raise ValueError(f"a row's id must not be null; it is in the column {self.id!r}")
        asked = row[self.prompt if self.body is None else self.body]
        if asked is None:
            raise ValueError("a row has a prompt or a body; got null")
        values = dict(self.fields)
        if self.body is None:
            prompt = _without_nulls(asked)
        else:
            values |= _body(asked)
            prompt = _prompt_of(values)
        draw = {"n": values.pop("n", self.n), "namespace": self.namespace, "replicate": self.replicate}
        if wrong := sorted(UNASKED.intersection(values)):
            raise ValueError(f"a body holds what is asked; {wrong[0]!r} is an option of Rows")
        return _kind(tuple(sorted(values)))(
            prompt, request_id=None if request_id is None else str(request_id), **draw, **values
        )


def _body(written: Any) -> dict[str, Any]:
    """Return a body as a mapping."""
    body = jsontext.loads(written.encode()) if isinstance(written, str) else _without_nulls(written)
    if not isinstance(body, dict):
        raise TypeError(f"a body is a JSON object; got {written!r:.80}")
    return {name: value for name, value in body.items() if name not in _STREAMED}


def _prompt_of(values: dict[str, Any]) -> Any:
    """Take the prompt out of the fields of a body."""
    found = [name for name in _PROMPTS if name in values]
    if len(found) != 1:
        raise ValueError(f"a body has one of {', '.join(_PROMPTS)}; got {', '.join(found) or 'none'}")
    return values.pop(found[0])


def _without_nulls(value: Any) -> Any:
    """Return a value of Arrow without the fields that only other rows have."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@lru_cache
def _kind(names: tuple[str, ...]) -> type[Request]:
    """Return a class of requests with these fields."""
    if not names:
        return Request
    fields: list[Any] = [(name, Any, field(default=None, kw_only=True)) for name in names]
    return make_dataclass("RowRequest", fields, bases=(Request,), frozen=True)


def written(sample: Any) -> str | list[float]:
    """Return a sample as a cell of a table: a text or a vector itself, anything else as its JSON text."""
    if isinstance(sample, str):
        try:
            sample.encode()
        except UnicodeEncodeError:  # half of a character, which a table cannot hold
            return jsontext.dumps(sample).decode()
        return sample
    if isinstance(sample, list) and sample and all(type(number) in (int, float) for number in sample):
        return list(map(float, sample))
    return jsontext.dumps(sample).decode()
