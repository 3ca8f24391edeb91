"""Looks for texts that should not be handed on: credentials, and private addresses.

Each pattern begins with a literal text. One expression finds all of these in one pass: it stops only at bytes
that are rare in texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import orjson

from cachepipe.errors import Finding

_SHOWN: Final = 100


class _Pattern(NamedTuple):
    """What a secret looks like.

    Attributes:
        kind: its name, for people.
        begins: the text that it begins with.
        mark: the place in that text of the byte that is looked for.
        form: what it matches as a whole.
    """

    kind: str
    begins: bytes
    mark: int
    form: re.Pattern[bytes]


_RARE: Final = b"_-.:zKJSxBb"  # the first of these in a beginning is looked for


def _pattern(kind: str, begins: str, rest: str) -> _Pattern:
    text = begins.encode()
    mark = next(text.index(byte) for byte in _RARE if byte in text)
    return _Pattern(kind, text, mark, re.compile((re.escape(begins) + rest).encode()))


_PATTERNS: Final = (
    _pattern("an API key", "sk-", r"(?=[\w-]*\d)[A-Za-z0-9_-]{20,}"),
    _pattern("an API key", "gsk_", r"[A-Za-z0-9]{40,}"),
    _pattern("an API key", "xai-", r"[A-Za-z0-9]{40,}"),
    _pattern("an API key", "pplx-", r"[A-Za-z0-9]{32,}"),
    _pattern("an API key", "tgp_v1_", r"[A-Za-z0-9_-]{32,}"),
    _pattern("an API key", "hf_", r"[A-Za-z0-9]{30,}"),
    _pattern("an API key", "r8_", r"[A-Za-z0-9]{36,}"),
    _pattern("an API key", "AIza", r"[A-Za-z0-9_-]{35}"),
    _pattern("an API key", "SG.", r"[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_-]{20,}"),
    _pattern("an API key", "sk_live_", r"[A-Za-z0-9]{20,}"),
    _pattern("an AWS key", "AKIA", r"[A-Z0-9]{16}(?![A-Z0-9])"),
    _pattern("an AWS key", "ASIA", r"[A-Z0-9]{16}(?![A-Z0-9])"),
    _pattern("a GitHub token", "ghp_", r"[A-Za-z0-9]{36,}"),
    _pattern("a GitHub token", "gho_", r"[A-Za-z0-9]{36,}"),
    _pattern("a GitHub token", "ghu_", r"[A-Za-z0-9]{36,}"),
    _pattern("a GitHub token", "ghs_", r"[A-Za-z0-9]{36,}"),
    _pattern("a GitHub token", "ghr_", r"[A-Za-z0-9]{36,}"),
    _pattern("a GitHub token", "github_pat_", r"[A-Za-z0-9_]{22,}"),
    _pattern("a GitLab token", "glpat-", r"[A-Za-z0-9_-]{20,}"),
    _pattern("a Slack token", "xox", r"[abeoprs]-[A-Za-z0-9-]{10,}"),
    _pattern("a PyPI token", "pypi-", r"AgE[A-Za-z0-9_-]{50,}"),
    _pattern("an npm token", "npm_", r"[A-Za-z0-9]{36,}"),
    _pattern("a JSON web token", "eyJ", r"[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    _pattern("a bearer token", "Bearer ", r"[A-Za-z0-9._~+/-]{20,}=*"),
    _pattern("a bearer token", "bearer ", r"[A-Za-z0-9._~+/-]{20,}=*"),
    _pattern("a private key", "-----BEGIN ", r"(?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"),
    _pattern("a password in a URL", "://", r"[^\s/\"'@:\\<>{}$]+:[^\s/\"'@\\<>{}$]+@[A-Za-z0-9\[]"),
    _pattern("a private address", "10.", r"(?:\d{1,3}\.){2}\d{1,3}(?![\d.]*\d)"),
    _pattern("a private address", "192.168.", r"\d{1,3}\.\d{1,3}(?![\d.]*\d)"),
    _pattern("a private address", "172.", r"(?:1[6-9]|2\d|3[01])\.\d{1,3}\.\d{1,3}(?![\d.]*\d)"),
    _pattern("a private host", "://", r"[A-Za-z0-9.-]*\.(?:internal|intranet|corp|lan|local|home\.arpa)\b"),
)
_INSIDE: Final = re.compile(rb"[A-Za-z0-9_.-]")


def _to_find(pattern: _Pattern) -> bytes:
    """Return an expression for the mark of a pattern between what else the pattern begins with."""
    text, mark = pattern.begins, pattern.mark
    parts = text[mark : mark + 1], text[: mark + 1], text[mark + 1 :]
    return b"%b(?<=%b)(?=%b)" % tuple(map(re.escape, parts))


_ANY: Final = re.compile(b"|".join(dict.fromkeys(map(_to_find, _PATTERNS))))
"""Matches the mark of any pattern."""
_BY_MARK: Final[dict[int, list[_Pattern]]] = {}
for _each in _PATTERNS:
    _BY_MARK.setdefault(_each.begins[_each.mark], []).append(_each)


def kinds_in(text: bytes) -> list[str]:
    """Return the kinds of secrets that a text seems to hold."""
    found: dict[str, None] = {}
    for match in _ANY.finditer(text):
        at = match.start()
        for pattern in _BY_MARK[text[at]]:
            if pattern.kind not in found and _holds(pattern, text, at - pattern.mark):
                found[pattern.kind] = None
    return list(found)


def _holds(pattern: _Pattern, text: bytes, start: int) -> bool:
    """Return True if a pattern matches at a place that is not inside a word."""
    if start < 0 or not text.startswith(pattern.begins, start) or not pattern.form.match(text, start):
        return False
    if not start or (text[start - 1 : start] == b"n" and text[start - 2 : start - 1] == b"\\"):
        return True  # at the beginning of a line, which JSON writes as \n
    return pattern.begins == b"://" or not _INSIDE.match(text, start - 1)


class Findings:
    """Collects what looks like a secret in the lines of a bundle.

    Attributes:
        found: some of the places.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.found: list[Finding] = []
        self.count = 0

    def scan(self, lines: bytes) -> None:
        """Look at the lines of one or more questions."""
        if not kinds_in(lines):
            return
        for finding in _places(lines):
            self.count += 1
            if len(self.found) < _SHOWN:
                self.found.append(finding)


def _places(lines: bytes) -> Iterator[Finding]:
    key = ""
    for text in lines.split(b"\n")[:-1]:
        line = orjson.loads(text)
        key = line.get("question", key)
        where = "question" if "question" in line else str(line.get("index", "draw"))
        for kind in kinds_in(text):
            yield Finding(kind, key, where)
