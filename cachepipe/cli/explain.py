"""The command `explain` says why a request is a hit or a miss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cachepipe.batch.settings import BatchSettings
from cachepipe.cli import common
from cachepipe.cli.batch_options import asking, mode_of, settings_in
from cachepipe.cli.common import counted, json_text, layers_in_use, styled
from cachepipe.cli.inspect import draw_lines
from cachepipe.terminal import visible

if TYPE_CHECKING:
    from cachepipe.batch import Explanation

_COLOURS: Final = {"hit": "green", "partial": "yellow", "miss": "red"}
_JSON: Final = """\b
With --json, a list with one object for each question of the request and each replicate:
  outcome                hit, partial or miss
  key, scope             the key of the question, and its scope
  draw                   namespace, shared, request_id, replicate, occurrence
  n, stored              samples asked for, and those of them that are stored
  why                    why samples are missing, in words
  drawn                  who drew samples of the question: as in `cachepipe show --json`
  nearest                the key of the stored question that differs least, or null
  differences            path, kind, asked, stored. kind is host (another host), default (a default that is
                         written out), date (another date or time), order (the same names in another order)
                         or null
"""


@click.command("explain", epilog=_JSON)
@click.argument("request", type=click.Path(path_type=Path))
@click.option(
    "--line",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Explain this line of a batch file; earlier lines with the same question count.",
)
@asking
@click.option(
    "--draws",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="The largest number of draws to show; 0 for all.",
)
@common.json_option("a list; see below")
def explain(**options: Any) -> None:
    """Say why a request is a hit or a miss: its key, who drew its samples, and what differs.

    REQUEST is a file with one request, in the form of a line of `cachepipe run`, or with --line a batch file.
    The options are those of `cachepipe run`. Nothing is asked, and the cache is opened read-only.
    """
    from cachepipe.batch import explain_request  # noqa: PLC0415 - so that --help is quick

    cache = layers_in_use(options["cache"])
    given = {**settings_in(options), "limit": None}
    try:
        settings = BatchSettings(**{**given, "cache": cache, "mode": mode_of(options), "api_key": ""})
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    found = explain_request(options["request"], settings, line=options["line"])
    if options["as_json"]:
        click.echo(json_text([one.as_dict() for one in found]))
        return
    common.echo_lines(line for one in found for line in _lines(one, options["draws"] or None))


def _lines(found: Explanation, limit: int | None) -> Iterator[str]:
    outcome = styled(found.outcome, bold=True, fg=_COLOURS[found.outcome])
    yield f"{outcome}  {visible(found.key)}"
    yield f"  scope {visible(str(found.scope))}"
    yield f"  {found.stored:,} of {counted(found.n, 'sample')} stored"
    if found.why:
        yield f"  why: {visible(found.why)}"
    for difference in found.differences if len(found.differences) > 1 else ():
        yield f"    {visible(str(difference))}"
    if found.drawn:
        yield f"  {counted(len(found.drawn), 'draw')} of this question:"
        yield from (f"  {line}" for line in draw_lines(iter(found.drawn), limit))
