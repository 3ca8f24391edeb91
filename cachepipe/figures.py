"""What a cache holds and has cost, as the command `stats`, the proxy and Python show it (C6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from cachepipe.accounting import Account, Statement, by_model
from cachepipe.contract.draws import SHARED, label, namespace_of
from cachepipe.prices import Prices
from cachepipe.stores import open_store
from cachepipe.stores.base import Listed, NamespaceInfo
from cachepipe.stores.sums import RunStatement, run_statements

ACCOUNTS: Final = tuple(Statement().accounts())
"""The names of the sums, in order."""


def stats(cache: Any = None, *, prices: Prices | None = None, scopes: bool = False) -> dict[str, Any]:
    """Return what a cache holds, and what was spent, billed, saved and wasted.

    Args:
        cache: a folder, a URL, a bundle, an open store, or None for the default folder.
        prices: the prices of the costs; default is those that are known.
        scopes: whether to count by scope too, which reads every key.

    Returns:
        The object that ``cachepipe stats --runs --json`` prints: figures of the whole cache, and lists of
        them by namespace, by model and by run.

    Raises:
        StoreError: when the cache cannot be read.
    """
    store: Any
    store, owned = open_store(cache, read_only=True)
    try:
        return stats_of(store, prices or Prices(), scopes=scopes)
    finally:
        if owned:
            store.close()


def stats_of(store: Listed, prices: Prices, *, scopes: bool = False) -> dict[str, Any]:
    """Return the figures of an open store; see `stats`."""
    runs = run_statements(store)
    sums: dict[str, Statement] = {}
    for run in runs:
        sums.setdefault(run.namespace, Statement()).join(run.statement)
    figures = _figures(store, sums, prices, scopes=scopes)
    return {**figures, "runs": [_run(run, prices) for run in runs]}


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
