"""Commands that read questions: `ls`, `show` and `path`. They write nothing and create no folder.

Their ``--json`` output is stable: fields are added, never renamed or removed. Times are seconds since 1970,
sizes are bytes, and the namespace null is that of requests without a namespace.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from cachepipe.cli import common
from cachepipe.cli.common import (
    WIDTH,
    beginning,
    counted,
    echo_lines,
    json_text,
    looking,
    opened,
    styled,
    when,
)
from cachepipe.cli.group import Failure
from cachepipe.contract.draws import SHARED, label, namespace_of
from cachepipe.contract.keys import FORMAT
from cachepipe.differences import asked_in, settings_in, strings
from cachepipe.errors import CachepipeError
from cachepipe.listings import (
    document_of,
    draw_fields,
    key_fields,
    known_scope,
    model_in,
    prompt_in,
    sample_fields,
    text_of,
)
from cachepipe.stores.base import DrawInfo, KeyInfo, Sample, StoredQuestion
from cachepipe.terminal import on_terminal, visible
from cachepipe.values import Codec

if TYPE_CHECKING:
    from cachepipe.stores.base import Listed

_SHORT: Final = len(FORMAT) + 13  # of a key: as many digits as tell the keys of any real cache apart
_BEGINNING: Final = 200  # characters of a prompt that `ls --json` gives
_PARTS: Final = 100  # indices, or runs of them, that `show` writes of a draw
_TEXTS: Final = ("system", "instructions", "messages", "prompt", "input")
_COLUMN: Final = 36  # columns of a terminal that a sample takes at least, beside others
_MOST_COLUMNS: Final = 4  # samples beside each other
_CANDIDATES: Final = 10  # keys that an ambiguous prefix lists


# path


@click.command()
@common.read_cache_option
@common.json_option('an object with "path", "exists" and "named_by"')
def path(*, cache: str | None, as_json: bool) -> None:
    """Print the cache folder or URL in use, whether it exists or not.

    With --json, named_by says how it was found: "--cache", "CACHEPIPE_DIR", "project" (there is a folder
    caches) or "user" (the user's cache folder).
    """
    found, how = common.cache_in_use(cache)
    if as_json:
        exists = common.exists(found)
        click.echo(json_text({"path": common.name_of(found), "exists": exists, "named_by": how}))
    else:
        click.echo(common.name_of(found))


# ls


_LS_JSON: Final = """\b
With --json, each line is an object:
  key, scope             the key of the question, and the endpoint or adapter that answers it
  at                     the time of its first request
  samples, pending       stored samples, and samples that are being generated (or were, by a killed process)
  namespaces             the number of namespaces that have drawn samples
  model                  the model in the request, or null
  settings               other fields of the request, such as temperature
  prompt                 the beginning of the prompt, at most 200 characters
"""


@click.command(epilog=_LS_JSON)
@common.read_cache_option
@click.option("--search", help="Only questions that contain this text; case does not matter.")
@click.option("--model", help="Only questions to this model.")
@click.option("--scope", help="Only questions to this endpoint or adapter, or below this base URL.")
@click.option("--namespace", help="Only questions that this namespace has drawn.")
@click.option("--prefix", default="", help="Only keys with this prefix.")
@common.limit_option(0, "The largest number of questions")
@common.json_option("a line of JSON per question; see below")
def ls(
    *, cache: str | None, namespace: str | None, prefix: str, limit: int, as_json: bool, **wanted: str | None
) -> None:
    """List the questions in the cache, in the order in which they were first asked."""
    with opened(cache) as store:
        found = _listed(store, namespace, _whole_prefix(prefix), **wanted)
        if limit:
            found = itertools.islice(found, limit)
        with looking(store):
            first = next(found, None)
        if as_json:
            shown = () if first is None else itertools.chain([first], found)
            echo_lines(json_text(_listing(store, info)) for info in shown)
            return
        if first is None:
            click.echo(f"{visible(store.where)} has no such question", err=True)
            return
        echo_lines(_table_lines(store, itertools.chain([first], found)))


def _whole_prefix(prefix: str) -> str:
    """Return a prefix with the name of the key format, which the user may omit."""
    return prefix if FORMAT.startswith(prefix) or prefix.startswith(FORMAT) else f"{FORMAT}-{prefix}"


def _listed(
    store: Listed,
    namespace: str | None,
    prefix: str,
    *,
    search: str | None,
    model: str | None,
    scope: str | None,
) -> Iterator[KeyInfo]:
    """Iterate over the matching keys, one at a time."""
    texts = [search] if search and search.isascii() else []  # SQL ignores the case of ASCII only
    whose = None if namespace is None else label(namespace)
    scope = None if scope is None else known_scope(scope)
    for info in store.keys(prefix, scope=scope, namespace=whose, holding=texts):
        if not (search or model) or _fits(store.question(info.key), search or "", model):
            yield info


def _fits(question: StoredQuestion | None, search: str, model: str | None) -> bool:
    """Return True if a question contains a text and asks a model."""
    document = document_of(question)
    if model is not None and model not in (model_in(document), None if question is None else question.scope):
        return False
    return not search or search.casefold() in "\n".join(strings(asked_in(document))).casefold()


def _listing(store: Listed, info: KeyInfo) -> dict[str, Any]:
    document = document_of(store.question(info.key))
    settings = settings_in(document)
    settings.pop("model", None)
    fields = key_fields(info, document, _BEGINNING)
    prompt = fields.pop("prompt")
    return {**fields, "settings": settings, "prompt": prompt}


def _table_lines(store: Listed, found: Iterator[KeyInfo]) -> Iterator[str]:
    heads = f"{'key':{_SHORT}}  {'first asked':19}  {'samples':>7}  {'pending':>7}  {'namespaces':>10}  "
    width = shutil.get_terminal_size().columns if on_terminal() else WIDTH + 32
    width = max(width - len(heads), 20)
    yield styled(f"{heads}prompt", bold=True)
    for info in found:
        listing = _listing(store, info)
        prompt = beginning(listing["prompt"], width)
        about = beginning(_about(listing), width)
        pending = f"{info.pending:7}" if info.pending else "      -"
        key = styled(f"{visible(info.key[:_SHORT]):{_SHORT}}", fg="cyan")
        yield (
            f"{key}  {when(info.at):19}  {info.samples:7}  {pending}  {info.namespaces:10}  {prompt}"
        ).rstrip()
        if about:
            yield f"{' ' * len(heads)}{styled(about, dim=True)}"


def _about(listing: dict[str, Any]) -> str:
    """Return the model and the settings of a question on one line."""
    settings = [f"{name}={json_text(value)}" for name, value in listing["settings"].items()]
    return " ".join([listing["model"] or "", *settings]).strip()


# show


_SHOW_JSON: Final = """\b
With --json:
  key, scope, at         as in ls
  counts                 an object of samples, pending and namespaces, as in ls
  question               the request: an object with "body" (and "headers"), "fields" or "hash"
  draws                  a list of namespace, shared (a shared draw), request_id, replicate,
                         occurrence, indices (by position), generated, at
  samples                a list of index, id, at, seconds and value (as stored); for the answer of a
                         provider also text, finish_reason, model and token counts
  discarded              a list of index, at and why: discarded samples
"""


@click.command(epilog=_SHOW_JSON)
@click.argument("key")
@common.read_cache_option
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    help="The largest number of samples and draws; 0 for all.  [default: 20; with --json all]",
)
@common.json_option("one object; see below")
def show(*, key: str, cache: str | None, limit: int | None, as_json: bool) -> None:
    """Show the question with this KEY, its samples, and which draw got which sample.

    A prefix of the key is enough if no other key has it. On a terminal, samples are shown side by side.
    """
    with opened(cache) as store:
        with looking(store):
            info = found_key(store, key)
        if as_json:
            _print_json(store, info, limit or None)
        else:
            echo_lines(_shown(store, info, 20 if limit is None else limit or None))


def found_key(store: Listed, key: str) -> KeyInfo:
    """Return the key with this prefix.

    Raises:
        Failure: when no key has it, or more than one.
    """
    whole = _whole_prefix(key)
    found = list(itertools.islice(store.keys(whole), _CANDIDATES + 1))
    exact = [info for info in found if info.key == whole]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if not found:
        raise Failure(
            f"no key in {store.where} begins with {key!r}; "
            "`cachepipe ls` lists them, and --cache names another cache"
        )
    some = "\n".join(
        f"  {info.key}  {beginning(prompt_in(document_of(store.question(info.key))), 40)}"
        for info in found[:_CANDIDATES]
    )
    more = "\n  and more" if len(found) > _CANDIDATES else ""
    raise Failure(f"several keys begin with {key!r}; give more characters:\n{some}{more}")


def _print_json(store: Listed, info: KeyInfo, limit: int | None) -> None:
    """Print one object piece by piece: a list of samples may be larger than memory."""
    head = {
        "key": info.key,
        "scope": info.scope,
        "at": info.at,
        "counts": {"samples": info.samples, "pending": info.pending, "namespaces": info.namespaces},
        "question": document_of(store.question(info.key)),
    }
    out = sys.stdout
    out.write(json_text(head)[:-1])
    draws = (draw_fields(draw) for draw in itertools.islice(store.draws(key=info.key), limit))
    samples = (
        _sample_fields(sample, info.scope) for sample in itertools.islice(store.samples(info.key), limit)
    )
    discarded = (info._asdict() for info in store.discards(info.key))
    for name, items in (("draws", draws), ("samples", samples), ("discarded", discarded)):
        out.write(f',"{name}":[')
        for place, item in enumerate(items):
            out.write(f"{',' if place else ''}{json_text(item)}")
        out.write("]")
    out.write("}\n")


def _sample_fields(sample: Sample, scope: str | None) -> dict[str, Any]:
    fields = sample_fields(sample, scope)
    of = {"index": sample.index, "id": sample.id, "at": sample.at, "seconds": fields["meta"].get("seconds")}
    return {**of, "value": fields["value"], **(fields["summary"] or {})}


def _shown(store: Listed, info: KeyInfo, limit: int | None) -> Iterator[str]:
    yield styled(visible(info.key), bold=True, fg="cyan")
    pending = f", {info.pending} pending" if info.pending else ""
    discards = list(store.discards(info.key))
    taken_back = f", {len(discards):,} discarded" if discards else ""
    samples, spaces = counted(info.samples, "sample"), counted(info.namespaces, "namespace")
    yield f"first asked {when(info.at)}, {samples}{pending}{taken_back}, drawn by {spaces}"
    if info.scope is not None:
        yield f"scope {visible(info.scope)}"
    yield ""
    yield _heading("Asked")
    yield from _asked_lines(document_of(store.question(info.key)))
    yield ""
    yield _heading("Samples")
    found = (_told_of(sample, info.scope) for sample in itertools.islice(store.samples(info.key), limit))
    columns = shutil.get_terminal_size().columns // _COLUMN if on_terminal() and info.samples > 1 else 1
    if columns > 1:
        yield from _side_by_side(found, min(columns, info.samples, _MOST_COLUMNS))
    else:
        yield from itertools.chain.from_iterable(map(_sample_lines, found))
    if limit is not None and info.samples > limit:
        yield f"  and {info.samples - limit:,} more; --limit 0 shows all"
    for discard in discards[:limit]:
        number = styled(f"  #{discard.index}", fg="cyan")
        yield f"{number}  discarded {when(discard.at)}: {visible(discard.why)}"
    yield ""
    yield _heading("Draws")
    yield from draw_lines(store.draws(key=info.key), limit)


def _heading(text: str) -> str:
    return styled(text, bold=True)


def _asked_lines(document: Any) -> Iterator[str]:
    if not isinstance(document, dict):
        yield "  (the question cannot be read)"
        return
    asked = _asked(document)
    for name, value in asked.items():
        if name not in _TEXTS:
            fact = value if isinstance(value, str) else json_text(value)
            yield f"  {styled(visible(name), dim=True)} {visible(fact)}"
    for name in _TEXTS:
        for speaker, text in _said(name, asked[name]) if name in asked else ():
            yield f"  {styled(visible(speaker), fg='green')}"
            yield from _block(text)


def _asked(document: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a question: those of its body, and its headers."""
    asked = document.get("body", document.get("fields"))
    if not isinstance(asked, dict):
        return document
    return {**asked, "headers": document["headers"]} if document.get("headers") else asked


def _said(name: str, value: Any) -> list[tuple[str, str]]:
    """Return the texts in a field, each with the role of its message, or with the name of the field."""
    if isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value):
        return [(str(item["role"]), _content(item)) for item in value]
    return [(name, text_of(value))]


def _content(message: dict[str, Any]) -> str:
    """Return the text of a message, and its other fields as JSON."""
    text = "" if message.get("content") is None else text_of(message["content"])
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return "\n".join(part for part in (text, json_text(rest) if rest else "") if part)


def _block(text: str) -> Iterator[str]:
    """Iterate over the lines of a text, indented; line ends other than line feeds are made visible."""
    for line in text.removesuffix("\n").split("\n"):
        yield f"    {visible(line, lines=True)}".rstrip()


class _Told(NamedTuple):
    """What is shown of a sample: its number, some facts, and its text."""

    number: str
    facts: str
    text: str


def _told_of(sample: Sample, scope: str | None) -> _Told:
    fields = _sample_fields(sample, scope)
    facts = [
        when(fields["at"]) if isinstance(fields["at"], int | float) else "",
        str(fields.get("model") or ""),
    ]
    if isinstance(fields.get("completion_tokens"), int):
        facts.append(f"{fields['completion_tokens']:,} tokens")
    facts.append(str(fields.get("finish_reason") or ""))
    text = fields["text"] if isinstance(fields.get("text"), str) else _value_text(sample)
    return _Told(f"#{sample.index}", visible("  ".join(fact for fact in (sample.id, *facts) if fact)), text)


def _sample_lines(told: _Told) -> Iterator[str]:
    yield f"{styled(f'  {told.number}', fg='cyan')}  {told.facts}"
    yield from _block(told.text)


def _side_by_side(found: Iterator[_Told], columns: int) -> Iterator[str]:
    """Iterate over the lines of tables with some samples in each row."""
    from rich import box  # noqa: PLC0415 - only on terminals
    from rich.console import Console  # noqa: PLC0415 - likewise
    from rich.table import Table  # noqa: PLC0415 - likewise
    from rich.text import Text  # noqa: PLC0415 - likewise

    console = Console(width=shutil.get_terminal_size().columns, highlight=False)
    while row := list(itertools.islice(found, columns)):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, expand=True)
        for number in [told.number for told in row] + [""] * (columns - len(row)):
            table.add_column(Text(number, "cyan"), ratio=1, overflow="fold")
        table.add_row(*(Text(told.facts, "dim") for told in row))
        table.add_row(*(Text(visible(told.text.removesuffix("\n"), lines=True)) for told in row))
        with console.capture() as capture:
            console.print(table)
        yield from capture.get().splitlines()


def _value_text(sample: Sample) -> str:
    """Return a sample's value as text: a string unchanged, any other value as its repr."""
    try:
        value = Codec().decode(sample.payload)
    except CachepipeError:  # an instance of a class that is not known here, or damaged bytes
        return sample.payload.decode(errors="backslashreplace")
    return value if isinstance(value, str) else repr(value)


def _numbers(indices: Sequence[int]) -> str:
    """Return indices in readable form: consecutive ones as a range."""
    parts: list[str] = []
    for _, group in itertools.groupby(enumerate(indices), key=lambda place: place[1] - place[0]):
        run = [index for _, index in group]
        parts += [f"#{run[0]} to #{run[-1]}"] if len(run) > 2 else [f"#{index}" for index in run]
    return ", ".join([*parts[:_PARTS], "…"] if len(parts) > _PARTS else parts)


def draw_lines(draws: Iterator[DrawInfo], limit: int | None) -> Iterator[str]:
    """Iterate over lines that say who drew which samples.

    Args:
        draws: the draws.
        limit: how many are shown; None for all.
    """
    for draw in itertools.islice(draws, limit):
        if draw.draw.namespace == SHARED:
            who = "shared by all namespaces"
        else:
            namespace = namespace_of(draw.draw.namespace)
            who = "no namespace" if namespace is None else namespace or "''"
        request = f" {draw.draw.request_id}" if draw.draw.request_id else ""
        replicate = namespace_of(draw.draw.replicate)
        repetition = "" if replicate is None else f" (replicate {replicate or repr('')})"
        again = f" (time {draw.draw.occurrence + 1})" if draw.draw.occurrence else ""
        yield (
            f"  {styled(visible(who), fg='green')}{visible(request + repetition)}{again}: "
            f"{_numbers(draw.indices)}; {draw.generated} generated for it, {when(draw.at)}"
        )
    rest = sum(1 for _ in draws)
    if rest:
        yield f"  and {rest:,} more; --limit 0 shows all"
