"""Data frames of pandas or polars, which are imported when a frame is asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cachepipe import jsontext

Library = Literal["pandas", "polars"]
"""What makes the data frame."""


def data_frame(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], library: Library | None = None
) -> Any:
    """Return rows as a data frame; a column that a row lacks is None in it.

    Args:
        rows: the rows.
        columns: the columns, in order.
        library: ``"pandas"`` or ``"polars"``; None uses the first one that is installed.

    Raises:
        ImportError: when neither is installed.
    """
    if library not in (None, "pandas", "polars"):
        raise ValueError(f"library= is 'pandas', 'polars' or None; got {library!r:.100}")
    names = [name for name in ("pandas", "polars") if importlib.util.find_spec(name)]
    chosen: str | None = library or next(iter(names), None)
    if chosen is None:
        raise ImportError("a data frame needs pandas or polars: pip install 'cachepipe[pandas]'")
    if chosen not in names:
        raise ImportError(f"{chosen} is not installed: pip install 'cachepipe[{chosen}]'")
    made = importlib.import_module(chosen)
    return made.DataFrame({name: [_encodable(row.get(name)) for row in rows] for name in columns})


def _encodable(value: Any) -> Any:
    """Return a cell without lone surrogates, which some libraries refuse."""
    return jsontext.mended(value) if isinstance(value, str) else value
