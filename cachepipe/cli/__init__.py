"""The command line: one group, whose commands are imported when they are called."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command that the process's arguments name, and exit with its code."""
    from cachepipe.cli.group import start  # noqa: PLC0415 - `import cachepipe.cli` stays light

    start()
