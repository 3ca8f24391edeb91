"""The command `stats` counts the samples of a cache, and what each namespace spent and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import click

from cachepipe.cli import common
from cachepipe.cli.common import counted, json_text, looking, opened
from cachepipe.figures import ACCOUNTS, stats_of
from cachepipe.prices import Prices
from cachepipe.removing import told

_NO_NAMESPACE: Final = "(none)"
_SHOWN: Final = ("spent", "billed", "saved", "wasted")
"""The sums in tables; the figures of the whole cache, and --json, have them all."""


_STATS_JSON: Final = """\b
With --json:
  folder, bytes          the folder of the cache and its size, or its URL and null
  keys, samples          different questions, and answers to them
  pending, discarded     samples that are being generated (or were, by a killed process); discarded
                         samples
  draws                  requests that have drawn samples
  drawn, generated, reused, reused_share
                         samples over all namespaces; reused_share = reused / drawn, or null
  requests               questions answered, over all runs; the sums below follow from it
  spent                  all that was generated: billed, and what reached no request
  billed                 what the answered requests paid for
  as_asked               what each would have cost alone, in one call
  saved                  as_asked less billed, so a rerun saves what it replays
  unreported             spent less billed: for requests that failed, were cancelled or killed, and extras
  wasted                 the part of spent that no namespace holds
  namespaces             a list of namespace, draws, drawn, generated, reused, reused_share, and the sums
  shared                 draws, drawn, generated of shared draws (embeddings, repeat="same")
  models                 a list of model, url, and the sums of its samples
  runs                   with --runs a list of run, namespace, first, last (when its first and last sample was
                         stored, in seconds since 1970, or null), requests, and the sums; else null
  removals               a list of what `rm` and `prune` have removed: at, selected, questions, draws,
                         samples, bytes, unused, questions_deleted, cost, done (see `cachepipe prune --help`)
  scopes                 with --scopes a list of scope, keys, samples, pending; else null
Each sum has samples, unknown (samples without usage, in no count of tokens), prompt_tokens,
completion_tokens, total_tokens, cached_tokens, reasoning_tokens, cost (US dollars, or null), unpriced.
A running process adds what it has answered every few seconds; a killed one has not added the last.
"""


@click.command(epilog=_STATS_JSON)
@common.read_cache_option
@click.option("--scopes", is_flag=True, help="Count by scope too; this reads every key.")
@click.option("--runs", is_flag=True, help="List the runs, with what each spent and saved.")
@click.option(
    "--prices", metavar="FILE", type=click.Path(dir_okay=False), help="A JSON file with prices by model."
)
@common.limit_option(50, "The largest number of rows in a table")
@common.json_option("one object; see below")
def stats(
    *, cache: str | None, scopes: bool, runs: bool, prices: str | None, limit: int, as_json: bool
) -> None:
    """Count the samples, what each namespace generated and reused, and what it spent and saved.

    Of the samples that a namespace has drawn, some were generated for it, and it reused the others. Shared
    draws (embeddings, repeat="same") are counted separately; their costs and savings belong to the
    namespaces that ask. Costs in money need the extra cachepipe[prices].
    """
    priced = Prices() if prices is None else Prices.load(prices)
    with opened(cache) as store, looking(store):
        figures = stats_of(store, priced, scopes=scopes)
    if not runs:
        figures["runs"] = None
    if as_json:
        click.echo(json_text(figures))
    else:
        _print_stats(figures, limit)


def _name_of(row: Mapping[str, Any]) -> str:
    namespace: str | None = row["namespace"]
    return _NO_NAMESPACE if namespace is None else namespace or "''"


def _share_of(row: Mapping[str, Any]) -> str:
    return "-" if row["reused"] == "-" else common.share(row["reused"], row["drawn"])


_DRAWN: Final[common.Columns] = {
    "namespace": _name_of,
    ">draws": "draws",
    ">drawn": "drawn",
    ">generated": "generated",
    ">reused": "reused",
    ">share": _share_of,
}
_SCOPES: Final[common.Columns] = {
    "scope": lambda row: "(none)" if row["scope"] is None else row["scope"],
    ">keys": "keys",
    ">samples": "samples",
}

_REMOVALS: Final[common.Columns] = {
    "removed": lambda row: common.when(row["at"]),
    "by": lambda row: told(row["selected"]) + ("" if row["done"] else " (was stopped)"),
    ">draws": "draws",
    ">samples": "samples",
}


def _print_stats(figures: dict[str, Any], limit: int) -> None:
    extra = [f"{figures[name]:,} {name}" for name in ("pending", "discarded") if figures[name]]
    share = f"{figures['reused']:,} of {figures['drawn']:,} samples drawn ({_share_of(figures)})"
    taken = "" if figures["bytes"] is None else f" ({common.size(figures['bytes'])})"
    facts = [
        ("cache", f"{figures['folder']}{taken}"),
        ("keys", f"{figures['keys']:,}"),
        ("samples", ", ".join([f"{figures['samples']:,}", *extra])),
        ("draws", f"{figures['draws']:,}"),
        ("reused", share),
    ]
    for name in ACCOUNTS:
        samples = counted(figures[name]["samples"], "sample")
        facts.append((name.replace("_", " "), f"{samples}, {common.money_of(figures[name])}"))
    common.print_facts(facts)
    namespaces = figures["namespaces"]
    _print_rows(_DRAWN, namespaces, limit, "namespace", last=_shared_row(figures["shared"]))
    sums_of = {f">{name}": _tokens_of(name) for name in _SHOWN}
    tokens: common.Columns = {"tokens of namespace": _name_of, ">requests": "requests", **sums_of}
    _print_rows(tokens, namespaces, limit)
    models: common.Columns = {
        "tokens of model": lambda row: row["model"] or "(none)",
        **sums_of,
        "url": "url",
    }
    _print_rows(models, figures["models"], limit)
    runs: common.Columns = {
        "run": lambda row: row["run"] or "(unknown)",
        "namespace": _name_of,
        "first sample": lambda row: "-" if row["first"] is None else common.when(row["first"]),
        **{name: tokens[name] for name in (">requests", *sums_of)},
    }
    _print_rows(runs, (figures["runs"] or [])[::-1], limit, "run")
    _print_rows(_SCOPES, figures["scopes"] or [], limit, "scope")
    _print_rows(_REMOVALS, figures["removals"][::-1], limit, "removal")


def _shared_row(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"namespace": "(shared)", **counts, "reused": "-"}] if counts["draws"] else []


def _print_rows(
    columns: common.Columns,
    rows: Sequence[Mapping[str, Any]],
    limit: int,
    what: str = "",
    last: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Print the first rows as a table, and how many more there are; ``last`` always follows them."""
    shown = [*rows[: limit or None], *last]
    if shown:
        click.echo()
        common.print_table(columns, shown)
    if what and len(rows) > limit > 0:
        click.echo(f"and {counted(len(rows) - limit, f'more {what}')}; --limit 0 shows all")


def _tokens_of(name: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the cell with the tokens of a sum and their cost, as far as these are known."""

    def cell(row: Mapping[str, Any]) -> str:
        sums = row[name]
        if sums["unknown"] and not sums["total_tokens"]:
            return "unknown"
        known = f"{sums['total_tokens']:,}{'+' * bool(sums['unknown'])}"
        return f"{known} {common.dollars(sums['cost'])}" if sums["cost"] else known

    return cell
