"""Settings for the requests within a block: who draws, and how the cache is used.

    with cachepipe.using(namespace="run-2", request_id="q17"):
        client.chat.completions.create(...)

They follow tasks and threads as context variables do, and override the settings of clients. A pipeline takes
the mode when it is made; its requests take who draws, where they do not say so themselves.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from cachepipe import cells, replaying
from cachepipe.contract.draws import Claimant
from cachepipe.typedefs import MODES, Mode, Ordered, Request, check_ordered, check_replicate


class Inherited:
    """Stands for what a block leaves as it was; None is a namespace like any other."""

    def __repr__(self) -> str:
        return "INHERITED"


INHERITED: Final = Inherited()
"""The default of ``using``: the setting outside the block."""


class Using(NamedTuple):
    """The settings of the innermost blocks; unset ones are `INHERITED`."""

    namespace: str | Inherited | None = INHERITED
    request_id: str | Inherited | None = INHERITED
    mode: Mode | Inherited = INHERITED
    replicate: str | int | Inherited | None = INHERITED
    ordered: Ordered | Inherited = INHERITED
    cache: Any = INHERITED
    budget: Any = INHERITED

    def over(self, outer: Using) -> Using:
        """Return these settings, and those of ``outer`` for the unset ones."""
        pairs: Any = zip(self, outer, strict=True)
        return Using(*(theirs if isinstance(own, Inherited) else own for own, theirs in pairs))

    def for_calls(self) -> dict[str, Any]:
        """Return the arguments of `using` that set the same for calls."""
        settings = self._asdict()
        del settings["cache"], settings["budget"]
        return settings

    def claimant(self, namespace: str | None, replicate: str | int | None) -> Claimant:
        """Return who draws, given the namespace and the replicate outside all blocks."""
        request_id = None if isinstance(self.request_id, Inherited) else self.request_id
        replicate = replicate if isinstance(self.replicate, Inherited) else self.replicate
        return Claimant(self.namespace_of(namespace), request_id, replicate)

    def namespace_of(self, usual: str | None) -> str | None:
        """Return the current namespace, given the one outside all blocks."""
        return usual if isinstance(self.namespace, Inherited) else self.namespace

    def ordered_of(self, usual: Ordered) -> Ordered:
        """Return whether answers are handed over in order, given the setting outside all blocks."""
        return usual if isinstance(self.ordered, Inherited) else self.ordered

    def cache_of(self, given: Any) -> Any:
        """Return the cache of what is made now, given its own; None is the default folder."""
        return self.cache if given is None and not isinstance(self.cache, Inherited) else given

    def budget_of(self, given: Any) -> Any:
        """Return the budget that a client or pipeline gets: its own, else the block's, else None."""
        return self.budget if given is None and not isinstance(self.budget, Inherited) else given

    def mode_of(self, usual: Mode) -> Mode:
        """Return the current mode, given the one outside all blocks; in ``cachepipe replay``, its mode."""
        if replaying.CURRENT is not None:
            return "replay"
        return usual if isinstance(self.mode, Inherited) else self.mode


_NOTHING: Final = Using()
_current: ContextVar[Using] = ContextVar("cachepipe_using", default=_NOTHING)


def current() -> Using:
    """Return the settings for a call made now; in a cell of a notebook, with the cell's id if none is set."""
    using = _current.get()
    if not cells.loaded:
        return using
    own_id = None if isinstance(using.request_id, Inherited) else using.request_id
    request_id = cells.request_id_of(own_id)
    return using if request_id is own_id else using._replace(request_id=request_id)


def claimed(request: Request) -> Request:
    """Return a request that names who draws, as the blocks around say, where it does not say so itself."""
    settings = _current.get() if not cells.loaded else current()
    if settings is _NOTHING or not isinstance(request, Request):
        return request
    own = {
        "namespace": request.namespace,
        "request_id": request.request_id or None,
        "replicate": request.replicate,
    }
    found = {
        name: value
        for name, given in own.items()
        if given is None and not isinstance(value := getattr(settings, name), Inherited | None)
    }
    if not found:
        return request
    twin = copy.copy(request)
    for name, value in found.items():
        object.__setattr__(twin, name, value)  # it is frozen
    return twin


@contextlib.contextmanager
def within(settings: Using) -> Iterator[None]:
    """Apply settings to the block; unset ones stay as they are outside."""
    token = _current.set(settings.over(_current.get()))
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def using(
    *,
    namespace: str | Inherited | None = INHERITED,
    request_id: str | Inherited | None = INHERITED,
    mode: Mode | Inherited = INHERITED,
    replicate: str | int | Inherited | None = INHERITED,
    ordered: Ordered | Inherited = INHERITED,
) -> Iterator[None]:
    """Set the namespace, request id, replicate, mode and order of the clients' calls made within the block.

    Pipelines take the namespace, request id and replicate for requests that name none, and the mode when they
    are made.

    Args:
        namespace: the unit within which samples are independent.
        request_id: which draw a call is among equal questions of its namespace.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``.
        replicate: which of several independent repetitions of the experiment a call belongs to.
        ordered: hand over the answers of asynchronous clients in the order of the first run, one at a time,
            so that a rerun of a program with concurrent tasks takes the same course.
    """
    for name, value in (("namespace", namespace), ("request_id", request_id)):
        if not isinstance(value, str | Inherited | None):
            raise TypeError(f"{name} must be a string or None; got {value!r}. Write {name}=str(...)")
    if not isinstance(replicate, Inherited):
        check_replicate(replicate)
    if not isinstance(mode, Inherited) and mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}; got {mode!r}")
    if not isinstance(ordered, Inherited):
        check_ordered(ordered)
    with within(Using(namespace, request_id, mode, replicate, ordered)):
        yield


class Attempt:
    """One attempt of a call that a stage above retries; adapters report what they see.

    Attributes:
        number: the number of earlier attempts.
        sole: whether the adapter must not retry by itself.
        headers: the headers of the answer, if the adapter reports them.
    """

    __slots__ = ("headers", "number", "sole")

    def __init__(self, number: int = 0, *, sole: bool = False) -> None:
        self.number = number
        self.sole = sole
        self.headers: Mapping[str, Any] | None = None


attempt: ContextVar[Attempt | None] = ContextVar("cachepipe_attempt", default=None)
"""The attempt that a call made now is, if a stage above counts them."""


@contextlib.contextmanager
def attempting(number: int) -> Iterator[Attempt]:
    """Mark the calls within the block as one attempt, after ``number`` others."""
    made = Attempt(number, sole=True)
    token = attempt.set(made)
    try:
        yield made
    finally:
        attempt.reset(token)
