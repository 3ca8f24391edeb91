"""Samples as bytes, and back."""

from __future__ import annotations

import enum
import math
import pickle
import sys
import typing
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import orjson
import pydantic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachepipe import NotStorable, StoreError
from cachepipe.values import Codec

codec = Codec()
texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=6),
    st.sampled_from(["\0", "\0tuple", "\0\0", "\\u0000tuple", "\ud800", "\udfff\ud800"]),
)
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(1 << 90), 1 << 90), st.floats(), texts, st.binary()
)
names = st.recursive(plain, lambda inner: st.tuples(inner, inner), max_leaves=3)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(texts, inner, max_size=4),
        st.dictionaries(names, inner, max_size=3),
    ),
    max_leaves=12,
)


def same(first, second):
    """Tell whether two values are equal in value and type, NaN and the sign of zero included."""
    if type(first) is not type(second):
        return False
    if isinstance(first, float):
        if math.isnan(first):  # whose sign means nothing
            return math.isnan(second)
        return first == second and math.copysign(1, first) == math.copysign(1, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return (
            len(first) == len(second)
            and same(list(first), list(second))
            and same(list(first.values()), list(second.values()))
        )
    return first == second


@given(values)
@example({"\0tuple": [1]})
@example({"\0map": [["a", 1]]})
@example({"a": {"\0class": "Point", "fields": {}}})
@example("\\u0000")
@example(["\0", {"\0": "\ud800"}])
@example({"\ud800": 1, "\0": 2})
@example({1: "a", "1": "b", 1.5: (), None: b""})
@example([2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, math.nan, -math.inf, -0.0])
def test_what_goes_in_comes_out_equal_and_of_the_same_types(value):
    assert same(codec.decode(codec.encode(value)), value)


@given(values)
def test_the_bytes_are_json(value):
    orjson.loads(codec.encode(value))


def test_a_plain_string_is_plain_json():
    assert codec.encode("héllo") == '"héllo"'.encode()
    assert codec.encode({"a": [1, None]}) == b'{"a":[1,null]}'


class Colour(enum.StrEnum):
    RED = "red"


class Pair(typing.NamedTuple):
    left: int
    right: list


@pytest.mark.parametrize(
    "value", [Colour.RED, OrderedDict(a=1), np.float64(0.5), np.str_("a"), Pair(1, [2])], ids=repr
)
def test_what_equals_a_plain_value_comes_back_as_that(value):
    decoded = codec.decode(codec.encode(value))
    assert decoded == value
    assert type(decoded) in (str, dict, float, tuple)


# Classes.


@dataclass
class Point:
    x: int
    y: object = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Frozen:
    x: tuple = ()


@dataclass
class Grown:
    x: int
    hidden: int = field(default=0, init=False)


class Tool(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    name: str
    at: Point | None = None
    count: float = 1


class Aliased(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(validate_by_name=True)
    long_name: str = pydantic.Field(alias="longName")


class Outer:
    @dataclass
    class Inner:
        x: int


NAMED = [Point, Frozen, Grown, Tool, Aliased, Outer.Inner]
named = Codec(NAMED)


@pytest.mark.parametrize(
    "value",
    [
        Point(1, (2, b"3")),
        Point(1, Point(2, {"p": Frozen((1,))})),
        [Frozen(("\ud800", math.inf))],
        {"a": Grown(3)},
        Tool(name="a"),
        Tool(name="a", at=Point(1), count=2, extra=[1], more={"x": (1,)}),
        Tool.model_construct(name="a"),
        Aliased(longName="x"),
        Outer.Inner(1),
    ],
    ids=repr,
)
def test_instances_of_named_classes_come_back_equal(value):
    decoded = named.decode(named.encode(value))
    assert decoded == value
    assert type(decoded) is type(value)


def test_which_fields_of_a_model_were_set_is_kept():
    decoded = named.decode(named.encode(Tool(name="a")))
    assert decoded.model_fields_set == {"name"}
    assert decoded.model_dump(exclude_unset=True) == {"name": "a"}


def test_fields_without_init_are_kept():
    grown = Grown(1)
    grown.hidden = 9
    assert named.decode(named.encode(grown)).hidden == 9


def test_no_code_of_the_class_runs_when_it_is_read():
    ran = []

    @dataclass
    class Loud:
        x: int

        def __post_init__(self):
            ran.append(self.x)

    loud = Codec([Loud])
    data = loud.encode(Loud(1))
    ran.clear()
    assert loud.decode(data).x == 1
    assert ran == []


class Thing:
    pass


@pytest.mark.parametrize(
    "value", [{1}, frozenset(), Thing(), object(), int, len, 3j, range(3), bytearray(b"a"), Point(1)]
)
def test_what_cannot_be_brought_back_equal_is_not_storable(value):
    for sample in (value, [value], {"a": (value,)}, {1: value}):
        with pytest.raises(NotStorable, match="cannot be stored"):
            codec.encode(sample)


def test_an_unnamed_class_is_refused_with_what_to_write():
    with pytest.raises(NotStorable, match=r"classes=\[Point\]"):
        codec.encode(Point(1))
    with pytest.raises(TypeError):
        codec.encode(Point(1))


def test_an_instance_that_its_fields_do_not_tell_is_refused():
    @dataclass
    class Lossy:
        x: int

        def __eq__(self, other):
            return self is other

        __hash__ = None

    with pytest.raises(NotStorable, match="would not come back equal"):
        Codec([Lossy]).encode(Lossy(1))


def test_a_private_attribute_that_would_be_lost_is_refused():
    class Secretive(pydantic.BaseModel):
        name: str
        _hidden: int = 0

    value = Secretive(name="a")
    value._hidden = 5
    secretive = Codec([Secretive])
    try:
        data = secretive.encode(value)
    except NotStorable:
        return
    assert secretive.decode(data) == value


def test_another_class_of_the_same_name_is_refused():
    other = dataclass(type("Point", (), {"__annotations__": {"x": int}, "__qualname__": "Point"}))
    with pytest.raises(NotStorable, match="another class"):
        named.encode(other(1))
    with pytest.raises(ValueError, match="two classes 'Point'"):
        Codec([Point, other])
    Codec([Point, Point])


@pytest.mark.parametrize("kind", [int, dict, Thing, Point(1), "Point"])
def test_only_dataclasses_and_models_can_be_named(kind):
    with pytest.raises(TypeError, match="dataclasses and pydantic models"):
        Codec([kind])


def test_a_value_that_holds_itself_is_not_storable():
    value = []
    value.append(value)
    with pytest.raises(NotStorable):
        codec.encode(value)


@pytest.mark.parametrize("depth", [100, 250, 300, 2000, 100_000])
def test_a_deep_value_comes_back_or_is_not_storable(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    try:
        data = codec.encode(value)
    except NotStorable:
        assert depth > 200
        return
    decoded = codec.decode(data)
    for _ in range(depth):
        [decoded] = decoded
    assert decoded == "x"


# What the bytes cannot do.


def test_bytes_that_name_an_unknown_class_are_refused_and_nothing_is_imported():
    data = orjson.dumps({"\0class": "antigravity.Point", "fields": {}, "extra": {}, "set": []})
    with pytest.raises(StoreError, match=r"classes=\[antigravity.Point\]"):
        named.decode(data)
    assert "antigravity" not in sys.modules


def test_a_sample_of_a_named_class_needs_the_class_to_be_named_again():
    with pytest.raises(StoreError, match="which was not named"):
        codec.decode(named.encode(Point(1)))


class Bomb:
    went_off = False

    def __reduce__(self):
        return (setattr, (Bomb, "went_off", True))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_damage(protocol):
    with pytest.raises(StoreError, match="damaged"):
        codec.decode(pickle.dumps(Bomb(), protocol))
    assert not Bomb.went_off


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"nope", b"[1] 2", b'{"a":NaN}'])
def test_damaged_bytes_are_a_store_error(data):
    with pytest.raises(StoreError, match="damaged"):
        codec.decode(data)


def test_a_form_of_a_later_version_is_a_store_error():
    with pytest.raises(StoreError, match="newer cachepipe"):
        codec.decode(orjson.dumps({"\0quaternion": [1, 2, 3, 4]}))


@pytest.mark.parametrize(
    "form",
    [
        {"\0tuple": 5},
        {"\0bytes": 5},
        {"\0bytes": "*"},
        {"\0int": "abc"},
        {"\0int": None},
        {"\0float": []},
        {"\0map": [[1]]},
        {"\0map": [[[], 1]]},
        {"\0str": "gA"},
        {"\0class": "Point"},
        {"\0class": ["Point"], "fields": {}},
        {"\0class": "Point", "fields": []},
        {"\0class": "Tool", "fields": {}, "extra": 5, "set": []},
    ],
    ids=repr,
)
def test_a_malformed_mark_is_a_store_error(form):
    """Whoever waits for the sample hears of it in the store's own words."""
    with pytest.raises(StoreError):
        named.decode(orjson.dumps(form))
