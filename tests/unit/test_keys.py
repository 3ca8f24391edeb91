"""Same question, same key (C9)."""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import json
import math
import os
import subprocess
import sys
import tracemalloc
import types
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pydantic
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cachepipe import Request, UnkeyableValue
from cachepipe.adapting import scope_of
from cachepipe.contract.keys import FORMAT, canonical, digest, encode, provider_question, question
from cachepipe.values import Codec


@dataclass(frozen=True)
class Chat(Request):
    model: str | None = None
    temperature: float | None = None
    seed: int | None = None
    best_of: int | None = None
    options: object = None


class Colour(str, enum.Enum):  # noqa: UP042 - the kind that older code has
    RED = "red"


class Size(enum.StrEnum):
    BIG = "big"


class Level(enum.IntEnum):
    HIGH = 3


def key(prompt, **fields):
    scope = fields.pop("scope", None)
    return question(Chat(prompt, **fields), scope).key


texts = st.text(st.characters(exclude_categories=()), max_size=8)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 80), 1 << 80),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
    st.binary(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(texts, inner, max_size=4),
    ),
    max_leaves=12,
)


def told_apart(value):
    """Write a value such that two are written alike exactly when they are to have one key."""
    if value is None or isinstance(value, bool):
        return ("constant", value)
    if isinstance(value, int | float):
        return ("number", value)
    if isinstance(value, str):
        return ("text", value)
    if isinstance(value, bytes):
        return ("bytes", value)
    if isinstance(value, list | tuple):
        return ("list", tuple(told_apart(item) for item in value))
    return ("mapping", frozenset((name, told_apart(item)) for name, item in value.items()))


@given(values, values)
def test_two_values_have_one_key_exactly_when_they_are_equal(first, second):
    """Equal as the clause says: not 1 and True, but a tuple and a list."""
    assert (key({"v": first}) == key({"v": second})) == (told_apart(first) == told_apart(second))


def respelled(value, draw):
    """Return an equal value in other types and another order."""
    if isinstance(value, dict):
        items = [(name, respelled(item, draw)) for name, item in value.items()]
        mixed = draw(st.permutations(items))
        return draw(st.sampled_from([dict, OrderedDict, lambda pairs: types.MappingProxyType(dict(pairs))]))(
            mixed
        )
    if isinstance(value, list | tuple):
        return draw(st.sampled_from([list, tuple]))([respelled(item, draw) for item in value])
    if type(value) is int and float(1 << 53) >= abs(value):
        return draw(st.sampled_from([int, float, np.int64, np.float64]))(value)
    if type(value) is float:
        return draw(st.sampled_from([float, np.float64]))(value)
    if type(value) is bytes:
        return draw(st.sampled_from([bytes, bytearray, memoryview]))(value)
    return value


@given(values, st.data())
def test_equal_values_give_equal_keys_however_they_are_spelled(value, data):
    other = respelled(value, data.draw)
    assert encode(canonical(other)) == encode(canonical(value))


@given(st.dictionaries(texts, values, min_size=1, max_size=3), st.data())
def test_any_single_change_gives_another_key(document, data):
    """In a provider's body, where null is a value."""
    other = copy.deepcopy(document)
    place = other
    while True:
        name = data.draw(
            st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)
        )
        inner = place[name]
        if isinstance(inner, list | dict) and inner and data.draw(st.booleans()):
            place = inner
            continue
        change = data.draw(st.sampled_from(["replace", "remove", "add", "repeat"]))
        break
    if change == "replace":
        place[name] = data.draw(values)
        assume(told_apart(place[name]) != told_apart(inner))
    elif change == "remove":
        del place[name]
    elif change == "repeat" and isinstance(place, list):
        place.insert(name, inner)
    elif isinstance(place, dict):
        new = data.draw(texts)
        assume(new not in place)
        place[new] = None
    else:
        place.append(None)
    assert provider_question("u", {"body": other}).key != provider_question("u", {"body": document}).key


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 1.0),
        (0, -0.0),
        (0.0, -0.0),
        (1e22, 10**22),
        (["a"], ("a",)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ("red", Colour.RED),
        ("big", Size.BIG),
        (3, Level.HIGH),
        (0.5, np.float64(0.5)),
        (0.5, np.float32(0.5)),
        (3, np.int8(3)),
        (3, np.uint64(3)),
        ("a", np.str_("a")),
        ({"red": 1}, {Colour.RED: 1}),
        ({"a": 1}, collections.ChainMap({"a": 1})),
        ([1], collections.namedtuple("Pair", "x")(1)),  # noqa: PYI024 - made in passing
        (b"ab", bytearray(b"ab")),
    ],
    ids=repr,
)
def test_values_that_compare_equal_give_one_key(first, second):
    assert key([first]) == key([second])
    assert key(first) == key(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, True),
        (0, False),
        (0, None),
        ("", None),
        (1, "1"),
        (1.5, "1.5"),
        ("a", b"a"),
        (["a", "b"], ["b", "a"]),
        (["a"], ["a", "a"]),
        ([["a"], "b"], ["a", ["b"]]),
        ({"a": None}, {}),
        ([None], []),
        ({"a": {"b": None}}, {"a": {}}),
        ("a", ["a"]),
        ([], {}),
        ("é", "e\u0301"),
        ("a ", "a"),
        (0.1, 0.1 + 1e-17 * 2),
        (2**53, 2**53 + 1),
        (2**64, 2**64 + 1),
        ("\ud800", "\udfff"),
        ("\ud800", "\\ud800"),
        ({"\0bytes": "YQ=="}, b"a"),
        ({"\0\0bytes": "YQ=="}, {"\0bytes": "YQ=="}),
    ],
    ids=repr,
)
def test_values_that_differ_give_two_keys(first, second):
    assert key([first]) != key([second])


class Plain(enum.Enum):
    RED = "red"


@given(st.lists(values, min_size=6, max_size=9))
def test_a_long_list_has_the_form_of_its_items(items):
    """Long lists are looked at as a whole first."""
    assert encode(canonical(items)) == encode([canonical(item) for item in items])
    assert encode(canonical([items])) == encode([canonical(items)])


@pytest.mark.parametrize(
    "item", [1.0, -0.0, 1e16, 1e45, 1e300, (1, 2.0), {"\0int": 1}, b"x", 1 << 70, "\ud800"], ids=repr
)
def test_what_a_long_list_holds_is_spelled_in_one_way(item):
    assert encode(canonical([item] * 7)) == encode([canonical(item)] * 7)
    assert encode(canonical(["a"] * 7 + [{"b": [item]}])) == encode(["a"] * 7 + [{"b": [canonical(item)]}])


@pytest.mark.parametrize("item", [math.nan, -math.inf, Plain.RED, uuid.UUID(int=1), {1: 2}, {1}], ids=repr)
def test_what_a_long_list_cannot_hold_is_refused(item):
    with pytest.raises(UnkeyableValue):
        canonical([item] * 7)
    with pytest.raises(UnkeyableValue):
        canonical(["a"] * 7 + [{"b": [item]}])


def test_booleans_of_numpy_are_no_numbers():
    """They compare equal to True and to 1 both, so no key can say which is meant."""
    with contextlib.suppress(UnkeyableValue):
        assert key([np.bool_(True)]) == key([True])


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        np.float64("nan"),
        np.float32("inf"),
        {1, 2},
        frozenset({1}),
        {1: "a"},
        {None: "a"},
        {("a",): "b"},
        {True: "a"},
        int,
        Chat,
        len,
        lambda: None,
        object(),
        3j,
        range(3),
        sys,
        iter([1]),
    ],
)
def test_values_without_a_stable_form_are_refused(value):
    for prompt in (value, [value], {"a": {"b": [value]}}):
        with pytest.raises(UnkeyableValue):
            canonical(prompt)


@pytest.mark.parametrize("value", [math.nan, {1, 2}, {1: "a"}, len, Chat], ids=repr)
def test_a_request_with_such_a_value_is_refused_and_it_is_a_type_error(value):
    with pytest.raises(UnkeyableValue):
        question(Chat("x", options=[value]))
    with pytest.raises(TypeError):
        question(Chat("x", options={"a": value}))


def test_the_refusal_names_the_value_and_what_to_do():
    with pytest.raises(UnkeyableValue, match=r"set \{1\}.*pass strings"):
        canonical({1})
    with pytest.raises(UnkeyableValue, match="whose key is 1; use strings"):
        canonical({1: 2})


# Classes.


@dataclass
class Point:
    x: int
    y: list = field(default_factory=list)


class Tool(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    name: str
    count: float = 1


def test_instances_are_keyed_by_class_and_fields():
    assert key(Point(1, [2])) == key(Point(1.0, (2,)))
    assert key(Point(1)) != key(Point(2))
    assert key(Point(1)) != key({"x": 1, "y": []})
    assert key(Tool(name="a", count=1)) == key(Tool(name="a", count=1.0))
    assert key(Tool(name="a")) != key(Tool(name="a", more=1))


def test_classes_of_one_name_with_other_fields_do_not_collide():
    other = pydantic.create_model("Tool", name=(str, ...), amount=(float, 1))
    assert key(Tool(name="a")) != key(other(name="a"))


# What is asked, and what is not.


def test_n_request_id_and_namespace_are_not_part_of_what_is_asked():
    assert key("x") == key("x", n=5) == key("x", request_id="a") == key("x", namespace="b")


def test_a_field_that_is_none_is_left_out():
    """So an optional field may be added without a new key."""

    @dataclass(frozen=True)
    class Newer(Chat):
        reasoning: str | None = None

    assert question(Newer("x")).key == question(Request("x")).key == key("x")
    assert question(Newer("x", reasoning="high")).key != key("x")
    assert json.loads(question(Newer("x")).document) == {"fields": {"prompt": "x"}}
    assert key("x", options={"a": None}) != key("x", options={})


def test_every_other_field_counts():
    keys = {key("x"), key("y"), key("x", model="m"), key("x", temperature=0), key("x", seed=1)}
    assert len(keys) == 5
    assert key("x", temperature=1) == key("x", temperature=1.0)


def test_the_name_of_a_field_counts():
    assert key("x", model="a") != key("x", options="a")


@pytest.mark.parametrize("value", [[1], {"a": 1}, Point(1), 10**30, "\ud800", b"a"], ids=repr)
def test_fields_may_hold_any_value(value):
    assert key(value, options=value) == key(copy.deepcopy(value), options=copy.deepcopy(value))


# Scope.


class Model:
    async def request(self, request): ...


def test_the_scope_is_part_of_the_key():
    assert len({key("x"), key("x", scope="a"), key("x", scope="b"), key("x", scope="")}) == 4


def test_the_scope_of_an_adapter_is_its_cache_scope_else_its_model():
    model = Model()
    assert scope_of(model) is None
    model.model = "llama"
    assert scope_of(model) == "llama"
    model.cache_scope = "https://api.example/v1"
    assert scope_of(model) == "https://api.example/v1"


def test_a_model_that_is_no_string_is_no_scope():
    model = Model()
    model.model = object()
    assert scope_of(model) is None


def test_a_cache_scope_that_is_no_string_is_refused():
    model = Model()
    model.cache_scope = 5
    with pytest.raises(UnkeyableValue, match="cache_scope must be a string"):
        scope_of(model)


def test_scope_and_document_cannot_be_confused():
    assert digest("a", b'"b"') != digest('a","b', b'""')
    assert digest(None, b"1") != digest("null", b"1")


# hash=, seed and best_of.


def test_hash_stands_for_the_fields():
    def hasher(request):
        return request.prompt[:1]

    assert (
        question(Chat("apple"), None, hasher).key
        == question(Chat("avocado", temperature=2), None, hasher).key
    )
    assert question(Chat("apple"), None, hasher).key != question(Chat("pear"), None, hasher).key
    assert question(Chat("apple"), "s", hasher).key != question(Chat("apple"), None, hasher).key
    assert question(Chat("a"), None, hasher).key != key("a")


def test_a_hash_that_is_no_string_is_refused():
    with pytest.raises(UnkeyableValue, match="hash= must return a string"):
        question(Chat("x"), None, lambda request: 5)


def test_with_best_of_n_is_part_of_the_key():
    """C4."""
    assert key("x", best_of=3, n=1) != key("x", best_of=3, n=2)
    assert not question(Chat("x", best_of=3)).mergeable
    hasher = str
    assert (
        question(Chat("x", best_of=3), None, hasher).key
        != question(Chat("x", best_of=3, n=2), None, hasher).key
    )


def test_questions_with_a_seed_are_not_merged():
    """C4."""
    assert question(Chat("x")).mergeable
    assert not question(Chat("x", seed=0)).mergeable
    assert key("x", seed=0) != key("x")


# Stability.

GOLDEN = [
    (Request("Hello"), None, "k2-58fe78c16a923d86ef9a44e5fe6b45728cab6d3e8c3dd846f1f8e83cc732512b"),
    (
        Request("Hello"),
        "https://api.openai.com/v1/chat/completions",
        "k2-84c13430ba14be7232005852f320daabfa93c5bacd2d9e4108d1ab70a248d31f",
    ),
    (
        Chat([{"role": "user", "content": "Grüße 🌍"}], model="m", temperature=0.7),
        "m",
        "k2-d0798944a22504f44c9d381d447a09df3690ee650e110353a0afdff5cef0a155",
    ),
    (
        Chat({"b": [1.0, -0.0, 1e-7, 1e300, 2**70], "a": None}, seed=1),
        "s",
        "k2-7d0ba787ddff4bd547454766949340a627cb3aa8944a2814a7b9e334ea824345",
    ),
    (
        Chat(b"\x00\xff", options=("\ud800", True, Point(1, [0.1]))),
        "",
        "k2-f1cf36871d95be8e5e72e71655d58507720cdcaeea212d549a5b2d67845f9829",
    ),
    (Chat("x", n=4, best_of=5), None, "k2-6ab77f4fa9b8eb3391b8b134567145373b4cd610e74b840ff77cc4abb7a4933c"),
]


@pytest.mark.parametrize(("request_", "scope", "expected"), GOLDEN)
def test_keys_never_change(request_, scope, expected):
    """Across processes, versions of Python and releases: a change is a new, named format."""
    assert FORMAT == "k2"
    assert question(request_, scope).key == expected


def test_the_document_is_the_one_json_spelling_of_what_was_asked():
    document = question(Chat({"b": 1.0, "a": ["é", None]}, temperature=0.5)).document
    assert document == '{"fields":{"prompt":{"a":["é",null],"b":1},"temperature":0.5}}'.encode()


@given(values)
def test_a_document_is_json_that_says_what_was_asked(value):
    text = encode(canonical(value))
    assert encode(json.loads(text)) == text


@pytest.mark.parametrize("kept", [encode, Codec().encode], ids=["documents", "samples"])
def test_what_is_kept_takes_no_more_memory_than_it_is_long(kept):
    tracemalloc.start()
    try:
        held = [kept({"content": "x" * 1000}) for _ in range(100)]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 1.2 * sum(map(len, held))


SCRIPT = """
import json, sys
from cachepipe import Request
from cachepipe.contract.keys import question
prompt = {"b": [1.0, "\\ud800"], "a": {"z": 1, "y": (2, None)}, "é": 2**70}
print(question(Request(prompt, n=3), "s").key)
"""


def test_keys_are_the_same_in_a_process_with_another_hash_seed():
    keys = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "77")
    }
    here = question(Request({"é": 2.0**70, "a": {"y": [2.0, None], "z": 1}, "b": (1, "\ud800")}), "s").key
    assert keys == {here}


# Where the order of mapping keys counts.

AS_WRITTEN = {"tools": frozenset({"parameters", "examples"}), "schema": frozenset()}
WRITTEN = ("parameters", "examples")


def provider_key(body, as_written=AS_WRITTEN):
    return provider_question("u", {"body": body}, as_written=as_written).key


def told_apart_in_order(value):
    if isinstance(value, list | tuple):
        return ("list", tuple(told_apart_in_order(item) for item in value))
    if isinstance(value, dict):
        return ("mapping", tuple((name, told_apart_in_order(item)) for name, item in value.items()))
    return told_apart(value)


def told_apart_below(value, names):
    """Write a value such that the order of mapping keys counts below these names only."""
    if isinstance(value, list | tuple):
        return ("list", tuple(told_apart_below(item, names) for item in value))
    if isinstance(value, dict):
        items = (
            (name, told_apart_in_order(item) if name in names else told_apart_below(item, names))
            for name, item in value.items()
        )
        return ("mapping", frozenset(items))
    return told_apart(value)


written_values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=8),
        st.dictionaries(st.sampled_from(["a", "b", "parameters", "\0", "\ud800"]), inner, max_size=4),
    ),
    max_leaves=16,
)


@given(written_values, st.data())
def test_c9_the_order_of_keys_counts_below_the_names_of_a_field_and_nowhere_else(value, data):
    other = respelled(value, data.draw)
    plain = json_like(other)
    same = told_apart_below(value, WRITTEN) == told_apart_below(plain, WRITTEN)
    assert (provider_key({"tools": value}) == provider_key({"tools": other})) is same
    same = told_apart_in_order(value) == told_apart_in_order(plain)
    assert (provider_key({"schema": value}) == provider_key({"schema": other})) is same
    assert provider_key({"other": value}) == provider_key({"other": other})
    assert encode(canonical(value)) == encode(canonical(other))  # an own adapter's


def json_like(value):
    """Return a value in the types of JSON, its mappings in their order."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [json_like(item) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return {name: json_like(item) for name, item in value.items()} if hasattr(value, "items") else value


@given(written_values, written_values)
def test_c9_two_bodies_have_one_key_exactly_when_they_are_equal_in_order(first, second):
    same = told_apart_below(first, WRITTEN) == told_apart_below(second, WRITTEN)
    assert (provider_key({"tools": first}) == provider_key({"tools": second})) is same


@pytest.mark.parametrize("extra", [None, 2**70, "\ud800"], ids=["plain", "long integer", "lone surrogate"])
def test_the_document_spells_mappings_that_are_shown_as_written_in_their_order(extra):
    tools = [{"name": "f", "parameters": {"z": {"y": 1.0, "b": extra}, "a": 2}}] * 2
    document = provider_question("u", {"body": {"tools": tools, "a": 1}}, as_written=AS_WRITTEN).document
    shown = json.loads(document)["body"]
    assert list(shown) == ["a", "tools"]
    for tool in shown["tools"]:
        assert list(tool["parameters"]) == ["z", "a"]
        assert list(tool["parameters"]["z"]) == ["y", "b"]
        assert tool == tools[0]


def test_c9_the_order_counts_in_long_lists_and_in_lists_of_mappings():
    first = [{"examples": [{"a": 1, "b": 2}]}] * 9
    second = [*first[:8], {"examples": [{"b": 2, "a": 1}]}]
    assert provider_key({"tools": first}) != provider_key({"tools": second})


# Numbers.


@given(st.integers(-(10**60), 10**60))
def test_c9_integers_are_exact_whatever_their_size(number):
    assert key([number]) != key([number + 1])
    assert (key([float(number)]) == key([number])) is (float(number) == number)
    assert (provider_key({"a": float(number)}) == provider_key({"a": number})) is (float(number) == number)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (10**22, 1e22, True),
        (10**30, 1e30, False),  # the nearest float is another number
        (int(1e30), 1e30, True),
        (2**53 + 1, float(2**53), False),
        (2**64, 2.0**64, True),
        (-(2**63) - 1, -(2.0**63), False),
        (10**4299, 10**4299 + 1, False),
    ],
)
def test_c9_an_integer_and_a_float_have_one_key_when_they_are_equal(first, second, same):
    assert (first == second) is same
    assert (key([first]) == key([second])) is same
    assert (
        provider_key({"schema": {"maximum": first}}) == provider_key({"schema": {"maximum": second}})
    ) is same


@pytest.mark.parametrize("wrapped", [lambda n: n, lambda n: [n], lambda n: {"a": [0] * 9 + [n]}])
@pytest.mark.parametrize("sign", [1, -1])
def test_c9_integers_of_more_than_4300_digits_are_refused(sign, wrapped):
    number = sign * 10**4300
    with pytest.raises(UnkeyableValue, match=r"more than 4,300 digits; send it as a string"):
        key(wrapped(number))
    with pytest.raises(UnkeyableValue, match=r"more than 4,300 digits"):
        provider_key({"tools": [{"parameters": wrapped(number)}]})
    assert key(wrapped(number // 10))
