"""The command `demo` shows what a cache saves, with real prompts and a real model that costs nothing.

The prompts are HumanEval's, the client is OpenAI's own, and the code is that of `cachepipe run`. The server
is the embedded model, in a thread. The demo reads what was paid from the server's counters, not from the
cache's, because the server would send the bill.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import secrets
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import orjson

from cachepipe.cli import common
from cachepipe.cli.group import Failure
from cachepipe.errors import ReadOnlyStore
from cachepipe.progress import Tick, shown
from cachepipe.terminal import visible

if TYPE_CHECKING:
    from cachepipe.batch import Report
    from cachepipe.testing import MockServer

_PROMPTS: Final = 164
_MORE: Final = 2  # samples that the last step asks for beyond n
_CHANGED: Final = 0.03  # the share of prompts that one step changes
_MAX_TOKENS: Final = 64
_LATENCY: Final = 0.25  # seconds: a fast provider
_CONCURRENCY: Final = 8
_MODEL: Final = "ngram-1"
_NOT_HELD: Final = 1

Lines = list[dict[str, Any]]
Answers = dict[str, dict[str, Any]]


class Bill(NamedTuple):
    """The counts of the server: calls, generated samples, tokens in and out."""

    calls: int
    samples: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One run of the demo, and what it cost.

    Attributes:
        name: the name of the step.
        report: the report of the run.
        bill: the server's counts for the run.
        answers: the answers by request id.
        asked: the number of samples that were asked for.
    """

    name: str
    report: Report
    bill: Bill
    answers: Answers
    asked: int

    @property
    def tokens(self) -> int:
        """The tokens that the requests would have cost as they were asked, without a cache."""
        return sum(answer["usage"]["total_tokens"] for answer in self.answers.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "step": self.name,
            "requests": self.report.requests,
            "failed": self.report.failed,
            "hits": self.report.hits,
            "seconds": round(self.report.seconds, 3),
            "calls": self.bill.calls,
            "samples": _saving(self.asked, self.bill.samples),
            "tokens": _saving(self.tokens, self.bill.tokens),
        }


def _saving(as_asked: int, spent: int) -> dict[str, int]:
    return {"as_asked": as_asked, "spent": spent, "saved": as_asked - spent}


_JSON: Final = """\b
With --json:
  prompts, n, changed    how many prompts, samples of each, and prompts that were changed
  steps                  a list of step, requests, failed, hits (samples from the cache), seconds,
                         calls, samples and tokens; the last two hold as_asked (what the requests would
                         have cost without a cache), spent and saved; calls and spent are the server's
                         own counts
  total                  the sums over all steps
  promises               a list of promise and held
  held                   whether all promises were held; if not, the exit code is 1
"""


@click.command(epilog=_JSON)
@click.option(
    "--prompts", default=40, show_default=True, type=click.IntRange(1, _PROMPTS), help="Prompts of HumanEval."
)
@click.option("--n", default=3, show_default=True, type=click.IntRange(1, 64), help="Samples of each prompt.")
@click.option(
    "--cache", metavar="DIR", type=click.Path(), help="Keep the cache in this folder, to look at it later."
)
@common.json_option("one object; see below")
@click.pass_context
def demo(context: click.Context, /, *, prompts: int, n: int, cache: str | None, as_json: bool) -> None:
    """Show what a cache saves; needs no key and no network.

    The demo starts a small model server on this machine and sends real prompts to it with OpenAI's client:
    once, a second time, in another namespace, with a few prompts changed, and with more samples of each.
    Then it compares the server's counts with what cachepipe promises.
    """
    _check_cache(cache)
    with tempfile.TemporaryDirectory(prefix="cachepipe-demo-") as made:
        scratch = Path(made)
        steps, promises = asyncio.run(_play(_read_prompts(prompts), n, cache or scratch / "cache", scratch))
    held = all(kept for _, kept in promises)
    rows = [step.as_dict() for step in steps]
    if as_json:
        figures = {
            "prompts": prompts,
            "n": n,
            "changed": len(_changed_places(prompts)),
            "steps": rows,
            "total": _total(rows),
            "promises": [{"promise": promise, "held": kept} for promise, kept in promises],
            "held": held,
        }
        click.echo(common.json_text(figures))
    else:
        _print_report(rows, promises)
        for step in steps:
            if step.report.failed:
                failed = f"{step.report.failed} requests of {step.name!r} failed: {step.report.example}"
                click.echo(failed, err=True)
        if cache is not None:
            click.echo(f"The cache is kept: cachepipe stats --cache {visible(common.name_of(cache))}")
    context.exit(0 if held else _NOT_HELD)


# What is done.


def _check_cache(cache: str | None) -> None:
    """Raise an error if the cache cannot store samples."""
    from cachepipe.stores import open_store, switched_off  # noqa: PLC0415 - help needs no store

    if switched_off():
        raise Failure(
            "CACHEPIPE_DISABLE switches all caches off, so the demo cannot show anything; unset it first"
        )
    if cache is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReadOnlyStore)
        store, _ = open_store(cache)
    store.close()
    if store.read_only:
        raise Failure(
            f"the cache {common.name_of(cache)} cannot be written: {store.why_read_only}. "
            "Name another with --cache"
        )


def _read_prompts(count: int) -> Lines:
    """Return the first prompts of HumanEval as lines of a batch file."""
    text = resources.files("cachepipe.testing").joinpath("data/humaneval.jsonl").read_bytes()
    found: Lines = []
    for line in text.splitlines()[:count]:
        fields = orjson.loads(line)
        found.append({"task_id": fields["task_id"], "prompt": fields["prompt"]})
    return found


def _changed_places(count: int) -> range:
    """Return the places of the prompts that are changed: 3 in 100, at least one, spread evenly."""
    changed = max(1, round(_CHANGED * count))
    return range(0, count, -(-count // changed))[:changed]


def _changed(lines: Lines) -> Lines:
    """Return the same lines with a few prompts changed."""
    places = set(_changed_places(len(lines)))
    return [
        {**line, "prompt": f"{line['prompt']}    # Do not use recursion.\n"} if place in places else line
        for place, line in enumerate(lines)
    ]


async def _play(
    lines: Lines, n: int, cache: str | Path, scratch: Path
) -> tuple[list[Step], list[tuple[str, bool]]]:
    """Return the steps, and which promises they kept."""
    import openai  # noqa: PLC0415 - takes a while, and help needs none of it

    from cachepipe.testing import MockServer, MockSettings  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(MockServer.in_thread(MockSettings(latency=_LATENCY)))
        # A proxy in the environment is for the network, which the demo does not use.
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        client = openai.AsyncOpenAI(base_url=server.base_url, api_key="none", http_client=http)
        async with client:
            player = _Player(server, client, cache, scratch)
            first = await player.step("first run", lines, n, "demo-1")
            again = await player.step("the same again", lines, n, "demo-1")
            other = await player.step("another namespace", lines, n, "demo-2")
            few = len(_changed_places(len(lines)))
            name = f"{few} prompt{'s' * (few != 1)} changed"
            changed = await player.step(name, _changed(lines), n, "demo-3")
            more = await player.step(f"n = {n + _MORE} instead of {n}", lines, n + _MORE, "demo-1")
    steps = [first, again, other, changed, more]
    return steps, _promises(steps, n, few)


class _Player:
    """Runs files against the server and notes the server's counts."""

    def __init__(self, server: MockServer, client: Any, cache: str | Path, scratch: Path) -> None:
        self._server = server
        self._client = client
        self._cache = cache
        self._scratch = scratch
        # The port may be that of an earlier demo with the same cache.
        self._scope = f"{server.base_url}/chat/completions?demo={secrets.token_hex(4)}"

    async def step(self, name: str, lines: Lines, n: int, namespace: str) -> Step:
        """Run the lines in a run of their own, and return the step."""
        from cachepipe.batch import run_file  # noqa: PLC0415 - help needs none of it

        requests, results = self._scratch / "requests.jsonl", self._scratch / "results.jsonl"
        requests.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        before = await self._bill()
        with shown(len(lines), name) as tick:
            report = await run_file(
                requests,
                results,
                model=_MODEL,
                client=self._client,
                n=n,
                max_tokens=_MAX_TOKENS,
                cache=self._cache,
                namespace=namespace,
                scope=self._scope,
                concurrency=_CONCURRENCY,
                progress=_ticking(tick),
            )
        bill = Bill(*map(operator.sub, await self._bill(), before))
        found = [orjson.loads(line) for line in results.read_bytes().splitlines()]
        answers = {line["custom_id"]: line["response"]["body"] for line in found if line["error"] is None}
        return Step(name, report, bill, answers, n * len(lines))

    async def _bill(self) -> Bill:
        """Return the server's counts once no call is in flight."""
        await asyncio.to_thread(self._server.wait_until, lambda stats: stats.in_flight == 0)
        stats = self._server.stats
        return Bill(stats.requests, stats.samples_generated, stats.tokens_in + stats.tokens_out)


def _promises(steps: list[Step], n: int, few: int) -> list[tuple[str, bool]]:
    """Return the promises of cachepipe, and whether the server's counts and the answers confirm them."""
    first, again, other, changed, more = steps
    count = len(first.answers)
    kept = [name for name in first.answers if changed.answers.get(name) == first.answers[name]]
    grown = [
        name
        for name in first.answers
        if name in more.answers and _texts(more.answers[name])[:n] == _texts(first.answers[name])
    ]
    free = Bill(0, 0, 0)
    return [
        (
            "every request was answered",
            all(step.report.failed == 0 and len(step.answers) == count for step in steps),
        ),
        (
            "the first run pays once for each sample",
            first.bill.samples == first.report.misses == first.asked - first.report.hits,
        ),
        ("the same run again costs nothing", again.bill == free),
        ("another namespace costs nothing", other.bill == free),
        ("both get the same answers", again.answers == first.answers == other.answers),
        (
            f"only changed prompts are paid for ({few} of {count})",
            (changed.bill.calls, changed.bill.samples) == (few, few * n) and len(kept) == count - few,
        ),
        (
            f"of {n + _MORE} samples, {n} are cached, and only the other {_MORE} are paid for",
            more.bill.samples == _MORE * count and len(grown) == count,
        ),
    ]


def _texts(answer: dict[str, Any]) -> list[Any]:
    return [choice["message"] for choice in answer["choices"]]


# The report.


def _ticking(tick: Tick) -> Callable[[Report], None]:
    """Return a function that moves a progress bar to the number of requests done."""
    done = 0

    def progress(report: Report) -> None:
        nonlocal done
        for _ in range(report.done - done):
            tick()
        done = report.done

    return progress


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all steps, added up."""
    total: dict[str, Any] = {
        name: sum(row[name] for row in rows) for name in ("requests", "failed", "hits", "seconds", "calls")
    }
    total["seconds"] = round(total["seconds"], 3)
    for what in ("samples", "tokens"):
        total[what] = _saving(*(sum(row[what][name] for row in rows) for name in ("as_asked", "spent")))
    return total


def _saved(what: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the cell with the share of samples or tokens that were saved."""
    return lambda row: common.share(row[what]["saved"], row[what]["as_asked"])


_COLUMNS: Final[common.Columns] = {
    "step": "step",
    ">requests": "requests",
    ">calls": "calls",
    ">samples spent": lambda row: row["samples"]["spent"],
    ">hits": "hits",
    ">time": lambda row: f"{row['seconds']:.2f} s",
    ">samples saved": _saved("samples"),
    ">tokens saved": _saved("tokens"),
}


def _print_report(rows: list[dict[str, Any]], promises: list[tuple[str, bool]]) -> None:
    total = _total(rows)
    common.print_table(_COLUMNS, [*rows, {"step": "together", **total}], total=True)
    click.echo()
    for promise, kept in promises:
        mark = common.styled("held", fg="green") if kept else common.styled("NOT HELD", fg="red", bold=True)
        click.echo(f"{mark}  {promise}")
    click.echo()
    asked, spent, saved = total["samples"].values()
    verdict = (
        f"The server was asked for {spent:,} samples where {asked:,} were delivered: "
        f"{common.share(saved, asked)} of them cost nothing."
    )
    if broken := sum(not kept for _, kept in promises):
        verdict = f"{broken} of {len(promises)} promises were not kept; this is a bug of cachepipe."
    click.echo(common.styled(verdict, bold=True))
