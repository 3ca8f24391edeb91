"""The fast path: answers plain calls of a resource's ``create`` without the SDK's preparations.

A ``create()`` spends three quarters of its time on the transformation of its parameters, and most of the rest
on a response object that is not used. If all arguments are JSON values, the transformed body equals the
arguments. So the first call with a set of parameters takes the SDK's normal path, and this module learns the
result (the options of the request, the order of the body's fields) as a `CallShape`. Later calls with the
same parameters use the shape. All other calls take the SDK's normal path.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import orjson

from cachepipe import context, wire
from cachepipe.errors import TooManySamples
from cachepipe.portal import run_now
from cachepipe.providers import info
from cachepipe.providers.exchange import (
    body_from,
    check_size,
    questions_of,
)
from cachepipe.providers.generation import Answer
from cachepipe.sdk import internals
from cachepipe.sdk.calls import STRICT, ClientCall

_MOST_SHAPES = 256
_RESOURCES: Final = (("chat", "completions"), ("embeddings",))
"""The resources with a fast path for ``create``."""


class CallShape(NamedTuple):
    """What the SDK makes of a call with a set of parameters.

    Attributes:
        options: the SDK's description of the request, without a body.
        cast_to: the type into which the SDK parses the answer.
        api: the API of the request.
        names: the fields of the body, in order.
        added: the fields that the SDK adds to the arguments.
    """

    options: Any
    cast_to: Any
    api: wire.Api
    names: tuple[str, ...]
    added: Mapping[str, Any]


class ObservedCall:
    """A call on the SDK's normal path, from which a shape may be learned."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.shape: CallShape | None = None

    def learn(self, cast_to: Any, options: Any, *, stream: bool) -> None:
        """Learn the shape of the call, if its arguments can be recognised in the body."""
        api = wire.api_for(options.method, str(options.url))
        body = options.json_data
        if api is None or stream or not internals.is_plain(options) or not isinstance(body, Mapping):
            return
        if options.extra_json is not None or getattr(options, "content", None) is not None or options.files:
            return
        if "encoding_format" in self.arguments or not _is_json(self.arguments):
            return  # the parser of embeddings knows the format
        added = {name: value for name, value in body.items() if name not in self.arguments}
        if len(body) - len(added) != len(self.arguments) or any(
            body[name] != value for name, value in self.arguments.items()
        ):
            return
        self.shape = CallShape(internals.with_body(options, {}), cast_to, api, tuple(body), added)


observed: contextvars.ContextVar[ObservedCall | None] = contextvars.ContextVar(
    "cachepipe_observed", default=None
)
"""The call that is being made."""


def with_fast_path(resource: Any, names: tuple[str, ...]) -> Any:
    """Return a client's resource with the fast path for its ``create`` method, there or below."""
    last = resource
    for name in names:
        last = getattr(last, name, None)
    kind: Any = type(last)
    if internals.is_own(getattr(kind, "create", None), kind):
        last.__class__ = _fast_class(kind)
    return resource


@functools.lru_cache(maxsize=64)
def _fast_class(kind: Any) -> Any:
    """Return a subclass of a resource's class with the fast path for ``create``."""
    own = kind.create
    create = _create(kind, own)
    if not inspect.iscoroutinefunction(inspect.unwrap(own)):
        create = run_now(create)
    functools.update_wrapper(create, own)
    about = {"create": create, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), {**about, "__qualname__": kind.__qualname__})


def _create(kind: Any, own: Any) -> Callable[..., Any]:
    """Return a ``create`` method with the fast path, as a coroutine function."""
    shapes: dict[tuple[str, ...], CallShape] = {}

    async def create(self: Any, **arguments: Any) -> Any:
        client = internals.client_of(self)
        settled = client._settled  # noqa: SLF001 - it is ours
        if kind.create is not own:  # somebody has put something in front of it since
            return await settled(kind.create(self, **arguments))
        given = internals.given(arguments)
        shape = shapes.get(tuple(given))
        if shape is None:
            taught = ObservedCall(given)
            token = observed.set(taught)
            try:
                return await settled(own(self, **arguments))
            finally:
                observed.reset(token)
                if taught.shape is not None and len(shapes) < _MOST_SHAPES:
                    shapes[tuple(given)] = taught.shape
        begun = _begin(client, shape, given)
        if begun is None:
            return await settled(own(self, **arguments))
        made, call, answer = begun
        if call is None:
            return made
        if answer is None:
            answer = await settled(call.answer())
        made = _built(call, answer)
        if made is None:
            made = await client._parsed(call, answer)  # noqa: SLF001 - it is ours
        return made

    return create


def _begin(client: Any, shape: CallShape, given: Mapping[str, Any]) -> Any:
    """Begin a call with these arguments; return None if the SDK must handle them.

    Returns:
        The SDK's object, if all of it is known; else None, the call, and the answer if it is known.
    """
    surface, kind = client._cachepipe, client._call_class  # noqa: SLF001 - they are ours
    using = context.current()
    mode = using.mode_of(surface.mode)
    if mode == "bypass" or surface.backing.closed or internals.is_strict(client):
        return None
    if not _is_json(given) or not _is_usual(internals.kind_of(client)) or "request" in vars(client):
        return None
    api, added = shape.api, shape.added
    body = {name: given[name] if name in given else added[name] for name in shape.names}
    try:
        asks = api.split(body)
        check_size(asks)
    except (wire.BadRequest, TooManySamples):
        return None
    for ask in asks:
        if ask.stream or not ask.cacheable:
            return None
    place = internals.target_of(client, shape.options, body)
    questions = questions_of(api, asks, *place, scope=surface.scope)
    found = None
    if mode == "read-write":
        claimant = using.claimant(surface.namespace)
        asked = [(question, ask.n) for question, ask in zip(questions, asks, strict=True)]
        found = surface.cache(mode).look(claimant, asked, body)
        if found is not None:
            samples = found.values()
            content = body_from(api, asks[0], samples)
            made = internals.validated(shape.cast_to, content, shape.options, samples[0].made_by)
            if made is not None:
                flags = [
                    kind.flags(surface, claimant.namespace, *asked)
                    for asked in zip(questions, asks, strict=True)
                ]
                names = tuple([question.key for question in questions])
                record = info.Record(names, claimant, place[0])
                record.later = functools.partial(found.responses, flags)
                info.note(made, record)
                return made, None, None
    how: dict[str, Any] = {"api": api, "body": body, "asks": asks, "mode": mode, "using": using}
    call = kind(
        client,
        surface,
        shape.cast_to,
        shape.options,
        stream=False,
        stream_cls=None,
        place=place,
        questions=questions,
        **how,
    )
    if mode == "replay":
        return None, call, call.known()
    return None, call, None if found is None else call.answered(found)


def _is_json(value: Any) -> bool:
    """Return True if a value consists of JSON values only."""
    try:
        orjson.dumps(value, option=STRICT)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def _is_usual(kind: Any) -> bool:
    """Return True if a client class makes its calls as ours do, which a subclass may not."""
    return all(
        getattr(kind, name).__module__ == "cachepipe.sdk.mixins" for name in ("request", "_process_response")
    )


def _built(call: ClientCall, answer: Answer) -> Any:
    """Return the SDK's object for an answer, or None if only the SDK itself can make it."""
    if type(answer.content) is not bytes or not answer.kept:
        return None
    made = internals.validated(call.cast_to, answer.content, call.options, answer.made_by)
    if made is not None:
        info.note(made, call.record)
    return made


def property_of(sdk: Any, name: str, names: tuple[str, ...]) -> Any:
    """Wrap the SDK's cached resource property with the fast path; None if the SDK lacks it."""
    own = inspect.getattr_static(sdk, name, None)
    if not isinstance(own, functools.cached_property):
        return None
    make: Any = own.func

    def get(self: Any) -> Any:
        return with_fast_path(make(self), names)

    get.__doc__ = own.__doc__
    return functools.cached_property(get)


def equip(kind: Any, sdk: Any) -> None:
    """Give a client class resources with the fast path for ``create``."""
    for name, *rest in _RESOURCES:
        made = property_of(sdk, name, tuple(rest))
        if made is not None:
            made.__set_name__(kind, name)
            setattr(kind, name, made)
