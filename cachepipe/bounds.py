"""Limits on the samples of one request and on the size of one answer in memory (C12).

The environment sets both: ``CACHEPIPE_MAX_N`` is a number of samples, ``CACHEPIPE_MAX_ANSWER`` a size in MiB.
"""

from __future__ import annotations

import os
from typing import Final

from cachepipe.errors import CachepipeError, TooManySamples

_SAMPLES: Final = 10_000
_MIB: Final = 64


def max_n() -> int:
    """Return the largest number of samples of one request.

    Raises:
        CachepipeError: when the variable is not a whole number above 0.
    """
    return _number("CACHEPIPE_MAX_N", _SAMPLES)


def max_answer() -> int:
    """Return the largest size in bytes of a decoded answer that is kept in memory, and so can be cached.

    Raises:
        CachepipeError: when the variable is not a whole number above 0.
    """
    return _number("CACHEPIPE_MAX_ANSWER", _MIB) << 20


def check_n(n: int, prompts: int = 1, most: int | None = None) -> None:
    """Raise an error for a request for too many samples, before memory is allocated for them.

    Args:
        n: the number of samples per prompt; one sample per prompt is always allowed.
        prompts: the number of prompts.
        most: the limit, if it differs from the environment's.

    Raises:
        TooManySamples: when there are too many.
    """
    if n == 1:
        return
    most = max_n() if most is None else most
    if n * prompts > most:
        shown = str(n) if n.bit_length() <= 128 else f"a number of {n.bit_length()} bits"
        each = f" for each of {prompts} prompts" if prompts > 1 else ""
        raise TooManySamples(
            f"a request asks for at most {most} samples; got n = {shown}{each}. Ask in several requests, or "
            "raise the limit: the environment variable CACHEPIPE_MAX_N, or --max-n of a proxy"
        )


def _number(variable: str, usual: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return usual
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text)):
        raise CachepipeError(f"the variable {variable} is a whole number above 0; got {text!r:.80}")
    return int(text)
