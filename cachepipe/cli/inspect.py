"""Commands that read a cache: `stats`, `ls`, `show` and `path`. They write nothing and create no folder.

Their ``--json`` output is stable: fields are added, never renamed or removed. Times are seconds since 1970,
sizes are bytes, and the namespace null is that of requests without a namespace.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cachepipe import prices, wire
from cachepipe.accounting import Statement
from cachepipe.cli import common
from cachepipe.cli.common import WIDTH, beginning, counted, echo_lines, json_text, opened, styled, when
from cachepipe.cli.group import Failure
from cachepipe.contract.draws import SHARED, label, namespace_of
from cachepipe.contract.keys import FORMAT
from cachepipe.differences import asked_in, settings_in, strings
from cachepipe.errors import CachepipeError
from cachepipe.listings import document_of, draw_fields, key_fields, model_in, sample_fields, text_of
from cachepipe.stores.base import DrawInfo, KeyInfo, NamespaceInfo, Sample, StoredQuestion
from cachepipe.stores.sums import statements
from cachepipe.terminal import on_terminal, visible
from cachepipe.values import Codec

if TYPE_CHECKING:
    from cachepipe.stores import DiskStore

_SHORT: Final = len(FORMAT) + 13  # of a key: as many digits as tell the keys of any real cache apart
_BEGINNING: Final = 200  # characters of a prompt that `ls --json` gives
_PARTS: Final = 100  # indices, or runs of them, that `show` writes of a draw
_CANDIDATES: Final = 10  # keys that an ambiguous prefix lists
_NO_NAMESPACE: Final = "(none)"


def _limit(default: int, what: str) -> Callable[[common.Command], common.Command]:
    return click.option(
        "--limit", type=click.IntRange(min=0), default=default, show_default=True, help=f"{what}; 0 for all."
    )


# path


@click.command()
@common.cache_option
@common.json_option('an object with "path", "exists" and "named_by"')
def path(*, cache: str | None, as_json: bool) -> None:
    """Print the cache folder in use, whether it exists or not.

    named_by says how it was found: "--cache", "CACHEPIPE_DIR", "project" (there is a folder caches) or
    "user" (the user's cache folder).
    """
    folder, how = common.folder_in_use(cache)
    if as_json:
        there = os.path.isdir(folder)  # noqa: PTH112 - also where it may not be looked at
        click.echo(json_text({"path": str(folder), "exists": there, "named_by": how}))
    else:
        click.echo(str(folder))


# stats


_STATS_JSON: Final = """\b
With --json:
  folder, bytes          the folder of the cache, and its size
  keys, samples          different questions, and answers to them
  pending, discarded     samples that are being generated (or were, by a killed process); discarded
                         samples
  draws                  requests that have drawn samples
  drawn, generated, reused, reused_share
                         samples over all namespaces; reused_share = reused / drawn, or null
  requests               questions answered, over all runs; the sums below follow from it
  spent                  all that was generated: billed, and what reached no request
  billed                 what the answered requests paid for
  as_asked               what each would have cost alone, in one call
  saved                  as_asked less billed, so a rerun saves what it replays
  unreported             spent less billed: for requests that failed, were cancelled or killed, and extras
  wasted                 the part of spent that no namespace holds
  namespaces             a list of namespace, draws, drawn, generated, reused, reused_share, and the sums
  shared                 draws, drawn, generated of shared draws (embeddings, repeat="same")
  scopes                 with --scopes a list of scope, keys, samples, pending; else null
Each sum has samples, unknown (samples without usage, in no count of tokens), prompt_tokens,
completion_tokens, total_tokens, cached_tokens, reasoning_tokens, cost (US dollars, or null), unpriced.
A running process adds what it has answered every few seconds; a killed one has not added the last.
"""


@click.command(epilog=_STATS_JSON)
@common.cache_option
@click.option("--scopes", is_flag=True, help="Count by scope too; this reads every key.")
@_limit(50, "The largest number of rows in a table")
@common.json_option("one object; see below")
def stats(*, cache: str | None, scopes: bool, limit: int, as_json: bool) -> None:
    """Count the samples, what each namespace generated and reused, and what it spent and saved.

    Of the samples that a namespace has drawn, some were generated for it, and it reused the others. Shared
    draws (embeddings, repeat="same") are counted separately; their costs and savings belong to the
    namespaces that ask. Costs in money need the extra cachepipe[prices].
    """
    with opened(cache) as store:
        sums = statements(store)
        figures = _figures(store, sums, scopes=scopes)
    if as_json:
        click.echo(json_text(figures))
    else:
        _print_stats(figures, sums, limit)


def _figures(store: DiskStore, sums: Mapping[str, Statement], *, scopes: bool) -> dict[str, Any]:
    totals = store.totals()
    known = list(store.namespaces())
    drawn = {label(info.namespace) for info in known}
    # The ledger has no draws of a namespace that only replays.
    known += [NamespaceInfo(namespace_of(name), 0, 0, 0) for name in sums if name not in drawn]
    namespaces = [
        {
            "namespace": info.namespace,
            "draws": info.draws,
            **_drawn(info.samples, info.generated),
            **_sums(sums.get(label(info.namespace), Statement())),
        }
        for info in known
    ]
    has_shared = totals["draws"] > sum(info.draws for info in known)
    shared = list(store.draws(namespace=SHARED)) if has_shared else []
    return {
        "folder": str(store.folder),
        "bytes": _bytes(store.folder),
        **{name: totals[name] for name in ("keys", "samples", "pending", "discarded", "draws")},
        **_drawn(sum(info.samples for info in known), sum(info.generated for info in known)),
        **_sums(_total(sums)),
        "namespaces": namespaces,
        "shared": {
            "draws": len(shared),
            "drawn": sum(len(draw.indices) for draw in shared),
            "generated": sum(draw.generated for draw in shared),
        },
        "scopes": _scopes(store) if scopes else None,
    }


def _total(sums: Mapping[str, Statement]) -> Statement:
    total = Statement()
    for statement in sums.values():
        total.join(statement)
    return total


def _sums(statement: Statement) -> dict[str, Any]:
    """Return the sums of a namespace, or of all."""
    accounts = statement.accounts()
    return {
        "requests": statement.delivered.requests,
        **{name: account.as_dict(prices.cost_of_sum) for name, account in accounts.items()},
    }


def _scopes(store: DiskStore) -> list[dict[str, Any]]:
    found: dict[str | None, Counter[str]] = {}
    for info in store.keys():  # noqa: SIM118 - a store is no mapping
        counts = found.setdefault(info.scope, Counter())
        counts.update(keys=1, samples=info.samples, pending=info.pending)
    return [{"scope": scope, **counts} for scope, counts in found.items()]


def _drawn(drawn: int, generated: int) -> dict[str, Any]:
    reused = max(drawn - generated, 0)
    return {
        "drawn": drawn,
        "generated": generated,
        "reused": reused,
        "reused_share": round(reused / drawn, 6) if drawn else None,
    }


def _bytes(folder: Path) -> int:
    """Return the size of all files below a folder; files that vanish meanwhile count as 0."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if file.is_file() and not file.is_symlink():
                total += file.stat().st_size
    return total


def _name_of(row: Mapping[str, Any]) -> str:
    namespace: str | None = row["namespace"]
    return _NO_NAMESPACE if namespace is None else namespace or "''"


def _share_of(row: Mapping[str, Any]) -> str:
    return "-" if row["reused"] == "-" else common.share(row["reused"], row["drawn"])


_DRAWN: Final[common.Columns] = {
    "namespace": _name_of,
    ">draws": "draws",
    ">drawn": "drawn",
    ">generated": "generated",
    ">reused": "reused",
    ">share": _share_of,
}
_SCOPES: Final[common.Columns] = {
    "scope": lambda row: "(none)" if row["scope"] is None else row["scope"],
    ">keys": "keys",
    ">samples": "samples",
}


def _print_stats(figures: dict[str, Any], sums: Mapping[str, Statement], limit: int) -> None:
    extra = [f"{figures[name]:,} {name}" for name in ("pending", "discarded") if figures[name]]
    share = f"{figures['reused']:,} of {figures['drawn']:,} samples drawn ({_share_of(figures)})"
    facts = [
        ("cache", f"{figures['folder']} ({common.size(figures['bytes'])})"),
        ("keys", f"{figures['keys']:,}"),
        ("samples", ", ".join([f"{figures['samples']:,}", *extra])),
        ("draws", f"{figures['draws']:,}"),
        ("reused", share),
    ]
    accounts = _total(sums).accounts()
    for name, account in accounts.items():
        samples = counted(account.counts()["samples"], "sample")
        facts.append((name.replace("_", " "), f"{samples}, {common.money(account)}"))
    common.print_facts(facts)
    namespaces = figures["namespaces"]
    _print_rows(_DRAWN, namespaces, limit, "namespace", last=_shared_row(figures["shared"]))
    sums_of = {f">{name.replace('_', ' ')}": _tokens_of(name) for name in accounts}
    tokens: common.Columns = {"tokens of namespace": _name_of, ">requests": "requests", **sums_of}
    _print_rows(tokens, namespaces, limit)
    _print_rows(_SCOPES, figures["scopes"] or [], limit, "scope")


def _shared_row(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"namespace": "(for everybody)", **counts, "reused": "-"}] if counts["draws"] else []


def _print_rows(
    columns: common.Columns,
    rows: Sequence[Mapping[str, Any]],
    limit: int,
    what: str = "",
    last: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Print the first rows as a table, and how many more there are; ``last`` always follows them."""
    shown = [*rows[: limit or None], *last]
    if shown:
        click.echo()
        common.print_table(columns, shown)
    if what and len(rows) > limit > 0:
        click.echo(f"and {counted(len(rows) - limit, f'more {what}')}; --limit 0 shows all")


def _tokens_of(name: str) -> Callable[[Mapping[str, Any]], str]:
    """Return the cell with the tokens of a sum and their cost, as far as these are known."""

    def cell(row: Mapping[str, Any]) -> str:
        sums = row[name]
        if sums["unknown"] and not sums["total_tokens"]:
            return "unknown"
        known = f"{sums['total_tokens']:,}{'+' * bool(sums['unknown'])}"
        return f"{known} {common.dollars(sums['cost'])}" if sums["cost"] else known

    return cell


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
@common.cache_option
@click.option("--search", help="Only questions that contain this text; case does not matter.")
@click.option("--model", help="Only questions to this model.")
@click.option("--scope", help="Only questions to this endpoint or adapter, or below this base URL.")
@click.option("--namespace", help="Only questions that this namespace has drawn.")
@click.option("--prefix", default="", help="Only keys with this prefix.")
@_limit(0, "The largest number of questions")
@common.json_option("a line of JSON per question; see below")
def ls(
    *, cache: str | None, namespace: str | None, prefix: str, limit: int, as_json: bool, **wanted: str | None
) -> None:
    """List the questions in the cache, in the order in which they were first asked."""
    with opened(cache) as store:
        found = _listed(store, namespace, _whole_prefix(prefix), **wanted)
        if limit:
            found = itertools.islice(found, limit)
        if as_json:
            echo_lines(json_text(_listing(store, info)) for info in found)
            return
        first = next(found, None)
        if first is None:
            click.echo(f"{visible(str(store.folder))} has no such question", err=True)
            return
        echo_lines(_table_lines(store, itertools.chain([first], found)))


def _whole_prefix(prefix: str) -> str:
    """Return a prefix with the name of the key format, which the user may omit."""
    return prefix if FORMAT.startswith(prefix) or prefix.startswith(FORMAT) else f"{FORMAT}-{prefix}"


def _listed(
    store: DiskStore,
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
    scope = None if scope is None else _scope(scope)
    for info in store.keys(prefix, scope=scope, namespace=whose, holding=texts):
        if not (search or model) or _fits(store.question(info.key), search or "", model):
            yield info


def _scope(scope: str) -> str:
    """Return a scope in the cache's spelling: a URL without credentials."""
    try:
        return wire.scope_of(scope)
    except wire.BadRequest:  # the name of an adapter
        return scope


def _fits(question: StoredQuestion | None, search: str, model: str | None) -> bool:
    """Return True if a question contains a text and asks a model."""
    document = document_of(question)
    if model is not None and model not in (model_in(document), None if question is None else question.scope):
        return False
    return not search or search.casefold() in "\n".join(strings(asked_in(document))).casefold()


def _listing(store: DiskStore, info: KeyInfo) -> dict[str, Any]:
    document = document_of(store.question(info.key))
    settings = settings_in(document)
    settings.pop("model", None)
    fields = key_fields(info, document, _BEGINNING)
    prompt = fields.pop("prompt")
    return {**fields, "settings": settings, "prompt": prompt}


def _table_lines(store: DiskStore, found: Iterator[KeyInfo]) -> Iterator[str]:
    heads = f"{'key':{_SHORT}}  {'first asked':19}  {'samples':>7}  {'pending':>7}  {'spaces':>6}  "
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
            f"{key}  {when(info.at):19}  {info.samples:7}  {pending}  {info.namespaces:6}  {prompt}"
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
  draws                  a list of namespace, shared (a shared draw), request_id, occurrence,
                         indices (by position), generated, at
  samples                a list of index, id, at, seconds and value (as stored); for the answer of a
                         provider also text, finish_reason, model and token counts
  discarded              a list of index, at and why: discarded samples
"""


@click.command(epilog=_SHOW_JSON)
@click.argument("key")
@common.cache_option
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    help="The largest number of samples and draws; 0 for all.  [default: 20; with --json all]",
)
@common.json_option("one object; see below")
def show(*, key: str, cache: str | None, limit: int | None, as_json: bool) -> None:
    """Show the question with this KEY, its samples, and which draw got which sample.

    A prefix of the key is enough if no other key has it.
    """
    with opened(cache) as store:
        info = found_key(store, key)
        if as_json:
            _print_json(store, info, limit or None)
        else:
            echo_lines(_shown(store, info, 20 if limit is None else limit or None))


def found_key(store: DiskStore, key: str) -> KeyInfo:
    """Return the key with this prefix.

    Raises:
        Failure: when there is none, or more than one.
    """
    whole = _whole_prefix(key)
    found = list(itertools.islice(store.keys(whole), _CANDIDATES + 1))
    exact = [info for info in found if info.key == whole]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if not found:
        raise Failure(
            f"no key in {store.folder} begins with {key!r}; "
            "`cachepipe ls` lists them, and --cache names another cache"
        )
    some = "\n".join(
        f"  {info.key}  {beginning(_listing(store, info)['prompt'], 40)}" for info in found[:_CANDIDATES]
    )
    more = "\n  and more" if len(found) > _CANDIDATES else ""
    raise Failure(f"several keys begin with {key!r}; give more characters:\n{some}{more}")


def _print_json(store: DiskStore, info: KeyInfo, limit: int | None) -> None:
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


def _shown(store: DiskStore, info: KeyInfo, limit: int | None) -> Iterator[str]:
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
    for sample in itertools.islice(store.samples(info.key), limit):
        yield from _sample_lines(sample, info.scope)
    if limit is not None and info.samples > limit:
        yield f"  and {info.samples - limit:,} more; --limit 0 shows all"
    for discard in discards[:limit]:
        number = styled(f"  #{discard.index}", fg="cyan")
        yield f"{number}  discarded {when(discard.at)}: {visible(discard.why)}"
    yield ""
    yield _heading("Draws")
    yield from _draw_lines(store.draws(key=info.key), limit)


def _heading(text: str) -> str:
    return styled(text, bold=True)


def _asked_lines(document: Any) -> Iterator[str]:
    if not isinstance(document, dict):
        yield "  (the question cannot be read)"
        return
    asked = document.get("body", document.get("fields"))
    if not isinstance(asked, dict):
        asked = document
    elif document.get("headers"):
        asked = {**asked, "headers": document["headers"]}
    texts = [name for name in ("system", "instructions", "messages", "prompt", "input") if name in asked]
    for name, value in asked.items():
        if name not in texts:
            fact = value if isinstance(value, str) else json_text(value)
            yield f"  {styled(visible(name), dim=True)} {visible(fact)}"
    for name in texts:
        value = asked[name]
        said = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
        for speaker, content in [(item["role"], item) for item in value] if said else [(name, value)]:
            yield f"  {styled(visible(str(speaker)), fg='green')}"
            yield from _block(_content(content) if said else text_of(content))


def _content(message: dict[str, Any]) -> str:
    """Return the text of a message, and its other fields as JSON."""
    text = "" if message.get("content") is None else text_of(message["content"])
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return "\n".join(part for part in (text, json_text(rest) if rest else "") if part)


def _block(text: str) -> Iterator[str]:
    """Iterate over the lines of a text, indented; line ends other than line feeds are made visible."""
    for line in text.removesuffix("\n").split("\n"):
        yield f"    {visible(line, lines=True)}".rstrip()


def _sample_lines(sample: Sample, scope: str | None) -> Iterator[str]:
    fields = _sample_fields(sample, scope)
    facts = [
        when(fields["at"]) if isinstance(fields["at"], int | float) else "",
        str(fields.get("model") or ""),
    ]
    if isinstance(fields.get("completion_tokens"), int):
        facts.append(f"{fields['completion_tokens']:,} tokens")
    facts.append(str(fields.get("finish_reason") or ""))
    number = styled(f"  #{sample.index}", fg="cyan")
    yield f"{number}  {visible('  '.join(fact for fact in (sample.id, *facts) if fact))}"
    yield from _block(fields["text"] if isinstance(fields.get("text"), str) else _value_text(sample))


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


def _draw_lines(draws: Iterator[DrawInfo], limit: int | None) -> Iterator[str]:
    for draw in itertools.islice(draws, limit):
        if draw.draw.namespace == SHARED:
            who = "for everybody"
        else:
            namespace = namespace_of(draw.draw.namespace)
            who = "no namespace" if namespace is None else namespace or "''"
        request = f" {draw.draw.request_id}" if draw.draw.request_id else ""
        again = f" (time {draw.draw.occurrence + 1})" if draw.draw.occurrence else ""
        yield (
            f"  {styled(visible(who), fg='green')}{visible(request)}{again}: {_numbers(draw.indices)}; "
            f"{draw.generated} generated for it, {when(draw.at)}"
        )
    rest = sum(1 for _ in draws)
    if rest:
        yield f"  and {rest:,} more; --limit 0 shows all"
