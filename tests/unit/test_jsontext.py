"""JSON text: what the SDKs read is read, digits are kept, and our own output is valid."""

from __future__ import annotations

import json
import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.jsontext import LongInteger, Verbatim, dumps, is_strict, loads, mended, read, shown

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=()), max_size=4), inner, max_size=4)
    ),
    max_leaves=10,
)


def spelled(value):
    """Write a value such that NaN equals itself, and 0.0 differs from -0.0 and from 0."""
    return repr(value)


@given(json_values)
def test_c9_what_the_standard_library_writes_is_read_and_written_without_loss(value):
    text = json.dumps(value).encode()
    read_back = json.loads(text)  # a pair of surrogates is one character
    assert spelled(loads(text)) == spelled(read_back)
    assert spelled(json.loads(dumps(read_back))) == spelled(read_back)


@given(json_values, st.booleans())
def test_c9_what_is_shown_is_json_to_a_strict_parser_and_holds_the_whole_value(value, escaped):
    text = json.dumps(shown({"of": value}), ensure_ascii=escaped).encode()
    told = orjson.loads(text)
    if set(told) == {"raw"}:
        told = json.loads(told["raw"])
    assert spelled(told) == spelled(json.loads(json.dumps({"of": value})))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 18446744073709551616}',
        b'{"a": -9223372036854775809}',
        b'{"a": [1e400, -1e400]}',
        b'{"a": NaN, "b": -Infinity}',
        b'{"a": "cut \\udfff"}',
        b'{"a": NaN, "a": NaN}',
        b'\n{ "a" : 1.50,  "b": Infinity }\n',
        b'{"deep": ' + b"[" * 300 + b"]" * 300 + b"}",
    ],
)
def test_c9_an_object_that_a_strict_parser_would_refuse_or_change_keeps_its_text(text):
    value = read(text)
    assert type(value) is Verbatim
    assert spelled(dict(value)) == spelled(json.loads(text))
    assert dumps(value) == text
    assert not is_strict(value)
    assert shown(value) == {"raw": text.decode()}


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 18446744073709551615, "b": -9223372036854775808, "c": -0.0, "d": 1e22, "e": 0.1}',
        b'{"a": "12345678901234567890123 in a text"}',
        b'{"a": 0.12345678901234567890123}',
        b"\xef\xbb\xbf{}",
        '{"a": "\\ud83d\\ude00"}'.encode("utf-16"),
        b'{"a": 1, "a": 2}',
    ],
)
def test_other_objects_are_plain(text):
    value = read(text)
    assert type(value) is dict
    assert spelled(value) == spelled(json.loads(text))
    assert is_strict(value)
    assert shown(value) is value


@pytest.mark.parametrize("text", [b'"\xed\xa0\xbd"', '["\ud83d"]'.encode("utf-16", "surrogatepass")])
def test_surrogates_in_bytes_that_are_not_utf_8_are_read_as_the_sdks_read_them(text):
    assert loads(text) == json.loads(text)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"nan", b"[1] 2", b'"\x01"', b"\xff", b"01", b"+1", b"[" * 200_000]
)
def test_what_no_sdk_reads_is_an_error(text):
    with pytest.raises(ValueError, match=r"line 1|decode|too deep"):
        loads(text)


@pytest.mark.parametrize("sign", ["", "-"])
def test_c9_integers_of_4300_digits_are_read_and_longer_ones_refused_in_a_sentence(sign):
    longest = sign + "9" * 4300
    assert loads(f"[{longest}]".encode()) == [int(longest)]
    with pytest.raises(LongInteger, match=r"more than 4,300 digits; write it as a string"):
        loads(f"[{longest}0]".encode())


def test_what_has_no_json_is_an_error_and_not_null():
    for value in ({1}, [object()], {"a": b"b"}):
        with pytest.raises(TypeError):
            dumps(value)
    assert not is_strict({1})
    assert dumps([None, math.nan]) == b"[null,NaN]"


def test_long_values_nest_as_deep_as_the_standard_library_writes():
    value = "x"
    for _ in range(400):
        value = [value]
    assert loads(dumps(value)) == value
    assert loads(shown(value)["raw"].encode()) == value


def test_a_lone_surrogate_is_mended_where_only_its_look_counts():
    assert mended("a\ud83d") == "a\ufffd"
    assert mended("\ud83d\ude00 ä") == "😀 ä"
    assert mended("plain") == "plain"
