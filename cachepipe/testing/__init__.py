"""Test doubles for code that calls language models: a real small model, a server, and more.

Each name is imported when it is first used, so `import cachepipe.testing` is fast, and needs only the
packages that the names in use need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cachepipe.testing.clock import FakeClock
    from cachepipe.testing.contract import StoreContract
    from cachepipe.testing.engines import MemoryEngine
    from cachepipe.testing.loop import VirtualTimeLoop
    from cachepipe.testing.models import ScriptedCall, ScriptedError, ScriptedModel
    from cachepipe.testing.ngram import NGramModel
    from cachepipe.testing.server import MockServer
    from cachepipe.testing.server import Settings as MockSettings
    from cachepipe.testing.stores import FaultyStore, MortalStore

# Public name: its module in this package, and its name there. A new double gets a line here.
_HOMES: Final = {
    "FakeClock": ("clock", "FakeClock"),
    "FaultyStore": ("stores", "FaultyStore"),
    "MemoryEngine": ("engines", "MemoryEngine"),
    "MockServer": ("server", "MockServer"),
    "MockSettings": ("server", "Settings"),
    "MortalStore": ("stores", "MortalStore"),
    "NGramModel": ("ngram", "NGramModel"),
    "ScriptedCall": ("models", "ScriptedCall"),
    "ScriptedError": ("models", "ScriptedError"),
    "ScriptedModel": ("models", "ScriptedModel"),
    "StoreContract": ("contract", "StoreContract"),
    "VirtualTimeLoop": ("loop", "VirtualTimeLoop"),
}

__all__ = [
    "FakeClock",
    "FaultyStore",
    "MemoryEngine",
    "MockServer",
    "MockSettings",
    "MortalStore",
    "NGramModel",
    "ScriptedCall",
    "ScriptedError",
    "ScriptedModel",
    "StoreContract",
    "VirtualTimeLoop",
]


if not TYPE_CHECKING:  # else type checkers would take any name for one of the package

    def __getattr__(name: str) -> Any:
        """Return the double of that name, importing its module."""
        if name not in _HOMES:
            raise AttributeError(f"cachepipe.testing has no {name!r}; it has {', '.join(_HOMES)}.")
        module, original = _HOMES[name]
        value = getattr(import_module(f"{__name__}.{module}"), original)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
