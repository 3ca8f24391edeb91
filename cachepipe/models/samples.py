"""What the adapters of providers and of local models have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from cachepipe import wire
from cachepipe.accounting import noted
from cachepipe.typedefs import UNASKED, Request, field_names
from cachepipe.values import Codec

_UNSENT: Final = UNASKED | {"prompt"}
_codec = Codec()


class ProviderSamples:
    """A model whose samples have the form of a provider's answers."""

    def pack(self, sample: wire.Sample) -> tuple[bytes, Mapping[str, Any]]:
        """Return the bytes of a sample, and the facts to store with it."""
        return _codec.encode(sample), noted(sample)


class Listener:
    """Hears the texts of samples while a model generates them, for a reader who wants a stream.

    The model calls it in the thread that generates. It passes texts on only while all samples come from one
    generation: what a second one says would not go on where the first has stopped.

    Args:
        n: the number of samples.
        heard: called with the place of a sample and the next words of its text.

    Attributes:
        head: the fields that the samples have in common, such as their ``id``.
        texts: what was passed on of each sample.
    """

    def __init__(self, n: int, heard: Callable[[int, str], None]) -> None:
        self.n = n
        self.head: Mapping[str, Any] = {}
        self.texts = [""] * n
        self._heard = heard
        self._open = True

    def begin(self, head: Mapping[str, Any]) -> bool:
        """Learn that a generation begins; return whether to call `hear` with its texts."""
        self._open = self._open and not any(self.texts)
        if self._open:
            self.head = head
        return self._open

    def hear(self, place: int, words: str) -> None:
        """Take the next words of the text of a sample."""
        self.texts[place] += words
        self._heard(place, words)


@dataclass(frozen=True, eq=False)
class Listened(Request):
    """A request with a listener, which may hear its samples while they are generated."""

    def heard_by(self, listener: Listener) -> Self:
        """Set the listener; it is not part of the question."""
        object.__setattr__(self, "_listener", listener)
        return self

    def merging(self, n: int) -> Self:
        """Return the question for a call that serves others too: its samples have no listener."""
        twin = copy.copy(self.asking(n))
        twin.__dict__.pop("_listener", None)
        return twin


def listener_of(request: Request) -> Listener | None:
    """Return the listener of a request, if all of its samples are to be generated in one call."""
    listener = request.__dict__.get("_listener")
    return listener if isinstance(listener, Listener) and listener.n == request.n else None


def fields_of(request: Request) -> dict[str, Any]:
    """Return the fields of a request that are asked, except the prompt and fields that are None."""
    values = {name: getattr(request, name) for name in field_names(type(request)) if name not in _UNSENT}
    return {name: value for name, value in values.items() if value is not None}
