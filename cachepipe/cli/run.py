"""The command `run` answers a batch file; a rerun costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cachepipe import progress
from cachepipe.batch.settings import BatchSettings
from cachepipe.cli.batch_options import asking, count, mode_of, planning, setting, settings_in
from cachepipe.cli.common import exists, json_text, layers_in_use, money, name_of
from cachepipe.cli.group import Failure
from cachepipe.cli.plan import print_plan
from cachepipe.errors import CachepipeError, CachepipeWarning
from cachepipe.providers import presets
from cachepipe.terminal import visible

if TYPE_CHECKING:
    from cachepipe.batch import Report

__all__ = ["run"]

SOME_FAILED: Final = 1
_STOPPING: Final = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""The signals that end a run in good order; Windows has no SIGHUP."""
_SIGNALLED: Final = 128  # and the signal's number: 130 for Ctrl-C
_PLAIN_EVERY: Final = 5.0  # seconds between two lines of progress, where there is no terminal
_BAR_EVERY: Final = 0.1


_JSON: Final = """\b
With --json, one object:
  requests, done         requests in the file, once per replicate, and those that have ended
  failed, kept           requests that failed; failed requests that keep their earlier result
  errors, example        the number of errors by code; the message of the first error
  hits, misses           samples from the cache, or generated for another line; samples generated for
                         the line that got them
  generated              samples that the model returned
  calls                  calls to the server
  spent                  tokens of all samples that the model returned
  as_asked               what the answered lines would have cost alone, each in one call
  billed, saved          what the lines paid for: their misses, and the prompt of each call once;
                         as_asked less billed
  unreported             spent less billed: what reached no line
  wasted                 the part of spent that no namespace holds at the end
  run                    the name of the run, as `stats --runs` lists it
  models                 a list of model, url, and the sums of its samples
  seconds, most_ahead    the duration; the largest number of lines in memory
  interrupted            whether the run ended early
  output, partial        the results; those of an interrupted run, or null
  exit_status            see below
Each sum has prompt_tokens, completion_tokens, total_tokens, cached_tokens,
reasoning_tokens, samples, unknown (samples without usage, in no count of tokens), cost (US dollars, or
null if no price is known) and unpriced (samples without a known price, not in cost).
"""
_STATUS: Final = """
Exit status: 0 for success, 1 if requests failed, 2 if nothing could be run, 130 if it was interrupted.
Run the same command again to continue: answers that were paid for are not asked again.
"""


@click.command("run", epilog=f"{_JSON}{_STATUS}")
@click.argument("requests", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The file for the results."
)
@asking
@click.option(
    "--api-key-env",
    metavar="NAME",
    help="The environment variable that holds the API key.  [default: OPENAI_API_KEY, or that of the "
    "provider that --base-url names]",
)
@count("max_retries", "--retries", least=0)
@setting("timeout", type=click.FloatRange(min=0, min_open=True))
@click.option("--why", is_flag=True, help="Print for each line that lacks samples why it does.")
@setting("max_cost", type=click.FloatRange(min=0), metavar="USD")
@click.option(
    "--dry-run", is_flag=True, help="Print what would be done, and do nothing: see `cachepipe plan`."
)
@planning
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.pass_context
def run(context: click.Context, /, **options: Any) -> None:
    """Answer the requests of a file, each line once, or once per replicate.

    REQUESTS holds one JSON object per line: OpenAI's batch requests (custom_id, method, url, body), or a
    prompt, or messages. In lines with a prompt or messages, the fields model, n, temperature, top_p,
    max_tokens, max_completion_tokens, seed and stop are part of the question. A line's own settings
    override the options. Other fields are copied to the result.

    The results are OpenAI's batch results, in the order of the requests. Each result says which of its
    samples came from the cache, and its replicate. With --replicates, the results of one line follow each
    other, and the same samples come back with --replicate 0, --replicate 1 and so on.
    """
    if options["dry_run"]:
        print_plan(options)
        return
    context.exit(_run(context, options))


def _run(context: click.Context, options: dict[str, Any]) -> int:
    """Return the exit status."""
    mode = mode_of(options)
    key = _key(options, mode)
    screen = _Screen(quiet=options["quiet"])
    try:
        with _spoken_warnings(screen):
            report, number = asyncio.run(_answer(options, mode, key, screen))
    except CachepipeError as error:
        raise Failure(_blotted(str(error), options, key)) from error
    except KeyboardInterrupt:
        click.echo(f"Stopped at once. To continue: {_again(context, options)}", err=True)
        return _SIGNALLED + signal.SIGINT
    status = _SIGNALLED + number if report.interrupted else SOME_FAILED if report.failed else 0
    if not options["quiet"]:
        _table(report)
    for sentence in _last_words(context, options, mode, report):
        click.echo(_blotted(sentence, options, key), err=True)
    if options["as_json"]:
        click.echo(json_text({**report.as_dict(), "exit_status": status}))
    return status


def _key(options: dict[str, Any], mode: str) -> str:
    """Return the API key; an empty one if the server needs none."""
    preset = presets.named(options["base_url"] or "")
    name = options["api_key_env"] or ("OPENAI_API_KEY" if preset is None else preset.key)
    key = os.environ.get(name)
    if key is not None or mode == "replay" or (preset is not None and not preset.needs_key):
        return key or ""
    elsewhere = options["base_url"] or os.environ.get("OPENAI_BASE_URL")
    if preset is not None or not elsewhere or name != "OPENAI_API_KEY":
        raise click.UsageError(
            f"The environment variable {name} is not set. Put the API key into it, or nothing "
            f"({name}=) for a server that needs none."
        )
    return ""


async def _answer(options: dict[str, Any], mode: Any, key: str, screen: _Screen) -> tuple[Report, int]:
    """Run the file; return the report, and the number of the signal that stopped the run."""
    from cachepipe.batch import BatchFileError, run_file  # noqa: PLC0415 - so that --help is quick

    cache = layers_in_use(options["cache"])
    if mode == "replay" and not exists(cache):
        raise BatchFileError(
            f"there is no cache in {name_of(cache)} to replay from; name another folder with --cache"
        )
    given = settings_in(options)
    ours = {"api_key": key, "cache": cache, "mode": mode, "progress": screen.update}
    if options["why"]:
        ours["why"] = lambda line, key, why: screen.say(visible(f"line {line} misses {key[:15]}: {why}"))
    try:
        settings = BatchSettings(**{**given, **ours})
    except ValueError as error:
        if isinstance(error, CachepipeError):
            raise
        raise click.UsageError(f"{error}.") from error
    with _signals(settings, screen) as caught:
        ticking = asyncio.create_task(screen.tick())
        try:
            report = await run_file(options["requests"], options["output"], settings)
        finally:
            ticking.cancel()
            screen.close()
    return report, caught[0] if caught else signal.SIGINT


@contextlib.contextmanager
def _signals(settings: BatchSettings, screen: _Screen) -> Iterator[list[int]]:
    """End the run in good order at the first Ctrl-C, SIGTERM or SIGHUP, and at once at the second."""
    loop, stop = asyncio.get_running_loop(), settings.stop
    caught: list[int] = []
    terminals = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]
    # `nohup` starts a command with SIGHUP ignored, so that it goes on.
    heard = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]

    def hear(number: int) -> None:
        caught.append(number)
        _forget_closed(terminals)
        if len(caught) > 1:
            release()
            stop.now()
            return
        stop.soon()
        waiting = screen.report.in_flight if screen.report is not None else 0
        screen.say(
            f"Stopping: no new requests; waiting up to {settings.grace:.0f} s for the {waiting} in flight. "
            "Press Ctrl-C again to stop at once."
        )

    def release() -> None:
        for number in heard:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(number)

    for number in heard:
        try:
            loop.add_signal_handler(number, hear, number)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(hear, number))
        except (RuntimeError, ValueError):  # not the main thread, which alone gets signals
            pass
    try:
        yield caught
    finally:
        release()


def _forget_closed(terminals: list[int]) -> None:
    """Redirect closed terminals to the null device, because writing to them would raise."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)


class _Screen:
    """Shows the progress of a run: a bar on a terminal, a line from time to time elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self.report: Report | None = None
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._told = 0
        self._failed = False
        self._begun = 0.0

    def update(self, report: Report) -> None:
        """Take the current figures, and print the first error at once."""
        self.report = report
        if report.failed and not self._failed and not self._quiet:
            self.say(visible(f"The first error was: {report.example[:500]}"))
        self._failed = bool(report.failed)

    def say(self, sentence: str) -> None:
        """Write a sentence to standard error, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(sentence, highlight=False, markup=False, soft_wrap=True)
        else:
            click.echo(sentence, err=True)

    async def tick(self) -> None:
        """Show the figures repeatedly, until cancelled."""
        if self._quiet:
            return
        self._begun = asyncio.get_running_loop().time()
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        while True:
            await asyncio.sleep(_BAR_EVERY if terminal else _PLAIN_EVERY)
            if self.report is None:
                continue
            (self._draw if terminal else self._tell)(self.report)

    def _draw(self, report: Report) -> None:
        if self._bar is None:
            self._bar = progress.bar(transient=True)
            self._task = self._bar.add_task("", total=report.requests, told="")
            self._bar.start()
        failed = f"; {report.failed} requests failed" * bool(report.failed)
        rate = f"; {self._rate(report):.1f}/s" if self._bar.console.width >= progress.BAR_FROM else ""
        told = f"{_samples(report)}{failed}{rate}"
        self._bar.update(self._task, completed=report.done, told=told)

    def _rate(self, report: Report) -> float:
        return report.done / (asyncio.get_running_loop().time() - self._begun)

    def _tell(self, report: Report) -> None:
        if report.done == self._told:
            return
        self._told = report.done
        rate = self._rate(report)
        left = (report.requests - report.done) / rate
        click.echo(
            f"{report.done} of {report.requests} requests, {report.failed} failed; {_samples(report)}; "
            f"{rate:.1f} requests/s, {left:.0f} s left",
            err=True,
        )

    def close(self) -> None:
        """Show the final figures."""
        if self._bar is not None and self.report is not None:
            self._draw(self.report)
            self._bar.stop()
            self._bar = None


def _table(report: Report) -> None:
    """Print the figures and the cost of the run."""
    accounts = report.accounts()
    unreported = accounts["unreported"].counts()["samples"]
    rows = {
        "requests": f"{report.done}"
        if report.done == report.requests
        else f"{report.done} of {report.requests}",
        "sample hits": f"{report.hits}",
        "sample misses": f"{report.misses}",
        "calls made": f"{report.calls}",
        "samples generated": f"{report.generated}" + f" ({unreported} unreported)" * bool(unreported),
        "errors": f"{report.failed}",
        **{name: money(accounts[name], report.prices) for name in ("spent", "billed", "saved", "wasted")},
        "time": f"{report.seconds:.1f} s",
    }
    width = max(map(len, rows.values()))
    for name, value in rows.items():
        click.echo(f"{name:<18} {value:>{width}}", err=True)


def _samples(report: Report) -> str:
    """Return the counts of samples in words."""
    return f"samples: {report.hits} hits, {report.misses} misses"


def _last_words(context: click.Context, options: dict[str, Any], mode: str, report: Report) -> Iterator[str]:
    """Yield the closing messages."""
    if not report.requests and not report.interrupted:
        yield f"{options['requests']} holds no requests: expected a JSON object per line."
    if report.failed:
        kinds = ", ".join(f"{count} {code}" for code, count in sorted(report.errors.items()))
        yield f"{report.failed} requests failed ({kinds}). The first error was: {report.example[:500]}"
    if report.kept:
        place = report.partial if report.interrupted else report.output
        yield f"{report.kept} earlier results were kept in {place} instead of errors."
    yield from _next_steps(context, options, mode, report)


def _next_steps(context: click.Context, options: dict[str, Any], mode: str, report: Report) -> Iterator[str]:
    """Yield where the results are, and how to get those that are missing."""
    if report.interrupted:
        if report.partial is not None:
            yield f"The results so far are in {report.partial}."
        kept = "Nothing was cached (--no-cache)." if mode == "bypass" else "All paid answers are cached."
        yield f"Interrupted. {kept} To continue: {_again(context, options)}"
    elif report.output is not None and not options["quiet"]:
        yield f"The results are in {report.output}."
        if report.failed and mode != "bypass":
            missing, dear = report.errors.get("cache_miss"), report.errors.get("budget_exceeded")
            aim = "generate the missing samples" if missing else "retry the failed requests"
            if dear:
                aim = f"go on, raise --max-cost above {options['max_cost']:g}"
            yield f"To {aim}: {_again(context, options)}"


def _again(context: click.Context, options: dict[str, Any]) -> str:
    """Return the command that continues this run, without credentials."""
    words = context.command_path.split()
    for parameter in context.command.params:
        name = parameter.name or ""
        value = options.get(name)
        if context.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        if name in ("replay", "refresh") or (name == "mode" and value in ("replay", "refresh")):
            continue  # replaying again finds nothing more, and refreshing would generate everything again
        if name == "base_url":
            scheme, mark, rest = str(value).rpartition("//")
            value = f"{scheme}{mark}{rest.rpartition('@')[2]}"
        values = value if isinstance(value, list) else [value]
        for each in map(name_of, values) if name == "cache" else values:
            if isinstance(parameter, click.Option):
                words.append(parameter.opts[0])
            if not getattr(parameter, "is_flag", False):
                words.append(str(each))
    return shlex.join(words)


def _blotted(text: str, options: dict[str, Any], key: str) -> str:
    """Return a text without the API key and the URL's credentials, safe to print."""
    from cachepipe.batch.errors import Secrets  # noqa: PLC0415 - so that --help is quick

    secrets = Secrets([options["base_url"], os.environ.get("OPENAI_BASE_URL")], [key], shortest=4)
    return visible(secrets.hidden(text), lines=True)


@contextlib.contextmanager
def _spoken_warnings(screen: _Screen) -> Iterator[None]:
    """Print cachepipe's own warnings as sentences."""
    with warnings.catch_warnings():
        usual: Callable[..., None] = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, CachepipeWarning):
                screen.say(f"Warning: {message}")
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        logger, handler = logging.getLogger("cachepipe"), logging.Handler()
        handler.emit = lambda record: screen.say(  # type: ignore[method-assign]
            f"{record.levelname.capitalize()}: {visible(record.getMessage())}"
        )
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
