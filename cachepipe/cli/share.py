"""Commands that hand on what a cache holds: `export`, `import`, `merge` and `sync`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from cachepipe.cli import common
from cachepipe.cli.batch_options import count, setting
from cachepipe.cli.common import counted, json_text, print_facts
from cachepipe.cli.group import Failure
from cachepipe.progress import counting

if TYPE_CHECKING:
    from cachepipe.importers import Imported
    from cachepipe.sharing import Counts, Scopes
    from cachepipe.stores.bundles.manifest import Manifest

Kind = Literal["bundle", "batch", "cachesaver"]
"""What can be imported."""

_SHOWN: Final = 20  # reasons that are listed
_WIDTH: Final = 400  # columns of a reason


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
    with common.opened(cache) as store, counting() as progress:
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


_IMPORT_JSON: Final = f"""{_COUNTS_JSON}
\b
With --requests, also:
  found, taken           how many requests of the batch, or entries of the folder, there were and were taken
  repeated               how many results were the same as another one
  drawn_before           how many requests have drawn other samples in the namespace before
  left                   a list of where, name and why, for what could not be taken

The exit code is 1 if something could not be taken.
"""


@click.command("import", epilog=_IMPORT_JSON)
@click.argument("sources", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@common.cache_option
@click.option(
    "--requests",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="The requests that FILE answers: the input of the batch, or what CacheSaver's program has asked.",
)
@click.option(
    "--scope",
    "scopes",
    metavar="[OLD=]NEW",
    multiple=True,
    help="Put the questions, or those of one scope, under another scope. Repeat it for more scopes.",
)
@setting("base_url")
@setting("namespace")
@setting("model")
@setting("temperature", type=float)
@count("max_tokens")
@common.json_option("an object of counts; see below")
def import_(
    *,
    sources: tuple[str, ...],
    cache: str | None,
    requests: str | None,
    scopes: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Add a bundle, the results of a batch, or a CacheSaver folder to a cache.

    FILE is a bundle; or, with --requests, the output of a batch and the file of its errors; or a folder of
    CacheSaver. Nothing is renumbered or overwritten, and an import can be repeated. What cannot be taken is
    listed with the reason.

    A bundle is checked completely first. If a draw has other samples in the cache, nothing is changed. The
    requests of a batch draw their results in --namespace, as `cachepipe run` with the same options would.
    """
    kind = _kind_of(sources, requests)
    found, _ = common.cache_in_use(cache)
    given = {name: value for name, value in settings.items() if value is not None}
    if kind == "bundle":
        _refuse(given, "only requests of a batch or of CacheSaver need")
        from cachepipe import sharing  # noqa: PLC0415 - help needs no store

        with counting() as progress:
            counts = sharing.import_(sources[0], found, scope=_scopes(scopes), progress=progress)
        _print({common.name_of(found): counts}, as_json=as_json)
        return
    if isinstance(scope := _scopes(scopes), dict):
        raise Failure("with --requests, give one --scope NEW for all questions")
    imported = _imported(kind, sources, requests or "", found, {**given, "scope": scope})
    _print_imported(common.name_of(found if cache is None else cache), imported, as_json=as_json)
    if imported.left:
        sys.exit(1)


def _imported(
    kind: Kind, sources: tuple[str, ...], requests: str, cache: Path | str, settings: dict[str, Any]
) -> Imported:
    """Import the results of a batch, or a folder of CacheSaver."""
    from cachepipe import importers  # noqa: PLC0415 - help needs no store

    with counting() as progress:
        if kind == "batch":
            return importers.import_batch(requests, sources, cache, progress=progress, **settings)
        if "namespace" in settings:
            raise Failure(
                "CacheSaver does not store which namespace has used which samples, so leave out --namespace: "
                "each namespace draws the samples from the front"
            )
        return importers.import_cachesaver(sources[0], requests, cache, progress=progress, **settings)


def _kind_of(sources: Sequence[str], requests: str | None) -> Kind:
    """Return what is to be imported.

    Raises:
        Failure: when it cannot be, with what to do.
    """
    first = sources[0]
    if Path(first).is_dir():
        return _kind_of_folder(sources, requests)
    if requests is not None:
        for source in sources:
            if _begins(source, b"\x1f\x8b"):
                raise Failure(f"{source} is a bundle, which holds its requests; leave out --requests")
        return "batch"
    if any(_begins(source, b"{") for source in sources):
        raise Failure(
            f"{first} looks like the results of a batch, which do not hold what was asked. Give the input of "
            "the batch: --requests input.jsonl"
        )
    if len(sources) > 1:
        raise Failure(f"import one bundle at a time; got {len(sources)}. `cachepipe merge` takes several")
    return "bundle"


def _kind_of_folder(sources: Sequence[str], requests: str | None) -> Kind:
    from cachepipe.importers.cachesaver import check_folder  # noqa: PLC0415 - help needs no store

    if len(sources) > 1:
        raise Failure(f"import one folder at a time; got {len(sources)} names")
    lists = check_folder(sources[0])
    if requests is None:
        raise Failure(
            f"{sources[0]} is a folder of CacheSaver with {counted(lists, 'list')} of samples, which does "
            "not hold what was asked. Give the requests that made it: --requests requests.jsonl"
        )
    return "cachesaver"


def _begins(source: str, begin: bytes) -> bool:
    """Return True if a file begins so, after blanks."""
    try:
        with Path(source).open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(begin)
    except OSError:
        return False


def _refuse(given: Mapping[str, Any], why: str) -> None:
    """Refuse options that have no meaning here."""
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise Failure(f"{why} {options}; leave them out")


def _print_imported(cache: str, imported: Imported, *, as_json: bool) -> None:
    if as_json:
        click.echo(json_text({"cache": cache, **imported.as_dict()}))
        return
    count = imported.counts
    facts = [
        ("cache", cache),
        ("taken", f"{imported.taken:,} of {imported.found:,}"),
        ("added", f"{counted(count.samples, 'sample')} and {counted(count.draws, 'draw')}"),
    ]
    if imported.repeated:
        facts.append(("repeated", f"{imported.repeated:,}, which were added once"))
    if imported.drawn_before:
        what = f"{counted(imported.drawn_before, 'request')} had drawn others; later draws get these"
        facts.append(("drawn", what))
    print_facts(facts)
    if imported.left:
        click.echo("\nNot taken, or not completely:")
    for each in imported.left[:_SHOWN]:
        click.echo(f"  {common.beginning(str(each), _WIDTH)}")
    if len(imported.left) > _SHOWN:
        click.echo(f"  and {len(imported.left) - _SHOWN:,} more; --json lists all")


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

    with counting() as progress:
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

    with counting() as progress:
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
    for name, got in counts.items():
        print_facts(
            [
                ("cache", name),
                ("added", f"{counted(got.samples, 'sample')} and {counted(got.draws, 'draw')}"),
                ("questions", f"{got.new:,} new, {got.more:,} with more, {got.same:,} the same"),
            ]
        )
