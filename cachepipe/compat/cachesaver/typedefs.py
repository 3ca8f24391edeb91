"""CacheSaver's ``typedefs``: requests with the arguments of a call, and metadata of answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from cachepipe import typedefs
from cachepipe.typedefs import Batch, BatchRequestModel, Response, SingleRequestModel

__all__ = ["Batch", "BatchRequestModel", "Metadata", "Request", "Response", "SingleRequestModel"]


class Metadata(NamedTuple):
    """Where the samples of an answer came from; a call with ``metadata=True`` returns it with the answer.

    Attributes:
        n: the number of samples.
        cached: per sample, False exactly when it was generated for this call.
        duplicated: per sample, whether it was merged into an equal call that was in flight.
    """

    n: int
    cached: list[bool] | None = None
    duplicated: list[bool] | None = None


@dataclass(frozen=True)
class Request(typedefs.Request):
    """A question as the arguments of a call, for your own model; ``prompt=`` works too.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
    """

    prompt: Any = dataclasses.field(default=None, kw_only=True)
    args: Any = None
    kwargs: Any = None
