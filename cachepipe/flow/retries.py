"""Which failed calls are repeated, when, and how often.

The decision reads a clock and never sleeps. The first failure of an outage is reported (see `outages`).

The waiting times grow exponentially with jitter, so that calls that failed together are not repeated
together. A provider's Retry-After is obeyed. Both the number of attempts and their total time are limited.
Existing libraries decide about one function call. Here the same decision serves coroutines, threads and the
items of a batch, and reads the provider's headers.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from cachepipe import context, outages
from cachepipe.flow.clock import CLOCK, Clock
from cachepipe.flow.headers import headers_of, retry_after

_NEVER = frozenset({400, 401, 402, 403, 404, 405, 410, 411, 413, 414, 415, 422, 501, 505})
_AGAIN = frozenset({408, 409, 425, 429, 498})  # the last: Groq has no capacity left for its flex tier
_SPENT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})

T = TypeVar("T")


def may_be_repeated(error: BaseException) -> bool:
    """Return True if a call that failed with this error may succeed when it is repeated.

    Errors 400, 401, 403, 404 and 422 are never repeated, and neither is a 429 which says that the budget is
    used up. Errors 408, 409, 429, 498, server errors and calls without an answer are repeated, unless the
    answer's ``x-should-retry`` says otherwise.
    """
    if not isinstance(error, Exception):
        return False
    status = outages.status_of(error)
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
    code, body = getattr(error, "code", None), getattr(error, "body", None)
    if code is None and isinstance(body, Mapping):  # the errors of Groq and Together have no attribute for it
        told = body.get("error", body)
        code = told.get("code") if isinstance(told, Mapping) else None
    return code if isinstance(code, str) else None


class Retries:
    """How failed calls are repeated.

    Args:
        max_retries: the largest number of times that a call is repeated; 0 is never.
        max_time: seconds after a call's first failure from which on it is not repeated.
        first: seconds before the second attempt, without jitter; each further wait is twice as long.
        longest: seconds of the longest such wait. A provider may ask for a longer one.
        retry: returns True if a call with this error may be repeated; default is `may_be_repeated`.
        clock: the clock.
        chance: returns a number from 0 to 1 for the jitter.
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
        """Return the attempts of one call.

        Args:
            max_retries: the largest number of times that this call is repeated, if it differs.
        """
        return Attempts(self, self.max_retries if max_retries is None else max_retries)

    async def run(self, make: Callable[[], Awaitable[T]], max_retries: int | None = None) -> T:
        """Return the result of the first attempt that succeeds, or raise the error of the last one.

        Args:
            make: makes an attempt.
            max_retries: the largest number of times that it is repeated, if it differs.
        """
        attempts = self.begin(max_retries)
        while True:
            try:
                with context.attempting(attempts.repeated):
                    made = await make()
            except Exception as error:
                wait = attempts.after(error)
                if wait is None:
                    raise
            else:
                attempts.succeeded()
                return made
            await self.clock.sleep(wait)


class Attempts:
    """The attempts of one call.

    Attributes:
        repeated: the number of times that the call was repeated.
    """

    __slots__ = ("_failure", "_most", "_retries", "_until", "repeated")

    def __init__(self, retries: Retries, most: int) -> None:
        self._retries = retries
        self._most = most
        self.repeated = 0
        self._until: float | None = None
        self._failure: str | None = None

    def succeeded(self) -> None:
        """Note that the last attempt succeeded, so that the next outage is reported again."""
        if self._failure is not None:
            outages.reached(self._failure)

    def after(self, error: BaseException) -> float | None:
        """Return the seconds until the call is repeated, or None if its error is final."""
        retries = self._retries
        now = retries.clock.now()
        if self._until is None:
            self._until = now + retries.max_time
        if self.repeated >= self._most or not isinstance(error, Exception) or not retries.retry(error):
            return None
        backoff: float = min(retries.longest, retries.first * 2.0**self.repeated)
        wait = backoff * (0.5 + 0.5 * retries.chance())
        asked = retry_after(headers_of(error))
        if asked:  # 0, as of a past date, does not say how long
            wait = asked * (1 + 0.1 * retries.chance())
        if now + wait > self._until:
            return None
        self.repeated += 1
        self._failure = outages.url_of(error)
        outages.failed(error, wait=wait)
        return wait
