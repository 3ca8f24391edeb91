"""The read-only JSON API of a proxy: keys, questions, samples and draws.

    /cachepipe/api/status                 the upstreams and settings
    /cachepipe/api/counters               hits, misses, spent, billed and saved since the start, by namespace
    /cachepipe/api/namespaces             each namespace, with its draws and samples
    /cachepipe/api/keys                   ?search= ?prefix= ?scope= ?namespace= ?after= ?limit=
    /cachepipe/api/keys/KEY               the question, and its number of samples
    /cachepipe/api/keys/KEY/samples       ?from= ?limit=
    /cachepipe/api/keys/KEY/draws         ?namespace= ?after= ?limit=

A listing is ``{"items": […], "next": …}``; ``next`` is null, or the ``after`` (or ``from``) of the next page.
For keys it is the last key of the page, so that new questions do not shift the pages.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

from cachepipe.contract.draws import label
from cachepipe.listings import document_of, draw_fields, key_fields, sample_fields
from cachepipe.proxy.http_exchange import Refusal
from cachepipe.stores.base import Store, StoredQuestion

_MOST: Final = 200  # items of a listing
_USUAL: Final = 50
_USUAL_SAMPLES: Final = 20
_SECONDS: Final = 0.25  # after which a search returns what it has found so far
_BEGINNING: Final = 300  # characters of a prompt or an answer in a listing


def answer(store: Store, path: str, query: str, clock: Callable[[], float] = time.monotonic) -> Any:
    """Return the JSON value at a path below ``/cachepipe/api``. This blocks while it reads.

    Args:
        store: the cache.
        path: the path, decoded: ``/namespaces``, ``/keys`` …
        query: the raw query.
        clock: returns seconds, and limits the time of searches.

    Raises:
        Refusal: when the query is not understood, or the object does not exist.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=20, errors="strict")
    except ValueError as error:
        raise _bad_query(f"the query cannot be read: {error}") from error
    options = dict(pairs)
    parts = path.strip("/").split("/")
    match parts:
        case ["namespaces"]:
            _known(options)
            return {"items": [dataclasses.asdict(info) for info in store.namespaces()], "next": None}
        case ["keys"]:
            _known(options, "search", "prefix", "scope", "namespace", "after", "limit")
            return _keys(store, options, clock)
        case ["keys", key]:
            _known(options)
            return _key(store, key)
        case ["keys", key, "samples"]:
            _known(options, "from", "limit")
            return _samples(store, key, options)
        case ["keys", key, "draws"]:
            _known(options, "namespace", "after", "limit")
            return _draws(store, key, options)
    raise _not_found("this path does not exist; see /cachepipe/api")


def _bad_query(message: str) -> Refusal:
    return Refusal(400, "bad_query", message)


def _not_found(message: str) -> Refusal:
    return Refusal(404, "not_found", message)


def _known(options: Mapping[str, str], *names: str) -> None:
    if unknown := sorted({*options} - {*names}):
        known = ", ".join(names) or "none"
        raise _bad_query(f"unknown in the query: {', '.join(unknown)}; known are {known}")


def _number(options: Mapping[str, str], name: str, default: int, most: int | None = None) -> int:
    text = options.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise _bad_query(f"{name} is a whole number; got {text[:50]!r}")
    return int(text) if most is None else min(int(text), most)


def _keys(store: Store, options: Mapping[str, str], clock: Callable[[], float]) -> dict[str, Any]:
    """List keys, newest first, page by page. A search stops after a while and returns where to continue."""
    limit = _number(options, "limit", _USUAL, _MOST) or 1
    search = options.get("search", "").casefold()
    scope, wanted, after = options.get("scope"), options.get("namespace"), options.get("after")
    drawn = None
    if wanted is not None:
        drawn = {draw.draw.key for draw in store.draws(namespace=label(wanted or None))}
    listed = store.keys(options.get("prefix", ""), newest=True)
    if after is not None and all(info.key != after for info in listed):  # this also skips the keys before it
        raise _not_found("the key in `after` is not in the cache; start the listing again")
    until = None
    items: list[dict[str, Any]] = []
    for info in listed:
        if until is None:  # start the time here, so that each page makes progress
            until = clock() + _SECONDS
        if len(items) == limit or clock() > until:
            return {"items": items, "next": after}
        after = info.key
        if (scope is not None and info.scope != scope) or (drawn is not None and info.key not in drawn):
            continue
        question = store.question(info.key)
        if search and (question is None or search not in _searched(question)):
            continue
        items.append(key_fields(info, document_of(question), _BEGINNING))
    return {"items": items, "next": None}


def _searched(question: StoredQuestion) -> str:
    """Return the text that searches compare: a question's JSON without regard to case."""
    return question.document.decode(errors="replace").casefold()


def _question(store: Store, key: str) -> StoredQuestion:
    question = store.question(key)
    if question is None:
        raise _not_found("there is no such key in the cache")
    return question


def _key(store: Store, key: str) -> dict[str, Any]:
    question = _question(store, key)
    info = next((info for info in store.keys(key) if info.key == key), None)
    counts = {name: getattr(info, name, 0) for name in ("samples", "pending", "namespaces")}
    return {
        "key": key,
        "scope": question.scope,
        "at": question.at,
        **counts,
        "document": document_of(question),
    }


def _samples(store: Store, key: str, options: Mapping[str, str]) -> dict[str, Any]:
    first = _number(options, "from", 0)
    limit = _number(options, "limit", _USUAL_SAMPLES, _MOST) or 1
    scope = _question(store, key).scope
    following = (sample for sample in store.samples(key) if sample.index >= first)
    found = list(itertools.islice(following, limit + 1))
    items = [sample_fields(sample, scope) for sample in found[:limit]]
    for item in items:
        if isinstance(item["value"], dict):
            item["value"].pop("cachepipe", None)
    return {"items": items, "next": found[limit].index if len(found) > limit else None}


def _draws(store: Store, key: str, options: Mapping[str, str]) -> dict[str, Any]:
    after = _number(options, "after", 0)
    limit = _number(options, "limit", _USUAL, _MOST) or 1
    wanted = options.get("namespace")
    _question(store, key)
    draws = store.draws(key, None if wanted is None else label(wanted or None))
    found = list(itertools.islice(draws, after, after + limit + 1))
    items = [draw_fields(info) for info in found[:limit]]
    return {"items": items, "next": after + limit if len(found) > limit else None}
