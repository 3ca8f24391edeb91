"""The keys of CacheSaver 0.0.6: deepdiff's ``DeepHash`` of a request's arguments.

They are computed for JSON-like values and objects of pydantic.
These keys ignore the order and the repetition of list items, and tell ``1`` from ``1.0``. The request cannot
be found from its key, so the keys of known requests are computed and compared.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from typing import Any, Final

_PRIVATE: Final = "__"
_NUMBERS: Final = frozenset({int, float})

UNKEYED: Final = frozenset(
    {
        "prompt_cache_key",
        "prompt_cache:retention",  # as CacheSaver spells it
        "safety_identifier",
        "service_tier",
        "store",
        "stream",
        "stream_options",
    }
)
"""The arguments that CacheSaver leaves out of its keys."""


def key_of(kwargs: Mapping[str, Any], args: Any = (), **fields: Any) -> str:
    """Return CacheSaver's key of a request.

    Args:
        kwargs: the keyword arguments of the call, without ``n``.
        args: the positional arguments, a tuple.
        fields: the further fields of the request, if its class has any.

    Raises:
        TypeError: when a value has no JSON form.
        UnicodeEncodeError: when a text holds half of a character, which CacheSaver refuses too.
    """
    kept = {name: value for name, value in kwargs.items() if name not in UNKEYED}
    return deep_hash({"args": args, "kwargs": kept, **fields})


def deep_hash(value: Any) -> str:
    """Return the hash of a value of strings, numbers, None, lists, tuples, mappings or pydantic's objects."""
    kind = type(value).__name__ if isinstance(value, enum.Enum) else "str"
    return hashlib.sha256(f"{kind}:{_spelled(value)}".encode()).hexdigest()


def _spelled(value: Any) -> str:
    kind = type(value)
    if kind is str:
        text: str = value
        return text
    if value is None:
        return "NONE"
    if kind is bool:
        return "bool:true" if value else "bool:false"
    if kind in _NUMBERS:
        return f"{kind.__name__}:{value}"
    if isinstance(value, str) and isinstance(value, enum.Enum):
        return f"{value}"
    if kind in (list, tuple) or hasattr(
        kind, "__pydantic_fields__"
    ):  # which gives its fields, also unset ones
        return f"{kind.__name__}:{','.join(sorted({deep_hash(item) for item in value}))}"
    if isinstance(value, Mapping):
        items = [
            f"{deep_hash(name)}:{deep_hash(item)}"
            for name, item in value.items()
            if not (isinstance(name, str) and name.startswith(_PRIVATE))
        ]
        return f"dict:{{{';'.join(sorted(items))}}}"
    raise TypeError(f"CacheSaver's key cannot be computed from {kind.__qualname__} {value!r:.80}")
