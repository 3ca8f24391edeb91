"""Which failures are tried again, and within which bounds."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from cachepipe import Retries, context
from cachepipe.flow.retries import may_be_repeated
from cachepipe.testing import FakeClock

pytestmark = pytest.mark.anyio


class StatusError(Exception):
    def __init__(self, status_code, code=None, **headers):
        super().__init__(status_code)
        self.status_code, self.code = status_code, code
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = httpx.Response(status_code, headers=headers)


def groq_error(status_code, code):
    """An error of an SDK that keeps the code in the body only."""
    error = StatusError(status_code)
    error.code, error.body = None, {"error": {"message": "no", "type": "tokens", "code": code}}
    return error


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_must_not_be_repeated_is_not_whatever_the_server_advises(status):
    assert not may_be_repeated(StatusError(status))
    assert not may_be_repeated(StatusError(status, x_should_retry="true"))


@pytest.mark.parametrize("status", [408, 409, 429, 498, 500, 502, 503, 504, 529])
def test_what_may_pass_is_repeated_unless_the_server_advises_against(status):
    assert may_be_repeated(StatusError(status))
    assert not may_be_repeated(StatusError(status, x_should_retry="false"))


@pytest.mark.parametrize(
    ("error", "repeated"),
    [
        (openai.APIConnectionError(request=None), True),
        (openai.APITimeoutError(request=None), True),
        (httpx.ConnectError("refused"), True),
        (httpx.ReadTimeout("late"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ValueError("a bug"), False),
        (asyncio.CancelledError(), False),
        (KeyboardInterrupt(), False),
        (StatusError(429, "insufficient_quota"), False),
        (groq_error(429, "insufficient_quota"), False),
        (groq_error(429, "rate_limit_exceeded"), True),
        (StatusError(418), False),
        (StatusError(418, x_should_retry="true"), True),
    ],
    ids=repr,
)
def test_other_failures(error, repeated):
    assert may_be_repeated(error) is repeated


class Failing:
    """Fails with each of some errors, then returns; notes when, and as which attempt, it was called."""

    def __init__(self, clock, *errors):
        self.clock, self.errors, self.calls = clock, list(errors), []

    async def __call__(self):
        attempt = context.attempt.get()
        self.calls.append((self.clock.now(), attempt.number, attempt.sole))
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


async def ended(clock, work):
    task = asyncio.create_task(work)
    await clock.advance(10_000)
    return await task


async def test_waits_double_up_to_the_longest_with_jitter():
    clock = FakeClock()
    failing = Failing(clock, *[StatusError(500)] * 5)
    retries = Retries(first=1, longest=5, clock=clock, chance=lambda: 0.5)
    assert await ended(clock, retries.run(failing)) == "answer"
    assert [when for when, _, _ in failing.calls] == [0, 0.75, 2.25, 5.25, 9, 12.75]
    assert [number for _, number, _ in failing.calls] == [0, 1, 2, 3, 4, 5]
    assert all(sole for _, _, sole in failing.calls)


async def test_retry_after_is_kept_and_a_little_spread():
    clock = FakeClock()
    failing = Failing(clock, StatusError(429, retry_after="20"))
    await ended(clock, Retries(clock=clock, chance=lambda: 1.0).run(failing))
    assert failing.calls[1][0] == 22
    failing = Failing(clock, StatusError(429, retry_after_ms="50"))
    began = clock.now()
    await ended(clock, Retries(clock=clock, chance=lambda: 0.0).run(failing))
    assert failing.calls[1][0] - began == pytest.approx(0.05)


@pytest.mark.parametrize("said", ["0", "Fri, 15 Jan 2021 08:00:00 GMT"])
async def test_a_provider_that_asks_for_no_time_at_all_gets_some(said):
    clock = FakeClock()
    failing = Failing(clock, *[StatusError(429, retry_after=said)] * 3)
    await ended(clock, Retries(first=1, clock=clock, chance=lambda: 1.0).run(failing))
    assert [when for when, _, _ in failing.calls] == [0, 1, 3, 7]


async def test_attempts_are_bounded_in_number():
    clock = FakeClock()
    failing = Failing(clock, *[StatusError(503) for _ in range(10)])
    last = failing.errors[2]
    with pytest.raises(StatusError) as caught:
        await ended(clock, Retries(max_retries=2, clock=clock).run(failing))
    assert caught.value is last
    assert len(failing.calls) == 3


async def test_attempts_are_bounded_in_time():
    clock = FakeClock()
    failing = Failing(clock, *[StatusError(503)] * 100)
    with pytest.raises(StatusError):
        await ended(clock, Retries(max_retries=99, max_time=60, clock=clock).run(failing))
    assert failing.calls[-1][0] <= 60
    failing = Failing(clock, StatusError(429, retry_after="3600"))
    with pytest.raises(StatusError):
        await ended(clock, Retries(clock=clock).run(failing))
    assert len(failing.calls) == 1  # an hour is not waited for


async def test_a_call_may_say_itself_how_often():
    clock = FakeClock()
    failing = Failing(clock, *[StatusError(503)] * 9)
    with pytest.raises(StatusError):
        await ended(clock, Retries(clock=clock).run(failing, 0))
    assert len(failing.calls) == 1


async def test_what_is_no_failure_of_the_call_is_raised_at_once():
    clock = FakeClock()
    for error in (StatusError(401), ValueError()):
        failing = Failing(clock, error)
        with pytest.raises(type(error)):
            await ended(clock, Retries(clock=clock).run(failing))
        assert len(failing.calls) == 1


async def test_another_rule_may_decide():
    clock = FakeClock()
    failing = Failing(clock, ValueError("half an answer"))
    assert await ended(clock, Retries(clock=clock, retry=lambda e: isinstance(e, ValueError)).run(failing))


@pytest.mark.parametrize(
    "options",
    [{"max_retries": -1}, {"max_retries": True}, {"max_time": -1}, {"first": "1"}, {"longest": None}],
)
def test_bounds_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Retries(**options)
