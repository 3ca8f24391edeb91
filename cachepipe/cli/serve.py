"""The commands `serve`, which runs the proxy, and `new-run`, which begins a new run of a proxy."""

from __future__ import annotations

import contextlib
import http.client
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click
import orjson

from cachepipe.cli.common import (
    existing_cache,
    exists,
    is_bundle_file,
    json_option,
    json_text,
    layers_in_use,
    layers_option,
    opened,
    token_option,
    url_file_option,
    write_url,
)
from cachepipe.cli.group import Failure
from cachepipe.providers import presets
from cachepipe.terminal import visible

if TYPE_CHECKING:
    from cachepipe.proxy.settings import ProxySettings, Upstream

_SECONDS: Final = 30.0

_EPILOG: Final = """\b
Clients take one of these as their base URL:
  http://127.0.0.1:8080/v1                in the namespace of --namespace
  http://127.0.0.1:8080/ns/NAME/v1        in the namespace NAME
  http://127.0.0.1:8080/ns/NAME@RUN/v1    the same, in a new run for each new label RUN
  http://127.0.0.1:8080/ns/NAME/rep/3/v1  the replicate 3 of the namespace NAME
  http://127.0.0.1:8080/up/OTHER/v1       to the upstream OTHER
Anthropic's clients take the same without /v1. Status pages: /cachepipe, /metrics.
"""


class _Mebibytes(click.IntRange):
    """A number of MiB; the parameter is in bytes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        size: int = super().convert(value, param, ctx)
        return size << 20


@click.command(epilog=_EPILOG)
@click.option(
    "--upstream",
    "upstreams",
    metavar="[NAME=]URL",
    multiple=True,
    help="The base URL of a provider, such as https://api.openai.com/v1, or the name of a known one, such as "
    "openrouter. Can be repeated, with names; the first is the default.",
)
@layers_option
@click.option("--config", type=click.Path(dir_okay=False), help="A TOML file; options override it.")
@click.option("--host", help="The address to listen on. Default: 127.0.0.1, this machine only.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port; 0 for any free port. Default: 8080.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="The number of processes that answer requests, about one per processor. Default: 1.",
)
@click.option("--replay", is_flag=True, help="Answer from the cache only; needs no key and no network.")
@click.option(
    "--api-key-env",
    metavar="NAME",
    help="The environment variable with the first upstream's key; clients then need none.",
)
@token_option
@click.option("--namespace", help="The namespace of requests that name none.")
@click.option("--replicate", help="The replicate of requests that name none.")
@click.option(
    "--allow-host", "hosts", metavar="NAME", multiple=True, help="A further host name for this server."
)
@click.option(
    "--max-cost",
    type=click.FloatRange(min=0),
    metavar="USD",
    help="The US dollars that each namespace may spend in this cache; see [budgets] of --config for others.",
)
@click.option(
    "--prices", metavar="FILE", type=click.Path(dir_okay=False), help="A JSON file with prices by model."
)
@click.option(
    "--max-n",
    type=click.IntRange(min=1),
    help="The largest number of samples of a request. Default: CACHEPIPE_MAX_N or 10000.",
)
@click.option(
    "--max-answer",
    type=_Mebibytes(min=1),
    help="The largest decoded answer in MiB that is cached. Default: CACHEPIPE_MAX_ANSWER or 64.",
)
@click.option(
    "--max-body", type=_Mebibytes(min=1), help="The largest request in MiB that is cached. Default: 128."
)
@click.option(
    "--max-connections", type=click.IntRange(min=1), help="The largest number of connections. Default: 2000."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds to wait for upstream. Default: 600.",
)
@click.option(
    "--why",
    is_flag=True,
    default=None,
    help="Log beside a miss why it is one. The reasons quote parts of requests.",
)
@click.option(
    "--log",
    type=click.Choice(["all", "calls", "errors", "off"]),
    help="The requests to log, as JSON lines. Default: all except hits.",
)
@url_file_option
@json_option('once it listens, an object with "url" and "base_url"')
def serve(
    *,
    upstreams: tuple[str, ...],
    config: str | None,
    replay: bool,
    api_key_env: str | None,
    token_env: str | None,
    hosts: tuple[str, ...],
    url_file: str | None,
    as_json: bool,
    **others: Any,
) -> None:
    """Serve an OpenAI-compatible API that answers from the cache, and asks the provider for the rest.

    A tool in any language can use it as its base URL. The proxy forwards the tool's own key with requests
    that the cache cannot answer, and never stores it. Stop it with Ctrl-C: it finishes what is in flight.
    """
    try:
        from cachepipe.proxy import server, settings, supervisor  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise Failure(str(error)) from error

    def choose() -> ProxySettings:
        """Return the settings in the file and in the options."""
        chosen = settings.from_file(config) if config else settings.ProxySettings()
        chosen = _with_upstreams(chosen, upstreams, api_key_env)
        given = {name: value for name, value in others.items() if value is not None}
        if token_env:
            given["token"] = settings.secret(token_env)
        return replace(chosen, replay=replay or chosen.replay, hosts=(*chosen.hosts, *hosts), **given)

    chosen = choose()
    found: list[Upstream] = []
    if chosen.replay and not chosen.upstreams:
        found = remembered(chosen.cache)
        if not found:
            raise Failure("the cache has nothing to replay; see `cachepipe stats`")
        chosen = settings.with_upstreams(chosen, found)
    with contextlib.ExitStack() as stack:

        def listening(url: str) -> None:
            base = f"{url}{chosen.upstreams[0].mount}"
            _say(url, base, chosen, as_json=as_json)
            if url_file is not None:
                write_url(url_file, base)
                stack.callback(Path(url_file).unlink, missing_ok=True)

        if chosen.workers == 1:
            server.serve(chosen, listening)
        else:
            supervisor.serve(chosen, listening, lambda: settings.with_upstreams(choose(), found))


def _with_upstreams(chosen: ProxySettings, texts: tuple[str, ...], key_env: str | None) -> ProxySettings:
    """Return settings with the upstreams of --upstream first; the key belongs to the first upstream."""
    from cachepipe.proxy import settings  # noqa: PLC0415 - an extra

    key = settings.secret(key_env) if key_env else None
    made = []
    for place, text in enumerate(texts):
        name, url = settings.name_and_url(text)
        preset = presets.named(url)
        name = name or (_name(place) if preset is None else preset.name.lower())
        made.append(settings.Upstream.of(name, url, api_key=None if place else key))
    chosen = settings.with_upstreams(chosen, made)
    if key is None or made:
        return chosen
    if not chosen.upstreams:
        raise Failure("--api-key-env is the key of an upstream; name one with --upstream or --config")
    first, *rest = chosen.upstreams
    return replace(chosen, upstreams=(replace(first, api_key=key), *rest))


def _name(place: int) -> str:
    return f"upstream-{place + 1}" if place else "upstream"


def remembered(caches: Any) -> list[Upstream]:
    """Return the upstreams of the answers in a cache or in layers, the one with the most questions first."""
    from cachepipe.proxy.settings import Upstream  # noqa: PLC0415 - an extra
    from cachepipe.wire import (  # noqa: PLC0415 - likewise
        CHAT,
        EMBED_CONTENT,
        GENERATE_CONTENT,
        MESSAGES,
        api_for,
    )

    scopes: Counter[str] = Counter()
    layers = caches if isinstance(caches, list) else [caches]
    for cache in layers:
        if cache is not layers[0] or len(layers) == 1 or exists(layers_in_use(cache)):
            scopes += _scopes(cache)
    bases: Counter[tuple[str, str]] = Counter()
    for scope, count in scopes.items():
        url = scope.partition("?")[0]
        api = api_for("POST", url)
        if api is None or not url.startswith(("http://", "https://")):
            continue
        if api in (GENERATE_CONTENT, EMBED_CONTENT):
            bases[url.rpartition("/v1")[0], "gemini"] += count
            continue
        theirs = api is MESSAGES
        ending = "/v1/messages" if theirs else "/chat/completions" if api is CHAT else url[url.rindex("/") :]
        bases[url.removesuffix(ending), "anthropic" if theirs else "openai"] += count
    places = enumerate(bases.most_common())
    return [Upstream.of(_name(number), base, kind=kind) for number, ((base, kind), _) in places]


def _scopes(cache: str | None) -> Counter[str]:
    """Return the number of questions of each scope of a cache or bundle."""
    place = existing_cache(cache, bundles=True)
    if is_bundle_file(place):
        from cachepipe.stores.bundles.reader import Bundle  # noqa: PLC0415 - only for bundles

        with contextlib.closing(Bundle(place)) as bundle:
            return Counter(bundle.manifest.scopes)
    with opened(cache) as store:
        return Counter(info.scope or "" for info in store.keys())  # noqa: SIM118 - a store is no mapping


def _say(url: str, base: str, chosen: ProxySettings, *, as_json: bool) -> None:
    first = chosen.upstreams[0]
    if as_json:
        click.echo(json_text({"url": url, "base_url": base}))
        return
    how = "replaying what came from" if chosen.replay else "in front of"
    click.echo(f"Serving {base} {how} {first.url}. Stop with Ctrl-C.")
    for other in chosen.upstreams[1:]:
        click.echo(f"  {url}/up/{other.name}{other.mount} {how} {other.url}")
    if first.kind == "openai":
        click.echo(f"Use it:  export OPENAI_BASE_URL={base}")


@click.command("new-run")
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="The URL of the proxy.")
@click.option("--namespace", help="Begin a run of this namespace only. Default: all namespaces.")
@token_option
@json_option("the proxy's answer")
def new_run(*, url: str, namespace: str | None, token_env: str | None, as_json: bool) -> None:
    """Begin a new run of a proxy: it counts equal requests from the start again, so a rerun replays.

    It does not affect requests with a label in their URL (/ns/NAME@LABEL/v1): change the label for those.
    """
    headers = {"content-type": "application/json"}
    if token_env:
        token = os.environ.get(token_env, "").strip()
        if not token:
            raise Failure(f"the environment variable {token_env} is not set; it holds the proxy's token")
        headers["x-cachepipe-token"] = token
    body = orjson.dumps({} if namespace is None else {"namespace": namespace})
    told = _begun(url, body, headers)
    if as_json:
        click.echo(json_text(told))
    else:
        whose = "all namespaces" if namespace is None else f"namespace {visible(namespace)}"
        click.echo(f"A new run of {whose} has begun.")
    if told.get("known") is False:
        click.echo(
            f"Neither this proxy nor its cache has seen the namespace {visible(str(namespace))}. "
            "Check the name; `cachepipe stats` lists namespaces.",
            err=True,
        )


def _begun(url: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    """Begin a run of the proxy at a URL, and return its answer."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Failure(f"--url is the URL of the proxy, such as http://127.0.0.1:8080; got {url!r}")
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # without a password
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(parts.hostname, parts.port, timeout=_SECONDS)
        connection.request("POST", "/cachepipe/runs", body, headers)
        answer = connection.getresponse()
        told = _object(answer.read(65_536))
        connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Failure(f"no proxy answers at {place}: {error}. Start one: cachepipe serve") from error
    if answer.status != 201 or "run" not in told:
        refusal = told.get("error")
        message = refusal.get("message") if isinstance(refusal, dict) else None
        raise Failure(
            f"{place} did not begin a run: status {answer.status}{f', {message}' if message else ''}"
        )
    return told


def _object(content: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one if the content is not one."""
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
