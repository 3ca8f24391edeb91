"""The settings of a proxy: its upstreams, its cache, its clients and its limits."""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

from cachepipe import bounds
from cachepipe.errors import CachepipeError
from cachepipe.flow import Budget, Limits, Quota, Retries
from cachepipe.flow.flow import Flow
from cachepipe.prices import Prices
from cachepipe.providers import presets
from cachepipe.proxy.headers import KEYS
from cachepipe.typedefs import REPEATS, Repeat, check_replicate

Kind = Literal["openai", "anthropic", "gemini"]
LogLevel = Literal["all", "calls", "errors", "off"]
_KEY_HEADERS: Final = {
    "openai": "authorization",
    "anthropic": "x-api-key",
    "gemini": "x-goog-api-key",
}
"""By kind, the header for the API key."""

_HOSTS: Final = {"anthropic.com": "anthropic", "generativelanguage.googleapis.com": "gemini"}
"""The kind of the upstreams at a host."""
KINDS: Final = tuple(_KEY_HEADERS)
LOGS: Final = ("all", "calls", "errors", "off")

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_MOUNT = re.compile(r"(/[A-Za-z0-9_.~-]+)*")
_QUOTA: Final = tuple(each.name for each in fields(Quota))
_RETRIES: Final = ("max_retries", "max_time")
_LIMITS: Final = frozenset({*_QUOTA, *_RETRIES, "per_model", "adaptive", "transit", "shared"})


class BadSettings(CachepipeError, ValueError):  # noqa: N818 - names the thing at fault
    """A proxy cannot be started with these settings."""


@dataclass(frozen=True)
class Upstream:
    """A provider.

    Attributes:
        name: its name in paths (``/up/NAME/v1``), listings and metrics.
        url: its base URL, such as ``https://api.openai.com/v1``.
        kind: its dialect, which decides how the API key is sent: ``"openai"``, ``"anthropic"`` or
            ``"gemini"``. By default, ``/v1/messages`` goes to the first upstream of the kind ``anthropic``,
            and ``/v1/models/MODEL:METHOD``, in any version, to the first one of the kind ``gemini``.
        mount: the local path prefix that maps to ``url``: ``/v1`` if the URL has a path, else none; for Groq
            ``/openai/v1``, as its SDK writes it.
        api_key: the API key to send; None if clients send their own.
        key_header: the header for the API key.
        flow: limits for calls that the cache cannot answer, or None; what passes through is not limited.
    """

    name: str
    url: str
    kind: Kind = "openai"
    mount: str = "/v1"
    api_key: str | None = field(default=None, repr=False)
    key_header: str = "authorization"
    flow: Flow | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        name: str,
        url: str,
        *,
        kind: str | None = None,
        mount: str | None = None,
        api_key: str | None = None,
        key_header: str | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return an upstream, with defaults from its URL.

        Args:
            name: its name.
            url: its base URL, or the name of a known provider, such as ``openrouter``.
            kind: its dialect.
            mount: the local path prefix.
            api_key: the API key to send.
            key_header: the header for the API key.
            limits: the parameters of `cachepipe.flow.Limits`, except its name and clock, and the parameters
                ``max_time`` and ``max_retries`` of `cachepipe.flow.Retries`. ``max_retries`` is 0 by default,
                because clients retry themselves.

        Raises:
            BadSettings: when a value is not valid.
        """
        what = f"the upstream {name!r}"
        _check_form(_NAME, name, "an upstream's name is made of letters, digits, '_', '.' and '-'")
        if isinstance(url, str):
            try:
                url = presets.located(url)
            except ValueError as error:
                raise BadSettings(f"{what}: {error}") from error
        parts = _url(what, url)
        if kind is None:
            kind = next((kind for host, kind in _HOSTS.items() if _is_at(parts.hostname, host)), "openai")
        if kind not in KINDS:
            raise BadSettings(f"{what}: kind is one of {', '.join(KINDS)}; got {kind!r}")
        if mount is None:
            known = presets.at(url.rstrip("/"))
            mount = (known and known.prefix) or ("/v1" if parts.path.strip("/") else "")
        mount = mount.rstrip("/")
        _check_form(_MOUNT, mount, f"{what}: mount is a path such as /v1")
        header = key_header or _KEY_HEADERS[kind]
        _check_form(_HEADER, header, f"{what}: key_header is the name of a header")
        flow = None if limits is None else _flow(what, url, limits)
        return cls(name, url.rstrip("/"), kind, mount, api_key, header.lower(), flow)  # type: ignore[arg-type]  # checked above

    @property
    def key_value(self) -> str | None:
        """The value of the header for the API key."""
        if self.api_key is None:
            return None
        return f"Bearer {self.api_key}" if self.key_header == "authorization" else self.api_key

    def credited(self, pairs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return headers with the upstream's own API key, if there is one, instead of the client's."""
        if self.key_value is None:
            return pairs
        header = self.key_header.encode()
        pairs = [pair for pair in pairs if pair[0] not in KEYS and pair[0] != header]
        return [*pairs, (header, self.key_value.encode())]


def _is_at(name: str | None, host: str) -> bool:
    """Return True if a host name is a host or below it."""
    return name is not None and (name == host or name.endswith(f".{host}"))


def _flow(what: str, url: str, limits: Mapping[str, Any]) -> Flow:
    options = dict(limits)
    _check_names(f"{what}: its limits hold", options, _LIMITS)
    retries = {name: options.pop(name) for name in _RETRIES if name in options}
    try:
        return Flow(Limits(**options, name=url), Retries(**{"max_retries": 0, **retries}))
    except (TypeError, ValueError, OSError) as error:
        raise BadSettings(f"{what}: its limits are not valid: {error}") from error


def _check_form(form: re.Pattern[str], text: str, rule: str) -> None:
    if not form.fullmatch(text):
        raise BadSettings(f"{rule}; got {text!r}")


def _check_names(what: str, table: Mapping[str, Any], known: Collection[str]) -> None:
    if unknown := sorted({*table} - {*known}):
        raise BadSettings(f"{what} {', '.join(map(repr, unknown))}; known are {', '.join(sorted(known))}")


def _url(what: str, url: Any) -> Any:
    if not isinstance(url, str):
        raise BadSettings(f"{what}: url is a text such as https://api.openai.com/v1; got {url!r}")
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises an error if it is not a number
    except ValueError as error:
        raise BadSettings(f"{what}: its URL {url!r} cannot be read: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadSettings(f"{what}: its URL begins with http:// or https:// and a host; got {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise BadSettings(
            f"{what}: its URL holds no user, query or fragment; a key comes from the environment, "
            "by --api-key-env NAME or api_key_env"
        )
    return parts


@dataclass(frozen=True)
class ProxySettings:
    """The settings of a proxy; every proxy calls `checked`.

    Attributes:
        upstreams: the providers; the first one is used for paths that name none.
        cache: a folder, a URL, a bundle, a store, a list of these, or None for the default folder. Of a list,
            the first one is written, and the others are read below it.
        host: the address to listen on.
        port: the port, 0 for any free one.
        workers: the number of processes that answer requests.
        replay: answer from the cache only; write nothing and call no upstream.
        token: the token that clients must send; required on every address except loopback.
        namespace: the namespace of requests that name none.
        replicate: the replicate of requests that name none.
        repeat: ``"fresh"``, or ``"same"`` for one draw per question.
        durability: ``"process"``, or ``"full"`` to survive a crash of the machine.
        hosts: further host names for this server; names are checked on loopback only.
        max_cost: the US dollars that each namespace may spend in this cache; None for no limit. Calls that
            may exceed it are refused with 402.
        budgets: the same for some namespaces, by name.
        prices: a JSON file with prices of tokens; see `cachepipe.Prices`.
        max_n: the largest number of samples of one request; requests for more are refused.
        max_answer: the largest decoded answer in bytes that is stored; larger ones pass through.
        max_body: the largest request in bytes that the cache may answer; other requests have no limit.
        max_connections: the largest number of connections; further ones are refused with 503.
        max_calls: the largest number of calls in flight to each upstream; further ones wait.
        connect_timeout: seconds until a connection to an upstream is made.
        timeout: seconds without a byte from an upstream.
        client_timeout: seconds without a byte from or to a client.
        shutdown_timeout: seconds for calls in flight to end when the server stops.
        why: whether the log says beside a miss why it is one; the reasons quote parts of requests.
        log: which requests are logged: ``"all"``, ``"calls"`` upstream and errors, ``"errors"`` or ``"off"``.
    """

    upstreams: tuple[Upstream, ...] = ()
    cache: Any = field(default=None, repr=False)  # a URL may have credentials
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    replay: bool = False
    token: str | None = field(default=None, repr=False)
    namespace: str | None = None
    replicate: str | int | None = None
    repeat: Repeat = "fresh"
    durability: Literal["process", "full"] = "process"
    hosts: tuple[str, ...] = ()
    max_cost: float | None = None
    budgets: Mapping[str, float] = field(default_factory=dict)
    prices: str | None = None
    max_n: int = field(default_factory=bounds.max_n)
    max_answer: int = field(default_factory=bounds.max_answer)
    max_body: int = 128 << 20
    max_connections: int = 2000
    max_calls: int = 1000
    connect_timeout: float = 15.0
    timeout: float = 600.0
    client_timeout: float = 120.0
    shutdown_timeout: float = 60.0
    why: bool = False
    log: LogLevel = "calls"

    def checked(self) -> Self:
        """Return these settings.

        Raises:
            BadSettings: when a proxy with them would not work, or would not be safe.
        """
        if not self.upstreams:
            raise BadSettings("a proxy needs an upstream: --upstream https://api.openai.com/v1")
        names = [upstream.name for upstream in self.upstreams]
        if len({*names}) < len(names):
            raise BadSettings(f"upstreams must have different names; got {', '.join(names)}")
        if self.token is not None and not self.token.strip():
            raise BadSettings("the token that clients must show is empty; set it to a long random text")
        if self.token is None and not is_loopback(self.host):
            raise BadSettings(
                f"a proxy on {self.host} can be reached by others, so clients must send a token: name the "
                "environment variable that holds it with --token-env, or listen on 127.0.0.1"
            )
        if not 0 <= self.port <= 65535:
            raise BadSettings(f"a port is a number from 0 to 65535; got {self.port}")
        self._check_values()
        if self.workers > 1 and not hasattr(os, "fork"):
            raise BadSettings("several workers need a system that can fork, such as Linux; use workers=1")
        _ = self.budget, self.given_prices
        return self

    @functools.cached_property
    def given_prices(self) -> Prices | None:
        """The prices in the file `prices`; None if it is not set.

        Raises:
            BadPrices: when they are not valid.
        """
        return None if self.prices is None else Prices.load(self.prices)

    @functools.cached_property
    def budget(self) -> Budget | None:
        """The budget of each namespace; None if none has one.

        Raises:
            BadSettings: when an amount is not valid.
            BadPrices: when the prices are not.
        """
        if self.max_cost is None and not self.budgets:
            return None
        try:
            return Budget(self.max_cost, namespaces=self.budgets, prices=self.given_prices)
        except ValueError as error:
            raise BadSettings(str(error)) from error

    def _check_values(self) -> None:
        try:
            check_replicate(self.replicate)
        except TypeError as error:
            raise BadSettings(str(error)) from error
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = " or ".join(map(repr, choices))
                raise BadSettings(f"{name} is {wanted}; got {getattr(self, name)!r}")
        for name in ("max_n", "max_answer", "max_body", "max_connections", "max_calls", "workers"):
            if getattr(self, name) < 1:
                raise BadSettings(f"{name} is at least 1; got {getattr(self, name)}")
        for name in ("connect_timeout", "timeout", "client_timeout", "shutdown_timeout"):
            if not getattr(self, name) > 0:
                raise BadSettings(f"{name} is a number of seconds above 0; got {getattr(self, name)}")


_CHOICES: Final = {"repeat": REPEATS, "durability": ("process", "full"), "log": LOGS}
_KINDS: Final[Mapping[Any, tuple[type, ...]]] = {
    "Any": (str, list),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str | int | None": (str, int),
    "tuple[str, ...]": (list,),
    "float | None": (int, float),
    "Mapping[str, float]": (dict,),
}
_TYPES: Final = {
    each.name: _KINDS.get(each.type, (str,))
    for each in fields(ProxySettings)
    if each.name not in ("upstreams", "token")
}
"""The types of the settings in a file."""

_OF_UPSTREAM: Final = {"url", "kind", "mount", "api_key_env", "key_header", "limits"}


def from_file(path: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> ProxySettings:
    """Return the settings in a TOML file, not yet checked as a whole.

    In addition to the names of `ProxySettings` it may have ``token_env``, ``default`` (the upstream for paths
    that name none), the tables ``[upstreams.NAME]`` with ``url``, ``kind``, ``mount``, ``api_key_env`` and
    ``key_header``, and ``[upstreams.NAME.limits]`` with the limits of `Upstream.of`. API keys are never in
    the file.

    Raises:
        BadSettings: when it cannot be read, or has unknown names.
    """
    file = Path(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSettings(f"the configuration {file} cannot be read: {error}") from error
    _check_names(f"{file} has the unknown names", table, {*_TYPES, "token_env", "default", "upstreams"})
    values = _typed(file, table)
    tables = table.get("upstreams", {})
    if not isinstance(tables, dict) or not all(isinstance(each, dict) for each in tables.values()):
        raise BadSettings(f"{file}: upstreams are tables, each [upstreams.NAME] with a url")
    upstreams = [_upstream(file, name, each, environment) for name, each in tables.items()]
    if "default" in table:
        if table["default"] not in tables:
            raise BadSettings(f"{file}: default is the name of an upstream; got {table['default']!r}")
        upstreams.sort(key=lambda upstream: upstream.name != table["default"])
    if "token_env" in table:
        values["token"] = secret(table["token_env"], environment)
    return ProxySettings(upstreams=tuple(upstreams), **values)


def _typed(file: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ProxySettings` in a file, checked for their types."""
    values = {name: table[name] for name in _TYPES if name in table}
    for name, value in values.items():
        kinds = _TYPES[name]
        if type(value) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise BadSettings(f"{file}: {name} is of type {wanted}; got {value!r}")
    if "hosts" in values:
        values["hosts"] = tuple(map(str, values["hosts"]))
    return values


def _upstream(
    file: Path, name: str, table: Mapping[str, Any], environment: Mapping[str, str] | None
) -> Upstream:
    _check_names(f"{file}: the upstream {name!r} holds", table, _OF_UPSTREAM)
    limits = table.get("limits")
    if limits is not None and not isinstance(limits, dict):
        raise BadSettings(f"{file}: limits are a table, [upstreams.{name}.limits]; got {limits!r}")
    for option, value in table.items():
        if option != "limits" and not isinstance(value, str):
            raise BadSettings(f"{file}: {option} of the upstream {name!r} is a text; got {value!r}")
    options = {option: table.get(option) for option in ("kind", "mount", "key_header")}
    key = secret(table["api_key_env"], environment) if "api_key_env" in table else None
    return Upstream.of(name, table.get("url", ""), api_key=key, limits=limits, **options)


def secret(variable: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the value of an environment variable with an API key or a token.

    Raises:
        BadSettings: when it is not set, or a header cannot contain it.
    """
    value = (os.environ if environment is None else environment).get(variable, "").strip()
    if not value:
        raise BadSettings(f"the environment variable {variable} is not set, or empty; set it to the secret")
    if not (value.isascii() and value.isprintable()):
        raise BadSettings(f"the environment variable {variable} has characters that a header cannot contain")
    return value


def name_and_url(text: str) -> tuple[str | None, str]:
    """Return the name and the URL in ``NAME=URL``; the name is None if there is only a URL."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "/" not in name else (None, text)


def is_loopback(host: str) -> bool:
    """Return True if an address is a loopback address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def with_upstreams(settings: ProxySettings, upstreams: list[Upstream]) -> ProxySettings:
    """Return settings with these upstreams, followed by the upstreams that they had."""
    own = {upstream.name for upstream in upstreams}
    kept = [upstream for upstream in settings.upstreams if upstream.name not in own]
    return replace(settings, upstreams=(*upstreams, *kept))
