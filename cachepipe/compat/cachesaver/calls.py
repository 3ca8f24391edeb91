"""CacheSaver's clients: cached clients of the SDKs, each in a run of its own."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Self

from cachepipe import context, runs
from cachepipe.compat.cachesaver.typedefs import Metadata
from cachepipe.providers.info import info


class Client:
    """A client of CacheSaver: the same constructor, calls with the same extra keywords.

    Attributes of the SDK's client (``client.chat.completions.create``, ``client.messages.create`` …) work
    as in the SDK. Each call also takes ``namespace=``, ``request_id=`` and ``metadata=True``, with which it
    returns the answer and a `Metadata`. In one client, a repeated request gets fresh samples; a new client
    starts again, and gets the samples of the first one.

    Args:
        namespace: the unit within which samples are independent.
        cachedir: the folder of the cache, or another cache that cachepipe takes.
        batch_size: the largest number of samples that a local model generates together. It has no effect
            otherwise: equal requests in flight are merged, and others go out as they come.
        timeout: seconds that a batch of a local model stays open. It has no effect otherwise. A time-out of
            calls is an option of each call.
        client_kwargs: parameters of the SDK's client, or of cachepipe's.

    Attributes:
        client: cachepipe's client, a subclass of the SDK's.
    """

    _batches: bool = False
    """Whether cachepipe's client takes ``batch_size`` and ``timeout``."""

    def __init__(
        self,
        namespace: str | None = "default",
        cachedir: Any = "./cache",
        batch_size: int = 1,
        timeout: float | None = None,
        **client_kwargs: Any,
    ) -> None:
        self.namespace, self.cachedir = namespace, cachedir
        self.batch_size, self.timeout = batch_size, timeout
        if self._batches:
            client_kwargs |= {"batch_size": batch_size, "timeout": timeout or 0.0}
        self.client = self._make(cache=cachedir, namespace=namespace, **client_kwargs)
        self._run = runs.Run()

    def _make(self, **kwargs: Any) -> Any:
        """Return cachepipe's client."""
        raise NotImplementedError

    def _calls_for(self, arguments: dict[str, Any]) -> int | None:  # noqa: ARG002 - subclasses use it
        """Return how many calls answer a call for ``n`` answers; None for one, if the API knows ``n``.

        Subclasses take ``n`` out of the arguments, and may set what the API has instead.
        """
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "client" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _wrapped(getattr(self.client, name), self)

    @contextlib.contextmanager
    def _within(self, settings: dict[str, Any]) -> Iterator[None]:
        """Make the calls in the block part of this client's run."""
        with runs.within(self._run), context.using(**settings):
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} namespace={self.namespace!r} cachedir={self.cachedir!r}>"


def taken_n(arguments: dict[str, Any]) -> int | None:
    """Take the number of answers out of the arguments of a call; None if they do not say it."""
    n = arguments.pop("n", None)
    if n is not None and (type(n) is not int or n < 1):
        raise ValueError(f"n is the number of answers, a whole number of at least 1; got {n!r}")
    return n


def _wrapped(value: Any, client: Client) -> Any:
    """Return a resource or method of the SDK's client such that its calls are in the run of ours."""
    plain = isinstance(value, str | int | float | bool | None | dict | list | tuple)
    return value if plain else _Attribute(value, client)


class _Attribute:
    """A resource or a method of the SDK's client."""

    def __init__(self, target: Any, client: Client) -> None:
        self._target, self._client = target, client

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self._target).__name__!r} object has no attribute {name!r}")
        return _wrapped(getattr(self._target, name), self._client)

    def __call__(
        self,
        *args: Any,
        namespace: str | context.Inherited | None = context.INHERITED,
        request_id: str | context.Inherited | None = context.INHERITED,
        metadata: bool = False,
        **kwargs: Any,
    ) -> Any:
        several = self._client._calls_for(kwargs)  # noqa: SLF001 - it is ours
        # A namespace of None means the client's own, as in CacheSaver.
        given = {"namespace": namespace, "request_id": request_id}
        settings = {name: value for name, value in given.items() if value is not None}

        def one() -> Any:
            return self._target(*args, **kwargs)

        if inspect.iscoroutinefunction(inspect.unwrap(self._target)):
            return self._awaited(one, several, settings, with_metadata=metadata)
        with self._client._within(settings):  # noqa: SLF001 - it is ours
            found = [one() for _ in range(several or 1)]
        return _answered(found, several, with_metadata=metadata)

    async def _awaited(
        self,
        one: Callable[[], Coroutine[Any, Any, Any]],
        several: int | None,
        settings: dict[str, Any],
        *,
        with_metadata: bool,
    ) -> Any:
        with self._client._within(settings):  # noqa: SLF001 - it is ours
            found = await asyncio.gather(*[one() for _ in range(several)]) if several else [await one()]
        return _answered(found, several, with_metadata=with_metadata)

    def __repr__(self) -> str:
        return f"<cached {self._target!r}>"


def _answered(found: Sequence[Any], several: int | None, *, with_metadata: bool) -> Any:
    """Return the answer, or a list of answers if ``n`` is above 1, with metadata if the caller wants it."""
    answer = found[0] if several in (None, 1) else list(found)
    if not with_metadata:
        return answer
    facts = [known for each in found if (known := info(each)) is not None]
    if len(facts) < len(found):  # the cache has no part in such calls, as in a list of models
        return answer, Metadata(n=len(found))
    return answer, Metadata(
        n=sum(len(each.cached) for each in facts),
        cached=[flag for each in facts for flag in each.cached],
        duplicated=[flag for each in facts for flag in each.duplicated],
    )
