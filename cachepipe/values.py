"""Converts samples to bytes and back to equal values.

The bytes are JSON, with marked objects for values without a JSON form: tuples, bytes, numbers beyond JSON's
range, mappings with keys that are not strings, answers that only a lenient parser reads, and instances of
classes that the caller has named. Bytes never cause a class to be looked up, and nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Any, Final

import orjson

from cachepipe import jsontext
from cachepipe.contract.keys import trimmed
from cachepipe.errors import NotStorable, StoreError

_MARK = "\0"
_MARKED = b'"\\u0000'  # the beginning of a marked name in JSON
_UNCHANGED: Final = frozenset({str, bool, NoneType})
_WRITERS: Final[Mapping[type, Callable[[Any], Any]]] = {
    int: lambda value: value if -(1 << 63) <= value < 1 << 64 else {_MARK + "int": hex(value)},
    float: lambda value: value if math.isfinite(value) else {_MARK + "float": repr(value)},
    bytes: lambda value: {_MARK + "bytes": base64.b64encode(value).decode()},
    jsontext.Verbatim: lambda value: {_MARK + "json": value.text},
}
_READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "bytes": lambda item: base64.b64decode(item, validate=True),
    "str": lambda item: base64.b64decode(item, validate=True).decode("utf-8", "surrogatepass"),
    "json": lambda item: jsontext.read(item.encode()),
    "int": lambda item: int(item, 0),
    "float": float,
}
_PLAIN: Final[Mapping[type, Any]] = {int: int, float: float, str: str.__str__, list: list, dict: dict}
"""How a value of a subclass becomes one of its plain class."""


class Codec:
    """Converts samples to bytes and back.

    Args:
        classes: dataclasses and pydantic models whose instances may be stored. Their
            qualified names identify them, so no two may share one.
    """

    def __init__(self, classes: Iterable[type] = ()) -> None:
        self._classes: dict[str, type] = {}
        for kind in classes:
            named = isinstance(kind, type)
            if not named or not (dataclasses.is_dataclass(kind) or hasattr(kind, "model_fields")):
                raise TypeError(f"classes= takes dataclasses and pydantic models; got {kind!r}")
            other = self._classes.setdefault(kind.__qualname__, kind)
            if other is not kind:
                raise ValueError(f"classes= names two classes {kind.__qualname__!r}; rename one of them")

    def encode(self, value: Any) -> bytes:
        """Return the bytes of a value.

        Raises:
            NotStorable: when an equal value could not be restored.
        """
        if type(value) is str:
            form = value
        else:
            try:
                form = self._form(value)
            except RecursionError:
                raise NotStorable("a sample nests too deep, or holds itself; it cannot be stored") from None
        try:
            return trimmed(orjson.dumps(form))
        except TypeError:  # a lone surrogate in some string
            try:
                return trimmed(orjson.dumps(_without_surrogates(form)))
            except (TypeError, RecursionError) as error:
                raise NotStorable(f"a sample cannot be written as JSON: {error}") from error

    def decode(self, data: bytes) -> Any:
        """Return the value of bytes.

        Raises:
            StoreError: when the bytes are damaged, or need a class that the caller has not named.
        """
        try:
            form = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise StoreError(
                f"a sample of the cache is damaged: {error}; restore the cache, or delete the sample's row"
            ) from error
        if _MARKED not in data:
            return form
        try:
            return self._value(form)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise StoreError(
                f"a sample of the cache is damaged: {error!r}; restore the cache, or delete the sample's row"
            ) from error

    def _form(self, value: Any) -> Any:
        kind = type(value)
        if kind in _UNCHANGED:
            return value
        if (write := _WRITERS.get(kind)) is not None:
            return write(value)
        if kind is list:
            return list(map(self._form, value))
        if kind is dict:
            return self._mapping(value)
        if kind is tuple or (isinstance(value, tuple) and hasattr(kind, "_fields")):
            return {_MARK + "tuple": self._form(list(value))}
        if kind.__qualname__ in self._classes:
            return self._instance(value)
        if (bare := _plain(value)) is not None:
            return self._form(bare)
        raise NotStorable(
            f"a sample of type {kind.__qualname__} cannot be stored; return strings, numbers, lists, "
            f"tuples, mappings or bytes, or name a dataclass or pydantic model: classes=[{kind.__name__}]"
        )

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        form = {}
        for name, item in value.items():
            if type(name) is not str or name.startswith(_MARK):
                return {_MARK + "map": [[self._form(k), self._form(v)] for k, v in value.items()]}
            form[name] = self._form(item)
        return form

    def _instance(self, value: Any) -> Any:
        kind = type(value)
        name = kind.__qualname__
        if self._classes[name] is not kind:
            raise NotStorable(f"classes= names another class {name!r} than the one of this sample")
        if dataclasses.is_dataclass(kind):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
            extra: dict[str, Any] = {}
        else:
            fields = {field: value.__dict__[field] for field in kind.model_fields if field in value.__dict__}
            extra = dict(value.__pydantic_extra__ or {})
        form = {
            _MARK + "class": name,
            "fields": self._mapping(fields),
            "extra": self._mapping(extra),
            "set": sorted(getattr(value, "__pydantic_fields_set__", ())),
        }
        if self._value(orjson.loads(orjson.dumps(_without_surrogates(form)))) != value:
            raise NotStorable(f"a {name} would not come back equal from its fields; it cannot be stored")
        return form

    def _value(self, form: Any) -> Any:
        if type(form) is list:
            return [self._value(item) for item in form]
        if type(form) is not dict:
            return form
        for name, item in form.items():
            if name.startswith(_MARK):
                return self._marked(name[1:], item, form)
        return {name: self._value(item) for name, item in form.items()}

    def _marked(self, kind: str, item: Any, form: dict[str, Any]) -> Any:
        match kind:
            case "tuple":
                return tuple(self._value(part) for part in item)
            case "map":
                return {self._value(name): self._value(part) for name, part in item}
            case "class":
                return self._revived(item, form)
        if (read := _READERS.get(kind)) is not None:
            return read(item)
        raise StoreError(
            f"a sample of the cache holds a value of unknown form {kind!r}; use a newer cachepipe"
        )

    def _revived(self, name: str, form: dict[str, Any]) -> Any:
        kind: Any = self._classes.get(name)
        if kind is None:
            raise StoreError(
                f"a sample of the cache is an instance of {name}, which was not named; "
                f"name it to the cacher: classes=[{name}]"
            )
        fields = {field: self._value(item) for field, item in form["fields"].items()}
        if dataclasses.is_dataclass(kind):
            value: Any = object.__new__(self._classes[name])
            for field, item in fields.items():
                object.__setattr__(value, field, item)
            return value
        extra = {field: self._value(item) for field, item in form["extra"].items()}
        return kind.model_construct(_fields_set=set(form["set"]), **fields, **extra)


def shown(data: bytes) -> Any:
    """Return a stored sample for cachepipe's JSON output.

    A JSON value is unchanged, or ``{"raw": "<its text>"}`` if a strict parser would refuse or change it. Any
    other value (tuples, bytes …) has the form in which it is stored.

    Raises:
        ValueError: when the bytes are not JSON.
    """
    form = orjson.loads(data)
    if _MARKED not in data:
        return form
    try:
        value = Codec().decode(data)
        same = repr(jsontext.loads(jsontext.dumps(value))) == repr(value)
    except (StoreError, TypeError, ValueError, RecursionError):  # of a class that is not known here
        return form
    return jsontext.shown(value) if same else form


def _plain(value: Any) -> Any:
    """Return an equal value of a plain class (for a str enum, an OrderedDict …), or None."""
    bare = (make(value) for plain, make in _PLAIN.items() if isinstance(value, plain))
    return next((each for each in bare if each == value), None)


def _without_surrogates(form: Any) -> Any:
    """Return a form in which strings with lone surrogates, which UTF-8 does not have, are marked."""
    if type(form) is str:
        try:
            form.encode()
        except UnicodeEncodeError:
            return {_MARK + "str": base64.b64encode(form.encode("utf-8", "surrogatepass")).decode()}
        return form
    if type(form) is list:
        return [_without_surrogates(item) for item in form]
    if type(form) is not dict:
        return form
    plain = {}
    for name, item in form.items():
        marked = _without_surrogates(name)
        if marked is not name:
            return {
                _MARK + "map": [[_without_surrogates(k), _without_surrogates(v)] for k, v in form.items()]
            }
        plain[name] = _without_surrogates(item)
    return plain
