r"""What the commands share: options, opening a store to read, and printing text safely.

Samples and prompts are untrusted text: characters that a terminal would obey or a pipe would misread are made
visible before printing, as ``\x1b``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import click
import orjson

from cachepipe.cli.group import Failure
from cachepipe.errors import StoreError
from cachepipe.terminal import UNSAFE, on_terminal, shows_colours, visible

if TYPE_CHECKING:
    from cachepipe.accounting import Account
    from cachepipe.prices import Prices
    from cachepipe.stores.base import Listed

Command = TypeVar("Command", bound=Callable[..., Any])

WIDTH: Final = 100
"""The width of lines if there is no terminal."""

_FLUSH: Final = 0.1  # seconds
_BEYOND_ASCII: Final = re.compile(r"[^\x00-\x7f]")
_NAMES: Final = 12  # columns that the first column of a table keeps, however narrow the terminal is


def json_text(value: Any) -> str:
    """Return the JSON of a value on one line, without characters that a terminal would obey.

    It is ASCII if the standard output cannot encode Unicode, since replacements would make it invalid.
    """
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # a lone surrogate, or a number beyond 64 bits
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = UNSAFE.sub(_escaped, text)
    return text if text.isascii() or _takes_unicode() else _BEYOND_ASCII.sub(_escaped, text)


def _takes_unicode() -> bool:
    """Return True if the standard output can hold any text."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return encoding.lower().startswith("utf")


def _escaped(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass").hex()
    return re.sub("(....)", r"\\u\1", units)


def beginning(text: str, width: int) -> str:
    """Return the beginning of a text on one line of at most ``width`` columns, with blanks collapsed."""
    head = " ".join(text[: 8 * width + 64].split())
    return shortened(visible(head), width)


def shortened(text: str, width: int) -> str:
    """Return a text of one line cut to ``width`` columns of a terminal, with an ellipsis where it was cut."""
    if text.isascii():
        return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"
    from rich.text import Text  # noqa: PLC0415 - wide characters are rare

    cut = Text(text)
    cut.truncate(width, overflow="ellipsis")
    return cut.plain


def when(at: float) -> str:
    """Return a time (seconds since 1970) in the local time zone, to the second."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return str(at)


def size(count: float) -> str:
    """Return a number of bytes as text: ``812 B``, ``3.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def dollars(cost: float) -> str:
    """Return an amount of US dollars as text: ``$12.30``, ``$0.0042``; it is never rounded to 0."""
    amount = abs(cost)
    text = f"${amount:,.2f}" if amount >= 1 or not amount else f"${amount:.4f}"
    if text == "$0.0000":
        text = "<$0.0001"
    return f"-{text}" if cost < 0 else text


def share(part: float, whole: float) -> str:
    """Return a share in percent, never rounded to 100 or 0; a dash if the whole is 0."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    text = f"{percent:.1f}"
    if text == "100.0" and part < whole:
        return "99.9%"
    if text == "0.0" and part > 0:
        return "<0.1%"
    return f"{text.removesuffix('.0')}%"


# Options.


_DEFAULT_CACHE: Final = (
    "Default: CACHEPIPE_DIR, else caches/default if the folder caches exists, else the user's cache folder."
)


def cache_option(command: Command, *, bundles: bool = False) -> Command:
    """Add ``--cache DIR``; the parameter ``cache`` is a folder, a URL, or None for the default folder.

    Args:
        command: the command.
        bundles: whether the command also reads a bundle.
    """
    what = (
        "The cache folder, the URL of a server, or a bundle"
        if bundles
        else "The cache folder, or the URL of a server"
    )
    return _cache_option(f"{what}. {_DEFAULT_CACHE}", _one_cache)(command)


def read_cache_option(command: Command) -> Command:
    """Add ``--cache DIR`` for a command that only reads; the parameter ``cache`` may also be a bundle."""
    return cache_option(command, bundles=True)


def layers_option(command: Command) -> Command:
    """Add ``--cache DIR``, which can be repeated.

    The parameter ``cache`` is a folder, a URL, a bundle, a list of these, or None for the default folder.
    """
    return _cache_option(
        "The cache folder, or the URL of a server. Repeat it to read other folders, servers and bundles "
        f"below the first one, which is written. {_DEFAULT_CACHE}",
        _layers,
    )(command)


def _cache_option(text: str, callback: Callable[..., Any]) -> Callable[[Command], Command]:
    return click.option(
        "--cache", metavar="DIR", type=click.Path(), multiple=True, callback=callback, help=text
    )


def _one_cache(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> str | None:
    if len(given) > 1:
        raise click.BadParameter(
            f"this command takes one cache; got {len(given)}: {', '.join(map(name_of, given))}"
        )
    return given[0] if given else None


def _layers(
    _context: click.Context, _option: click.Parameter, given: tuple[str, ...]
) -> str | list[str] | None:
    return list(given) if len(given) > 1 else given[0] if given else None


def token_option(command: Command) -> Command:
    """Add ``--token-env NAME``, the environment variable with the token of a proxy."""
    return click.option(
        "--token-env", metavar="NAME", help="The environment variable with the token that the proxy requires."
    )(command)


def url_file_option(command: Command) -> Command:
    """Add ``--url-file FILE``, a file for the URL of a server once it answers; the parameter may be None."""
    return click.option(
        "--url-file",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        help="Write the URL to this file once the server answers, for programs that wait for it.",
    )(command)


def json_option(what: str) -> Callable[[Command], Command]:
    """Return a decorator that adds ``--json``; the parameter is ``as_json``.

    Args:
        what: the printed JSON, in a few words.
    """
    return click.option("--json", "as_json", is_flag=True, help=f"Print JSON: {what}.")


def limit_option(default: int, what: str) -> Callable[[Command], Command]:
    """Return a decorator that adds ``--limit``.

    Args:
        default: the default; 0 for no limit.
        what: the meaning of the limit.
    """
    return click.option(
        "--limit", type=click.IntRange(min=0), default=default, show_default=True, help=f"{what}; 0 for all."
    )


# Files.


def write_url(file: str, url: str) -> None:
    """Write a URL to a file at once: a reader finds no file, the file before, or the whole URL.

    Raises:
        Failure: when the file cannot be written.
    """
    new = Path(f"{file}.new-{os.getpid()}")
    try:
        new.write_text(f"{url}\n", "utf-8")
        new.replace(file)
    except OSError as error:
        raise Failure(f"the URL cannot be written to {file}: {error.strerror}") from error


# Stores.


def cache_in_use(cache: str | None) -> tuple[Path | str, str]:
    """Return the folder or the URL of the cache that a command uses, and how it was found."""
    from cachepipe.stores import default_folder  # noqa: PLC0415 - help needs no store
    from cachepipe.stores.folders import expanded  # noqa: PLC0415 - likewise
    from cachepipe.stores.remote import is_url  # noqa: PLC0415 - likewise

    found = default_folder() if cache is None else cache
    if cache is not None:
        how = "--cache"
    elif os.environ.get("CACHEPIPE_DIR"):
        how = "CACHEPIPE_DIR"
    else:
        how = "user" if Path(found).is_absolute() else "project"
    return found if is_url(found) else expanded(found), how


def layers_in_use(cache: str | list[str] | None) -> Path | str | list[Path | str]:
    """Return the cache that a command uses, or the list of its layers, as `open_store` takes it."""
    if isinstance(cache, list):
        return [cache_in_use(each)[0] for each in cache]
    return cache_in_use(cache)[0]


def name_of(cache: Path | str | Sequence[Path | str]) -> str:
    """Return the name of a folder, a bundle or a URL, without credentials; of layers, all names."""
    from cachepipe.stores.remote import is_url, shown  # noqa: PLC0415 - help needs no store

    if not isinstance(cache, Path | str):
        return ", ".join(map(name_of, cache))
    return shown(str(cache)) if is_url(str(cache)) else str(cache)


def exists(cache: Path | str | Sequence[Path | str]) -> bool:
    """Return True if a folder or bundle exists, or the server of a URL can be used; of layers, one."""
    if not isinstance(cache, Path | str):
        return any(map(exists, cache))
    if isinstance(cache, Path):
        return os.path.exists(cache)  # noqa: PTH110 - also where it may not be looked at
    from cachepipe.stores import open_store  # noqa: PLC0415 - help needs no store

    try:
        open_store(cache, read_only=True)[0].close()
    except StoreError:
        return False
    return True


_FOUND: Final = {
    "--cache": "named by --cache",
    "CACHEPIPE_DIR": "named by CACHEPIPE_DIR",
    "project": "the default if a folder caches exists",
    "user": "the user's default",
}


@contextlib.contextmanager
def opened(cache: str | None, *, write: bool = False) -> Iterator[Listed]:
    """Open the store of an existing cache; without ``write``, it is read-only, and may be a bundle.

    Raises:
        StoreError: when there is no cache; it names the folder, and says how to name another.
    """
    found = existing_cache(cache, bundles=not write)
    from cachepipe.stores import DiskStore  # noqa: PLC0415 - help needs no store

    store: Listed
    if is_bundle_file(found):
        from cachepipe.sharing import unpacked  # noqa: PLC0415 - only for bundles

        with unpacked(found) as store:
            yield store
        return
    if isinstance(found, Path):
        store = DiskStore(found, read_only=not write)
    else:
        from cachepipe.stores.remote.urls import open_url  # noqa: PLC0415 - only when it is needed

        store = open_url(found, read_only=not write)
    with contextlib.closing(store):
        yield store


@contextlib.contextmanager
def looking(store: Listed) -> Iterator[None]:
    """Show on a terminal how many questions a listing has looked at, if the store is on a server."""
    if "://" not in store.where:
        yield
        return
    from cachepipe.progress import counting  # noqa: PLC0415 - only when it is needed
    from cachepipe.stores.remote.listing import Listing  # noqa: PLC0415 - likewise

    assert isinstance(store, Listing)  # noqa: S101 - only these have URLs
    with counting() as show:
        store.looked = lambda count: show("looking at questions", count)
        yield
    store.looked = lambda _count: None


def is_bundle_file(cache: Path | str) -> bool:
    """Return True if a cache is a bundle, or is named like one."""
    from cachepipe.stores.bundles.reader import is_bundle  # noqa: PLC0415 - help needs no store

    return isinstance(cache, Path) and is_bundle(cache)


def existing_cache(cache: str | None, *, bundles: bool = False) -> Path | str:
    """Return the folder or the URL of the cache that a command uses.

    Args:
        cache: the cache that the user names, or None for the default folder.
        bundles: whether it may be a bundle; then only its name is checked.

    Raises:
        StoreError: when there is no cache in the folder.
    """
    folder, how = cache_in_use(cache)
    if not isinstance(folder, Path):
        return folder
    if is_bundle_file(folder):
        if bundles:
            return folder
        raise StoreError(f"{folder} is a bundle, which is only read; name a folder or a URL")
    try:
        what = _lack_of(folder)
    except OSError as error:
        raise StoreError(f"the folder {folder} ({_FOUND[how]}) cannot be read: {error.strerror}") from error
    if what:
        raise StoreError(
            f"there is no cache: the folder {folder} ({_FOUND[how]}) {what}. "
            "Name another with --cache DIR or in CACHEPIPE_DIR, or fill it: cachepipe run --help"
        )
    return folder


def _lack_of(folder: Path) -> str:
    """Return why a folder is not a cache, or an empty string."""
    if not folder.is_dir():
        return "is a file" if folder.is_file() else "does not exist"
    with os.scandir(folder) as entries:
        return "" if any(entry.name.endswith(".db") for entry in entries) else "does not contain one"


# Printing.


def styled(text: str, **style: Any) -> str:
    """Return a text in a style (of ``click.style``) on a terminal without NO_COLOR, else unchanged."""
    if not shows_colours():
        return text
    return click.style(text, **style)


def echo_lines(lines: Iterable[str]) -> None:
    """Print lines as they are produced, and flush at least ten times a second."""
    flushed = 0.0
    for line in lines:
        sys.stdout.write(f"{line}\n")
        now = time.monotonic()
        if now - flushed > _FLUSH:
            sys.stdout.flush()
            flushed = now
    sys.stdout.flush()


def money(account: Account, prices: Prices | None = None) -> str:
    """Return the tokens of an account and their cost, if known."""
    from cachepipe.prices import Prices  # noqa: PLC0415 - help needs none of it

    return money_of(account.as_dict((prices or Prices()).cost_of_sum))


def money_of(sums: Mapping[str, Any]) -> str:
    """Return the tokens of a sum and their cost, if known; the sum is one of ``Account.as_dict``."""
    if sums["unknown"] and not sums["total_tokens"]:
        return "unknown"
    told = f"{sums['total_tokens']:,} tokens"
    if sums["unknown"]:
        told += f" and {sums['unknown']:,} samples without usage"
    if sums["cost"] is not None and sums["samples"]:
        told += f", {dollars(sums['cost'])}"
        if sums["unpriced"] > sums["unknown"]:
            told += f" and {sums['unpriced'] - sums['unknown']:,} samples without a known price"
    return told


Column = str | Callable[[Mapping[str, Any]], Any]
"""The name of a field of a row, or a function of the row."""

Columns = dict[str, Column]
"""The columns of a table by heading.

A heading that begins with ``>`` aligns its cells to the right.
"""


def print_table(
    columns: Columns, rows: Sequence[Mapping[str, Any]], *, title: str = "", total: bool = False
) -> None:
    """Print a table: with rules on a terminal, aligned with blanks elsewhere.

    Args:
        columns: the columns.
        rows: the rows, as `json_text` prints them; text is made safe, and the digits of whole numbers are
            grouped on terminals only.
        title: the title of the table.
        total: whether the last row is the sum of the others.
    """
    heads = [name.removeprefix(">") for name in columns]
    rights = [name.startswith(">") for name in columns]
    people = on_terminal()
    cells = [[_cell(row, of, people=people) for of in columns.values()] for row in rows]
    widths = [max(map(width_of, column)) for column in zip(heads, *cells, strict=True)]
    if people:
        _print_ruled(heads, cells, rights, widths, title, total=total)
        return
    lines = [title] if title else []
    for row in [heads, *cells]:
        padded = [
            _padded(cell, width, right=right) for cell, width, right in zip(row, widths, rights, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    echo_lines(lines)


def print_facts(facts: list[tuple[str, str]]) -> None:
    """Print facts, each after its name."""
    width = max(len(name) for name, _ in facts)
    echo_lines(f"{styled(name.ljust(width), dim=True)}  {visible(fact)}" for name, fact in facts)


def counted(count: int, what: str) -> str:
    """Return a count with its noun, as in ``1 draw`` and ``2,000 draws``."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def _print_ruled(
    heads: list[str],
    cells: list[list[str]],
    rights: list[bool],
    widths: list[int],
    title: str,
    *,
    total: bool,
) -> None:
    from rich import box  # noqa: PLC0415 - only on terminals
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    needed = len(heads) - 1
    for name, right, width in zip(heads, rights, widths, strict=True):
        least = width if right else min(width, _NAMES)
        needed += least
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(Text(name), justify=justify, overflow="fold", min_width=least, no_wrap=right)
    for place, row in enumerate(cells):
        last = total and place == len(cells) - 1
        table.add_row(*map(Text, row), style="bold" if last else "")
    console = Console(highlight=False)
    console.width = max(console.width, needed + len(heads))  # numbers are never cut: the terminal wraps lines
    console.print(table)


def _cell(row: Mapping[str, Any], of: Column, *, people: bool) -> str:
    value = row[of] if isinstance(of, str) else of(row)
    return f"{value:,}" if isinstance(value, int) and people else visible(str(value))


def _padded(cell: str, width: int, *, right: bool) -> str:
    blanks = " " * (width - width_of(cell))
    return blanks + cell if right else cell + blanks


def width_of(text: str) -> int:
    """Return the width of a text of one line in columns of a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 - wide characters are rare

    return cell_len(text)
