"""Writes the stub of the clients that are made from the table of providers: python tests/stubs.py."""

from __future__ import annotations

from pathlib import Path

from cachepipe.providers import presets

STUB = Path(__file__).parent.parent / "cachepipe" / "sdk" / "presets.pyi"


def text():
    """What the stub holds."""
    classes = [
        f"class {name}({'AsyncOpenAI' if name.startswith('Async') else 'OpenAI'}): ..."
        for name in sorted(presets.compatible())
    ]
    head = "# Made by tests/stubs.py from the table in cachepipe/providers/presets.py."
    return "\n".join([head, "", "from cachepipe.sdk.openai import AsyncOpenAI, OpenAI", "", *classes, ""])


if __name__ == "__main__":
    STUB.write_text(text(), encoding="utf-8")
