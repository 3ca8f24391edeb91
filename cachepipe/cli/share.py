"""Commands that hand on what a cache holds: `export`, `import`, `merge` and `sync`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from cachepipe.cli import common
from cachepipe.cli.common import counted, json_text, print_facts
from cachepipe.cli.group import Failure

if TYPE_CHECKING:
    from cachepipe.sharing import Counts, Progress, Scopes
    from cachepipe.stores.bundles.manifest import Manifest

_EVERY: Final = 100  # questions to an update of the progress


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Show what is being done, and how many questions are done, on a terminal."""
    from rich.console import Console  # noqa: PLC0415 - only when it is needed

    from cachepipe.progress import bar  # noqa: PLC0415 - likewise

    if not Console(stderr=True).is_terminal:
        yield lambda _doing, _done: None
        return
    with bar(transient=True) as progress:
        task = progress.add_task("reading", total=None, told="")
        shown = ("", 0)

        def show(doing: str, done: int) -> None:
            nonlocal shown
            if doing != shown[0] or done >= shown[1] + _EVERY:
                shown = doing, done
                progress.update(task, description=doing, completed=done)

        yield show


# export


@click.command()
@common.read_cache_option
@click.option(
    "--namespace",
    "namespaces",
    metavar="NAME",
    multiple=True,
    help="A namespace to export; repeat it for more. Default: everything in the cache.",
)
@click.option("--no-namespace", is_flag=True, help="Export what was asked without a namespace.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    type=click.Path(),
    help="The bundle, such as paper.cachepipe.",
)
@click.option(
    "--allow-secrets",
    is_flag=True,
    help="Export texts that look like credentials or private addresses. Without it, they are refused.",
)
@click.option("--overwrite", is_flag=True, help="Replace the file if it has other content.")
@common.json_option("the manifest of the bundle")
def export(
    *,
    cache: str | None,
    namespaces: tuple[str, ...],
    no_namespace: bool,
    output: str,
    allow_secrets: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write what replays some namespaces into one file, for others.

    The file holds the questions, the samples that the namespaces drew, and their draws: JSON lines, which
    `gzip -dc FILE` prints. Equal content gives equal bytes, from any cache.
    """
    from cachepipe import sharing  # noqa: PLC0415 - help needs no store

    wanted: list[str | None] | None = [*namespaces, *([None] if no_namespace else [])] or None
    with common.opened(cache) as store, _progress() as progress:
        manifest = sharing.export(
            store,
            output,
            namespaces=wanted,
            allow_secrets=allow_secrets,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        click.echo(json_text(manifest.summary()))
    else:
        print_facts([("bundle", output), *_facts(manifest)])


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    counts = manifest.counts
    holds = [
        counted(counts["questions"], "question"),
        counted(counts["samples"], "sample"),
        counted(counts["draws"], "draw"),
    ]
    if counts["discarded"]:
        holds.append(f"{counts['discarded']:,} discarded")
    facts = [("holds", ", ".join(holds))]
    if manifest.namespaces is not None:
        names = ["(none)" if name is None else name for name in manifest.namespaces]
        facts.append(("namespaces", ", ".join(names)))
    if models := manifest.answered or manifest.asked:
        facts.append(("models", ", ".join(models)))
    if manifest.scopes:
        facts.append(("scopes", ", ".join(manifest.scopes)))
    if manifest.last:
        first, last = common.when(manifest.first / 1e6), common.when(manifest.last / 1e6)
        facts.append(("generated", f"from {first} to {last}"))
    facts.append(("content", manifest.content))
    return facts


# import, merge and sync


_COUNTS_JSON: Final = """\b
With --json:
  questions              how many questions were compared
  new, more, same        of these, how many the cache did not have, had in part, and had completely
  samples, draws         how many were added
"""


@click.command("import", epilog=_COUNTS_JSON)
@click.argument("bundle", metavar="FILE", type=click.Path())
@common.cache_option
@click.option(
    "--scope",
    "scopes",
    metavar="[OLD=]NEW",
    multiple=True,
    help="Put the questions, or those of one scope, under another scope. Repeat it for more scopes.",
)
@common.json_option("an object of counts; see below")
def import_(*, bundle: str, cache: str | None, scopes: tuple[str, ...], as_json: bool) -> None:
    """Add a bundle to a cache, without renumbering or overwriting anything.

    The bundle is checked completely first. If a draw has other samples in the cache, nothing is changed. An
    import that was stopped can be repeated.
    """
    from cachepipe import sharing  # noqa: PLC0415 - help needs no store

    found, _ = common.cache_in_use(cache)
    with _progress() as progress:
        counts = sharing.import_(bundle, found, scope=_scopes(scopes), progress=progress)
    _print({common.name_of(found): counts}, as_json=as_json)


def _scopes(given: tuple[str, ...]) -> Scopes | None:
    """Return the scopes that options name."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [option.partition("=") for option in given]
    if any(not equals for _, equals, _ in pairs):
        raise Failure("expected one --scope NEW for all questions, or --scope OLD=NEW for each scope")
    return {old: new for old, _, new in pairs} or None


@click.command(epilog=_COUNTS_JSON)
@click.argument("caches", metavar="CACHE...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="CACHE",
    required=True,
    help="The folder or URL that gets everything.",
)
@common.json_option("an object of counts; see below")
def merge(*, caches: tuple[str, ...], output: str, as_json: bool) -> None:
    """Add what some caches or bundles hold to another cache.

    Each draw keeps its samples, so each experiment replays in the merged cache. If one draw has other samples
    in two of them, nothing is changed.
    """
    from cachepipe import sharing  # noqa: PLC0415 - help needs no store

    with _progress() as progress:
        counts = sharing.merge([*map(_existing, caches)], common.cache_in_use(output)[0], progress=progress)
    _print({output: counts}, as_json=as_json)


@click.command(epilog=f"{_COUNTS_JSON}  They are a list of two objects, with the name of the cache.")
@click.argument("one", metavar="CACHE")
@click.argument("other", metavar="CACHE")
@common.json_option("a list of two objects; see below")
def sync(*, one: str, other: str, as_json: bool) -> None:
    """Copy between two caches both ways, so that each holds what both held.

    The caches may be folders and servers. A copy that was stopped continues when it is repeated.
    """
    from cachepipe import sharing  # noqa: PLC0415 - help needs no store

    with _progress() as progress:
        found = sharing.sync(_existing(one), _existing(other), progress=progress)
    _print(dict(zip(map(common.name_of, (one, other)), found, strict=True)), as_json=as_json, many=True)


def _existing(cache: str) -> Any:
    """Return a cache or a bundle that exists."""
    return common.existing_cache(cache, bundles=True)


def _print(counts: dict[str, Counts], *, as_json: bool, many: bool = False) -> None:
    if as_json:
        found = [{"cache": name, **count.as_dict()} for name, count in counts.items()]
        click.echo(json_text(found if many else found[0]))
        return
    for name, count in counts.items():
        print_facts(
            [
                ("cache", name),
                ("added", f"{counted(count.samples, 'sample')} and {counted(count.draws, 'draw')}"),
                ("questions", f"{count.new:,} new, {count.more:,} with more, {count.same:,} the same"),
            ]
        )
