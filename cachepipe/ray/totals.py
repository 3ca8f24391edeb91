"""What a run has cost and saved over all of its workers, and how many of its rows failed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from cachepipe import prices
from cachepipe.accounting import Statement
from cachepipe.cli.common import counted, money
from cachepipe.ray.settings import RaySettings
from cachepipe.stores import open_store
from cachepipe.stores.sums import run_statements
from cachepipe.terminal import visible

if TYPE_CHECKING:
    from ray.data import Dataset

_BATCH = 4096  # rows that are counted at once


@dataclass
class Answered:
    """The rows that were answered, and those that failed.

    Attributes:
        rows: the rows.
        failed: the rows that failed.
        hits: samples that came from the cache, or were generated for another row.
        misses: samples that were generated for the row that got them.
        errors: the number of errors by code.
        example: the first error.
    """

    rows: int = 0
    failed: int = 0
    hits: int = 0
    misses: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def add(self, cached: list[bool] | None, error: str | None) -> None:
        """Count a row by the columns that a stage has added to it."""
        self.rows += 1
        flags = cached or []
        self.hits += sum(flags)
        self.misses += len(flags) - sum(flags)
        if error is not None:
            self.failed += 1
            self.errors[error.partition(":")[0]] += 1
            self.example = self.example or error


@dataclass(frozen=True)
class Summary:
    """What a run has cost and saved, over all workers. Print it for a table.

    Attributes:
        statement: the sums of tokens and money.
        answered: the rows; None if no dataset was given.
    """

    statement: Statement
    answered: Answered | None = None

    def __str__(self) -> str:
        facts = {"requests": f"{self.statement.delivered.requests:,}"}
        if (rows := self.answered) is not None:
            kinds = ", ".join(f"{count:,} {code}" for code, count in rows.errors.most_common())
            facts |= {
                "rows": f"{rows.rows:,}",
                "samples": f"{rows.hits:,} hits, {rows.misses:,} misses",
                "errors": f"{rows.failed:,} ({kinds})" if kinds else "0",
            }
        for name in ("spent", "billed", "saved"):
            account = self.statement.accounts()[name]
            facts[name] = f"{counted(account.counts()['samples'], 'sample')}, {money(account)}"
        width = max(map(len, facts))
        return "\n".join(f"{name:<{width}}  {visible(fact)}" for name, fact in facts.items())

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name, and each sum as ``cachepipe stats --json`` writes it."""
        rows = self.answered
        figures = {} if rows is None else {**vars(rows), "errors": dict(rows.errors)}
        accounts = self.statement.accounts().items()
        return {
            "requests": self.statement.delivered.requests,
            **figures,
            **{name: account.as_dict(prices.cost_of_sum) for name, account in accounts},
        }


def summary(settings: RaySettings, answers: Dataset | None = None, *, prefix: str = "") -> Summary:
    """Return what the run of the settings has cost and saved, over all workers.

    It reads the headers of all samples in the cache, because what was spent follows from them.

    Args:
        settings: the settings of the run.
        answers: the dataset that `ask` has returned, materialized, whose rows and errors are then counted. A
            dataset that is not materialized asks again.
        prefix: the prefix of its columns.

    Raises:
        StoreError: when the cache cannot be opened.
    """
    answered = None if answers is None else _counted(answers, prefix)
    store, owned = open_store(settings.cache, read_only=True)
    total = Statement()
    try:
        for each in run_statements(store):
            if each.run == settings.run:
                total.join(each.statement)
    finally:
        if owned:
            store.close()
    return Summary(total, answered)


def _counted(answers: Dataset, prefix: str) -> Answered:
    """Return the figures of the rows of a dataset."""
    columns = [f"{prefix}cached", f"{prefix}error"]
    batches = answers.select_columns(columns).iter_batches(batch_format="pyarrow", batch_size=_BATCH)
    found = Answered()
    for cached, error in chain.from_iterable(zip(*_lists(batch, columns), strict=True) for batch in batches):
        found.add(cached, error)
    return found


def _lists(batch: Any, columns: list[str]) -> list[list[Any]]:
    return [batch.column(name).to_pylist() for name in columns]
