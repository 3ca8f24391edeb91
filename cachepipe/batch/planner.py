"""What a run would do, without doing it: hits, misses, tokens, money and time. Nothing is written.

A plan makes the draws of `run_file` in the order of the file, and asks the store what each would get after
the ones before it. The contract's own rules decide that (C3, C4), so a plan buys what a run buys.

Prompts are estimated from their text, and corrected by what stored answers of the same model have used. The
size of an answer is the mean of stored answers; its bound is ``max_tokens``, or the largest that the model
gives. Nothing is guessed: what is unknown is None, and a note says how to make it known.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from cachepipe.accounting import sold_in, usage_sold
from cachepipe.batch.draws import FileDraws, LineDraw
from cachepipe.batch.files import InputFile
from cachepipe.batch.lines import Line
from cachepipe.batch.plan import ModelPlan, Plan, Reason
from cachepipe.batch.report import Report
from cachepipe.batch.runner import model_of
from cachepipe.batch.settings import BatchSettings
from cachepipe.contract.draws import Draw
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.differences import differences
from cachepipe.errors import NoCache, UnkeyableValue
from cachepipe.flow.tokens import Estimator, limit_of
from cachepipe.prices import HOW_TO_GIVE, Prices, cost_by_unit
from cachepipe.runs import Spilling
from cachepipe.stores import MemoryStore, Store, open_store, switched_off
from cachepipe.stores.base import Ahead, Foreseen
from cachepipe.stores.misses import unlike
from cachepipe.wire import Ask

_TOGETHER: Final = 256  # draws that the store is asked about at once
_KEPT: Final = 2000  # keys with planned samples in memory
_LEARNT: Final = 1000  # stored answers of a model from which its estimates are corrected
_LOOKED_AT: Final = 10  # new questions that are compared with stored ones


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast calls can be made.

    Attributes:
        concurrency: calls at once.
        requests_per_minute: calls per minute; None for no limit.
        tokens_per_minute: tokens of prompts and answers per minute; None for no limit.
    """

    concurrency: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


def plan_file(
    input: str | os.PathLike[str],  # noqa: A002 - as in `run_file`
    settings: BatchSettings | None = None,
    *,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    progress: Callable[[int], object] | None = None,
    **changes: Any,
) -> Plan:
    """Return what `run_file` would do with the same arguments. Calls no model, and changes nothing.

    Args:
        input: the batch file.
        settings: the settings of the run.
        requests_per_minute: the calls per minute that the service allows, for the duration.
        tokens_per_minute: the tokens per minute that it allows, for the duration.
        progress: called with the number of each line of the file, in order.
        changes: settings to change; `BatchSettings` lists them.

    Raises:
        BatchFileError: when the input cannot be run.
        StoreError: when the cache cannot be opened.
    """
    settings = replace(settings or BatchSettings(), **changes)
    if settings.mode == "read-write" and switched_off():
        settings = replace(settings, mode="bypass")
    rate = Rate(
        concurrency=settings.concurrency,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    with InputFile(Path(input), settings) as lines:
        store, owned = opened(settings)
        try:
            planner = _Planner(store, settings)

            def take(line: Line) -> None:
                planner.take(line)
                if progress is not None:
                    progress(line.number)

            lines.check(settings.stop, take)
            return planner.plan(rate)
        finally:
            if owned:
                store.close()


def opened(settings: BatchSettings) -> tuple[Store, bool]:
    """Return the store, read-only, and whether to close it; an empty one if there is no cache yet."""
    if settings.mode == "bypass":
        return MemoryStore(), True
    try:
        return open_store(settings.cache, read_only=True)
    except NoCache:
        return MemoryStore(), True


class _Wanted(NamedTuple):
    """One question of a line, and its draw."""

    line: int
    question: Question
    ask: Ask
    draw: Draw
    url: str


class _Seller:
    """What is wanted of one model at one URL, and what its stored answers have shown."""

    def __init__(self) -> None:
        self.calls = self.samples = 0
        self.prompt = 0.0  # tokens of the prompts to pay for, before the correction
        self.most: int | None = 0
        self.looked_at = self.shown = self.completion = 0
        self.shown_prompt = self.raw_prompt = 0.0
        self.seconds = 0.0

    def learn(self, foreseen: Foreseen, raw: float) -> None:
        """Learn from a stored answer: the size of its prompt, and of its text, and how long it took."""
        for sample in foreseen.samples:
            self.looked_at += 1
            counts = usage_sold(sold_in(sample.header)).counts
            if counts is None:
                continue
            self.shown += 1
            self.completion += counts["completion_tokens"]
            if raw and counts["prompt_tokens"]:
                self.shown_prompt += counts["prompt_tokens"]
                self.raw_prompt += raw
            seconds = orjson.loads(sample.header).get("seconds")
            self.seconds += seconds if isinstance(seconds, int | float) else 0.0

    def want(self, samples: int, calls: int, raw: float, limit: int | None) -> None:
        """Add samples to buy."""
        self.samples += samples
        self.calls += calls
        self.prompt += calls * raw
        self.most = None if limit is None or self.most is None else self.most + samples * limit

    def planned(self, model: str | None, url: str, prices: Prices) -> ModelPlan:
        """Return what would be bought."""
        ratio = self.shown_prompt / self.raw_prompt if self.raw_prompt else 1.0
        prompt = round(self.prompt * ratio)
        mean = self.completion / self.shown if self.shown else None
        expected = 0 if self.most == 0 else None if mean is None else round(self.samples * mean)
        if expected is not None and self.most is not None:
            expected = min(expected, self.most)
        price = prices.unit(model, url)

        def cost(completion: int | None) -> float | None:
            if completion is None:
                return None
            counts = {"prompt_tokens": prompt, "cached_tokens": 0, "completion_tokens": completion}
            return cost_by_unit(counts, price)

        return ModelPlan(
            model,
            url,
            self.calls,
            self.samples,
            prompt,
            expected,
            self.most,
            cost(expected),
            cost(self.most),
        )


class _Planner:
    """Makes the draws of a file, and adds up what each would get."""

    def __init__(self, store: Store, settings: BatchSettings) -> None:
        self._store = store
        self._settings = settings
        self._prices = settings.prices or Prices()
        self._model = model_of(settings)
        self._draws = FileDraws(self._model, store, settings, Report())
        self._plan = Plan()
        self._estimator = Estimator(None)
        self._sellers: dict[tuple[str | None, str], _Seller] = {}
        self._limits: dict[tuple[str | None, str], int | None] = {}
        self._ahead: Spilling[tuple[str, str], Ahead] = Spilling(Ahead, _dump, _load, _KEPT)
        self._seen: Spilling[tuple[str], int] = Spilling(int, int, int, _KEPT)
        self._new: list[_Wanted] = []
        self._waiting: list[list[_Wanted]] = []
        self._waiting_draws = 0

    def take(self, line: Line) -> None:
        """Take the next line of the file."""
        for draw in self._draws.draws(line):
            self._plan.requests += 1
            wanted = self._wanted(draw)
            if wanted is None:
                self._plan.refused += 1
                continue
            self._waiting.append(wanted)
            self._waiting_draws += len(wanted)
            if self._waiting_draws >= _TOGETHER:
                self._foresee()

    def _wanted(self, draw: LineDraw) -> list[_Wanted] | None:
        """Return the questions of a line with their draws; None if it would be refused."""
        if draw.line.refusal is not None:
            return None
        try:
            url, each = self._draws.planned(draw)
        except UnkeyableValue:
            return None
        return [_Wanted(draw.line.number, *one, url) for one in zip(*each, strict=True)]

    def _foresee(self) -> None:
        """Add up what the waiting requests would get."""
        requests, self._waiting, self._waiting_draws = self._waiting, [], 0
        wanted = [each for request in requests for each in request]
        refresh = self._settings.mode == "refresh"
        if not wanted:
            return
        if self._settings.mode == "bypass":
            found = [Foreseen([], each.ask.n, [], known=False) for each in wanted]
        else:
            ahead: dict[tuple[str, str], Ahead] = {}
            for each in wanted:
                place = (each.draw.namespace, each.draw.key)
                if place not in ahead:
                    ahead[place] = self._ahead[place]
            asked = [(each.draw, each.ask.n, ahead[each.draw.namespace, each.draw.key]) for each in wanted]
            found = self._store.foresee(asked, refresh=refresh)
            for place, planned in ahead.items():
                if planned.taken or planned.listed:
                    self._ahead[place] = planned
            self._ahead.trim()
        each_found = iter(found)
        for request in requests:
            self._add(request, [next(each_found) for _ in request])

    def _add(self, request: Sequence[_Wanted], found: Sequence[Foreseen]) -> None:
        """Add up what a request would get."""
        missing = 0
        for wanted, foreseen in zip(request, found, strict=True):
            missing += self._add_draw(wanted, self._without_the_dead(wanted.draw.key, foreseen))
        asked = sum(wanted.ask.n for wanted in request)
        if not missing:
            self._plan.hits += 1
        elif missing < asked:
            self._plan.partial_hits += 1
        else:
            self._plan.misses += 1

    def _without_the_dead(self, key: str, foreseen: Foreseen) -> Foreseen:
        """Return what a claim would get once the leases of processes that have ended are taken back."""
        if not foreseen.awaited:
            return foreseen
        states = self._store.status([(key, index) for index in foreseen.awaited])
        left = [index for index, state in zip(foreseen.awaited, states, strict=True) if state == "pending"]
        free = len(foreseen.awaited) - len(left)
        return foreseen._replace(generated=foreseen.generated + free, awaited=left)

    def _add_draw(self, wanted: _Wanted, foreseen: Foreseen) -> int:
        """Add up what a draw would get; return how many samples the model would be asked for."""
        plan, n = self._plan, wanted.ask.n
        plan.samples += n
        plan.stored += len(foreseen.samples)
        plan.awaited += len(foreseen.awaited)
        plan.to_buy += foreseen.generated
        plan.repeated += n - len(foreseen.samples) - len(foreseen.awaited) - foreseen.generated
        model = wanted.ask.question.get("model")
        seller = (model if isinstance(model, str) else None, wanted.url)
        totals = self._sellers.get(seller)
        if totals is None:
            totals = self._sellers[seller] = _Seller()
        self._count(wanted, known=foreseen.known)
        if not foreseen.generated and totals.looked_at >= _LEARNT:
            return 0
        raw = self._estimator.estimate(wanted.ask.question, 1).raw
        if foreseen.samples and totals.looked_at < _LEARNT:
            totals.learn(foreseen, raw)
        if foreseen.generated:
            calls = math.ceil(foreseen.generated / self._model.max_n)
            totals.want(foreseen.generated, calls, raw, self._limit(wanted.ask, seller))
        return foreseen.generated

    def _limit(self, ask: Ask, seller: tuple[str | None, str]) -> int | None:
        """Return the largest number of tokens of an answer, or None if it is unknown."""
        limit = 0 if ask.function else limit_of(ask.question)
        if limit is None:
            if seller not in self._limits:
                self._limits[seller] = self._prices.max_tokens(*seller)
            limit = self._limits[seller]
        return limit

    def _count(self, wanted: _Wanted, *, known: bool) -> None:
        """Count the question, and whether the cache knows it, once."""
        place = (wanted.question.key,)
        if self._seen[place]:
            return
        self._seen[place] = 1
        self._seen.trim()
        self._plan.questions += 1
        if not known:
            self._plan.new_questions += 1
            if len(self._new) < _LOOKED_AT:
                self._new.append(wanted)

    # The result.

    def plan(self, rate: Rate) -> Plan:
        """Return the plan, when all lines are taken."""
        self._foresee()
        plan = self._plan
        bought = {seller: totals for seller, totals in self._sellers.items() if totals.samples}
        for (model, url), totals in bought.items():
            planned = totals.planned(model, url, self._prices)
            plan.models.append(planned)
            plan.notes += _notes(planned, self._prices)
        plan.seconds = _seconds(plan, [*self._sellers.values()], rate)
        if plan.seconds is None:
            plan.notes.append(
                "The duration is unknown: no answer of these models is stored. Give "
                "--requests-per-minute or --tokens-per-minute"
            )
        if plan.new_questions * 2 > plan.questions:
            plan.reasons = self._reasons()
        return plan

    def _reasons(self) -> list[Reason]:
        """Return why questions are new, unless the cache is empty.

        Questions that differ in the same fields have one reason.
        """
        if next(self._store.keys(), None) is None:
            return []
        found: dict[tuple[str, ...], Reason] = {}
        counts: Counter[tuple[str, ...]] = Counter()
        for wanted in self._new:
            question = wanted.question
            near = self._store.similar(question)
            paths: tuple[str, ...] = ()
            if near is not None:
                differing = differences(question.scope, question.document, near.scope, near.document)
                paths = tuple(difference.path for difference in differing)
            counts[paths] += 1
            if paths not in found:
                nearest = None if near is None else near.key
                found[paths] = Reason(0.0, wanted.line, question.key, nearest, unlike(question, near))
        for paths, reason in found.items():
            reason.share = counts[paths] / len(self._new)
        return sorted(found.values(), key=lambda reason: -reason.share)


def _notes(planned: ModelPlan, prices: Prices) -> Iterator[str]:
    """Yield what is unknown about a model, and how to give it."""
    name = planned.model or "the server's own model"
    if prices.unit(planned.model, planned.url) is None:
        yield f"The price of {name} at {planned.url} is unknown. {HOW_TO_GIVE}"
    if planned.completion_tokens is None:
        yield (
            f"The expected size of the answers of {name} is unknown: no line has a stored answer. "
            "Run some first, such as --limit 20"
        )
    if planned.most_completion_tokens is None:
        yield (
            f"The largest size of the answers of {name} is unknown, because requests have no limit. "
            "Give --max-tokens, or max_tokens in the file of --prices"
        )


def _seconds(plan: Plan, sellers: Sequence[_Seller], rate: Rate) -> float | None:
    """Return how long the calls would take, or None if nothing says so."""
    if not plan.to_buy:
        return 0.0
    found: list[float] = []
    shown = sum(seller.shown for seller in sellers)
    if shown:
        latency = sum(seller.seconds for seller in sellers) / shown
        found.append(plan.calls * latency / min(rate.concurrency, plan.calls))
    if rate.requests_per_minute:
        found.append(60 * plan.calls / rate.requests_per_minute)
    if rate.tokens_per_minute:
        each = [(one.completion_tokens, one.most_completion_tokens) for one in plan.models]
        completion = sum(most or 0 if expected is None else expected for expected, most in each)
        prompt = sum(one.prompt_tokens for one in plan.models)
        found.append(60 * (prompt + completion) / rate.tokens_per_minute)
    return max(found, default=None)


def _dump(ahead: Ahead) -> bytes:
    return orjson.dumps([list(ahead.listed), list(ahead.taken), ahead.held])


def _load(row: bytes) -> Ahead:
    listed, taken, held = orjson.loads(row)
    return Ahead(IntervalSet(map(tuple, listed)), IntervalSet(map(tuple, taken)), held)
