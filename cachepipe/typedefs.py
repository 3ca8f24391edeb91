"""Requests, batches and responses, and the two protocols of models and pipelines."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from cachepipe.bounds import check_n

if TYPE_CHECKING:
    import contextvars
    from typing import Self
F = TypeVar("F", bound=Callable[..., Any])
Mode = Literal["read-write", "replay", "refresh", "bypass"]
Repeat = Literal["fresh", "same"]
Ordered = bool | int
"""Whether answers are handed over in order (C11).

A number also sets the turns after which an event loop counts as quiet, if its queue cannot be read.
"""

MODES: tuple[Mode, ...] = ("read-write", "replay", "refresh", "bypass")
REPEATS: tuple[Repeat, ...] = ("fresh", "same")

_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})


def describes(*options: type) -> Callable[[F], F]:
    """Return a decorator that adds the descriptions of options to a docstring, for ``help()``.

    Args:
        options: the classes with the options.
    """
    sections = [(inspect.getdoc(kind) or "").partition("Attributes:\n")[2] for kind in options]

    def describe(thing: F) -> F:
        thing.__doc__ = "\n".join([inspect.getdoc(thing) or "", "\nOptions:", *sections])
        return thing

    return describe


def by_value(value: Any) -> Any:
    """Return a deep copy of a JSON-like value, which shares nothing mutable with it."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is dict:
        if _SCALARS.issuperset(map(type, value.values())):
            return value.copy()
        return {key: by_value(item) for key, item in value.items()}
    if kind is list:
        return [by_value(item) for item in value]
    if kind is tuple:
        return tuple([by_value(item) for item in value])
    return copy.deepcopy(value)


def _frozen_hash(value: Any) -> int:
    """Hash a JSON-like value such that equal values hash alike, lists and mappings included."""
    if isinstance(value, Mapping):
        return hash(frozenset((key, _frozen_hash(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return hash(tuple(_frozen_hash(item) for item in value))
    try:
        return hash(value)
    except TypeError:
        return hash(type(value).__qualname__)


@dataclass(frozen=True)
class Request:
    """A question to a model, taken by value: later changes by the caller have no effect.

    Subclass it as a frozen dataclass to add fields (``temperature`` …); they may lack defaults. Every
    field but ``n``, ``request_id``, ``namespace`` and ``replicate`` is part of what is asked, and so of the
    key. A public field that the request does not have reads as None, so that an adapter can write
    ``request.stop or None`` for requests with and without one.

    Attributes:
        prompt: a string, a list of chat messages, or any JSON-like value.
        n: how many samples are wanted, at least 1, and at most ``CACHEPIPE_MAX_N`` (10,000 unless set).
        request_id: which draw this is among equal questions of its namespace; None is the empty string.
        namespace: the unit within which samples are independent, in practice one experiment.
        replicate: which of several independent repetitions of the experiment it belongs to. Replicates share
            one namespace, so that their samples are independent; 3 and "3" are the same.
    """

    prompt: Any
    n: int = dataclasses.field(default=1, kw_only=True)
    request_id: str | None = dataclasses.field(default=None, kw_only=True)
    namespace: str | None = dataclasses.field(default=None, kw_only=True)
    replicate: str | int | None = dataclasses.field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__hash__" not in cls.__dict__ and "__eq__" not in cls.__dict__:
            # A dataclass would write a hash of its own that fails on a list of messages.
            cls.__hash__ = Request.__hash__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        for name in field_names(type(self)):
            value = getattr(self, name)
            if type(value) not in _SCALARS:
                object.__setattr__(self, name, by_value(value))
        n = self.n
        if type(n) is not int:
            if isinstance(n, bool) or not hasattr(n, "__index__"):
                raise TypeError(f"n must be a whole number of samples, at least 1; got {n!r}")
            n = n.__index__()
            object.__setattr__(self, "n", n)
        if n < 1:
            raise ValueError(f"n must be a whole number of samples, at least 1; got {n!r:.200}")
        check_n(n)
        for name in ("request_id", "namespace"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a string or None; got {value!r}. Write {name}=str(...)")
        check_replicate(self.replicate)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return None

    def __hash__(self) -> int:
        return hash(tuple(_frozen_hash(getattr(self, name)) for name in field_names(type(self))))

    def asking(self, n: int) -> Self:
        """Return the same question for n samples, sharing nothing mutable with this request."""
        names, own = field_names(type(self)), self.__dict__
        if n == self.n and _SCALARS.issuperset(map(type, own.values())) and all(map(own.__contains__, names)):
            return self
        twin = object.__new__(type(self))  # what copy.copy does, in a quarter of the time
        held = twin.__dict__
        held.update(own)
        for name in names:
            if name not in own:  # it has a slot
                object.__setattr__(twin, name, by_value(getattr(self, name)))
            elif type(value := own[name]) not in _SCALARS:
                held[name] = by_value(value)
        object.__setattr__(twin, "n", n)
        return twin

    def merging(self, n: int) -> Self:
        """Return the question for n samples of a call that serves several draws.

        Override it in a request that needs to know about the call.
        """
        return self if n == self.n else self.asking(n)

    def placed(self, indices: Sequence[int]) -> None:
        """Receive the indices of the samples that a call will return for this request alone.

        By default it does nothing. Override it in a request that needs the indices.
        """


UNASKED = frozenset({"n", "request_id", "namespace", "replicate"})
"""The fields of a request that are not part of the question."""


def check_ordered(ordered: object) -> None:
    """Refuse a value of ``ordered=`` that is neither a boolean nor a number of turns."""
    if not isinstance(ordered, bool) and not (isinstance(ordered, int) and ordered > 0):
        raise ValueError(
            f"ordered is True, False, or a number of turns of the event loop, at least 1; got {ordered!r}"
        )


def check_replicate(replicate: object) -> None:
    """Raise an error if the value is not the name of a replicate."""
    if replicate is not None and type(replicate) is not int and not isinstance(replicate, str):
        raise TypeError(
            f"replicate must be a string, a whole number or None; got {replicate!r}. Write replicate=str(...)"
        )


_FIELDS: dict[type, tuple[str, ...]] = {}


def field_names(kind: type[Request]) -> tuple[str, ...]:
    """Return the names of a request class's fields, in order of definition."""
    names = _FIELDS.get(kind)
    if names is None:
        names = _FIELDS[kind] = tuple(field.name for field in dataclasses.fields(kind))
    return names


@dataclass(frozen=True)
class Batch:
    """Requests that are served together.

    Attributes:
        requests: the requests; the list is the batch's own.
    """

    requests: list[Request]

    def __post_init__(self) -> None:
        requests = list(self.requests)
        for request in requests:
            if not isinstance(request, Request):
                raise TypeError(f"a Batch holds Requests; got {request!r}. Wrap it: Request(prompt=...)")
        object.__setattr__(self, "requests", requests)

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class _Answer(NamedTuple):
    data: Sequence[Any]
    cached: list[bool] | None = None
    duplicated: list[bool] | None = None


class Payment(Protocol):
    """What an answer's calls have reserved of a budget, until its samples are stored."""

    @property
    def calls(self) -> Sequence[str]:
        """Identifies the calls."""
        ...

    def stored(self) -> None:
        """Learn that the samples of the answer are stored, or that they will not be."""
        ...


class Response(_Answer):
    """The samples that answer one request, and where each came from.

    In a pipeline's response, ``data``, ``cached`` and ``duplicated`` have ``request.n`` items.

    Attributes:
        data: the samples, in the order of their positions in the draw.
        cached: per sample, False exactly when it was generated on this request's behalf; None
            without a cacher.
        duplicated: per sample, True when it was merged into a group of identical requests served
            together and is not the group's first; None without a deduplicator.
        indices: per sample, its index in the key's sample list, or None.
        key: the key of the question, or None.
        payment: what its calls have reserved of a budget; None above the cacher, and without a budget.
    """

    indices: tuple[int, ...] | None = None
    key: str | None = None
    payment: Payment | None = None

    def __repr__(self) -> str:
        return f"Response(data={self.data!r}, cached={self.cached!r}, duplicated={self.duplicated!r})"

    def _replace(self, **changes: Any) -> Self:
        answer = super()._replace(**changes)
        answer.__dict__.update(self.__dict__)
        return answer


@runtime_checkable
class SingleRequestModel(Protocol):
    """An object that answers one request: a model's adapter, a stage or a pipeline."""

    async def request(self, request: Request) -> Response:
        """Return a response with ``request.n`` samples."""
        ...


@runtime_checkable
class BatchRequestModel(Protocol):
    """An object that answers a batch of requests."""

    async def batch_request(self, batch: Batch) -> list[Response]:
        """Return one response per request of the batch, in its order."""
        ...


Arrived = Callable[[int, Any], None]
"""A callback on the loop that gets a request's place in its batch, and its answer or error once it comes."""


class ReportingModel(Protocol):
    """A `BatchRequestModel` that reports each answer of a batch as it comes.

    The stages pass ``arrived`` to each ``batch_request`` that has a parameter of this name. A sample that is
    reported is stored and delivered at once, also if the rest of the batch is cancelled later.
    """

    async def batch_request(self, batch: Batch, *, arrived: Arrived | None = None) -> list[Response]:
        """Return one response per request, in order; call ``arrived`` with each answer or error before."""
        ...


class Ticket(Protocol, Awaitable[Response]):
    """A request's place in a queue. Await it for the response."""

    def withdraw(self) -> None:
        """Give the place up. A request that was sent together with others still gets its answer."""
        ...

    def result(self) -> Response:
        """Return the response if it came although its awaiter was cancelled, else raise the cancellation."""
        ...


class ModelHooks(Protocol):
    """Everything that a model may offer beside its ``request`` or ``batch_request``. All of it is optional.

    A stage looks a hook up once, when it is made (``cachepipe.adapting``); ``max_n`` and ``cut_n`` may
    change later. `docs/adapters.md` shows the hooks at work.

    Attributes:
        max_n: the largest number of samples that one call returns. Default: no limit.
        cut_n: the number of samples above which a request is cut into several, unless it has a ``seed`` or
            ``best_of``. Default: never.
        cache_scope: identifies the model in cache keys. Default: ``model``.
        model: the name of the model, also for estimates of tokens. Default: unknown.
    """

    max_n: int | None
    cut_n: int | None
    cache_scope: str | None
    model: str | None

    def question(self, request: Request, scope: str | None) -> Any:
        """Return what a request asks, with its key: a `cachepipe.contract.keys.Question`.

        Default: the question that all fields of the request make (C9).
        """
        ...

    def present(self, sample: Any) -> Any:
        """Return what callers get of a sample, generated or stored. Default: the sample itself."""
        ...

    def pack(self, sample: Any) -> tuple[bytes, Mapping[str, Any]]:
        """Return the bytes to store for a sample, and what is noted beside it. Default: its JSON, nothing."""
        ...

    def unpack(self, stored: Any) -> Any:
        """Return a sample as callers get it. Default: the JSON that is read and presented.

        Args:
            stored: the stored sample, with its bytes in ``payload`` and what was noted in ``header``.
        """
        ...

    def context_of(self, request: Request) -> contextvars.Context | None:
        """Return the context in which the call for a request runs. Default: that of whoever asks first."""
        ...

    def submit(self, request: Request) -> Ticket:
        """Queue a request without waiting for it. Default: a task awaits ``request``."""
        ...
