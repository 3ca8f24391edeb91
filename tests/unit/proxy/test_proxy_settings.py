"""How a proxy is set: by options and files, refused in words before anything is opened."""

from __future__ import annotations

import math
import tracemalloc

import pytest

from cachepipe.contract.keys import provider_question
from cachepipe.providers.exchange import questions_of
from cachepipe.proxy.body_cache import BodyCache, ParsedBody, read_object
from cachepipe.proxy.headers import INERT, caller_digest, from_upstream, to_upstream
from cachepipe.proxy.settings import BadSettings, ProxySettings, Upstream, from_file, name_and_url, secret
from cachepipe.wire import CHAT

FILE = """
cache = "caches/x"
port = 9
default = "b"
token_env = "TOKEN"
hosts = ["proxy.local"]

[upstreams.a]
url = "https://a.example/v1/"
api_key_env = "KEY"

[upstreams.b]
url = "https://api.anthropic.com"

[upstreams.c]
url = "https://c.example"
mount = "/v1"
key_header = "Api-Key"
"""


def test_a_file_names_upstreams_and_no_keys(tmp_path):
    path = tmp_path / "proxy.toml"
    path.write_text(FILE)
    settings = from_file(path, {"TOKEN": "t", "KEY": "sk-1"}).checked()
    assert (settings.cache, settings.port, settings.token, settings.hosts) == (
        "caches/x",
        9,
        "t",
        ("proxy.local",),
    )
    b, a, c = settings.upstreams
    assert (a.name, a.url, a.kind, a.mount, a.key_value) == (
        "a",
        "https://a.example/v1",
        "openai",
        "/v1",
        "Bearer sk-1",
    )
    assert (b.name, b.kind, b.mount, b.key_header, b.key_value) == ("b", "anthropic", "", "x-api-key", None)
    assert (c.mount, c.key_header) == ("/v1", "api-key")
    assert "sk-1" not in repr(settings)
    with pytest.raises(BadSettings, match="TOKEN is not set"):
        from_file(path, {"KEY": "k"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "unknown names 'x'"),
        ("port = 'a'", "port is of type int"),
        ("port = true", "port is of type int"),
        ("replicate = true", "replicate is of type str or int"),
        ("[upstreams.a]\nurl = 'ftp://x'", "begins with http"),
        ("[upstreams.a]", "expected a base URL"),
        ("[upstreams.a]\nurl = 'https://u:p@x/v1'", "no user, query or fragment"),
        ("[upstreams.a]\nurl = 'https://x/v1?key=1'", "no user, query or fragment"),
        ("[upstreams.a]\nurl = 'https://x/v1'\nkey = 'sk'", "holds 'key'"),
        ("[upstreams.a]\nurl = 'https://x/v1'\nkind = 'other'", "kind is one of"),
        ("[upstreams.a]\nurl = 'https://x:99999/v1'", "cannot be read"),
        ("default = 'q'\n[upstreams.a]\nurl = 'https://x/v1'", "default is the name"),
        ("upstreams = 3", "upstreams are tables"),
        ("port = ", "cannot be read"),
    ],
)
def test_what_a_file_may_not_hold(tmp_path, text, message):
    path = tmp_path / "proxy.toml"
    path.write_text(text)
    with pytest.raises(BadSettings, match=message):
        from_file(path, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upstreams": ()}, "needs an upstream"),
        ({"port": 70000}, "port"),
        ({"token": " "}, "empty"),
        ({"timeout": 0}, "timeout"),
        ({"max_calls": 0}, "max_calls"),
        ({"repeat": "x"}, "repeat"),
        ({"replicate": 1.5}, "replicate must be a string, a whole number or None"),
        ({"log": "x"}, "log"),
        ({"durability": "x"}, "durability"),
        (
            {"upstreams": (Upstream.of("a", "http://x/v1"), Upstream.of("a", "http://y/v1"))},
            "different names",
        ),
    ],
)
def test_what_could_not_work_is_refused(options, message):
    with pytest.raises(BadSettings, match=message):
        ProxySettings(**{"upstreams": (Upstream.of("a", "http://x/v1"),), **options}).checked()


def test_names_and_secrets():
    assert name_and_url("a=https://x/v1") == ("a", "https://x/v1")
    assert name_and_url("https://x/v1") == (None, "https://x/v1")
    assert name_and_url("https://x/v1?a=b") == (None, "https://x/v1?a=b")
    with pytest.raises(BadSettings, match="a header cannot contain"):
        secret("A", {"A": "a\nb"})


def test_which_requests_share_calls():
    """All headers that go upstream tell clients apart, but those of one call."""
    one = [(b"authorization", b"a"), (b"user-agent", b"x"), (b"x-stainless-os", b"y")]
    assert (
        caller_digest("u", one)
        == caller_digest("u", one[:1])
        == caller_digest("u", [*one, (b"x-irid", b"1")])
    )
    assert (
        len(
            {
                caller_digest("u", one),
                caller_digest("v", one),
                caller_digest("u", []),
                caller_digest("u", [*one, (b"x-org", b"1")]),
            }
        )
        == 4
    )
    assert caller_digest("u", [(b"a", b"bc")]) != caller_digest("u", [(b"ab", b"c")])


def test_what_connection_names_stays_here():
    pairs = [(b"connection", b"close, X-Mine"), (b"x-mine", b"1"), (b"x-yours", b"2"), (b"te", b"trailers")]
    assert to_upstream(pairs) == [(b"x-yours", b"2")]
    assert from_upstream([(b"Connection", b"x-mine"), (b"X-Mine", b"1"), (b"X-Yours", b"2")]) == [
        (b"x-yours", b"2"),
        *INERT,
    ]


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'{"a": 1.0, "b": 123456789012345678901234567890}', {"a": 1.0, "b": 123456789012345678901234567890}),
        (b'{"a": "1234567890123456789012"}', {"a": "1234567890123456789012"}),
        (b'{"a": "\\ud800"}', {"a": "\ud800"}),
        (b'{"a": 1e999, "b": 123456789012345678901}', {"a": math.inf, "b": 123456789012345678901}),
        (b'{"a": -0, "a": 2}', {"a": 2}),
        (b"\xef\xbb\xbf{}", {}),
        ('{"a": "\u00e4"}'.encode("utf-16"), None),
        (b'{"a": "\xff"}', None),
        (b"[" * 100_000, None),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, None),
        (b"[1]", None),
        (b"", None),
    ],
)
def test_bodies_are_read_as_they_are_meant(content, value):
    assert read_object(content) == value


def test_the_memory_of_bodies_is_bounded():
    question = provider_question("https://a.example/v1", {"body": {}})
    memory = BodyCache(size=12_000, largest=5)
    for content in (b"aaaa", b"bbbb", b"cccccc"):
        memory.put(("u", content), ParsedBody({}, (), [question]))
    assert memory.get(("u", b"cccccc")) is None
    assert memory.get(("u", b"aaaa")) is not None
    memory.put(("u", b"dddd"), ParsedBody({}, (), [question]))
    assert memory.get(("u", b"bbbb")) is None
    assert memory.get(("v", b"aaaa")) is None
    assert memory.get(("u", b"aaaa")) is not None
    memory.put(("u", b"eeee"), ParsedBody({}, (), [question, question]))  # as much as two others
    assert memory.get(("u", b"dddd")) is None
    assert memory.get(("u", b"aaaa")) is None
    assert memory.get(("u", b"eeee")) is not None


def test_short_bodies_are_not_taken_for_small():
    """What is made of a short body takes kilobytes."""
    memory = BodyCache(size=200_000)
    tracemalloc.start()
    try:
        for number in range(300):
            content = b'{"model":"m","messages":[{"role":"user","content":"%d"}]}' % number
            body = read_object(content)
            asks = CHAT.split(body)
            questions = questions_of(CHAT, asks, "https://a.example/v1/chat/completions", {})
            memory.put(("u", content), ParsedBody(body, asks, questions))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 400_000
