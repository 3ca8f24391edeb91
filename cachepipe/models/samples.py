"""What the adapters of providers and of local models have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

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


def fields_of(request: Request) -> dict[str, Any]:
    """Return the fields of a request that are asked, except the prompt and fields that are None."""
    values = {name: getattr(request, name) for name in field_names(type(request)) if name not in _UNSENT}
    return {name: value for name, value in values.items() if value is not None}
