"""The figures of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachepipe.accounting import Account, Delivered, by_model, sums
from cachepipe.prices import Prices


@dataclass
class Report:
    """How far a run is, and what it has cost; complete when `run_file` returns it.

    Attributes:
        requests: requests in the input, or as many as were to be run, times the number of replicates.
        done: requests that have ended, including failed ones.
        failed: requests that failed.
        kept: failed requests that keep their earlier result; the other failed ones became error lines.
        hits: samples that came from the cache, or were generated for another line.
        misses: samples that were generated for the line that got them.
        generated: samples that the model returned.
        delivered: what the answered lines would have cost alone, were billed, and saved, in tokens.
        spent: the tokens of all samples that the model returned.
        wasted: those of them that no namespace holds at the end of the run.
        run: the name of the run, as ``stats`` lists it.
        calls: calls that were made; repetitions within the SDK are not counted.
        in_flight: lines that are being answered now.
        most_ahead: the largest number of lines in memory, counted from the line that is written next.
        seconds: the duration.
        errors: the number of errors by code.
        example: the message of the first error.
        interrupted: whether the run ended before all lines had.
        output: the file with the results, once they are complete.
        partial: the file with the results of an interrupted run, up to the first that is missing; None if it
            has none.
        prices: the prices of the costs.
    """

    requests: int = 0
    done: int = 0
    failed: int = 0
    kept: int = 0
    hits: int = 0
    misses: int = 0
    generated: int = 0
    delivered: Delivered = field(default_factory=Delivered)
    spent: Account = field(default_factory=Account)
    wasted: Account = field(default_factory=Account)
    run: str = ""
    calls: int = 0
    in_flight: int = 0
    most_ahead: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
    example: str = ""
    interrupted: bool = False
    output: Path | None = None
    partial: Path | None = None
    prices: Prices = field(default_factory=Prices)

    def fail(self, code: str, message: str) -> None:
        """Count a request that failed."""
        self.failed += 1
        self.errors[code] = self.errors.get(code, 0) + 1
        self.example = self.example or message

    def accounts(self) -> dict[str, Account]:
        """Return the sums of tokens by name: spent, as asked, billed, saved, unreported and wasted."""
        return {**sums(self.spent, self.delivered), "wasted": self.wasted}

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name, paths as strings; sums of tokens as `Account.as_dict` does."""
        figures = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        for name in ("output", "partial"):
            figures[name] = None if figures[name] is None else str(figures[name])
        del figures["in_flight"], figures["delivered"], figures["prices"]
        accounts, price = self.accounts(), self.prices.cost_of_sum
        figures |= {name: account.as_dict(price) for name, account in accounts.items()}
        return {**figures, "models": by_model(accounts, price)}
