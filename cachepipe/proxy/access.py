"""Who may use a proxy: what calls it by its own name, is no page of another site, and shows the token."""

from __future__ import annotations

import base64
import binascii
import functools
import hmac
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from cachepipe.proxy import page
from cachepipe.proxy.headers import KEYS
from cachepipe.proxy.settings import Settings, is_loopback
from cachepipe.proxy.turn import Refused, Turn

_FREE: Final = frozenset({"/healthz", "/readyz", *page.FILES})  # the page asks for the token itself
_BESIDE: Final = b"x-cachepipe-token"
_CHALLENGE: Final = [(b"www-authenticate", b'Basic realm="cachepipe"'), (b"www-authenticate", b"Bearer")]


class Access:
    """Lets requests in.

    Args:
        settings: the token, and the names of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self._names = {_name(host) for host in settings.hosts} - {""}
        self._is_ours = functools.lru_cache(256)(self._named_ours)
        self._token = None if settings.token is None else settings.token.encode()
        self._any_name = settings.token is not None or not is_loopback(settings.host)

    def check(self, turn: Turn, path: str | None) -> None:
        """Let a request in; a token that it shows as a key is taken from what goes upstream.

        Args:
            turn: the request.
            path: which of the proxy's own paths it is for; None when it is for an upstream.

        Raises:
            Refused: when it is not for this server, or shows no token.
        """
        if turn.method in ("CONNECT", "TRACE"):
            raise Refused(405, "bad_method", f"{turn.method} is not served here")
        offered = turn.named.get(b"upgrade", b"").lower().split(b",")
        if turn.method == "GET" and b"websocket" in map(bytes.strip, offered):
            close = [(b"connection", b"close")]
            raise Refused(
                501, "no_websockets", "WebSockets are not passed on; connect to the provider itself", close
            )
        if not self._any_name:
            self._check_names(turn)
            self._check_site(turn, path)
        if self._token is not None and path not in _FREE and self._check_token(turn, self._token):
            self._check_site(turn, path)

    def _check_names(self, turn: Turn) -> None:
        """Refuse what calls this server by a name that somebody else made up for its address."""
        host = turn.says(b"host")
        if host is not None and not self._is_ours(f"//{host}"):
            raise Refused(
                403,
                "bad_host",
                f"this server is not called {host[:200]!r}; allow that name with --allow-host",
            )

    def _check_site(self, turn: Turn, path: str | None) -> None:
        """Refuse what a page of another site has a browser send: forms and scripts name it, images do not."""
        origin = turn.says(b"origin")
        if origin is None:
            if turn.named.get(b"sec-fetch-site") == b"cross-site" and path not in _FREE:
                raise Refused(403, "bad_origin", "pages of other sites may not use this server")
        elif not self._is_ours(origin) and origin.partition("://")[2] != turn.says(b"host"):
            raise Refused(403, "bad_origin", f"pages of {origin[:200]!r} may not use this server")

    def _named_ours(self, url: str) -> bool:
        name = _name(url)
        return is_loopback(name) or name in self._names

    @staticmethod
    def _check_token(turn: Turn, token: bytes) -> bool:
        """Take the token wherever it is shown; tell whether as a password, which browsers send unasked."""
        shown = [
            pair
            for pair in turn.headers
            if (pair[0] in KEYS or pair[0] == _BESIDE) and hmac.compare_digest(_bare(pair[1]), token)
        ]
        if not shown:
            raise Refused(
                401,
                "bad_token",
                "show the proxy's token: as the API key, or in the header x-cachepipe-token beside it",
                _CHALLENGE,
            )
        turn.headers = [pair for pair in turn.headers if pair not in shown]
        return all(value.lstrip()[:6].lower() == b"basic " for _, value in shown)


def _name(url: str) -> str:
    """Return the name of a server, told by a URL, or by a host with or without a port."""
    if "//" not in url:
        url = f"//[{url}]" if url.count(":") > 1 and "[" not in url else f"//{url}"
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _bare(shown: bytes) -> bytes:
    """Return the secret that a header shows: bare, as a bearer's token or as a password."""
    scheme, blank, value = shown.strip().partition(b" ")
    if blank and scheme.lower() == b"bearer":
        return value.strip()
    if blank and scheme.lower() == b"basic":
        with suppress(binascii.Error):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return shown.strip()
