"""Brings what other programs have paid for into a cache: batches of OpenAI, and caches of CacheSaver.

Each importer names what it could not take, and why. An import can be repeated: it adds nothing twice. No
answer is given to a question unless it is known to be its answer.

Every name is imported when it is first used, so that the command line shows its help quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cachepipe import lazy

if TYPE_CHECKING:
    from cachepipe.importers.cachesaver import import_cachesaver as import_cachesaver
    from cachepipe.importers.openai_batch import import_batch as import_batch
    from cachepipe.importers.report import Imported as Imported
    from cachepipe.importers.report import NotTaken as NotTaken

_HOMES: Final = {
    "Imported": "cachepipe.importers.report",
    "NotTaken": "cachepipe.importers.report",
    "import_batch": "cachepipe.importers.openai_batch",
    "import_cachesaver": "cachepipe.importers.cachesaver",
}

__all__ = ["Imported", "NotTaken", "import_batch", "import_cachesaver"]

if not TYPE_CHECKING:  # else type checkers would take any name for one of the package
    __getattr__, __dir__ = lazy.names(__name__, _HOMES)
