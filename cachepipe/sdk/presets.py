"""The clients of OpenAI-compatible providers: two classes for each row of `cachepipe.providers.presets`.

A class is made when its name is first used. ``tests/stubs.py`` writes ``presets.pyi`` for type checkers.
"""

from __future__ import annotations

from typing import Any

from cachepipe.sdk.openai import preset_class


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    made = globals()[name] = preset_class(name)
    return made
