"""The group `cachepipe`: its commands, and the handling of their errors.

Commands are imported when they are called, and the help text comes from the table below. So ``cachepipe
--help`` imports no client library, and a broken optional part breaks its own command only.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from cachepipe import __version__
from cachepipe.errors import CachepipeError, CachepipeWarning


class Entry(NamedTuple):
    """The location of a command, and its line in the group's help."""

    target: str
    help: str


COMMANDS: Final[dict[str, Entry]] = {
    "run": Entry("cachepipe.cli.run:run", "Answer a file of requests, from the cache if possible."),
    "plan": Entry("cachepipe.cli.plan:plan", "Print what a run would cost, without running anything."),
    "serve": Entry("cachepipe.cli.serve:serve", "Serve an API that answers from the cache, for any tool."),
    "new-run": Entry("cachepipe.cli.serve:new_run", "Begin a new run of a proxy, so that a rerun replays."),
    "demo": Entry("cachepipe.cli.demo:demo", "Show what a cache saves; needs no key and no network."),
    "explain": Entry("cachepipe.cli.explain:explain", "Say why a request is a hit or a miss."),
    "stats": Entry("cachepipe.cli.stats:stats", "Count the samples, and what each namespace reused."),
    "ls": Entry("cachepipe.cli.inspect:ls", "List the questions in the cache."),
    "show": Entry("cachepipe.cli.inspect:show", "Show one question, its samples, and their draws."),
    "path": Entry("cachepipe.cli.inspect:path", "Print the cache folder in use."),
    "verify": Entry("cachepipe.cli.verify:verify", "Check the integrity of a cache, and repair it."),
    "discard": Entry("cachepipe.cli.verify:discard", "Discard samples, so that draws get others instead."),
    "rm": Entry("cachepipe.cli.manage:rm", "Forget a namespace: remove its draws."),
    "prune": Entry("cachepipe.cli.manage:prune", "Delete samples that no draw has, or old draws too."),
    "compact": Entry("cachepipe.cli.manage:compact", "Give back the disk space that was freed."),
    "export": Entry("cachepipe.cli.share:export", "Write an experiment into one file, for others."),
    "replay": Entry("cachepipe.cli.replay:replay", "Run a program that gets its answers from such a file."),
    "import": Entry("cachepipe.cli.share:import_", "Add such a file, a batch or a CacheSaver folder."),
    "merge": Entry("cachepipe.cli.share:merge", "Add what several caches hold to another one."),
    "sync": Entry("cachepipe.cli.share:sync", "Copy between two caches both ways."),
    "valkey": Entry("cachepipe.cli.valkey:valkey", "Run a Valkey server, as a cache for several machines."),
    "mock-server": Entry(
        "cachepipe.testing.command:mock_server", "Serve the embedded model as an OpenAI-compatible server."
    ),
}
"""The commands in the order of the help: running, reading, testing."""


_FULL: Final = frozenset({errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)})
_INTERRUPTED: Final = 128 + 2
"""The exit code after Ctrl-C, also while a command is still being imported."""

_NO_READER: Final = 128 + 13
"""The exit code if the reader of the output has gone: that of a process that SIGPIPE ended."""


class Failure(click.ClickException):
    """An error that a command can explain in a sentence; the exit code is 2."""

    exit_code = 2

    def format_message(self) -> str:
        """Return the sentence, with characters that a terminal would obey made visible."""
        from cachepipe.terminal import visible  # noqa: PLC0415 - only for errors

        return visible(self.message, lines=True)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called.

    Args:
        entries: the location and help of each command, by name, in the order of the help.
    """

    def __init__(self, *args: Any, entries: dict[str, Entry], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of help."""
        return [*self.entries, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command with this name; None if it does not exist."""
        entry = self.entries.get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = entry.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command and its arguments; for an unknown name, suggest similar names."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx))
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {' or '.join(near)}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of cachepipe becomes a sentence and the exit code 2."""
        try:
            return super().invoke(ctx)
        except CachepipeError as error:
            raise Failure(str(error)) from error
        except BrokenPipeError:
            return ctx.exit(_NO_READER)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            return ctx.exit(_INTERRUPTED)


@click.group(
    cls=LazyGroup,
    entries=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="cachepipe", message="%(prog)s %(version)s")
def cli() -> None:
    """Cache, deduplicate and replay calls to language models, with samples that stay independent."""


def start(arguments: Sequence[str] | None = None) -> None:
    """Run a command as the main program, and exit with its code.

    If the reader of the output has gone (``cachepipe ls | head``), the command ends without an error message.
    """
    for name in ("stdin", "stdout", "stderr"):  # in the order of their descriptors, so that each gets its own
        if getattr(sys, name) is None:  # it is closed, so the next file that is opened would become it
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115 - kept
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="cachepipe")
    except SystemExit as leaving:
        _leave(leaving.code)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _leave(_unwritten(error))


def _leave(code: Any) -> None:
    """Write the rest of the output, and exit with a code: that of a broken pipe if the reader has gone."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush that the interpreter does at exit
        if error.errno in (errno.EPIPE, errno.EINVAL):
            code = _NO_READER
        elif code != Failure.exit_code:
            code = _unwritten(error)
    sys.exit(code)


def _unwritten(error: OSError) -> int:
    """Report that the output could not be written, for example to a full disk; return the exit code."""
    Failure(f"the output cannot be written: {error.strerror}").show()
    return Failure.exit_code


_show_others = warnings.showwarning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """Print a warning of cachepipe as a sentence, without its line of code."""
    if issubclass(category, CachepipeWarning) and file is None:
        from cachepipe.terminal import visible  # noqa: PLC0415 - only for warnings

        click.echo(f"Warning: {visible(str(message), lines=True)}", err=True)
    else:
        _show_others(message, category, filename, lineno, file, line)
