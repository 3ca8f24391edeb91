"""The read-only JSON API of a proxy: keys, questions, samples and draws.

    /cachepipe/api/status                 the upstreams and settings
    /cachepipe/api/counters               hits, misses, spent, billed and saved since the start, by namespace
    /cachepipe/api/stats                  what the cache has cost and saved, by namespace, model and run
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

from cachepipe.contract.draws import label
from cachepipe.listings import document_of, draw_fields, key_fields, sample_fields
from cachepipe.proxy.http_exchange import Refusal
from cachepipe.stores.base import KeyInfo, Store, StoredQuestion

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
        options = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=20, errors="strict"))
    except ValueError as error:
        raise _bad_query(f"the query cannot be read: {error}") from error
    match path.strip("/").split("/"):
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


def _number(options: Mapping[str, str], name: str, default: int) -> int:
    text = options.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise _bad_query(f"{name} is a whole number; got {text[:50]!r}")
    return int(text)


def _limit(options: Mapping[str, str], usual: int) -> int:
    return min(max(_number(options, "limit", usual), 1), _MOST)


def _namespace(options: Mapping[str, str]) -> str | None:
    """Return the label of the namespace in a query, or None if it names none."""
    name = options.get("namespace")
    return None if name is None else label(name or None)


def _keys(store: Store, options: Mapping[str, str], clock: Callable[[], float]) -> dict[str, Any]:
    """List keys, newest first, page by page. A search stops after a while and returns where to continue."""
    limit = _limit(options, _USUAL)
    search = options.get("search", "").casefold()
    scope, after = options.get("scope"), options.get("after")
    drawn = _drawn_keys(store, _namespace(options))
    listed = store.keys(options.get("prefix", ""), newest=True)
    _skip_to(listed, after)
    until = None
    items: list[dict[str, Any]] = []
    for info in listed:
        until = until or clock() + _SECONDS  # the time starts here, so that each page makes progress
        if len(items) == limit or clock() > until:
            return {"items": items, "next": after}
        after = info.key
        if scope not in (None, info.scope) or (drawn is not None and info.key not in drawn):
            continue
        question = store.question(info.key)
        if search in _searched(question):
            items.append(key_fields(info, document_of(question), _BEGINNING))
    return {"items": items, "next": None}


def _drawn_keys(store: Store, namespace: str | None) -> set[str] | None:
    """Return the keys that a namespace has drawn, or None for all keys."""
    return None if namespace is None else {draw.draw.key for draw in store.draws(namespace=namespace)}


def _skip_to(listed: Iterator[KeyInfo], key: str | None) -> None:
    """Skip the keys of a listing up to and including ``key``, if there is one."""
    if key is not None and all(info.key != key for info in listed):
        raise _not_found("the key in `after` is not in the cache; start the listing again")


def _searched(question: StoredQuestion | None) -> str:
    """Return the text that searches compare: a question's JSON without regard to case."""
    return "" if question is None else question.document.decode(errors="replace").casefold()


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
    limit = _limit(options, _USUAL_SAMPLES)
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
    limit = _limit(options, _USUAL)
    _question(store, key)
    draws = store.draws(key, _namespace(options))
    found = list(itertools.islice(draws, after, after + limit + 1))
    items = [draw_fields(info) for info in found[:limit]]
    return {"items": items, "next": after + limit if len(found) > limit else None}
