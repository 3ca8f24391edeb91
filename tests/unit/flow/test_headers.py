"""What providers say of their limits, in the headers that they really send."""

from __future__ import annotations

import json
import urllib.error

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.flow.headers import Hint, headers_of, hints, retry_after
from cachepipe.outages import status_of
from cachepipe.proxy.upstream import UpstreamRefusal

NOON = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT


class GoogleError(Exception):
    """An error as google-genai raises it."""

    code = 429
    status = "RESOURCE_EXHAUSTED"

    def __init__(self, *details):
        self.details = {"error": {"code": 429, "status": self.status, "details": [*details]}}


def test_the_time_to_wait_is_in_the_retry_info_of_googles_errors():
    kind = "type.googleapis.com/google.rpc."
    told = {"@type": f"{kind}RetryInfo", "retryDelay": "3.5s"}
    error = GoogleError({"@type": f"{kind}QuotaFailure", "violations": []}, told)
    assert status_of(error) == 429
    assert retry_after(headers_of(error)) == 3.5
    assert headers_of(GoogleError({"@type": f"{kind}RetryInfo", "retryDelay": "soon"})) is None
    proxied = UpstreamRefusal("google", 429, [], json.dumps(error.details).encode())
    assert retry_after(headers_of(proxied)) == 3.5


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
        ({"retry-after": 7}, 7),
        ({"retry-after": b"7"}, 7),
        ({"retry-after": ["7"]}, None),
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
        (  # Mistral says no time
            {"x-ratelimit-limit-req-minute": "720", "x-ratelimit-remaining-req-minute": "0"},
            Hint("requests", 720, 0, 60),
        ),
        ({"x-ratelimit-remaining-tokens-minute": "4999911"}, Hint("tokens", None, 4999911, 60)),
        (  # Cerebras
            {
                "x-ratelimit-limit-requests-day": "14400",
                "x-ratelimit-remaining-requests-day": "14399",
                "x-ratelimit-reset-requests-day": "33011.5",
            },
            Hint("requests", 14400, 14399, 33011.5),
        ),
        (  # Groq
            {
                "x-ratelimit-limit-requests": "14400",
                "x-ratelimit-remaining-requests": "14370",
                "x-ratelimit-reset-requests": "2m59.5s",
            },
            Hint("requests", 14400, 14370, 179.5),
        ),
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


class OtherError(Exception):
    """As of libraries that have neither httpx's headers nor its errors."""

    def __init__(self, headers=None, response=None):
        super().__init__()
        self.headers, self.response = headers, response


@pytest.mark.parametrize(
    "error",
    [
        OtherError({"Retry-After": "7"}),
        OtherError(response=httpx.Response(429, headers={"Retry-After": "7"})),
        OtherError({"retry-after": "9"}, response=httpx.Response(429, headers={"Retry-After": "7"})),
        urllib.error.HTTPError("http://host", 429, "slowly", httpx.Headers({"Retry-After": "7"}), None),
    ],
    ids=["dict", "response", "both", "urllib"],
)
def test_headers_are_found_in_the_errors_of_any_library(error):
    assert retry_after(headers_of(error)) == 7


def test_an_error_without_headers_has_none():
    for error in (None, ValueError(), OtherError("text"), OtherError(response="text")):
        assert headers_of(error) is None


VALUES = st.one_of(
    st.text(),
    st.text("0123456789.:-+TZ mshd,GFriJan", max_size=30),
    st.integers(),
    st.floats(),
    st.binary(),
    st.none(),
)


@given(VALUES)
def test_whatever_a_header_holds_is_no_error(value):
    seconds = retry_after({"retry-after": value}, NOON)
    assert seconds is None or 0 <= seconds <= 86400
    for hint in hints({"x-ratelimit-remaining": "1", "x-ratelimit-reset": value}, NOON):
        assert 0 <= hint.reset <= 86400
