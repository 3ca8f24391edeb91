"""The manifest of a bundle: what it holds, and where."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from cachepipe.contract.entries import Entry
from cachepipe.errors import BundleError, FormatError
from cachepipe.stores.bundles.container import Chunk

FORMAT: Final = 1
"""The version of the form of bundles."""

_NAME: Final = "cachepipe bundle"
_COUNTS: Final = ("questions", "samples", "discarded", "draws")


@dataclass(slots=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        version: the version of cachepipe that wrote it.
        namespaces: the exported namespaces; None for all of a cache.
        counts: the numbers of questions, samples, discarded samples and draws.
        scopes: the endpoints and adapters that answered, each with its number of questions.
        asked: the models that the questions name, each with its number of questions.
        answered: the models that the answers name, each with its number of samples.
        fingerprints: the system fingerprints of the answers.
        first: the lowest stamp of a sample (microseconds since 1970); 0 without samples.
        last: the greatest one.
        content: the SHA-256 of all lines, in hexadecimal: equal for equal content.
        chunks: where the questions are.
    """

    version: str
    namespaces: list[str | None] | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    scopes: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    fingerprints: list[str] = field(default_factory=list)
    first: int = 0
    last: int = 0
    content: str = ""
    chunks: list[Chunk] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return everything but where the questions are, for people and as JSON."""
        return {
            "cachepipe": self.version,
            "namespaces": self.namespaces,
            **self.counts,
            "scopes": self.scopes,
            "models_asked": self.asked,
            "models_answered": self.answered,
            "fingerprints": self.fingerprints,
            "first": self.first,
            "last": self.last,
            "content": self.content,
        }

    def dumps(self) -> bytes:
        """Return its line."""
        return (
            orjson.dumps(
                {"bundle": _NAME, "format": FORMAT, **self.summary(), "chunks": [*map(list, self.chunks)]}
            )
            + b"\n"
        )

    @classmethod
    def loads(cls, content: bytes, where: str) -> Manifest:
        """Return the manifest in a line.

        Raises:
            FormatError: when a later version of cachepipe wrote it.
            BundleError: when it is not a manifest.
        """
        try:
            line = orjson.loads(content)
            known = line["bundle"] == _NAME and type(line["format"]) is int
        except (ValueError, TypeError, KeyError) as error:
            raise _invalid(where, error) from error
        if not known:
            raise _invalid(where, ValueError("it has no format"))
        if line["format"] != FORMAT:
            raise FormatError(
                f"the bundle {where} has format {line['format']}; this version of cachepipe reads format "
                f"{FORMAT}. Install cachepipe {line.get('cachepipe', 'of a later version')!s:.40}"
            )
        try:
            return _read(line)
        except (ValueError, TypeError, KeyError) as error:
            raise _invalid(where, error) from error


def _read(line: dict[str, Any]) -> Manifest:
    chunks = [Chunk(*chunk) for chunk in line["chunks"]]
    if any(list(map(type, chunk)) != [str, int, int, int, str] for chunk in chunks):
        raise ValueError("a chunk has a value of the wrong type")
    return Manifest(
        str(line["cachepipe"]),
        None if line["namespaces"] is None else list(line["namespaces"]),
        {name: int(line[name]) for name in _COUNTS},
        dict(line["scopes"]),
        dict(line["models_asked"]),
        dict(line["models_answered"]),
        list(line["fingerprints"]),
        int(line["first"]),
        int(line["last"]),
        str(line["content"]),
        chunks,
    )


def _invalid(where: str, error: Exception) -> BundleError:
    return BundleError(f"the bundle {where} has no valid manifest: {error}")


class Tally:
    """Counts what goes into a bundle.

    Args:
        version: the version of cachepipe.
        namespaces: the exported namespaces; None for all.
    """

    def __init__(self, version: str, namespaces: Collection[str | None] | None) -> None:
        names = (
            None if namespaces is None else sorted({*namespaces}, key=lambda name: (name is not None, name))
        )
        self.manifest = Manifest(version, names)
        self._fingerprints: set[str] = set()
        self._content = hashlib.sha256()

    def add(self, entry: Entry, headers: Iterable[Mapping[str, Any]], model: Any) -> None:
        """Count an entry, with the headers of its samples and the model that it asks."""
        found = self.manifest
        add_counts(found.counts, entry)
        _count(found.scopes, entry.scope)
        _count(found.asked, model)
        for header in headers:
            _count(found.answered, header.get("model"))
            if isinstance(fingerprint := header.get("fingerprint"), str):
                self._fingerprints.add(fingerprint)
            stamp = header.get("stamp")
            if type(stamp) is int:
                if stamp < found.first or not found.first:
                    found.first = stamp
                found.last = max(found.last, stamp)

    def add_lines(self, lines: bytes) -> None:
        """Add the lines of a chunk to the digest of the content."""
        self._content.update(lines)

    def done(self, chunks: list[Chunk]) -> Manifest:
        """Return the manifest."""
        found = self.manifest
        for counts in (found.scopes, found.asked, found.answered):
            in_order = sorted(counts.items())
            counts.clear()
            counts.update(in_order)
        found.fingerprints = sorted(self._fingerprints)
        found.content = self._content.hexdigest()
        found.chunks = chunks
        return found


def add_counts(counts: dict[str, int], entry: Entry) -> None:
    """Add an entry to the counts of a bundle."""
    counts["questions"] += 1
    counts["draws"] += len(entry.draws)
    for sample in entry.samples:
        counts["samples" if sample.discarded is None else "discarded"] += 1


def _count(counts: dict[str, int], name: Any) -> None:
    if isinstance(name, str):
        counts[name] = counts.get(name, 0) + 1
