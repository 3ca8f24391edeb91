"""Bundles: files with what a cache holds of some namespaces, for others.

`container.py` is the form of the file, `lines.py` writes and reads entries as JSON lines, and `manifest.py`
says what a bundle holds. `writer.py` and `reader.py` write and read whole bundles, and `secrets.py` looks for
what should not be handed on.
"""

from __future__ import annotations

from typing import Final

SUFFIX: Final = ".cachepipe"
"""The ending of the names of bundles."""
