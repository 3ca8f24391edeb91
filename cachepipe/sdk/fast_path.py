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
from cachepipe.bounds import check_n
from cachepipe.cache.cache import responses_of
from cachepipe.errors import TooManySamples
from cachepipe.portal import run_now
from cachepipe.providers import info
from cachepipe.providers.exchange import body_from, questions_of
from cachepipe.sdk import internals
from cachepipe.sdk.calls import STRICT

_MOST_SHAPES = 256
_RESOURCES: Final = (("chat", "completions"), ("embeddings",))
"""The resources with a fast path for ``create``."""


class CallShape(NamedTuple):
    """What the SDK makes of a call with a set of parameters.

    Attributes:
        options: the SDK's description of the request, without a body.
        cast_to: the type into which the SDK parses the answer.
        parsed_once: whether the SDK returns the parsed answer as it is.
        api: the API of the request.
        body: the fields of the body in order, with the values that the SDK adds to the arguments.
    """

    options: Any
    cast_to: Any
    parsed_once: bool
    api: wire.Api
    body: Mapping[str, Any]


class ObservedCall:
    """A call on the SDK's normal path, from which a shape may be learned."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments
        self.shape: CallShape | None = None

    def learn(self, cast_to: Any, options: Any, *, stream: bool) -> None:
        """Learn the shape of the call, if the body contains its arguments unchanged."""
        api = wire.api_for(options.method, str(options.url))
        body = options.json_data
        if api is None or stream or not internals.is_plain(options) or not isinstance(body, Mapping):
            return
        if any(getattr(options, name, None) for name in ("extra_json", "content", "files")):
            return
        if "encoding_format" in self.arguments or not _is_json(self.arguments):
            return  # the parser of embeddings knows the format
        if {**body, **self.arguments} != body:
            return
        bare, once = internals.with_body(options, {}), internals.is_parsed_once(options)
        fields = {**body, **dict.fromkeys(self.arguments)}
        self.shape = CallShape(bare, cast_to, once, api, fields)


observed: contextvars.ContextVar[ObservedCall | None] = contextvars.ContextVar(
    "cachepipe_observed", default=None
)
"""The call that is being made on the SDK's normal path."""


def with_fast_path(resource: Any, names: tuple[str, ...]) -> Any:
    """Give a client's resource, or the one below it with these names, the fast path for ``create``."""
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
    shapes: dict[tuple[Any, ...], CallShape] = {}

    async def create(self: Any, **arguments: Any) -> Any:
        client = internals.client_of(self)
        settled = client._settled  # noqa: SLF001 - it is ours
        if kind.create is not own:  # another library has replaced it since
            return await settled(kind.create(self, **arguments))
        given = internals.given(arguments)
        key = (internals.has_own_url(client), *given)
        shape = shapes.get(key)
        if shape is None:
            call = ObservedCall(given)
            token = observed.set(call)
            try:
                return await settled(own(self, **arguments))
            finally:
                observed.reset(token)
                if call.shape is not None and len(shapes) < _MOST_SHAPES:
                    shapes[key] = call.shape
        begun = _begin(client, shape, given)
        if begun is None:
            return await settled(own(self, **arguments))
        made, call, answer = begun
        if made is not None:
            return made
        if answer is None:
            answer = await settled(call.answer())
            if answer.kept:
                made = _made(shape, answer.content, answer.made_by, call.record)
        return await client._parsed(call, answer) if made is None else made  # noqa: SLF001 - it is ours

    return create


def _begin(client: Any, shape: CallShape, given: Mapping[str, Any]) -> Any:
    """Begin a call with these arguments; return None if the SDK must handle them.

    Returns:
        The SDK's object, if all of it is known; else None, the call, and the answer if it is known.
    """
    view, kind = client._cachepipe, client._call_class  # noqa: SLF001 - they are ours
    using = context.current()
    mode = using.mode_of(view.mode)
    if mode == "bypass" or view.shared_store.closed or not internals.is_usual(client):
        return None
    api, body = shape.api, {**shape.body, **given}
    asks = _asks_of(api, body)
    if not asks:
        return None
    target = internals.known_target(client, shape.options, body)
    limit = client._max_n  # noqa: SLF001 - it is ours
    questions = questions_of(api, asks, target.url, target.headers, scope=view.scope, max_n=limit)
    claimant = using.claimant(view.namespace, view.replicate)
    asked = [(question, asks[0].n) for question in questions]
    ordered = kind.check_order(using.ordered_of(view.ordered))
    found = view.cache(mode).look(claimant, asked, body) if ordered is False else None
    if found is not None:
        samples = found[0].values if len(found) == 1 else [value for one in found for value in one.values]
        record = info.Record(questions, claimant, target.url, view.prices)
        made = _made(shape, body_from(api, asks[0], samples), samples[0].made_by, record)
        if made is not None:
            flagged = functools.partial(kind.flags, view, claimant.namespace)
            record.later = functools.partial(responses_of, found, list(map(flagged, questions, asks)))
            return made, None, None
    call = kind(
        client,
        shape.cast_to,
        shape.options,
        target,
        api=api,
        body=body,
        asks=asks,
        stream=False,
        alone=False,
        mode=mode,
        claimant=claimant,
        questions=questions,
        ordered=ordered,
    )
    return None, call, None if found is None else call.hit(found)


def _asks_of(api: wire.Api, body: Mapping[str, Any]) -> tuple[wire.Ask, ...]:
    """Return the asks of a body; none if the SDK must handle it."""
    if not _is_json(body):
        return ()
    try:
        asks = api.split(body)
        check_n(asks[0].n, len(asks))
    except (wire.BadRequest, TooManySamples):
        return ()
    return asks if asks[0].cacheable and not asks[0].stream else ()


def _made(shape: CallShape, content: Any, made_by: str | None, record: info.Record) -> Any:
    """Return the SDK's object for an answer, or None if only the SDK itself can make it."""
    if not shape.parsed_once or type(content) is not bytes:
        return None
    made = internals.validated(shape.cast_to, content, made_by)
    if made is not None:
        info.note(made, record)
    return made


def _is_json(value: Any) -> bool:
    """Return True if a value consists of JSON values only."""
    try:
        orjson.dumps(value, option=STRICT)
    except TypeError:
        return False
    return True


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
