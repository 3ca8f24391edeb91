"""Access control: clients must use the proxy's own name, be no pages of other sites, and send the token."""

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
from cachepipe.proxy.http_exchange import HttpExchange, Refusal
from cachepipe.proxy.settings import ProxySettings, is_loopback

_FREE: Final = frozenset({"/healthz", "/readyz", *page.FILES})  # the page asks for the token itself
_TOKEN_HEADER: Final = b"x-cachepipe-token"
_CHALLENGE: Final = [(b"www-authenticate", b'Basic realm="cachepipe"'), (b"www-authenticate", b"Bearer")]


class AccessControl:
    """Decides which requests are allowed.

    Args:
        settings: the token, and the names of the server.
    """

    def __init__(self, settings: ProxySettings) -> None:
        self._names = {_name(host) for host in settings.hosts} - {""}
        self._is_ours = functools.lru_cache(256)(self._is_own_name)
        self._token = None if settings.token is None else settings.token.encode()
        self._any_name = settings.token is not None or not is_loopback(settings.host)

    def check(self, http: HttpExchange, path: str | None) -> None:
        """Allow a request; remove a token that it sends as its API key from the headers for upstream.

        Args:
            http: the request.
            path: the proxy's own path that it is for; None if it is for an upstream.

        Raises:
            Refusal: when it is not for this server, or does not send the token.
        """
        if http.method in ("CONNECT", "TRACE"):
            raise Refusal(405, "bad_method", f"{http.method} is not served here")
        offered = http.named.get(b"upgrade", b"").lower().split(b",")
        if http.method == "GET" and b"websocket" in map(bytes.strip, offered):
            close = [(b"connection", b"close")]
            raise Refusal(
                501, "no_websockets", "WebSockets are not supported; connect to the provider directly", close
            )
        if not self._any_name:
            self._check_names(http)
            self._check_site(http, path)
        if self._token is not None and path not in _FREE and self._check_token(http, self._token):
            self._check_site(http, path)

    def _check_names(self, http: HttpExchange) -> None:
        """Refuse unknown host names: another site may have pointed its name to this address."""
        host = http.header(b"host")
        if host is not None and not self._is_ours(f"//{host}"):
            raise Refusal(
                403,
                "bad_host",
                f"this server does not answer to the name {host[:200]!r}; allow it with --allow-host",
            )

    def _check_site(self, http: HttpExchange, path: str | None) -> None:
        """Refuse pages of other sites. Browsers name the site for forms and scripts, not for images."""
        origin = http.header(b"origin")
        if origin is None:
            if http.named.get(b"sec-fetch-site") == b"cross-site" and path not in _FREE:
                raise Refusal(403, "bad_origin", "pages of other sites may not use this server")
        elif not self._is_ours(origin) and origin.partition("://")[2] != http.header(b"host"):
            raise Refusal(403, "bad_origin", f"pages of {origin[:200]!r} may not use this server")

    def _is_own_name(self, url: str) -> bool:
        name = _name(url)
        return is_loopback(name) or name in self._names

    @staticmethod
    def _check_token(http: HttpExchange, token: bytes) -> bool:
        """Check the token; return True if it was sent as a password, which browsers do unasked."""
        shown = [
            pair
            for pair in http.headers
            if (pair[0] in KEYS or pair[0] == _TOKEN_HEADER)
            and hmac.compare_digest(_secret_in(pair[1]), token)
        ]
        if not shown:
            raise Refusal(
                401,
                "bad_token",
                "send the proxy's token as the API key, or in the header x-cachepipe-token",
                _CHALLENGE,
            )
        http.headers = [pair for pair in http.headers if pair not in shown]
        return all(value.lstrip()[:6].lower() == b"basic " for _, value in shown)


def _name(url: str) -> str:
    """Return the name of a server from a URL, or from a host with or without a port."""
    if "//" not in url:
        url = f"//[{url}]" if url.count(":") > 1 and "[" not in url else f"//{url}"
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _secret_in(shown: bytes) -> bytes:
    """Return the secret in a header: the whole value, a bearer token or a password."""
    scheme, blank, value = shown.strip().partition(b" ")
    if blank and scheme.lower() == b"bearer":
        return value.strip()
    if blank and scheme.lower() == b"basic":
        with suppress(binascii.Error):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return shown.strip()
