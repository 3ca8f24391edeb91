"""Imports the folders of CacheSaver 0.0.6.

CacheSaver keeps, in a diskcache, a list of samples under a key: ``DeepHash`` of the arguments of the call. It
stores neither the request nor the server, nor which namespace has used how many samples. So the requests
must be given: their keys are computed, and what the folder has under them is taken, in the order of the
list. No draw is made. A later run draws the samples from the front, as CacheSaver's reruns do.

CacheSaver's keys ignore the order and the repetition of list items. If several of the given requests have the
same key, the importer takes nothing from it, because it cannot know which request the samples answer.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from cachepipe import jsontext, wire
from cachepipe.batch.errors import BatchFileError
from cachepipe.batch.files import numbered
from cachepipe.batch.lines import parse_line
from cachepipe.batch.runner import model_of
from cachepipe.batch.settings import BatchSettings
from cachepipe.contract import keys
from cachepipe.contract.entries import EntrySample
from cachepipe.contract.keys import Question
from cachepipe.errors import CachepipeError, StoreError, UnkeyableValue
from cachepipe.importers.adding import Adder, sample_of
from cachepipe.importers.deephash import UNKEYED, key_of
from cachepipe.importers.pickles import BadPickle, Instance, Plain, read
from cachepipe.importers.report import Imported
from cachepipe.models.openai import OpenAIModel
from cachepipe.providers.exchange import questions_of
from cachepipe.providers.generation import Kept, packed
from cachepipe.sharing import Cache, Progress, opened
from cachepipe.stores import folders
from cachepipe.stores.disk import connect, connect_to_read
from cachepipe.stores.identity import SHELF
from cachepipe.stores.received import check_shelf
from cachepipe.stores.tables import UNREADABLE
from cachepipe.typedefs import UNASKED, Request, field_names
from cachepipe.values import Codec

_PICKLE: Final = 4  # diskcache's mode of a pickle
_FILE: Final = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{28}\.val")
_ROW: Final = "SELECT store_time, mode, filename, value FROM Cache WHERE key = ? AND raw = 1"
_KEYS: Final = "SELECT key, raw FROM Cache ORDER BY rowid"
_COUNT: Final = "SELECT count(*) FROM Cache"
_OURS: Final = "SELECT 1 FROM sqlite_master WHERE name = 'cachepipe'"
_CHOICES: Final = frozenset({"choices", "candidates"})
_COUNTS: Final = frozenset({"candidate_count", "candidateCount"})
_UNSENT: Final = frozenset({"n", "timeout", "extra_headers", "extra_query", "extra_body"})
_EXPANDED: Final = 64  # how often a pickle may be as large as its file, when its references are followed
_LEAST: Final = 1 << 20
_SHOWN: Final = 60  # characters of a text in a reason
_SHORT: Final = 16  # characters of a key
_LATEST: Final = 1 << 33
_codec = Codec()


_Hash = Callable[[Request], str]


def import_cachesaver(
    folder: str | os.PathLike[str],
    requests: str | os.PathLike[str] | Iterable[Request],
    cache: Cache,
    settings: BatchSettings | None = None,
    *,
    hash: _Hash | None = None,  # noqa: A002 - CacheSaver's name
    progress: Progress = lambda _doing, _done: None,
    **changes: Any,
) -> Imported:
    """Add what CacheSaver has stored for some requests to a cache. Nothing in the folder is unpickled.

    Args:
        folder: CacheSaver's folder, ``./cache`` by default there. It is only read.
        requests: what was asked. A file: batch requests, objects with ``prompt`` or ``messages``, or
            ``{"kwargs": {…}}`` with the arguments of a call. Or requests to a model of your own, and calls
            with objects of an SDK, as ``cachepipe.compat.cachesaver.typedefs.Request``.
        cache: the cache, which is created if it does not exist.
        settings: of a file, the settings that fill in what a request leaves out, and the ``base_url`` of
            calls through OpenAI's SDK; the ``scope`` of all questions.
        hash: the function that CacheSaver's pipeline had as ``hash=``, for requests to your own model.
        progress: gets how many entries are done.
        changes: settings to change; `BatchSettings` lists them.

    Raises:
        BatchFileError: when the file of requests cannot be read.
        StoreError: when the folder is not one of CacheSaver, or the cache cannot be written.
    """
    settings = replace(settings or BatchSettings(), **changes)
    imported = Imported()
    with closing(_Folder(folder)) as source, opened(cache, write=True) as store:
        adder = Adder(store, imported, progress)
        if isinstance(requests, str | os.PathLike):
            known = _from_file(Path(requests), settings, source, imported)
        else:
            known = _from_requests(requests, settings, hash, source)
        for key in source.keys(imported):
            try:
                _take(key, known, source, adder)
            except _LeftError as error:
                imported.leave(f"entry {key[:_SHORT]}", error.name, str(error))
            else:
                imported.taken += 1
            adder.step()
        adder.flush()
    return imported


class _LeftError(Exception):
    """An entry cannot be taken; the message says why.

    Attributes:
        name: the model that answered, if that is known.
    """

    def __init__(self, why: str, name: str = "") -> None:
        super().__init__(why)
        self.name = name


# The folder.


def check_folder(folder: str | os.PathLike[str]) -> int:
    """Return the number of entries of a folder of CacheSaver.

    Raises:
        StoreError: when it is something else.
    """
    with closing(_Folder(folder)) as source:
        return source.count()


class _Folder:
    """A folder of CacheSaver, open for reading.

    Args:
        folder: its path.

    Raises:
        StoreError: when it is something else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = folders.expanded(folder)
        shelf = self.path / SHELF
        if not os.path.isfile(shelf):  # noqa: PTH113 - also where it may not be looked at
            raise StoreError(f"{self.path} is not a folder of CacheSaver: it holds no file {SHELF}")
        folders.check_files(self.path, SHELF)
        try:
            # If nobody has the file open, SQLite would create two more files and leave them there.
            used = any(shelf.with_name(f"{SHELF}{ending}").exists() for ending in ("-wal", "-shm"))
            self._rows = connect_to_read(shelf)[0] if used else connect(shelf, uri="?immutable=1")
            try:
                tables = check_shelf(self._rows, str(self.path))
                ours = self._rows.execute(_OURS).fetchone()
            except BaseException:
                self._rows.close()
                raise
        except UNREADABLE as error:
            raise StoreError(f"the folder {self.path} cannot be read: {error}") from error
        if ours is not None or "Cache" not in tables:
            self.close()
            raise StoreError(
                f"{self.path} is a cache of cachepipe; `cachepipe merge` adds it to another one"
                if ours is not None
                else f"{self.path} is not a folder of CacheSaver: it holds no table Cache"
            )

    def close(self) -> None:
        """Close the database."""
        self._rows.close()

    def count(self) -> int:
        """Return the number of entries."""
        number: int = next(self._reading(_COUNT))[0]
        return number

    def keys(self, imported: Imported) -> Iterator[str]:
        """Iterate over the keys; one that CacheSaver does not write is left."""
        for key, raw in self._reading(_KEYS):
            if raw == 1 and type(key) is str:
                yield key
            else:
                imported.leave(f"entry {key!r:.20}", "", "its key is not a string, so no CacheSaver wrote it")

    def __contains__(self, key: str) -> bool:
        return next(self._reading(_ROW, key), None) is not None

    def entry(self, key: str) -> tuple[list[Any], int, Plain]:
        """Return the list under a key, when it was stored in seconds since 1970, and what makes it plain.

        Raises:
            _LeftError: when it is not a list of samples.
        """
        at, mode, name, data = next(self._reading(_ROW, key))
        if mode != _PICKLE:
            raise _LeftError("it is not a list of samples")
        content = self._file(name) if data is None else data
        if type(content) is not bytes:
            raise _LeftError("its row is damaged")
        try:
            found = read(content)
        except BadPickle as error:
            raise _LeftError(f"its pickle is refused: {error}") from error
        if type(found) is not list or not found:
            raise _LeftError("it is not a list of samples")
        stored = int(at) if isinstance(at, int | float) and 0 <= at < _LATEST else 0
        return found, stored, Plain(_EXPANDED * len(content) + _LEAST)

    def _file(self, name: Any) -> bytes:
        """Return the content of a file of the folder.

        Raises:
            _LeftError: when the name leads elsewhere, or there is no such file.
        """
        if type(name) is not str or not _FILE.fullmatch(name):
            raise _LeftError("its row names a file that diskcache does not write")
        path = self.path / name
        try:
            parts = [each.lstat().st_mode for each in (path.parent.parent, path.parent, path)]
            if not stat.S_ISREG(parts[-1]) or not all(map(stat.S_ISDIR, parts[:-1])):
                raise _LeftError(f"its file {name} is a link, or no regular file")
            descriptor = os.open(path, os.O_RDONLY | folders.NOFOLLOW)
            with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
                return file.read()
        except OSError as error:
            raise _LeftError(f"its file {name} cannot be read: {error.strerror}") from error

    def _reading(self, query: str, *values: Any) -> Iterator[Any]:
        try:
            yield from self._rows.execute(query, values)
        except (sqlite3.Error, *UNREADABLE) as error:
            raise StoreError(f"the folder {self.path} cannot be read: {error}") from error


# The requests.


class _Asked(NamedTuple):
    """What was asked under a key.

    Attributes:
        identity: what it has in common with an equal request.
        kwargs: the arguments of a call of an SDK.
        question: the question to the user's own model, if the request may be one.
        scope: replaces the endpoint's URL in the key.
        base_url: where calls through OpenAI's SDK went.
    """

    identity: bytes
    kwargs: Mapping[str, Any]
    question: Question | None = None
    scope: str | None = None
    base_url: str | None = None


class _Known:
    """The requests by their keys.

    Args:
        source: where they come from, for reasons.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.model_at = functools.cache(_model_at)
        self._by_key: dict[str, _Asked | None] = {}

    def add(self, key: str, asked: _Asked) -> None:
        """Add a request; other ones with the same key contradict it."""
        before = self._by_key.setdefault(key, asked)
        if before is not None and before.identity != asked.identity:
            self._by_key[key] = None

    def find(self, key: str) -> _Asked:
        """Return what was asked under a key.

        Raises:
            _LeftError: when that is not known.
        """
        if key not in self._by_key:
            raise _LeftError(f"no request of {self.source} has this key")
        asked = self._by_key[key]
        if asked is None:
            raise _LeftError(
                f"several requests of {self.source} have this key, which ignores the order and repetition of "
                "list items, so nobody knows which one its samples answer"
            )
        return asked


def _from_file(path: Path, settings: BatchSettings, source: _Folder, imported: Imported) -> _Known:
    """Return the requests of a file that have an entry."""
    known = _Known(path.name)
    missing: list[int] = []
    try:
        with path.open("rb") as file:
            for number, text in numbered(file):
                try:
                    kwargs = _kwargs(text, number, settings)
                    key = key_of(_with_config(kwargs))
                    identity = keys.encode(keys.canonical(_keyed(kwargs)))
                except (ValueError, UnkeyableValue, TypeError, ImportError) as error:
                    imported.leave(f"{path.name} line {number}", "", str(error))
                    continue
                if key in source:
                    known.add(key, _Asked(identity, kwargs, None, settings.scope, settings.base_url))
                else:
                    missing.append(number)
    except OSError as error:
        raise BatchFileError(f"{path} cannot be read: {error.strerror}") from error
    if missing:
        imported.leave(
            path.name,
            "",
            f"the folder has no entry for {len(missing):,} of its requests, such as line {missing[0]}. An "
            "entry is found only by exactly the arguments that the program passed: temperature=1 is not 1.0. "
            "With a config of Gemini's, the versions of google-genai and Python must also be the program's",
        )
    return known


def _kwargs(text: bytes, number: int, settings: BatchSettings) -> Mapping[str, Any]:
    """Return the arguments of the call that a line stands for.

    Raises:
        ValueError: when it is not a request.
    """
    fields = jsontext.loads(text)
    if isinstance(fields, dict) and "kwargs" in fields:
        if fields.get("args") or not isinstance(fields["kwargs"], dict):
            raise ValueError("kwargs must be an object, and args empty: name the arguments of the call")
        given: Mapping[str, Any] = fields["kwargs"]
    else:
        given = parse_line(text, number, replace(settings, n=1)).body
    config = given.get("config")
    if isinstance(config, dict):
        given = {**given, "config": {name: item for name, item in config.items() if name not in _COUNTS}}
    return {name: value for name, value in given.items() if name != "n"}


def _with_config(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of a call with the config of Gemini's SDK as CacheSaver keys it: without a count.

    Raises:
        ImportError: when the SDK is not installed.
        ValueError: when it refuses the config.
    """
    config = kwargs.get("config")
    if config is None or "contents" not in kwargs:
        return kwargs
    try:
        from google.genai import types  # noqa: PLC0415 - only when it is needed
    except ImportError as error:
        raise ImportError(
            "CacheSaver's key of a config of Gemini's needs google-genai: pip install 'cachepipe[gemini]'"
        ) from error
    if isinstance(config, Mapping):
        config = types.GenerateContentConfig(**config)
    return {**kwargs, "config": config.model_copy(update={"candidate_count": None})}


def _keyed(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in UNKEYED}


def _from_requests(
    requests: Iterable[Request], settings: BatchSettings, hash_: _Hash | None, source: _Folder
) -> _Known:
    """Return the given requests that have an entry: to a model of the user's own, or to one of an SDK."""
    known = _Known("the given ones")
    for request in requests:
        if not isinstance(request, Request):
            raise TypeError(
                "requests are a file, or a list of cachepipe.compat.cachesaver.typedefs.Request; "
                f"got {request!r:.200}"
            )
        key = _own_key(request) if hash_ is None else hash_(request)
        if key not in source:
            continue
        try:
            question = keys.question(request, settings.scope, hash_)
        except UnkeyableValue:  # it holds objects of an SDK
            question = None
        kwargs = getattr(request, "kwargs", None)
        identity = repr(kwargs).encode() if question is None else question.document
        known.add(
            key,
            _Asked(
                identity,
                kwargs if isinstance(kwargs, Mapping) else {},
                question,
                settings.scope,
                settings.base_url,
            ),
        )
    return known


def _own_key(request: Request) -> str:
    """Return CacheSaver's key of a request."""
    fields = {
        name: getattr(request, name)
        for name in field_names(type(request))
        if name not in UNASKED and not (name == "prompt" and request.prompt is None)
    }
    if not isinstance(fields.get("kwargs"), Mapping):
        raise TypeError(
            "CacheSaver 0.0.6 keys requests by their args and kwargs; make them with "
            f"cachepipe.compat.cachesaver.typedefs.Request, or give hash=. Got {request!r:.200}"
        )
    return key_of(_with_config(fields.pop("kwargs")), fields.pop("args", ()), **fields)


# The entries.


def _take(key: str, known: _Known, source: _Folder, adder: Adder) -> None:
    """Add the samples under a key.

    Raises:
        _LeftError: when they cannot be taken.
    """
    values, stored, plain = source.entry(key)
    kinds = {value.kind.package if isinstance(value, Instance) else "" for value in values}
    try:
        found = [plain.of(value) for value in values]
    except BadPickle as error:
        raise _LeftError(f"its pickle is refused: {error}") from error
    try:
        asked = known.find(key)
    except _LeftError as error:
        raise _LeftError(f"{error}; {_said(found)}", _model(found)) from None
    if len(kinds) != 1:
        raise _LeftError("its samples are of different kinds", _model(found))
    (package,) = kinds
    try:
        if package or asked.question is None:
            question, kept = _answers(package, asked, found, known)
        else:
            question, kept = asked.question, [Kept(_codec.encode(value)) for value in found]
    except (CachepipeError, ImportError, TypeError, ValueError) as error:
        raise _LeftError(str(error), _model(found)) from error
    adder.add(question, list(_numbered(key, found, kept, stored)))


def _numbered(key: str, values: Sequence[Any], kept: Sequence[Kept], stored: int) -> Iterator[EntrySample]:
    """Iterate over samples to add; the list only grows, so a place in it names a sample."""
    for place, (value, each) in enumerate(zip(values, kept, strict=True)):
        identity = hashlib.blake2b(b"%b/%d/%b" % (key.encode(), place, each.payload), digest_size=12)
        facts = value if isinstance(value, dict) else {}
        created = facts.get("created")
        at = created if type(created) is int and 0 < created < _LATEST else stored
        yield sample_of(each, f"c{identity.hexdigest()}", at, place, _id(facts))


def _answers(package: str, asked: _Asked, found: Sequence[Any], known: _Known) -> tuple[Question, list[Kept]]:
    """Return the question of a call of an SDK, and its answers as they are stored.

    Raises:
        CachepipeError: when a sample is not an answer, or a request not a question.
    """
    if not package:
        raise _LeftError(
            "its samples are no answers of a known SDK, but of a model of your own: give its requests to "
            "import_cachesaver in Python"
        )
    api, url, headers, body = _sent(package, asked, known)
    asks = api.split(body)
    if len(asks) != 1 or not asks[0].cacheable:
        raise _LeftError(
            f"its request cannot be answered from a cache: {asks[0].reason or 'it asks several questions'}"
        )
    (question,) = questions_of(api, asks, url, headers, scope=asked.scope)
    kept = packed(
        [sample for call in _calls(found) for sample in _samples(api, call)],
        asked=body.get("model"),
        url=None if wire.scope_of(url) == question.scope else url,
    )
    if len(kept) != len(found):
        raise wire.BadAnswer("its samples do not have one choice each")
    return question, kept


class _Sent(NamedTuple):
    """A request as an SDK sends it: its API, URL, the headers that count, and its body."""

    api: wire.Api
    url: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]


def _sent(package: str, asked: _Asked, known: _Known) -> _Sent:
    """Return the request that an SDK has sent.

    Raises:
        _LeftError: when it is not known.
        CachepipeError: when it cannot be answered from a cache.
        TypeError: when the SDK takes no such arguments.
        ValueError: when the SDK refuses them.
    """
    kwargs = asked.kwargs
    if kwargs.get("extra_query"):
        raise _LeftError("its request has extra_query, so its URL is not known")
    if package == "google":
        from cachepipe.sdk.gemini import request_of  # noqa: PLC0415 - only when it is needed

        request = request_of(**_with_config(kwargs))
        api = wire.GENERATE_CONTENT
        return _Sent(
            api, request.url, wire.answer_headers(request.headers), api.received(request.url, request.data)
        )
    if package == "huggingface_hub":
        from cachepipe.sdk.huggingface import chat_request_of  # noqa: PLC0415 - likewise

        if not kwargs.get("model"):
            raise _LeftError("its request names no model, and CacheSaver does not store that of the client")
        request = chat_request_of(**kwargs)
        return _Sent(wire.CHAT, request.url, wire.answer_headers(request.headers), request.json)
    model = known.model_at(package, asked.base_url)
    body = {name: value for name, value in kwargs.items() if name not in _UNSENT}
    body.update(kwargs.get("extra_body") or {})
    url = model.connection.scope_of(model.endpoint, body.get("model"))
    return _Sent(model.api, url, {**model.connection.headers, **(kwargs.get("extra_headers") or {})}, body)


def _model_at(package: str, base_url: str | None) -> OpenAIModel:
    """Return the adapter of a provider, which knows its URL and the headers that count.

    Args:
        package: the SDK whose classes CacheSaver has stored.
        base_url: where calls through OpenAI's SDK went, unless the environment says so.
    """
    if package == "anthropic":
        from cachepipe.models.anthropic import AnthropicModel  # noqa: PLC0415 - only when it is needed

        return AnthropicModel()
    if package == "together":
        from cachepipe.models.together import TogetherModel  # noqa: PLC0415 - likewise

        return TogetherModel()
    # A replay needs no key, and neither does an import.
    return model_of(BatchSettings(base_url=package if package == "groq" else base_url, mode="replay"))


def _samples(api: wire.Api, call: Sequence[Mapping[str, Any]]) -> list[wire.Sample]:
    """Return the samples of a call; CacheSaver has copied the usage of the call to each of them."""
    answer = dict(call[0])
    for name in _CHOICES & answer.keys():
        answer[name] = [choice for each in call for choice in each[name]]
    return api.samples(jsontext.dumps(answer))


def _calls(found: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Iterate over the samples of each call: they follow one another, and have the id of their answer."""
    call: list[Mapping[str, Any]] = []
    for each in found:
        if call and not (_id(each) and _id(each) == _id(call[0]) and _has_choices(each, call[0])):
            yield call
            call = []
        call.append(each)
    yield call


def _id(answer: Mapping[str, Any]) -> Any:
    return answer.get("id") or answer.get("responseId")


def _has_choices(*answers: Mapping[str, Any]) -> bool:
    return all(any(isinstance(each.get(name), list) for name in _CHOICES) for each in answers)


def _model(found: Sequence[Any]) -> str:
    facts = found[0] if isinstance(found[0], dict) else {}
    model = facts.get("model") or facts.get("modelVersion")
    return model if isinstance(model, str) else ""


def _said(found: Sequence[Any]) -> str:
    """Return what an entry holds, in a few words, so that its request can be found."""
    first = found[0]
    text = first if isinstance(first, str) else ""
    if isinstance(first, dict):
        for api in (wire.CHAT, wire.MESSAGES, wire.GENERATE_CONTENT):
            try:
                text = str(api.summary(first)["text"])
                break
            except (CachepipeError, AttributeError, TypeError, ValueError, LookupError):
                continue
    samples = "1 sample" if len(found) == 1 else f"{len(found)} samples"
    shown = " ".join(text.split())
    return f"it has {samples}" + (f', such as "{shown:.{_SHOWN}}"' if shown else "")
