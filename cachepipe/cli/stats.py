"""The command `stats` counts the samples of a cache, and what each namespace spent and saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from cachepipe.accounting import Account, Statement, by_model
from cachepipe.cli import common
from cachepipe.cli.common import counted, json_text, looking, opened
from cachepipe.contract.draws import SHARED, label, namespace_of
from cachepipe.prices import Prices
from cachepipe.removing import told
from cachepipe.stores.base import NamespaceInfo
from cachepipe.stores.sums import RunStatement, run_statements

if TYPE_CHECKING:
    from cachepipe.stores.base import Listed

_NO_NAMESPACE: Final = "(none)"


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
        each = run_statements(store)
        sums: dict[str, Statement] = {}
        for run in each:
            sums.setdefault(run.namespace, Statement()).join(run.statement)
        figures = _figures(store, sums, priced, scopes=scopes)
    figures["runs"] = [_run(run, priced) for run in each] if runs else None
    if as_json:
        click.echo(json_text(figures))
    else:
        _print_stats(figures, sums, limit, priced)


def _run(run: RunStatement, prices: Prices) -> dict[str, Any]:
    return {
        "run": run.run,
        "namespace": namespace_of(run.namespace),
        "first": run.first,
        "last": run.last,
        **_sums(run.statement, prices),
    }


def _figures(store: Listed, sums: Mapping[str, Statement], prices: Prices, *, scopes: bool) -> dict[str, Any]:
    totals, known = store.totals(), _known(store, sums)
    namespaces = [
        {
            "namespace": info.namespace,
            "draws": info.draws,
            **_drawn(info.samples, info.generated),
            **_sums(sums.get(label(info.namespace), Statement()), prices),
        }
        for info in known
    ]
    has_shared = totals["draws"] > sum(info.draws for info in known)
    shared = list(store.draws(namespace=SHARED)) if has_shared else []
    return {
        "folder": store.where,
        "bytes": store.size(),
        **{name: totals[name] for name in ("keys", "samples", "pending", "discarded", "draws")},
        **_drawn(sum(info.samples for info in known), sum(info.generated for info in known)),
        **_sums(_total(sums), prices),
        "models": by_model(_total(sums).accounts(), prices.cost_of_sum),
        "namespaces": namespaces,
        "shared": {
            "draws": len(shared),
            "drawn": sum(len(draw.indices) for draw in shared),
            "generated": sum(draw.generated for draw in shared),
        },
        "removals": [_removal(record, prices) for record in store.removals()],
        "scopes": _scopes(store) if scopes else None,
    }


def _removal(record: dict[str, Any], prices: Prices) -> dict[str, Any]:
    told = {name: fact for name, fact in record.items() if name not in ("id", "lease", "spent", "deleting")}
    return {**told, "cost": Account.of(record["cost"]).as_dict(prices.cost_of_sum)}


def _known(store: Listed, sums: Mapping[str, Statement]) -> list[NamespaceInfo]:
    """Return the namespaces; those that only replay have no draws in the ledger.

    Imported samples were generated for none of them, and count in the sums of the cache only.
    """
    known = {label(info.namespace): info for info in store.namespaces()}
    for name in sums.keys() - {SHARED}:
        known.setdefault(name, NamespaceInfo(namespace_of(name), 0, 0, 0))
    return list(known.values())


def _total(sums: Mapping[str, Statement]) -> Statement:
    total = Statement()
    for statement in sums.values():
        total.join(statement)
    return total


def _sums(statement: Statement, prices: Prices) -> dict[str, Any]:
    """Return the sums of a namespace, or of all."""
    accounts = statement.accounts()
    return {
        "requests": statement.delivered.requests,
        **{name: account.as_dict(prices.cost_of_sum) for name, account in accounts.items()},
    }


def _scopes(store: Listed) -> list[dict[str, Any]]:
    found: dict[str | None, Counter[str]] = {}
    for info in store.keys():  # noqa: SIM118 - a store is no mapping
        counts = found.setdefault(info.scope, Counter())
        counts.update(keys=1, samples=info.samples, pending=info.pending)
    return [{"scope": scope, **counts} for scope, counts in found.items()]


def _drawn(drawn: int, generated: int) -> dict[str, Any]:
    reused = max(drawn - generated, 0)
    return {
        "drawn": drawn,
        "generated": generated,
        "reused": reused,
        "reused_share": round(reused / drawn, 6) if drawn else None,
    }


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


def _print_stats(figures: dict[str, Any], sums: Mapping[str, Statement], limit: int, prices: Prices) -> None:
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
    accounts = _total(sums).accounts()
    for name, account in accounts.items():
        samples = counted(account.counts()["samples"], "sample")
        facts.append((name.replace("_", " "), f"{samples}, {common.money(account, prices)}"))
    common.print_facts(facts)
    namespaces = figures["namespaces"]
    _print_rows(_DRAWN, namespaces, limit, "namespace", last=_shared_row(figures["shared"]))
    sums_of = {f">{name.replace('_', ' ')}": _tokens_of(name) for name in accounts}
    tokens: common.Columns = {"tokens of namespace": _name_of, ">requests": "requests", **sums_of}
    _print_rows(tokens, namespaces, limit)
    models: common.Columns = {
        "tokens of model": lambda row: row["model"] or "(none)",
        "url": "url",
        **sums_of,
    }
    _print_rows(models, figures["models"], limit)
    runs: common.Columns = {
        "run": lambda row: row["run"] or "(unknown)",
        "namespace": _name_of,
        "first sample": lambda row: "-" if row["first"] is None else common.when(row["first"]),
        **{name: tokens[name] for name in (">requests", ">spent", ">billed", ">saved", ">wasted")},
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
