"""Which failed calls are made again, when, and how often.

The decision reads a clock and sleeps nowhere; the first failure of an outage is told (see `outages`).

The waiting times grow exponentially with jitter, so that calls that failed together do not come back
together. What a provider asks for (Retry-After) is kept. Both the number of attempts and the time that they
may take are bounded. Existing libraries decide about one function call; here the same decision serves
coroutines, threads and the items of a batch, and reads the provider's headers.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from cachepipe import context, outages
from cachepipe.flow.clock import CLOCK, Clock
from cachepipe.flow.headers import headers_of, retry_after
from cachepipe.flow.limits import status_of

_NEVER = frozenset({400, 401, 402, 403, 404, 405, 410, 411, 413, 414, 415, 422, 501, 505})
_AGAIN = frozenset({408, 409, 425, 429})
_SPENT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})

T = TypeVar("T")


def may_be_repeated(error: BaseException) -> bool:
    """Tell whether a call that failed like this may succeed when it is made again.

    Never 400, 401, 403, 404 or 422, nor a 429 that says that the money is spent; 408, 409, 429, what
    is wrong on the server's side, and calls that were not answered are. ``x-should-retry`` decides the rest.
    """
    if not isinstance(error, Exception):
        return False
    status = status_of(error)
    if status is None:
        return outages.is_connection_error(error)
    if status in _NEVER or _code_of(error) in _SPENT:
        return False
    headers = headers_of(error)
    advice = headers.get("x-should-retry") if headers is not None else None
    if advice in ("true", "false"):
        return bool(advice == "true")
    return status in _AGAIN or status >= 500


def _code_of(error: BaseException) -> Any:
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else None


class Retries:
    """How failed calls are made again.

    Args:
        max_retries: how often a call is made again at most; 0 is never.
        max_time: seconds from a call's first failure after which it is not made again.
        first: seconds before the second attempt, without jitter; each further wait is twice as long.
        longest: seconds of the longest such wait. What a provider asks for may be longer.
        retry: tells of an error whether its call may be made again; default is `may_be_repeated`.
        clock: tells the time.
        chance: gives a number from 0 to 1 for the jitter.
    """

    def __init__(
        self,
        max_retries: int = 8,
        max_time: float = 600.0,
        *,
        first: float = 0.5,
        longest: float = 30.0,
        retry: Callable[[BaseException], bool] = may_be_repeated,
        clock: Clock = CLOCK,
        chance: Callable[[], float] = random.random,
    ) -> None:
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise ValueError(f"max_retries is a whole number, 0 or more; got {max_retries!r}")
        for name, value in (("max_time", max_time), ("first", first), ("longest", longest)):
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{name} is a number of seconds, 0 or more; got {value!r}")
        self.max_retries = max_retries
        self.max_time = max_time
        self.first = first
        self.longest = longest
        self.retry = retry
        self.clock = clock
        self.chance = chance

    def __repr__(self) -> str:
        return f"<Retries {self.max_retries} at most, within {self.max_time:g} s>"

    def begin(self, max_retries: int | None = None) -> Attempts:
        """Return what decides about one call.

        Args:
            max_retries: how often this call is made again at most, if it says so itself.
        """
        return Attempts(self, self.max_retries if max_retries is None else max_retries)

    async def run(self, make: Callable[[], Awaitable[T]], max_retries: int | None = None) -> T:
        """Return what the first attempt brings that does not fail, or raise the last one's error.

        Args:
            make: makes an attempt.
            max_retries: how often it is made again at most, if the call says so itself.
        """
        attempts = self.begin(max_retries)
        number = 0
        while True:
            try:
                with context.attempting(number):
                    made = await make()
            except Exception as error:
                wait = attempts.after(error)
                if wait is None:
                    raise
            else:
                attempts.succeeded()
                return made
            number += 1
            await self.clock.sleep(wait)


class Attempts:
    """The attempts of one call."""

    __slots__ = ("_failure", "_left", "_made", "_retries", "_until")

    def __init__(self, retries: Retries, most: int) -> None:
        self._retries = retries
        self._left = most
        self._made = 0
        self._until: float | None = None
        self._failure: str | None = None

    def succeeded(self) -> None:
        """Note that the last attempt did not fail, so that the next outage is told again."""
        if self._failure is not None:
            outages.reached(self._failure)

    def after(self, error: BaseException) -> float | None:
        """Return in how many seconds to make the call again, or None when its error stands."""
        retries = self._retries
        now = retries.clock.now()
        if self._until is None:
            self._until = now + retries.max_time
        if self._left <= 0 or not isinstance(error, Exception) or not retries.retry(error):
            return None
        backoff: float = min(retries.longest, retries.first * 2.0**self._made)
        wait = backoff * (0.5 + 0.5 * retries.chance())
        asked = retry_after(headers_of(error))
        if asked:  # 0, as a date gone by, says nothing of how long
            wait = asked * (1 + 0.1 * retries.chance())
        if now + wait > self._until:
            return None
        self._left -= 1
        self._made += 1
        self._failure = outages.url_of(error)
        outages.failed(error, wait=wait)
        return wait
