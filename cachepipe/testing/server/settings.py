"""The settings and faults of a mock server."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["FAULTS", "Fault", "Settings", "is_integer", "is_number"]

FAULTS: Final[Mapping[str, str]] = {
    "rate_limit": "429 with Retry-After",
    "error": "500",
    "unavailable": "503 with Retry-After",
    "status": "the status given as `status`",
    "drop": "the connection closes before any byte",
    "cut": "the connection closes in mid-answer",
    "truncate": "a stream ends in good order but without finish_reason or [DONE]; otherwise as cut",
    "short": "fewer choices than asked: `keep` of them, by default one too few",
    "error_200": "an error object under status 200, or an error event in mid-stream",
    "malformed": "status 200 and broken JSON",
}
"""The kinds of faults, and what a client observes."""

_SECONDS: Final = "a number of seconds, 0 or more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to fail a request to a model.

    Attributes:
        kind: One of `FAULTS`.
        probability: Its probability, unless it is scripted.
        status: The HTTP status of kind ``"status"``.
        retry_after: The seconds in Retry-After; by default 1 for kinds that have the header.
        keep: The number of choices that a short reply keeps.
        after: The number of events that a broken stream delivers; by default half of those with content.
        path: The fault applies only to requests with this text in their path, unless it is scripted.
        message: The message of the error.
    """

    kind: str
    probability: float = 1.0
    status: int | None = None
    retry_after: float | None = None
    keep: int | None = None
    after: int | None = None
    path: str = ""
    message: str = "This failure was asked for in the settings of the mock server."

    def __post_init__(self) -> None:
        _check("kind", self.kind, f"one of {', '.join(FAULTS)}", self.kind in FAULTS)
        share = self.probability
        _check("probability", share, "a number from 0 to 1", is_number(share) and 0 <= share <= 1)
        status = self.status
        good = status is None or (is_integer(status) and 400 <= status <= 599)
        _check("status", status, "a whole number from 400 to 599, or None", good)
        wait = self.retry_after
        _check("retry_after", wait, _SECONDS, wait is None or _is_seconds(wait))
        for name in ("keep", "after"):
            value = getattr(self, name)
            _check(name, value, "a whole number, 0 or more, or None", value is None or _is_count(value, 0))
        for name in ("path", "message"):
            _check(name, getattr(self, name), "a string", isinstance(getattr(self, name), str))

    @classmethod
    def parse(cls, value: object) -> Fault:
        """Return the fault in a short form.

        The form is a kind (``"drop"``), a status (``503``), either with a probability (``"drop:0.1"``), or
        the fields by name (``{"kind": "short", "keep": 1}``).
        """
        if isinstance(value, Fault):
            return value
        if isinstance(value, dict):
            _known_names("fault", value, cls)
            return cls(**value)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            kind, _, probability = str(value).partition(":")
            try:
                share = float(probability or 1.0)
            except ValueError:
                raise ValueError(f"A fault's probability is a number, not {probability!r}.") from None
            if kind.isdecimal():
                return cls(kind="status", status=int(kind), probability=share)
            return cls(kind=kind, probability=share)
        raise ValueError(f"A fault is a kind, a status or an object with a kind, not {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a mock server, which may be replaced while it runs.

    Attributes:
        latency: Seconds before an answer, or before the first event of a stream.
        latency_per_token: Additional seconds per token of the longest choice; in a stream, seconds
            between events.
        stream_delay: Seconds between the events of a stream.
        paused: While it is true, requests are read but not answered.
        faults: The faults that occur by chance: each is tried in turn, with its probability.
        script: The faults of the next requests to a model, one entry for each; None is no fault.
            While there is a script, `faults` do not occur.
        max_n: The largest `n` (and `best_of`) that is not refused with 400.
        max_tokens: The largest length of an answer, and the limit of requests without one.
        rate: The requests per second that are answered; further ones get 429.
        burst: The requests that may come at once after a rest; by default the rate, rounded up.
        api_key: The only accepted key; without it, a request needs no key.
        seed: Makes the samples of unseeded requests, and the faults, a repeatable sequence.
        uses_tools: Whether an offered tool is called; otherwise only a required one is. If there are several,
            the
            first that the conversation has not called yet.
        models: The listed models.
        any_model: Whether requests for other models are answered; otherwise they get 404.
        dimensions: The length of an embedding, if the request has none.
        max_body: The largest request body in bytes; larger ones get 413.
        log_size: The number of requests in the log.
    """

    latency: float = 0.0
    latency_per_token: float = 0.0
    stream_delay: float = 0.0
    paused: bool = False
    faults: tuple[Fault, ...] = ()
    script: tuple[Fault | None, ...] = ()
    max_n: int = 128
    max_tokens: int = 512
    rate: float | None = None
    burst: int | None = None
    api_key: str | None = field(default=None, repr=False)
    seed: int | None = None
    uses_tools: bool = False
    models: tuple[str, ...] = ("ngram-1", "ngram-1-embedding")
    any_model: bool = True
    dimensions: int = 256
    max_body: int = 16 * 2**20
    log_size: int = 10_000

    def __post_init__(self) -> None:
        for name in ("latency", "latency_per_token", "stream_delay"):
            _check(name, getattr(self, name), _SECONDS, _is_seconds(getattr(self, name)))
        for name in ("max_n", "max_tokens", "dimensions", "max_body"):
            _check(name, getattr(self, name), "a whole number, 1 or more", _is_count(getattr(self, name), 1))
        rate, burst, seed, key = self.rate, self.burst, self.seed, self.api_key
        good = rate is None or (is_number(rate) and 0 < rate < math.inf)
        _check("rate", rate, "a number of requests per second above 0, or None", good)
        _check("burst", burst, "a whole number, 1 or more, or None", burst is None or _is_count(burst, 1))
        _check("seed", seed, "a whole number or None", seed is None or is_integer(seed))
        _check("api_key", "something else", "a string or None", key is None or isinstance(key, str))
        for name in ("paused", "uses_tools", "any_model"):
            _check(name, getattr(self, name), "true or false", isinstance(getattr(self, name), bool))
        _check("log_size", self.log_size, "a whole number, 0 or more", _is_count(self.log_size, 0))
        for name in ("faults", "script", "models"):
            _check(name, getattr(self, name), "a list", isinstance(getattr(self, name), (list, tuple)))
        # Short forms are converted once. A tuple without them stays the same object, so that the server can
        # tell a script that it has begun from a new one.
        object.__setattr__(self, "faults", _complete(self.faults, Fault))
        object.__setattr__(self, "script", _complete(self.script, (Fault, type(None))))
        object.__setattr__(self, "models", tuple(map(str, self.models)))

    def updated(self, changes: Mapping[str, Any]) -> Settings:
        """Return the settings with the named fields changed, as ``POST /mock/settings`` does.

        Raises:
            ValueError: If a name is not a setting, or a value is not valid for it.
        """
        _known_names("setting", changes, type(self))
        return replace(self, **changes)

    def as_json(self) -> dict[str, Any]:
        """Return the settings by name; the key is replaced by whether there is one."""
        values = asdict(self)
        values["api_key"] = self.api_key is not None
        return values


def is_integer(value: object) -> bool:
    """Return True for an integer that is not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return True for a number that is not a boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < math.inf


def _check(name: str, value: object, expected: str, good: bool) -> None:
    if not good:
        raise ValueError(f"{name} is {expected}, not {value!r}.")


def _complete(values: Sequence[Any], kinds: Any) -> tuple[Any, ...]:
    """Return a tuple of faults (None stays None); a tuple of faults is returned unchanged."""
    if isinstance(values, tuple) and all(isinstance(value, kinds) for value in values):
        return values
    return tuple(value if isinstance(value, kinds) else Fault.parse(value) for value in values)


def _known_names(what: str, values: Iterable[str], kind: type[Any]) -> None:
    names = [item.name for item in fields(kind)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"There is no {what} {', '.join(unknown)}; there are {', '.join(names)}.")
