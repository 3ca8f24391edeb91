"""The command `replay`: it runs a program, and answers its requests from bundles and caches."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click

from cachepipe.cli import common
from cachepipe.cli.group import Failure

if TYPE_CHECKING:
    from cachepipe.proxy.settings import Upstream

_KEYS: Final = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "TOGETHER_API_KEY", "GEMINI_API_KEY", "GROQ_API_KEY")
_OPENAI: Final = ("OPENAI_BASE_URL", "OPENAI_API_BASE")  # the second one is that of some frameworks
_TOGETHER: Final = ("together.xyz", "together.ai")
_GROQ: Final = "/openai/v1"
"""What Groq's SDK writes into its paths."""
_NOT_FOUND: Final = 127  # the exit code of a shell
_SHOWN: Final = 20  # misses that are listed
_WIDTH: Final = 60  # columns of a prompt
_SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")

_EPILOG: Final = """\b
With --report, the file gets an object:
  exit_code   that of the program
  misses      a list of key, namespace, model, prompt, why (what is stored instead) and times
  refused     a list of method, path and times, for requests that no cache can answer
"""


class _Replay(click.Command):
    """A command that takes its own arguments before ``--``, and the program to run after it."""

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return the parts of the usage line."""
        return [*super().collect_usage_pieces(ctx), "--", "COMMAND..."]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the program from the arguments.

        Raises:
            UsageError: when there is none.
        """
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = args[end + 1 :]
        rest = super().parse_args(ctx, args[:end])
        if not ctx.obj and not ctx.resilient_parsing:
            raise click.UsageError("Put -- and the program to run after the files.", ctx)
        return rest


@click.command(cls=_Replay, epilog=_EPILOG)
@click.argument("sources", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--namespace",
    help="The namespace of requests that name none. Default: that of the files, if they have only one.",
)
@click.option(
    "--report",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Write what was asked and is not stored to this file, as JSON.",
)
@click.pass_obj
def replay(
    command: list[str], *, sources: tuple[str, ...], namespace: str | None, report: str | None
) -> None:
    """Run a program that gets its answers from bundles or caches: no key, no network, no costs.

    FILE is a bundle, a cache folder or a URL. Several of them answer together; where they contradict each
    other, the first one counts.

    Programs with the SDKs of OpenAI, Anthropic, Google, Together and Groq ask a proxy on this machine, by
    OPENAI_BASE_URL and so on. In programs with cachepipe, every cache is FILE and every mode is replay.
    The exit code is that of the program. At the end, the command lists what was asked and is not
    stored.
    """
    from cachepipe.stores.scratch import scratch_folder  # noqa: PLC0415 - help needs no store

    found = [*map(_located, sources)]
    with scratch_folder() as folder:
        notes = folder / "misses.jsonl"
        refused: Counter[tuple[str, str]] = Counter()
        with _environment(found, namespace, notes, refused) as environment:
            code = _run(command, environment)
        misses = _misses(notes)
    _tell([*map(common.name_of, sources)], misses, refused)
    if report is not None:
        told = [{"method": method, "path": path, "times": times} for (method, path), times in refused.items()]
        text = common.json_text({"exit_code": code, "misses": misses, "refused": told})
        try:
            Path(report).write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise Failure(f"the report cannot be written to {report}: {error.strerror}") from error
    sys.exit(code)


def _located(bundle: str) -> str:
    """Return the absolute path of a bundle or a folder, or a URL.

    Raises:
        StoreError: when there is none.
    """
    if Path(bundle).is_file() and not common.is_bundle_file(Path(bundle)):
        raise Failure(
            f"{bundle} is not a bundle; name a file that `cachepipe export` has written, or a cache"
        )
    return str(common.existing_cache(bundle, bundles=True))


@contextlib.contextmanager
def _environment(
    caches: Sequence[str], namespace: str | None, notes: Path, refused: Counter[tuple[str, str]]
) -> Iterator[dict[str, str]]:
    """Serve caches, and yield the environment of a program that gets its answers from them."""
    from cachepipe import replaying  # noqa: PLC0415 - help needs none of it
    from cachepipe.cli.serve import remembered  # noqa: PLC0415 - likewise

    try:
        from cachepipe.proxy import server  # noqa: PLC0415 - an extra
        from cachepipe.proxy.settings import ProxySettings, Upstream  # noqa: PLC0415 - likewise
    except ImportError as error:
        raise Failure(str(error)) from error

    unknown = Upstream.of("unknown", "http://provider.invalid/v1")  # for caches without a provider's answers
    upstreams = tuple(remembered([*caches])) or (unknown,)
    settings = ProxySettings(
        upstreams,
        caches[0] if len(caches) == 1 else [*caches],
        port=0,
        replay=True,
        namespace=_only_namespace(caches) if namespace is None else namespace,
        log="errors",
        shutdown_timeout=5.0,
    )

    def log(event: Mapping[str, Any]) -> None:
        if event.get("error") in ("not_cached", "bad_path"):
            refused[str(event.get("method")), str(event.get("path"))] += 1

    with replaying.noting(str(notes)), server.running(settings, log) as running:
        urls = {each: f"{running.url}/up/{each.name}{each.mount}" for each in upstreams}
        variables = {**dict.fromkeys(_KEYS, replaying.NO_KEY), **_base_urls(upstreams, urls.__getitem__)}
        replayed = replaying.Replay(caches, str(notes), {url: each.url for each, url in urls.items()})
        direct = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
        hidden = ("ANTHROPIC_AUTH_TOKEN", "GOOGLE_API_KEY", "CACHEPIPE_DISABLE")
        inherited = {name: value for name, value in os.environ.items() if name not in hidden}
        yield {**inherited, **variables, **replayed.variable(), "NO_PROXY": direct, "no_proxy": direct}


def _only_namespace(caches: Sequence[str]) -> str | None:
    """Return the namespace of caches and bundles that have only one together; else None."""
    names = {name for cache in caches for name in _namespaces(cache)}
    return names.pop() if len(names) == 1 else None


def _namespaces(cache: str) -> Sequence[str | None]:
    """Return the namespaces of a cache or a bundle."""
    from cachepipe.stores.bundles.reader import Bundle, is_bundle  # noqa: PLC0415 - help needs no store

    if is_bundle(cache):
        with contextlib.closing(Bundle(cache)) as bundle:
            return bundle.manifest.namespaces or []
    with common.opened(cache) as store:
        return [info.namespace for info in store.namespaces()]


def _base_urls(upstreams: Sequence[Upstream], url_of: Callable[[Upstream], str]) -> dict[str, str]:
    """Return the base URLs of the SDKs: of the provider that each variable names or usually stands for."""

    def is_at(upstream: Upstream, *hosts: str) -> bool:
        return (urlsplit(upstream.url).hostname or "").endswith(hosts)

    def chosen(fitting: Sequence[Upstream], variable: str) -> str:
        named = os.environ.get(variable, "").rstrip("/")
        return url_of(next((each for each in fitting if each.url == named), (*fitting, upstreams[0])[0]))

    openai = [each for each in upstreams if each.kind == "openai"]
    together = [each for each in openai if is_at(each, *_TOGETHER)]
    first = sorted(openai, key=lambda each: (not is_at(each, "api.openai.com"), each in together))
    groq = [each for each in openai if each.mount == _GROQ]
    anthropic = [each for each in upstreams if each.kind == "anthropic"]
    fitting = {
        **dict.fromkeys(_OPENAI, first),
        "TOGETHER_BASE_URL": together or first,
        "ANTHROPIC_BASE_URL": anthropic,
        "GROQ_BASE_URL": groq or first,
        "GOOGLE_GEMINI_BASE_URL": [each for each in upstreams if each.kind == "gemini"],
    }
    urls = {name: chosen(each, name) for name, each in fitting.items()}
    return {**urls, "GROQ_BASE_URL": urls["GROQ_BASE_URL"].removesuffix(_GROQ)}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program, pass signals on to it, and return its exit code."""
    try:
        program = subprocess.Popen(command, env=environment)  # noqa: S603 - the user's own
    except OSError as error:
        click.echo(f"Error: {command[0]} cannot be run: {error.strerror}", err=True)
        return _NOT_FOUND

    def forward(number: int, _: Any) -> None:
        if number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty():
            return  # the terminal sends Ctrl-C to the program too
        program.send_signal(number)

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        code = program.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _misses(notes: Path) -> list[dict[str, Any]]:
    """Return the misses that were noted, each once, with the number of times."""
    from cachepipe.differences import loaded  # noqa: PLC0415 - help needs none of it
    from cachepipe.listings import model_in, prompt_in  # noqa: PLC0415 - likewise

    lines = notes.read_bytes().splitlines() if notes.exists() else []
    found: list[dict[str, Any]] = []
    for line, times in Counter(lines).items():
        miss = json.loads(line)
        document = loaded(miss.pop("document").encode())
        found.append({**miss, "model": model_in(document), "prompt": prompt_in(document), "times": times})
    return found


def _tell(
    sources: Sequence[str], misses: Sequence[Mapping[str, Any]], refused: Counter[tuple[str, str]]
) -> None:
    """Say on standard error what was asked and is not in the bundles."""
    name = ", ".join(sources)
    if len(name) > _WIDTH:  # the last parts of paths say most
        name = ", ".join(source.rstrip("/").rpartition("/")[2] for source in sources)
    name = common.beginning(name, 4 * _WIDTH)
    total = sum(miss["times"] for miss in misses)
    if not total and not refused:
        click.echo(f"Replayed from {name}: all that was asked is in it.", err=True)
        return
    if total:
        click.echo(f"{common.counted(total, 'request')} asked for what {name} does not hold:", err=True)
    for miss in misses[:_SHOWN]:
        often = f"{miss['times']} times " if miss["times"] > 1 else ""
        model = f"{common.beginning(miss['model'], _WIDTH)}: " if miss["model"] else ""
        click.echo(f"  {often}{model}{common.beginning(miss['prompt'], _WIDTH)}", err=True)
        if miss["why"]:
            click.echo(f"    {common.beginning(miss['why'], 4 * _WIDTH)}", err=True)
    if len(misses) > _SHOWN:
        click.echo(f"  and {common.counted(len(misses) - _SHOWN, 'more question')}", err=True)
    for (method, path), times in list(refused.items())[:_SHOWN]:
        shown = common.beginning(f"{method} {path}", _WIDTH)
        click.echo(f"No cache can answer {shown}, which was asked {common.counted(times, 'time')}.", err=True)
