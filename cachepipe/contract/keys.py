"""Same question, same key: the canonical form of a question, and its digest (C9).

The key is the SHA-256 of the canonical JSON of ``[scope, document]``. The canonical form has one
spelling for values that compare equal: whole floats become integers, tuples become lists, and mapping
keys are sorted, except where a provider shows them to the model as written (JSON schemas, for example).
Everything else that differs gives another key. Values without a stable canonical form are refused
before any money is spent.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from cachepipe import jsontext
from cachepipe.contract.demands import is_mergeable
from cachepipe.errors import UnkeyableValue
from cachepipe.typedefs import UNASKED, Request, field_names

FORMAT = "k2"
"""The name of the key format. A changed format gets a new name, and old keys stay readable."""

_MARK = "\0"  # opens the names of the objects that stand for values JSON has no form for
_LONG = 6  # items of a list from which on a check of its JSON is cheaper than a walk through it
_PLAIN = orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS
_EXPONENTS = (b"e+",) if b"e+" in orjson.dumps(1e22) else tuple(b"e%d" % digit for digit in range(1, 10))
_SIGNS = (b".0", *_EXPONENTS, b'"\\u0000')
"""Strings in JSON that indicate a whole float (from 1e16 on with an exponent), or a marked name."""
_LISTS, _NUMBERS = frozenset({list, tuple}), frozenset({int, float})
_AS_THEY_ARE = frozenset({str, bool, type(None)})
_TOO_LARGE = 10**jsontext.MOST_DIGITS

AsWritten = Mapping[str, frozenset[str]]
"""The fields of a body in which the order of mapping keys counts: within the values that have one of these
names, at any depth; within the whole field if there are no names."""


class Question(NamedTuple):
    """A question, without the number of samples and who wants them.

    Attributes:
        key: the digest, a string such as ``k2-5f2c…``.
        scope: identifies the endpoint (its URL) or the adapter (its name); or None.
        document: the question, as canonical JSON.
        mergeable: whether several draws may share one call (not with ``seed`` or ``best_of``).
        function: whether the answer is a function of the question (embeddings, moderations).
    """

    key: str
    scope: str | None
    document: bytes
    mergeable: bool = True
    function: bool = False


def canonical(value: Any) -> Any:
    """Return the canonical form of a JSON-like value: plain types with exactly one JSON spelling.

    Raises:
        UnkeyableValue: for NaN, infinities, integers of more than 4,300 digits, sets, mapping keys that
            are not strings, and objects without known fields (classes, functions, files …).
    """
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is float and value.is_integer():
        return int(value)
    if kind in _NUMBERS:
        if not -_TOO_LARGE < value < _TOO_LARGE:
            raise _unkeyable_number(value)
        return value
    if kind in _LISTS:
        return value if len(value) >= _LONG and _is_canonical(value) else [canonical(item) for item in value]
    if kind is dict:
        return _mapping(value)
    return _unusual(value)


def _unkeyable_number(value: Any) -> UnkeyableValue:
    if isinstance(value, float):
        return UnkeyableValue(f"a key cannot be made from the number {value!r}; send a finite number")
    return UnkeyableValue(
        f"a key cannot be made from an integer of more than {jsontext.MOST_DIGITS:,} digits; "
        "send it as a string"
    )


def _is_canonical(value: Any, names: frozenset[str] = frozenset()) -> bool:
    """Return True if a value is certainly its own canonical form, without a walk through it.

    Plain JSON comes back equal from its spelling: tuples, numbers that are not finite, enumerations and the
    like do not. Whole floats do, but they show in the spelling, and so do marked names.

    Args:
        value: the value.
        names: names below which the order of mapping keys counts, so the value must not have them there.
    """
    try:
        text = orjson.dumps(value, option=_PLAIN)
    except TypeError:
        return False
    if any(sign in text for sign in _SIGNS):
        return False
    # One search for anything nested costs less than one for each name.
    nested = names and (b":{" in text or b":[" in text)
    if nested and any(sign in text for sign in _openings(names)):
        return False
    return bool(orjson.loads(text) == value)


@functools.cache
def _openings(names: frozenset[str]) -> tuple[bytes, ...]:
    """Return the JSON spelling of these names before a mapping or list."""
    return tuple(b'"%b":%b' % (name.encode(), opening) for name in sorted(names) for opening in (b"{", b"["))


def _mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    form = {}
    for name, item in value.items():
        if type(name) is not str or name[:1] == _MARK:
            name = _marked(name)  # noqa: PLW2901 - its canonical form
        form[name] = item if type(item) is str else canonical(item)
    return form


class _Ordered(dict[str, Any]):
    """A mapping in canonical form that keeps its own order, as do the mappings in it."""


def _ordered(value: Any) -> Any:
    """Return the canonical form of a value that the model is shown as written."""
    if isinstance(value, Mapping):
        return _Ordered(_mapping(value))
    return [_ordered(item) for item in value] if isinstance(value, list | tuple) else canonical(value)


def _body(body: Mapping[str, Any], as_written: AsWritten) -> dict[str, Any]:
    """Return the canonical form of a provider's body."""
    form = {}
    for name, item in body.items():
        if type(name) is not str or name[:1] == _MARK:
            name = _marked(name)  # noqa: PLW2901 - its canonical form
        if type(item) is str:
            form[name] = item
            continue
        names = as_written.get(name)
        if names is None:
            form[name] = canonical(item)
        else:
            form[name] = _partly_ordered(item, names) if names else _ordered(item)
    return form


def _partly_ordered(value: Any, names: frozenset[str]) -> Any:
    """Return the canonical form of a value in which the order counts below some names."""
    kind = type(value)
    if kind in _LISTS:
        if len(value) >= _LONG and _is_canonical(value, names):
            return value
        return [_partly_ordered(item, names) for item in value]
    if kind is not dict and not isinstance(value, Mapping):
        return canonical(value)
    form: dict[str, Any] = {}
    for name, item in value.items():
        if type(item) is str:
            part = item
        elif name in names and not _wraps_schema(name, item):
            part = _ordered(item)
        else:
            part = _partly_ordered(item, names)
        form[name if type(name) is str and name[:1] != _MARK else _marked(name)] = part
    return form


def _wraps_schema(name: str, item: Any) -> bool:
    """Return True for an item that holds a name, a description, and the schema itself."""
    return name == "json_schema" and isinstance(item, Mapping) and "schema" in item


def _marked(name: Any) -> str:
    """Return the canonical form of a mapping's key."""
    if not isinstance(name, str):
        raise UnkeyableValue(f"a key cannot be made from a mapping whose key is {name!r}; use strings")
    return _MARK + name if name.startswith(_MARK) else str.__str__(name)


def _unusual(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return canonical(int(value))
    if isinstance(value, numbers.Real) and not hasattr(value, "denominator"):
        return canonical(float(value))
    if isinstance(value, list | tuple):
        return canonical(list(value))
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return {_MARK + "bytes": base64.b64encode(bytes(value)).decode()}
    if not isinstance(value, type):
        fields = _fields(value)
        if fields is not None:
            return {_MARK + "class": type(value).__qualname__, _MARK + "fields": _mapping(fields)}
    raise UnkeyableValue(
        f"a key cannot be made from {type(value).__qualname__} {value!r:.200}; "
        "pass strings, numbers, lists, mappings, bytes, dataclasses or pydantic models"
    )


def _fields(value: Any) -> Mapping[str, Any] | None:
    """Return the fields of a dataclass's or pydantic model's instance, else None."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(type(value), "model_fields") and hasattr(value, "__dict__"):
        return {**value.__dict__, **(getattr(value, "__pydantic_extra__", None) or {})}
    return None


def trimmed(data: bytes) -> bytes:
    """Return a copy of bytes that uses no more memory than their length.

    orjson returns its output in a buffer of many times its length, which lives as long as the bytes.
    """
    return b"%b" % data


def encode(form: Any) -> bytes:
    """Return the only JSON spelling of a canonical form: sorted keys, no blanks, UTF-8.

    Whole numbers beyond 64 bits and lone surrogates, which orjson refuses, get the standard library's
    spelling. Documents without them never do, so each document has one spelling.
    """
    try:
        option = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_SUBCLASS
        return trimmed(orjson.dumps(form, default=_fragment, option=option))
    except TypeError:
        return json.dumps(_sorted(form), separators=(",", ":"), allow_nan=False).encode()


def _fragment(form: Any) -> orjson.Fragment:
    """Return the spelling of a mapping that keeps its order."""
    return orjson.Fragment(orjson.dumps(dict(form)))


def _sorted(form: Any) -> Any:
    """Return a form with sorted keys."""
    if type(form) is dict:
        return {name: _sorted(form[name]) for name in sorted(form)}
    return [_sorted(item) for item in form] if type(form) is list else form


def digest(scope: str | None, document: bytes) -> str:
    """Return the key of a canonical document in a scope."""
    return f"{FORMAT}-{hashlib.sha256(b'[%b,%b]' % (_spelled(scope), document)).hexdigest()}"


@functools.lru_cache(maxsize=256)
def _spelled(scope: str | None) -> bytes:
    """Return the JSON of a scope; most questions of a program have the same few."""
    return jsontext.dumps(scope)


_PLANS: dict[type, tuple[tuple[str, ...], bool, bool]] = {}


def _plan(kind: type[Request]) -> tuple[tuple[str, ...], bool, bool]:
    """Return a request class's fields for the key, and whether it has a ``seed`` and a ``best_of``."""
    names = field_names(kind)
    asked = tuple(name for name in names if name not in UNASKED)
    plan = _PLANS[kind] = (asked, "seed" in names, "best_of" in names)
    return plan


def question(
    request: Request,
    scope: str | None = None,
    hash: Callable[[Request], str] | None = None,  # noqa: A002 - CacheSaver's name
) -> Question:
    """Return the question of a request to a user's own adapter.

    Fields that are None are left out, so that an optional field can be added without a new key.

    Args:
        request: the request; its fields are the question.
        scope: identifies the adapter.
        hash: a function that returns a string for a request, which replaces the fields: requests with equal
            strings ask the same.
    """
    kind = type(request)
    names, has_seed, has_best_of = _PLANS.get(kind) or _plan(kind)
    seed = request.seed if has_seed else None
    best_of = request.best_of if has_best_of else None
    if hash is None:
        fields = {}
        for name in names:
            value = getattr(request, name)
            if value is not None:
                fields[name] = value if type(value) in _AS_THEY_ARE else canonical(value)
        document: dict[str, Any] = {"fields": fields}
    else:
        name = hash(request)
        if not isinstance(name, str):
            raise UnkeyableValue(f"hash= must return a string for each request; it returned {name!r}")
        document = {"hash": name}
    if best_of is not None:
        document["n"] = request.n
    text = encode(document)
    return Question(digest(scope, text), scope, text, is_mergeable(seed, best_of))


def provider_question(
    scope: str,
    document: Mapping[str, Any],
    *,
    as_written: AsWritten = MappingProxyType({}),
    mergeable: bool = True,
    function: bool = False,
) -> Question:
    """Return the question of a request to a provider: its endpoint's URL, and the body as it is sent.

    Args:
        scope: the full URL of the endpoint without credentials.
        document: ``{"body": …}`` without ``n`` and transport fields, and ``"headers"`` when there are
            any that change the answer.
        as_written: the parts of the body in which the order of mapping keys counts.
        mergeable: whether several draws may share one call.
        function: whether the answer is a function of the question.
    """
    form = {}
    for name, item in document.items():
        form[name] = _body(item, as_written) if name == "body" else canonical(item)
    text = encode(form)
    return Question(digest(scope, text), scope, text, mergeable, function)
