"""The figures of a plan: what a run of a batch file would do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ModelPlan:
    """What would be bought of one model.

    Attributes:
        model: the name in the requests.
        url: the URL of the calls.
        calls: the calls, each for the samples of one question; a run that merges calls makes fewer.
        samples: the samples to buy.
        prompt_tokens: the tokens of the prompts, estimated; a call's prompt counts once.
        completion_tokens: the expected tokens of the answers; None if no answer of the model is stored.
        most_completion_tokens: the largest number of them; None if a request has no limit that is known.
        cost: the expected cost in US dollars; None if it is unknown.
        most_cost: the largest cost, with the longest answers; None if it is unknown.
    """

    model: str | None
    url: str
    calls: int = 0
    samples: int = 0
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    most_completion_tokens: int | None = None
    cost: float | None = None
    most_cost: float | None = None


@dataclass
class Reason:
    """Why questions are new.

    Attributes:
        share: the part of the new questions that were looked at.
        line: the line of one of them.
        key: its key.
        nearest: the key of the stored question that differs least; None if none is similar.
        why: how they differ, in words.
    """

    share: float
    line: int
    key: str
    nearest: str | None
    why: str


@dataclass
class Plan:
    """What a run would do.

    Attributes:
        requests: requests in the file, times the number of replicates.
        hits: requests that the cache answers.
        partial_hits: requests that lack some samples.
        misses: requests that lack all samples.
        refused: requests that would fail before any call.
        questions: the different questions in the file, with the draws of each counted once.
        new_questions: questions that the cache has never been asked.
        samples: samples that the requests ask for.
        stored: samples that are stored.
        repeated: samples that an earlier line of the file would generate.
        awaited: samples that other processes generate now.
        to_buy: samples that the model would be asked for; in replay mode they are cache misses.
        models: what would be bought, by model and URL.
        seconds: how long the calls would take at the given rates; None if that is unknown.
        reasons: why questions are new, the most frequent first, if most are.
        notes: what is unknown, and how to give it.
    """

    requests: int = 0
    hits: int = 0
    partial_hits: int = 0
    misses: int = 0
    refused: int = 0
    questions: int = 0
    new_questions: int = 0
    samples: int = 0
    stored: int = 0
    repeated: int = 0
    awaited: int = 0
    to_buy: int = 0
    models: list[ModelPlan] = field(default_factory=list)
    seconds: float | None = None
    reasons: list[Reason] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """The number of calls, at most."""
        return sum(each.calls for each in self.models)

    @property
    def cost(self) -> float | None:
        """The expected cost in US dollars; None if a part of it is unknown."""
        return _sum(each.cost for each in self.models)

    @property
    def most_cost(self) -> float | None:
        """The largest cost in US dollars; None if a part of it is unknown."""
        return _sum(each.most_cost for each in self.models)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {**asdict(self), "calls": self.calls, "cost": self.cost, "most_cost": self.most_cost}


def _sum(parts: Iterator[float | None]) -> float | None:
    known = list(parts)
    return None if None in known else math.fsum(part for part in known if part is not None)
