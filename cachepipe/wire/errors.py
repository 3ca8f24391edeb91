"""What can be wrong with bytes from the wire, each error a sentence."""

from __future__ import annotations

from cachepipe import errors


class WireError(errors.CachepipeError, ValueError):
    """The base of the errors of the wire layer."""


class BadRequest(WireError):  # noqa: N818 - names the thing at fault
    """A request does not say what it wants in a form that can be understood; nothing was sent."""


class BadAnswer(errors.BadAnswer, WireError):  # noqa: N818 - names the thing at fault
    """What arrived is no whole answer: broken, an error under 200, failed or cut off. It is not cached."""


class MixedAnswer(BadAnswer):
    """An answer to several questions that does not tell which of its samples answer which of them."""
