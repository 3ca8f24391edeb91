"""Which upstream a request goes to, and under which URL."""

from __future__ import annotations

import functools
import re
from typing import Final, NamedTuple

from cachepipe import wire
from cachepipe.proxy import paths
from cachepipe.proxy.paths import Destination, UnknownPath
from cachepipe.proxy.settings import ProxySettings, Upstream

_ROUTES: Final = 4096  # paths whose routes are kept
_MESSAGES: Final = re.compile(r"/v1/messages(/|$)")
_GEMINI: Final = re.compile(r"/v[0-9][a-z0-9]*/(.*/)?(models|tunedModels)/[^/:]+:[A-Za-z]+")
_OWN: Final = re.compile(r"/|/healthz|/readyz|/metrics|/cachepipe(/.*)?")


class Route(NamedTuple):
    """The destination of requests with one path.

    Attributes:
        destination: the parts of the path.
        upstream: the upstream; None for the proxy's own paths.
        url: the URL at the upstream, without a query.
        api: the API, if the cache may answer requests with this path.
    """

    destination: Destination
    upstream: Upstream | None = None
    url: str = ""
    api: wire.Api | None = None


class Router:
    """Finds the upstream of each path.

    Args:
        settings: the upstreams; the first one is the default.
    """

    def __init__(self, settings: ProxySettings) -> None:
        self.upstreams = {upstream.name: upstream for upstream in settings.upstreams}
        self._default = settings.upstreams[0]
        self._anthropic = next(
            (each for each in settings.upstreams if each.kind == "anthropic"), self._default
        )
        self._gemini = next((each for each in settings.upstreams if each.kind == "gemini"), self._default)
        self.route = functools.lru_cache(_ROUTES)(self._route)
        """Return the route of a raw path; raise `paths.BadPath` if there is none."""

    def _route(self, raw: bytes) -> Route:
        destination = paths.destination_of(raw)
        rest = destination.rest
        if destination.bare and _OWN.fullmatch(rest):
            return Route(destination)
        upstream = self._upstream(destination)
        mount = upstream.mount
        if rest != mount and not rest.startswith(f"{mount}/"):
            raise UnknownPath(
                f"paths of the upstream {upstream.name!r} begin with {mount}; the base URL ends with it"
            )
        url = upstream.url + paths.collapsed(rest[len(mount) :])
        return Route(destination, upstream, url, wire.api_for("POST", rest))

    def _upstream(self, destination: Destination) -> Upstream:
        name = destination.upstream
        if name is None:
            if _GEMINI.fullmatch(destination.rest):
                return self._gemini
            return self._anthropic if _MESSAGES.match(destination.rest) else self._default
        if name not in self.upstreams:
            raise UnknownPath(f"there is no upstream {name!r}; there are {', '.join(self.upstreams)}")
        return self.upstreams[name]
