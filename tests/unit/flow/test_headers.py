"""What providers say of their limits, in the headers that they really send."""

from __future__ import annotations

import pytest

from cachepipe.flow.headers import Hint, hints, retry_after

NOON = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "7", "retry-after-ms": "120"}, 0.12),
        ({"retry-after": "Fri, 15 Jan 2027 08:00:30 GMT"}, 30),
        ({"retry-after": "Fri, 15 Jan 2027 07:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "1e12"}, 86400),
        ({}, None),
        (None, None),
    ],
)
def test_how_long_to_wait(headers, seconds):
    assert retry_after(headers, NOON) == seconds


@pytest.mark.parametrize(
    ("headers", "hint"),
    [
        (
            {
                "x-ratelimit-limit-requests": "500",
                "x-ratelimit-remaining-requests": "499",
                "x-ratelimit-reset-requests": "120ms",
            },
            Hint("requests", 500, 499, 0.12),
        ),
        (
            {"x-ratelimit-remaining-tokens": "149984", "x-ratelimit-reset-tokens": "6m0.5s"},
            Hint("tokens", None, 149984, 360.5),
        ),
        (
            {
                "anthropic-ratelimit-requests-limit": "50",
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2027-01-15T08:00:10Z",
            },
            Hint("requests", 50, 0, 10),
        ),
        (
            {"x-ratelimit-limit": "20", "x-ratelimit-remaining": "3", "x-ratelimit-reset": "1800000005000"},
            Hint("requests", 20, 3, 5),
        ),
        ({"x-ratelimit-remaining": "3", "x-ratelimit-reset": "1800000002"}, Hint("requests", None, 3, 2)),
        ({"x-ratelimit-remaining": "3", "x-ratelimit-reset": "12"}, Hint("requests", None, 3, 12)),
    ],
)
def test_what_is_left(headers, hint):
    assert hints(headers, NOON) == [hint]


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"x-ratelimit-remaining-requests": "5"},
        {"x-ratelimit-remaining-requests": "many", "x-ratelimit-reset-requests": "1s"},
        {"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "1 fortnight"},
    ],
)
def test_what_cannot_be_understood_is_left_alone(headers):
    assert hints(headers, NOON) == []


def test_requests_and_tokens_are_told_apart():
    headers = {
        f"x-ratelimit-{what}-{kind}": value
        for kind in ("requests", "tokens")
        for what, value in (("limit", "9"), ("remaining", "4"), ("reset", "1s"))
    }
    assert [hint.kind for hint in hints(headers)] == ["requests", "tokens"]
