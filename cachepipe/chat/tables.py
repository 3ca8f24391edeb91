"""Completions as tables: data frames, lines of JSON, and side by side."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cachepipe import jsontext, terminal
from cachepipe.chat.answers import TextCompletion, TokenLogProb
from cachepipe.chat.conversations import Conversation
from cachepipe.frames import Library, data_frame

COLUMNS: Final = (
    "prompt",
    "message",
    "model",
    "cached",
    "start_time",
    "end_time",
    "duration",
    "retrieval_duration",
    "prompt_tokens",
    "completion_tokens",
    "cost",
    "finish_reason",
    "mean_log_prob",
    "key",
    "index",
    "namespace",
    "request_id",
    "replicate",
    "error",
)
"""The columns of a data frame."""

_WIDTH: Final = 100
_NARROWEST: Final = 24  # columns of a sample, if a row has several
_LEAST: Final = 10
_Result = TextCompletion | BaseException


def to_dataframe(
    completions: Iterable[TextCompletion | BaseException], library: Library | None = None
) -> Any:
    """Return completions as a data frame, one row each, in their order.

    ``prompt`` is the last message that was completed, times are seconds since 1970, and the row of an error
    has only ``error``.

    Args:
        completions: completions, and errors in the places of failed ones.
        library: ``"pandas"`` or ``"polars"``; None uses the first one that is installed.

    Raises:
        ImportError: when neither is installed.
    """
    return data_frame([_row(completion) for completion in completions], COLUMNS, library)


def _row(completion: TextCompletion | BaseException) -> dict[str, Any]:
    if isinstance(completion, BaseException):
        return {"error": f"{type(completion).__name__}: {completion}"}
    row = {name: getattr(completion, name) for name in COLUMNS if hasattr(completion, name)}
    row["prompt"] = completion.conversation.messages[-1].text
    for name in ("prompt_tokens", "completion_tokens"):
        row[name] = completion.usage.get(name)
    if completion.token_log_probs:
        logs = [token.log_prob for token in completion.token_log_probs if not math.isnan(token.log_prob)]
        row["mean_log_prob"] = sum(logs) / len(logs) if logs else None
    return row


def to_jsonl(
    completions: Iterable[TextCompletion | BaseException], path: str | os.PathLike[str] | None = None
) -> str:
    """Return completions as lines of JSON with all of their fields; the line of an error has only ``error``.

    Args:
        completions: completions, and errors in the place of those that failed.
        path: a file to write them to as well.
    """
    text = "".join(f"{json.dumps(_document(completion))}\n" for completion in completions)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _document(completion: TextCompletion | BaseException) -> dict[str, Any]:
    if isinstance(completion, BaseException):
        return _row(completion)
    document = {field.name: getattr(completion, field.name) for field in dataclasses.fields(completion)}
    document["conversation"] = completion.conversation.to_messages()
    document["usage"] = dict(completion.usage)
    if completion.parsed is not None:
        document["parsed"] = completion.parsed.model_dump(mode="json")
    for name in ("token_log_probs", "full_token_log_probs"):
        document[name] = _plain(document[name])
    return {name: jsontext.valid(value) for name, value in document.items()}


def _plain(tokens: Any) -> Any:
    if isinstance(tokens, TokenLogProb):
        value = tokens.log_prob
        told = {"token": tokens.token, "log_prob": value if math.isfinite(value) else str(value)}
        return told if tokens.raw is None else {**told, "raw": list(tokens.raw)}
    return [_plain(token) for token in tokens] if isinstance(tokens, list) else tokens


def from_jsonl(text: str | os.PathLike[str]) -> list[TextCompletion | dict[str, Any]]:
    """Return the completions in lines of JSON, in their order, with errors in their places.

    ``parsed`` stays a mapping.

    Args:
        text: the lines, or the path of a file with them (not a string).

    Raises:
        ValueError: for a line that is not a completion; it names the line.
    """
    lines = (text if isinstance(text, str) else Path(text).read_text(encoding="utf-8")).split("\n")
    found: list[TextCompletion | dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_read(json.loads(line)))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            hint = "" if line.startswith("{") else ". The path of a file is given as a pathlib.Path"
            raise ValueError(f"line {number} is not a completion: {error!r}{hint}") from error
    return found


def _read(document: Mapping[str, Any]) -> TextCompletion | dict[str, Any]:
    if "conversation" not in document and "error" in document:
        return dict(document)
    fields = dict(document)
    fields["conversation"] = Conversation(list(document["conversation"]))
    for name in ("token_log_probs", "full_token_log_probs"):
        fields[name] = _tokens(document.get(name))
    return TextCompletion(**fields)


def _tokens(token: Any) -> Any:
    if not isinstance(token, dict):
        return None if token is None else [_tokens(each) for each in token]
    value, raw = float(token["log_prob"]), token.get("raw")  # JSON has no infinities: they are strings
    return TokenLogProb(token["token"], value, None if raw is None else bytes(raw))


def side_by_side(
    completions: Sequence[TextCompletion | BaseException],
    *,
    labels: Sequence[str] | None = None,
    width: int | None = None,
    color: bool | None = None,
) -> str:
    """Return samples side by side under their prompt, with as many in a row as fit.

    Args:
        completions: completions, and errors in the place of those that failed. Where their prompts differ,
            each sample has its own above it.
        labels: the heading of each; by default its number, model, and whether it was cached.
        width: columns to use; by default the width of the terminal, or 100 without one.
        color: whether to use colours; None uses them on a terminal without NO_COLOR.

    Raises:
        ValueError: when there are not as many labels as completions, or too few columns.
    """
    from rich.console import Console  # noqa: PLC0415 - only for people
    from rich.text import Text  # noqa: PLC0415

    completions = list(completions)
    labels = list(itertools.starmap(_label, enumerate(completions, start=1))) if labels is None else labels
    if len(labels) != len(completions):
        raise ValueError(
            f"side_by_side takes a label for each: {len(completions)} are shown, got {len(labels)}"
        )
    color = terminal.shows_colours(color)
    width = _terminal_width() if width is None else width
    if width < _LEAST:
        raise ValueError(f"width= is a number of columns, at least {_LEAST}; got {width!r}")
    prompts = [_row(one).get("prompt", "") for one in completions]
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        legacy_windows=False,
        force_jupyter=False,
    )
    if len(set(prompts)) == 1:  # it is shown once
        if prompts[0]:
            console.print(Text(terminal.visible(prompts[0], lines=True), style="bold"))
        prompts = []
    per_row = max(width // _NARROWEST, 1)
    for start in range(0, len(completions), per_row):
        shown = slice(start, start + per_row)
        console.print(_table(completions[shown], labels[shown], prompts[shown], width))
    written: str = console.file.getvalue()  # type: ignore[attr-defined]  # it is the one given above
    return written.rstrip("\n")


def _terminal_width() -> int:
    return shutil.get_terminal_size((_WIDTH, 1)).columns if terminal.on_terminal() else _WIDTH


def _table(completions: Sequence[_Result], labels: Sequence[str], prompts: Sequence[str], width: int) -> Any:
    """Return samples beside each other, each under its label and its prompt, if there are prompts."""
    from rich import box  # noqa: PLC0415 - only for people
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.ROUNDED, width=width)
    for label in labels:
        table.add_column(Text(terminal.visible(str(label))), ratio=1, overflow="fold")
    if prompts:
        table.add_row(*(Text(terminal.visible(prompt, lines=True), "bold") for prompt in prompts))
    table.add_row(*(_cell(one, Text) for one in completions))
    return table


def _label(number: int, one: TextCompletion | BaseException) -> str:
    if isinstance(one, BaseException):
        return f"{number} failed"
    return f"{number} {one.model}{' cached' if one.cached else ''}"


def _cell(one: TextCompletion | BaseException, text: Any) -> Any:
    if isinstance(one, BaseException):
        return text(terminal.visible(_row(one)["error"], lines=True), "red")
    return text(terminal.visible(one.to_message().text, lines=True))
