"""The errors of requests and answers in a provider's format. Each message is a sentence."""

from __future__ import annotations

from cachepipe.errors import BadAnswer, CachepipeError

__all__ = ["BadAnswer", "BadRequest", "MixedAnswer"]


class BadRequest(CachepipeError, ValueError):  # noqa: N818 - names the thing at fault
    """A request is not in a valid form; nothing was sent."""


class MixedAnswer(BadAnswer):
    """An answer to several questions does not show which of its samples answers which question."""
