"""The destination of a request, from its path alone.

    /ns/NAME/v1/…            in the namespace NAME
    /ns/NAME@RUN/v1/…        in the namespace NAME and the run labelled RUN
    /rep/REPLICATE/v1/…      in the replicate REPLICATE
    /up/UPSTREAM/v1/…        to the upstream of that name
    /v1/…                    to the first upstream
    /cachepipe/…             the proxy's own paths

The rest of a path is sent upstream unchanged, including its percent-encoding. So the proxy refuses anything
that two servers may read differently: dot segments in any encoding, backslashes, control characters. Between
two of these parts, several slashes count as one, because base URLs may end in a slash.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

from cachepipe.context import INHERITED, Inherited

_MOST: Final = 16_384  # bytes of a path; no provider has longer ones
_DEPTH: Final = 4  # layers of percent-encoding that are removed to look for dot segments
_PLAIN: Final = re.compile(rb"[!$&'()*+,;=:@/A-Za-z0-9._~%|\"<>^`{}\[\]-]*")
_UNSAFE: Final = re.compile(
    rb"(?:^|[/\\])\.{1,2}(?:[/\\;]|$)"  # dot segments, also with parameters, which some servers drop
    rb"|[\\\x00-\x1f\x7f]"
)
_OURS: Final = re.compile(r"/(ns|rep|up)(?:/([^/]*)(/.*)?)?")
_NAMED: Final = {
    "ns": "a namespace is named as in /ns/NAME/v1, a run as in /ns/NAME@RUN/v1",
    "rep": "a replicate is named as in /rep/3/v1 or /ns/NAME/rep/3/v1",
    "up": "an upstream is named as in /up/NAME/v1",
}
"""How each of the proxy's own parts is written."""
_BROKEN: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class BadPath(ValueError):  # noqa: N818 - names the thing at fault
    """A path that is not allowed."""


class UnknownPath(BadPath):
    """A path that does not exist."""


class Destination(NamedTuple):
    """The destination of a request.

    Attributes:
        rest: the raw path without the proxy's own parts, beginning with a slash.
        namespace: the namespace that draws; `INHERITED` if the path does not name one.
        run: the label of a run, or None.
        upstream: the name of the upstream, or None.
        replicate: the replicate that draws; `INHERITED` if the path does not name one.
    """

    rest: str
    namespace: str | Inherited | None = INHERITED
    run: str | None = None
    upstream: str | None = None
    replicate: str | Inherited = INHERITED

    @property
    def bare(self) -> bool:
        """Whether the path names nothing but the path of the upstream."""
        return self == Destination(self.rest)


def destination_of(raw: bytes) -> Destination:
    """Return the destination of a path.

    Args:
        raw: the raw path, without the query.

    Raises:
        BadPath: when it must not be forwarded; the message says why.
    """
    _check(raw)
    found = Destination(collapsed(raw.decode("ascii")))
    parts: set[str] = set()
    while (match := _OURS.fullmatch(found.rest)) and match[1] not in parts:
        part, name, rest = match.groups("")
        if name in ("", "@") or not rest:
            raise BadPath(_NAMED[part])
        parts.add(part)
        found = found._replace(rest=collapsed(rest), **_names(part, name))
    return found


def _names(part: str, name: str) -> dict[str, Any]:
    """Return the names in one of the proxy's own parts of a path."""
    if part == "ns":
        namespace, run = (*name.rsplit("@", 1), "")[:2]
        return {"namespace": _decoded(namespace), "run": _decoded(run)}
    return {"replicate" if part == "rep" else "upstream": _decoded(name)}


def _check(raw: bytes) -> None:
    """Raise an error for a path that servers may read differently."""
    if not raw.startswith(b"/"):
        raise BadPath("the target of a request is a path that begins with a slash, without a server's name")
    if len(raw) > _MOST:
        raise BadPath(f"a path has at most {_MOST} bytes")
    if not _PLAIN.fullmatch(raw) or _BROKEN.search(raw):
        raise BadPath("the path contains characters that must be percent-encoded, or an invalid encoding")
    text = raw
    for _ in range(_DEPTH):
        if _UNSAFE.search(text):
            raise BadPath("a path must not contain '.' or '..' segments, backslashes or control characters")
        decoded = unquote_to_bytes(text)
        if decoded == text:
            return
        text = decoded
    raise BadPath("the path is percent-encoded too many times")


def collapsed(path: str) -> str:
    """Return a path with its leading slashes collapsed into one."""
    return "/" + path.lstrip("/") if path.startswith("//") else path


def _decoded(name: str) -> str | None:
    """Return a name without percent-encoding; None if it is empty."""
    try:
        return unquote_to_bytes(name).decode() or None
    except UnicodeDecodeError as error:
        raise BadPath("the names in the proxy's parts of a path must be valid UTF-8") from error
