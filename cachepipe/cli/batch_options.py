"""The options that `run` and `plan` share: what is asked, and how the cache is used."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from cachepipe.batch.settings import HELP, BatchSettings
from cachepipe.cli.common import Command, layers_option
from cachepipe.providers import presets
from cachepipe.typedefs import MODES, REPEATS

_NUMBER: Final = re.compile("0|[1-9][0-9]{0,17}")


def setting(name: str, option: str = "", **how: Any) -> Callable[[Any], Any]:
    """Return an option for one of the settings of a run; its name in the settings is the parameter."""
    return click.option(option or f"--{name.replace('_', '-')}", name, help=HELP[name], **how)


def count(name: str, option: str = "", *, least: int = 1, **how: Any) -> Callable[[Any], Any]:
    """Return an option for a setting that is a whole number."""
    return setting(name, option, type=click.IntRange(min=least), **how)


def _replicate(text: str) -> str | int:
    """Return the name of a replicate: a number if it is written as one, so that results show it as one."""
    return int(text) if _NUMBER.fullmatch(text) else text


def _check_provider(_context: click.Context, _option: click.Parameter, given: str | None) -> str | None:
    """Return a base URL or the name of a provider unchanged."""
    if given is not None:
        try:
            presets.located(given)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from error
    return given


_ASKING: Final = (
    setting("model"),
    setting("base_url", callback=_check_provider, metavar="URL|NAME"),
    count("n", default=BatchSettings.n, show_default=True),
    setting("namespace"),
    setting("replicate", type=_replicate, metavar="NAME"),
    count("replicates"),
    count("concurrency", default=BatchSettings.concurrency, show_default=True),
    layers_option,
    setting("mode", type=click.Choice(MODES)),
    click.option(
        "--replay", is_flag=True, help="Only replay; never call the model. The same as --mode replay."
    ),
    click.option("--refresh", is_flag=True, help="Generate all samples again. The same as --mode refresh."),
    click.option(
        "--no-cache", is_flag=True, help="Neither read nor write the cache. The same as --mode bypass."
    ),
    setting("scope"),
    setting("repeat", default=BatchSettings.repeat, show_default=True, type=click.Choice(REPEATS)),
    setting("ids", is_flag=True),
    setting("temperature", type=float),
    count("max_tokens"),
    count("max_completion_tokens"),
    setting("seed", type=int),
    count("max_n"),
    count("limit"),
)
_PLANNING: Final = (
    click.option(
        "--prices",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        help="A JSON file with prices by model: prompt, completion and cached, in US dollars per million "
        "tokens, and max_tokens, the largest answer. Default: the table of genai-prices.",
    ),
    click.option(
        "--requests-per-minute",
        type=click.FloatRange(min=0, min_open=True),
        help="Calls that the service allows per minute, for the duration of a plan.",
    ),
    click.option(
        "--tokens-per-minute",
        type=click.FloatRange(min=0, min_open=True),
        help="Tokens that the service allows per minute, for the duration of a plan.",
    ),
)


def asking(command: Command) -> Command:
    """Add the options that decide what is asked."""
    return _with(command, _ASKING)


def planning(command: Command) -> Command:
    """Add the options of a plan."""
    return _with(command, _PLANNING)


def _with(command: Command, options: tuple[Callable[[Any], Any], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def mode_of(options: dict[str, Any]) -> Any:
    """Return the mode that the options choose."""
    short = {"replay": "replay", "refresh": "refresh", "no_cache": "bypass"}
    asked = {f"--{name.replace('_', '-')}": mode for name, mode in short.items() if options[name]}
    if options["mode"] is not None:
        asked = {"--mode": options["mode"], **asked}
    if len(set(asked.values())) > 1:
        raise click.UsageError(f"{' and '.join(asked)} ask for different modes; use only one of them.")
    if asked:
        return next(iter(asked.values()))
    from cachepipe.stores import switched_off  # noqa: PLC0415 - help needs none of it

    return "bypass" if switched_off() else "read-write"


def settings_in(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run among a command's options."""
    from cachepipe.prices import Prices  # noqa: PLC0415 - so that --help is quick

    found = {name: value for name, value in options.items() if name in HELP and name != "why"}
    prices = options.get("prices")
    found["prices"] = None if prices is None else Prices.load(prices)
    return found
