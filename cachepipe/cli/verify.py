"""Commands that keep a cache in order: `verify` and `discard`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from cachepipe.cli import common
from cachepipe.cli.common import counted, json_text, print_facts
from cachepipe.cli.group import Failure
from cachepipe.cli.inspect import found_key
from cachepipe.progress import counting
from cachepipe.stores.base import Discard
from cachepipe.terminal import visible

if TYPE_CHECKING:
    from cachepipe.stores import Store
    from cachepipe.stores.verify import IntegrityReport


# verify


_VERIFY_JSON: Final = """\b
Exit codes: 0 if nothing is wrong, 1 if the cache is damaged, 2 if it cannot be checked.

\b
With --json:
  folder, whole          the cache folder, and whether nothing is wrong
  checked                an object of questions, samples, draws and discarded
  foreign                rows of diskcache that cachepipe did not write; they are ignored
  recent                 samples that a killed process stored last, or a running one stores now
  unfinished             positions of draws that killed runs left without a sample
  problems               a list of kind, count, what, advice and examples
  repaired               with --repair a list like problems of what was wrong before; else null
"""


@click.command(epilog=_VERIFY_JSON)
@common.read_cache_option
@click.option(
    "--repair",
    is_flag=True,
    help="Repair what can be repaired. Damaged and missing samples are discarded on record, so that they are "
    "generated anew when they are asked for; no bytes are deleted.",
)
@common.json_option("one object; see below")
@click.pass_context
def verify(ctx: click.Context, *, cache: str | None, repair: bool, as_json: bool) -> None:
    """Check the integrity of a cache: both files, every sample and every row of the ledger.

    Without --repair, this command only reads. It works on read-only copies, on a cache that is in use, and on
    bundles.
    """
    from cachepipe.progress import shown  # noqa: PLC0415 - help needs no store
    from cachepipe.stores import repair as repairs  # noqa: PLC0415 - likewise
    from cachepipe.verifying import check  # noqa: PLC0415 - likewise

    def progress(steps: int) -> Any:
        return shown(steps, "thousand rows checked")

    found = common.existing_cache(cache, bundles=True)
    report, before = check(str(found), repairs=repair, rows=progress, counting=counting)
    name = common.name_of(found)
    if as_json:
        click.echo(json_text(_fields(name, report, before)))
    else:
        _print(name, report, before)
        if repair and report.problems and not repairs.can_repair(report):
            click.echo("\nNothing was repaired: writing to files in this state may destroy more.")
    ctx.exit(0 if report.whole else 1)


def _fields(folder: str, report: IntegrityReport, before: IntegrityReport | None) -> dict[str, Any]:
    return {
        "folder": folder,
        "whole": report.whole,
        "checked": report.counts,
        "foreign": report.foreign,
        "recent": report.recent,
        "unfinished": report.unfinished,
        "problems": _problems(report),
        "repaired": None if before is None else _problems(before, report),
    }


def _problems(report: IntegrityReport, after: IntegrityReport | None = None) -> list[dict[str, Any]]:
    """Return the problems of a report; with ``after``, only those that the later report no longer has."""
    from cachepipe.stores.verify import KINDS  # noqa: PLC0415 - help needs no store

    return [
        {
            "kind": kind,
            "count": report.problems[kind].count,
            "what": what,
            "advice": advice,
            "examples": report.problems[kind].examples,
        }
        for kind, (what, advice) in KINDS.items()
        if kind in report.problems and (after is None or kind not in after.problems)
    ]


def _print(folder: str, report: IntegrityReport, before: IntegrityReport | None) -> None:
    counts = report.counts
    checked = [
        counted(counts["questions"], "question"),
        counted(counts["samples"], "sample"),
        counted(counts["draws"], "draw"),
        f"{counts['discarded']:,} discarded",
    ]
    facts = [("cache", folder), ("checked", ", ".join(checked))]
    if report.foreign:
        facts.append(("not ours", f"{counted(report.foreign, 'row')} of diskcache, ignored"))
    if report.recent:
        facts.append(("recent", f"{counted(report.recent, 'sample')} that the next opening lists"))
    if report.unfinished:
        facts.append(("unfinished", f"{counted(report.unfinished, 'sample')} to generate when asked for"))
    repaired = [] if before is None else _problems(before, report)
    facts += [("repaired", f"{each['what']} ({each['count']:,})") for each in repaired]
    facts.append(("result", "nothing is wrong" if report.whole else "the cache is damaged"))
    print_facts(facts)
    if problems := _problems(report):
        click.echo()
        common.print_table({"what is wrong": "what", ">count": "count", "what to do": "advice"}, problems)
        click.echo()
        common.echo_lines(_example_lines(problems))


def _example_lines(problems: list[dict[str, Any]]) -> Iterator[str]:
    for each in problems:
        yield common.styled(f"{each['what']}:", bold=True)
        for example in each["examples"]:
            yield f"  {visible(example)}"
        if each["count"] > len(each["examples"]):
            yield f"  and {each['count'] - len(each['examples']):,} more"


# discard


@click.command()
@click.argument("key", metavar="KEY[/INDEX]")
@common.cache_option
@click.option("--index", type=click.IntRange(min=0), help="The index of the sample, instead of KEY/INDEX.")
@click.option(
    "--why", required=True, help="The reason, which is stored with each sample and shown by `show`."
)
@common.json_option('an object with "key", "discarded" (a list of indices) and "draws"')
def discard(*, key: str, cache: str | None, index: int | None, why: str, as_json: bool) -> None:
    """Discard one sample of a question, or all of them without an INDEX.

    The samples stay in the cache, and no draw gets them any more. A draw that had one of them gets another
    sample at the same position when it is asked for again. A prefix of the key is enough if no other key
    has it. Damaged and missing samples can be discarded by their index.
    """
    prefix, slash, number = key.partition("/")
    if slash and not (number.isascii() and number.isdigit() and len(number) < 16):
        raise Failure(f"expected the index of a sample after {prefix}/, a whole number; got {number!r}")
    if index is not None:
        if slash and int(number) != index:
            raise Failure(f"KEY/{number} and --index {index} name two samples; give one of them")
        slash, number = "/", str(index)
    with common.opened(cache, write=True) as store:
        name = found_key(store, prefix).key
        indices = [int(number)] if slash else [sample.index for sample in store.samples(name)]
        draws = sum(not {*indices}.isdisjoint(draw.indices) for draw in store.draws(key=name))
        asyncio.run(_discard(store, name, indices, why))
    if as_json:
        click.echo(json_text({"key": name, "discarded": indices, "draws": draws}))
    else:
        those = counted(draws, "draw")
        click.echo(f"discarded {counted(len(indices), 'sample')} of {visible(name)}, which {those} had")


async def _discard(store: Store, key: str, indices: list[int], why: str) -> None:
    await store.apply([Discard(key, index, why) for index in indices])
