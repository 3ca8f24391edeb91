"""The commands `valkey start`, `stop` and `status`: a server for a cache that machines share."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from cachepipe.cli import common
from cachepipe.cli.group import Failure
from cachepipe.terminal import visible

if TYPE_CHECKING:
    from cachepipe.valkey_server import Status

_JSON = """\b
With --json:
  state          "running", "starting" (it does not answer yet) or "stopped"
  url            the URL of a cache on it, without the password, or null
  password_file  the file with the password, or null
  folder, log    its folder and its log file
  pid, version   its process and version if it answers, else null
  memory         the bytes of its data in memory if it answers, else null
"""

_folder = click.option(
    "--dir",
    "folder",
    metavar="DIR",
    required=True,
    type=click.Path(),
    help="The folder of the server's data, log and password, on a local disk.",
)


@click.group()
def valkey() -> None:
    """Run a Valkey server in a folder, as a cache that several machines share.

    It writes every sample to its append-only file, evicts nothing, and requires a password.
    """


def _module() -> Any:
    try:
        from cachepipe import valkey_server  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise Failure(str(error)) from error
    return valkey_server


@valkey.command(epilog=_JSON)
@_folder
@click.option(
    "--port", type=click.IntRange(0, 65535), default=6379, show_default=True, help="0 for any free port."
)
@click.option(
    "--bind",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="The address to listen on; 0.0.0.0 for other machines. Connections are not encrypted.",
)
@click.option(
    "--password-file",
    metavar="FILE",
    type=click.Path(),
    help="The file with the password, which may be on a shared disk. If it does not exist, it is made with a "
    "random password, and only you can read it. Default: the file password in DIR.",
)
@click.option(
    "--server",
    metavar="PATH",
    type=click.Path(),
    help="The program of a Valkey server, or of Redis 7.0 or later. Default: that of the extra "
    "valkey-server, else an installed one.",
)
@common.url_file_option
@common.json_option("one object; see below")
def start(
    *,
    folder: str,
    port: int,
    bind: str,
    password_file: str | None,
    server: str | None,
    url_file: str | None,
    as_json: bool,
) -> None:
    """Start a server in the background, wait until it answers, and print its URL.

    The URL takes the place of a cache's folder: in --cache, in CACHEPIPE_DIR and in programs. If a server
    already runs in DIR, this command prints its URL, and the other options have no effect.
    """
    found, new = _module().start(folder, port=port, bind=bind, password_file=password_file, program=server)
    if url_file is not None:
        common.write_url(url_file, found.url)
    if as_json:
        click.echo(common.json_text(_fields(found)))
        return
    url = visible(str(found.url))
    click.echo(f"Valkey {found.version} {'runs' if new else 'already runs'} at {url}")
    click.echo(f"Use it:  export CACHEPIPE_DIR='{url}'")
    click.echo(
        "Machines that cannot read the password file: leave ?password_file=... out, and set "
        "CACHEPIPE_VALKEY_PASSWORD to its content."
    )
    click.echo(f"Stop it: cachepipe valkey stop --dir {visible(shlex.quote(str(found.folder)))}")


@valkey.command()
@_folder
def stop(*, folder: str) -> None:
    """Stop a server, which first writes everything to the disk."""
    stopped = _module().stop(folder)
    click.echo("The server has stopped." if stopped else "No server runs there.")


@valkey.command(epilog=f"Exit codes: 0 if it runs, 1 if it does not.\n\n{_JSON}")
@_folder
@common.json_option("one object; see below")
@click.pass_context
def status(ctx: click.Context, *, folder: str, as_json: bool) -> None:
    """Say whether a server runs, and where."""
    found: Status = _module().status(folder)
    fields = _fields(found)
    if as_json:
        click.echo(common.json_text(fields))
    else:
        if found.memory is not None:
            fields["memory"] = common.size(found.memory)
        names = {name: name.replace("_", " ") for name in fields}
        common.print_facts([(names[name], str(value)) for name, value in fields.items() if value is not None])
    ctx.exit(0 if found.state == "running" else 1)


def _fields(found: Status) -> dict[str, Any]:
    """Return a status as the values of a JSON object."""
    return {
        "state": found.state,
        "url": found.url,
        "password_file": None if found.password_file is None else str(found.password_file),
        "folder": str(found.folder),
        "log": None if found.log is None else str(found.log),
        "pid": found.pid,
        "version": found.version,
        "memory": found.memory,
    }
