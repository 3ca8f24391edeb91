r"""Makes text safe to print, and decides about colours.

Samples and prompts are untrusted text: characters that a terminal would obey or a pipe would misread are made
visible before printing, as ``\x1b``.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Final

# Controls, invisible marks that reorder or hide text, line separators, lone surrogates, tags.
_OBEYED = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
)
UNSAFE: Final = re.compile(f"[{_OBEYED}]")
"""A character that a terminal would obey, except line feeds and tabs."""
_UNSAFE_IN_LINE: Final = re.compile(f"[{_OBEYED}\t\n]")
_NAMED: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(text: str, *, lines: bool = False) -> str:
    r"""Return the text with everything that a terminal would obey written out, as ``\x1b`` or ``\u202e``.

    Args:
        text: any text, however hostile.
        lines: keep line feeds and tabs.
    """
    return (UNSAFE if lines else _UNSAFE_IN_LINE).sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    if character in _NAMED:
        return _NAMED[character]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def on_terminal() -> bool:
    """Return True if a stream is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def shows_colours(wanted: bool | None = None) -> bool:
    """Return what is wanted; for None, True on a terminal that supports colours, without NO_COLOR."""
    if wanted is not None:
        return wanted
    return on_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, codes: str, *, color: bool) -> str:
    """Return a text with each line coloured, or unchanged.

    Args:
        text: text that is safe to print.
        codes: the parameters of the terminal's sequence, such as ``"1;34"``.
        color: whether to colour it.
    """
    if not color or not text:
        return text
    lines = text.split("\n")
    return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if line else line for line in lines)
