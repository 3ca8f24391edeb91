"""The door between the stages and models of any kind: only this module looks up what a model offers.

A model needs one method, ``request`` or ``batch_request``. Whatever else it may offer is declared in
`cachepipe.typedefs.ModelHooks`; `hooks_of` returns it with the default for everything that a model lacks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from cachepipe.errors import UnkeyableValue
from cachepipe.typedefs import BatchRequestModel, ModelHooks, SingleRequestModel


class Hooks(NamedTuple):
    """The optional methods of a model, as `ModelHooks` declares them; None is the default behaviour."""

    question: Callable[..., Any] | None
    present: Callable[[Any], Any] | None
    pack: Callable[[Any], Any] | None
    unpack: Callable[[Any], Any] | None
    context_of: Callable[[Any], Any] | None
    submit: Callable[[Any], Any] | None


def hooks_of(model: Any) -> Hooks:
    """Return the optional methods of a model.

    Raises:
        TypeError: when one of them is not a method.
    """
    found = {name: getattr(model, name, None) for name in Hooks._fields}
    for name, hook in found.items():
        if hook is not None and not callable(hook):
            what = (getattr(ModelHooks, name).__doc__ or "").partition("\n")[0]
            raise TypeError(f"{name} of a model is a method ({what!r}); {model!r} has {hook!r}")
    return Hooks(**found)


def check_model(model: Any) -> None:
    """Raise an error if the object is not a model, before anything is asked of it."""
    limit_of(model)
    if isinstance(model, type) or not (has_request(model) or has_batch(model)):
        raise TypeError(
            "a model has `async request(Request) -> Response` or `async batch_request(Batch) -> "
            f"list[Response]`; got {model!r}"
        )


def has_request(model: Any) -> bool:
    """Return True if a model answers single requests."""
    return _overrides(model, "request")


def has_batch(model: Any) -> bool:
    """Return True if a model answers batches."""
    return _overrides(model, "batch_request")


def _overrides(model: Any, name: str) -> bool:
    """Return True if a model has a method of its own, not only the protocol's empty one."""
    method = getattr(type(model), name, None)
    if method is None:
        return callable(getattr(model, name, None))
    return method not in (
        getattr(SingleRequestModel, name, None),
        getattr(BatchRequestModel, name, None),
    )


def limit_of(model: Any) -> int | None:
    """Return a model's limit on ``n``, its attribute ``max_n``; None or 0 is no limit."""
    limit: Any = getattr(model, "max_n", None)
    if limit is None:
        return None
    if type(limit) is not int and not isinstance(limit, bool) and hasattr(limit, "__index__"):
        limit = limit.__index__()
    if type(limit) is not int or limit < 0:
        raise TypeError(f"max_n is a whole number of samples or None; {model!r} has {limit!r}")
    return limit or None


def cut_of(model: Any) -> int | None:
    """Return the number of samples above which a model's requests are cut, its attribute ``cut_n``."""
    limit: int | None = getattr(model, "cut_n", None)
    return limit


def name_of(model: Any) -> str | None:
    """Return the name of a model, its attribute ``model`` if that is a string."""
    name = getattr(model, "model", None)
    return name if isinstance(name, str) else None


def scope_of(model: Any) -> str | None:
    """Return the default scope of a model: its ``cache_scope``, else its name."""
    scope = getattr(model, "cache_scope", None)
    if scope is None:
        return name_of(model)
    if not isinstance(scope, str):
        raise UnkeyableValue(f"a model's cache_scope must be a string; {model!r} has {scope!r}")
    return scope


@lru_cache
def reports_arrivals(batch_request: Callable[..., Any]) -> bool:
    """Return True if a ``batch_request`` takes ``arrived``, to report its answers as they come."""
    try:
        return "arrived" in inspect.signature(batch_request).parameters
    except (TypeError, ValueError):  # of one that is not written in Python
        return False
