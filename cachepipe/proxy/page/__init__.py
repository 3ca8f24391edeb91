"""The page for people: its files, and the headers that keep what models answered from acting there."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

_TYPES: Final = {
    "css": b"text/css; charset=utf-8",
    "html": b"text/html; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "svg": b"image/svg+xml",
}
_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
)
_HEADERS: Final = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
)


FILES: Final = {
    "/" if file.name == "index.html" else f"/cachepipe/page/{file.name}": (_TYPES[suffix], file.read_bytes())
    for file in files(__name__).iterdir()
    if (suffix := file.name.rpartition(".")[2]) in _TYPES
}
"""What is served by path: its type and its bytes. None of it is secret: it holds nothing of the cache."""


def answer(path: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers and the bytes of a file by its path, one of `FILES`."""
    kind, content = FILES[path]
    return [(b"content-type", kind), *_HEADERS], content
