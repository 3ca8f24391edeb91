r"""Text that is safe to print, and when it may have colours.

Samples and prompts are hostile text: whatever a terminal would obey is made visible before it is
printed, as ``\x1b``, and what a pipe would misread is too.
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
"""A character that a terminal would obey; line feeds and tabs are none."""
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
    """Tell whether what is printed is read on a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def shows_colours() -> bool:
    """Tell whether what is printed may have colours: on a terminal that knows them, without NO_COLOR."""
    return on_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, codes: str, *, color: bool) -> str:
    """Return a text in colours, each of its lines by itself, or as it is.

    Args:
        text: text that is safe to print.
        codes: the parameters of the terminal's sequence, such as ``"1;34"``.
        color: whether to.
    """
    if not color or not text:
        return text
    lines = text.split("\n")
    return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if line else line for line in lines)
