"""How much one request may ask for, and how much of one answer is kept in memory.

The environment sets both: ``CACHEPIPE_MAX_N`` is a number of samples, ``CACHEPIPE_MAX_ANSWER`` one of MiB.
"""

from __future__ import annotations

import os
from typing import Final

from cachepipe.errors import CachepipeError, TooManySamples

_SAMPLES: Final = 10_000
_MIB: Final = 64


def max_n() -> int:
    """Return the most samples that one request may ask for.

    Raises:
        CachepipeError: when the environment holds another thing than a number for it.
    """
    return _number("CACHEPIPE_MAX_N", _SAMPLES)


def max_answer() -> int:
    """Return the most bytes of a decoded answer that are kept in memory, and so in the cache.

    Raises:
        CachepipeError: when the environment holds another thing than a number for it.
    """
    return _number("CACHEPIPE_MAX_ANSWER", _MIB) << 20


def check_n(n: int, prompts: int = 1, most: int | None = None) -> None:
    """Refuse a request for more samples than one may ask for, before anything is made for them.

    Args:
        n: how many samples it asks for, of each of its prompts; one of each is never too much.
        prompts: how many prompts it has.
        most: the bound, if it is another than that of the environment.

    Raises:
        TooManySamples: when they are too many.
    """
    if n == 1:
        return
    most = max_n() if most is None else most
    if n * prompts > most:
        shown = str(n) if n.bit_length() <= 128 else f"a number of {n.bit_length()} bits"
        each = f" for each of {prompts} prompts" if prompts > 1 else ""
        raise TooManySamples(
            f"a request asks for at most {most} samples; got n = {shown}{each}. Ask in several requests, or "
            "raise the bound: the environment variable CACHEPIPE_MAX_N, or --max-n of a proxy"
        )


def _number(variable: str, usual: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return usual
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text)):
        raise CachepipeError(f"the variable {variable} is a whole number above 0; got {text!r:.80}")
    return int(text)
