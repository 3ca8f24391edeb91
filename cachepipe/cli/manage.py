"""The commands `rm` and `prune`, which delete draws and samples, and `compact`, which frees space."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from cachepipe.cli import common
from cachepipe.cli.common import counted, json_text, print_facts, size
from cachepipe.cli.group import Failure

if TYPE_CHECKING:
    from cachepipe.removing import Removal

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES: Final = {"": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}

_REMOVAL_JSON: Final = """\b
With --json:
  folder                 the cache folder, or the URL of the server
  selected               the command and its options
  questions, draws       how many questions are concerned, and how many draws are removed
  samples, bytes         how many samples are deleted, and how much their content takes
  unused                 how many samples stay that no draw has any more
  questions_deleted      how many questions are deleted, because nothing is left of them
  cost                   what these samples have cost: tokens by kind, and cost in US dollars or null
  done                   false for --dry-run
"""


def _amount(units: dict[str, int], example: str) -> Callable[..., float | None]:
    """Return a callback of an option that reads a number with a unit.

    Args:
        units: the factor of each unit, in small letters.
        example: a valid value.
    """

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
        if value is None:
            return None
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([a-z]*)", value.strip().lower(), re.ASCII)
        if match is None or match[2] not in units:
            known = ", ".join(unit for unit in units if unit)
            raise click.BadParameter(
                f"expected a number and a unit ({known}), such as {example}; got {value!r}", ctx, param
            )
        return float(match[1]) * units[match[2]]

    return read


def _removal_options(command: common.Command) -> common.Command:
    """Add ``--dry-run``, ``--yes``, ``--json`` and ``--cache``."""
    for option in (
        common.json_option("one object; see below"),
        click.option("--yes", is_flag=True, help="Do not ask. Without a terminal, --yes is necessary."),
        click.option("--dry-run", is_flag=True, help="Only say what would be removed, and what it cost."),
        common.cache_option,
    ):
        command = option(command)
    return command


# rm


@click.command(epilog=_REMOVAL_JSON)
@click.option("--namespace", metavar="NAME", help="The namespace.")
@click.option("--no-namespace", is_flag=True, help="Forget what was asked without a namespace.")
@click.option("--samples", is_flag=True, help="Delete the samples that then no draw has.")
@_removal_options
def rm(
    *,
    namespace: str | None,
    no_namespace: bool,
    samples: bool,
    cache: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Forget a namespace: remove all of its draws, as if it had never drawn.

    Samples stay, unless --samples is given: then those are deleted that no other namespace has drawn. What
    the namespace was billed stays in the sums of `stats`. A later run of the namespace draws anew.
    """
    if (namespace is None) is not no_namespace:
        raise Failure("expected --namespace NAME, or --no-namespace for requests without one")
    from cachepipe import removing  # noqa: PLC0415 - help needs no store

    found = common.existing_cache(cache)
    _removed(
        found,
        lambda *, dry_run: removing.forget(found, namespace, samples=samples, dry_run=dry_run),
        dry_run=dry_run,
        yes=yes,
        as_json=as_json,
    )


# prune


@click.command(epilog=_REMOVAL_JSON)
@click.option(
    "--older-than",
    metavar="AGE",
    callback=_amount(_SECONDS, "30d"),
    help="Only samples, and draws, that are older than an age such as 30d (units: s, m, h, d, w).",
)
@click.option("--namespace", metavar="NAME", help="Only questions that this namespace has drawn.")
@click.option("--model", help="Only questions to this model.")
@click.option("--scope", help="Only questions to this endpoint or adapter, or below this base URL.")
@click.option(
    "--larger-than",
    metavar="SIZE",
    callback=_amount(_BYTES, "10MB"),
    help="Only questions whose samples together take more than this size, such as 10MB.",
)
@click.option(
    "--draws",
    is_flag=True,
    help="Remove the draws of these questions too (only those of --namespace, if it is given), and then the "
    "samples that no draw has any more.",
)
@_removal_options
def prune(
    *,
    older_than: float | None,
    larger_than: float | None,
    draws: bool,
    cache: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **wanted: str | None,
) -> None:
    """Delete samples that no draw has; with --draws, remove draws together with their samples.

    Without --draws, every run replays as before. A draw that was removed cannot be replayed: a later run
    draws anew. The index of a deleted sample is not used again, and its cost still counts as spent.
    """
    from cachepipe import removing  # noqa: PLC0415 - help needs no store

    if draws and not (older_than or larger_than or any(wanted.values())):
        raise Failure(
            "--draws needs at least one of --older-than, --namespace, --model, --scope and --larger-than; to "
            "remove everything, delete the folder, or the keys or the schema on the server"
        )
    found = common.existing_cache(cache)
    _removed(
        found,
        lambda *, dry_run: removing.prune(
            found,
            older_than=older_than,
            larger_than=None if larger_than is None else int(larger_than),
            draws=draws,
            dry_run=dry_run,
            **wanted,
        ),
        dry_run=dry_run,
        yes=yes,
        as_json=as_json,
    )


def _removed(
    cache: Path | str, remove: Callable[..., Removal], *, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Say what is removed and what it cost, ask, and remove it."""
    name = common.name_of(cache)
    removal = remove(dry_run=True)
    if not as_json:
        _print(name, removal)
    if removal.questions and not dry_run:
        _ask(yes=yes)
        removal = remove(dry_run=False)
        if not as_json:
            click.echo(" ".join(["Done.", *_later(cache, removal)]))
    if as_json:
        click.echo(json_text({"folder": name, **removal.as_dict()}))


def _later(cache: Path | str, removal: Removal) -> Iterator[str]:
    if isinstance(cache, Path):
        yield "`cachepipe compact` gives the disk space back."
    if removal.unused:
        yield f"{counted(removal.unused, 'sample')} that no draw has any more stay."


def _print(name: str, removal: Removal) -> None:
    if not removal.questions:
        click.echo(f"{name} has nothing to remove")
        return
    facts = [
        ("cache", name),
        ("questions", f"{removal.questions:,}"),
        ("removes", f"{counted(removal.draws, 'draw')} and {counted(removal.samples, 'sample')}"),
    ]
    if removal.questions_deleted:
        facts.append(("nothing left of", f"{counted(removal.questions_deleted, 'question')}; deleted too"))
    if removal.samples:
        facts.append(("content", size(removal.size)))
    if removal.unused:
        facts.append(("unused then", f"{counted(removal.unused, 'sample')}; they stay"))
    facts.append(("which cost", common.money(removal.cost)))
    print_facts(facts)


def _ask(*, yes: bool) -> None:
    """Ask on a terminal.

    Raises:
        Failure: when the answer is no, or there is no terminal.
    """
    if yes:
        return
    if not _asks():
        raise Failure("nothing was removed: there is no terminal to ask on; give --yes to remove it")
    if not click.confirm("Remove it?", err=True):
        raise Failure("nothing was removed")


def _asks() -> bool:
    """Return True if there is somebody to ask."""
    return sys.stdin.isatty()


# compact


@click.command()
@common.cache_option
@common.json_option('an object with "folder", "before" and "after" (bytes, or null on Valkey)')
def compact(*, cache: str | None, as_json: bool) -> None:
    """Give back the disk space that was freed in a cache.

    The files of a folder are rewritten. Others may read meanwhile, and the disk needs as much free space as
    the cache takes. On PostgreSQL, this command runs VACUUM on the tables of the cache: new rows use the
    space, and others may go on meanwhile. A Valkey server frees at once what is deleted.
    """
    from cachepipe import removing  # noqa: PLC0415 - help needs no store

    found = common.existing_cache(cache)
    name, sizes = common.name_of(found), removing.compact(found)
    if as_json:
        click.echo(json_text({"folder": name, "before": sizes.before, "after": sizes.after}))
    elif sizes.before is None or sizes.after is None:
        click.echo(
            f"{name} has nothing to compact: the server frees at once what is deleted, and rewrites its "
            "append-only file by itself (BGREWRITEAOF does so now)"
        )
    else:
        print_facts([("cache", name), ("before", size(sizes.before)), ("after", size(sizes.after))])
