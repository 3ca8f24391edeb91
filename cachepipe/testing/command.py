"""The command `mock-server`, which `cachepipe.cli` adds to its group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import orjson

from cachepipe.testing.server import FAULTS, Fault, Settings, run_server

if TYPE_CHECKING:
    from cachepipe.testing.server import MockServer

__all__ = ["mock_server"]


def _faults(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[Fault, ...]:
    try:
        return tuple(Fault.parse(value) for value in values)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command(
    "mock-server", epilog=f"Faults: {'; '.join(f'{kind}: {what}' for kind, what in FAULTS.items())}."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The interface to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 for any.")
@click.option("--latency", default=0.0, type=click.FloatRange(min=0), help="Seconds before each answer.")
@click.option(
    "--latency-per-token", default=0.0, type=click.FloatRange(min=0), help="Seconds more for each token."
)
@click.option(
    "--stream-delay", default=0.0, type=click.FloatRange(min=0), help="Seconds between a stream's events."
)
@click.option("--seed", type=int, help="Make the samples a repeatable sequence.")
@click.option("--max-n", default=128, show_default=True, type=click.IntRange(min=1), help="Largest n.")
@click.option(
    "--max-tokens", default=512, show_default=True, type=click.IntRange(min=1), help="Longest answer."
)
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), help="Requests per second to let through."
)
@click.option("--burst", type=click.IntRange(min=1), help="How many of them may come at once.")
@click.option(
    "--fault",
    "faults",
    multiple=True,
    callback=_faults,
    metavar="KIND[:SHARE]",
    help="Fail that share of requests, for example drop:0.1 or 503:0.05. May be repeated.",
)
@click.option(
    "--any-model", is_flag=True, help="Answer to any model's name, not only to ngram-1 and ngram-1-embedding."
)
@click.option("--api-key", envvar="MOCK_SERVER_API_KEY", show_envvar=True, help="The only key to accept.")
@click.option("--json", "as_json", is_flag=True, help="Say that the server is ready as a line of JSON.")
def mock_server(
    *,
    host: str,
    port: int,
    latency: float,
    latency_per_token: float,
    stream_delay: float,
    seed: int | None,
    max_n: int,
    max_tokens: int,
    rate: float | None,
    burst: int | None,
    faults: tuple[Fault, ...],
    any_model: bool,
    api_key: str | None,
    as_json: bool,
) -> None:
    """Serve a small random text model that speaks OpenAI's protocol, until interrupted.

    It answers from a model that is built in, so it costs nothing and needs no network. Change its
    settings while it runs with POST /mock/settings, and see what it served at GET /mock/stats.
    """
    if burst is not None and rate is None:
        raise click.UsageError("--burst is part of a limit on requests per second; give --rate as well.")
    try:
        settings = Settings(
            latency=latency,
            latency_per_token=latency_per_token,
            stream_delay=stream_delay,
            seed=seed,
            max_n=max_n,
            max_tokens=max_tokens,
            rate=rate,
            burst=burst,
            faults=faults,
            any_model=any_model,
            api_key=api_key or None,
        )
    except ValueError as error:  # NaN or an infinity
        raise click.UsageError(str(error)) from error

    def announce(server: MockServer) -> None:
        if as_json:
            click.echo(orjson.dumps({"base_url": server.base_url, "url": server.url, "port": server.port}))
        else:
            click.echo(f"mock model server on {server.base_url}")
            key = "" if api_key else " OPENAI_API_KEY=any"
            click.echo(f"Use it:  export OPENAI_BASE_URL={server.base_url}{key}")
            click.echo(f"Models:  {'any' if any_model else ', '.join(settings.models)}")

    try:
        run_server(host, port, settings, ready=announce)
    except OSError as error:
        raise click.ClickException(
            f"Cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port, or 0 for any."
        ) from error
