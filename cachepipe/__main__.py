"""``python -m cachepipe`` is the console script ``cachepipe``."""

from __future__ import annotations

from cachepipe.cli import main

if __name__ == "__main__":
    main()
