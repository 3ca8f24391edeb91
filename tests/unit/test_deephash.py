"""CacheSaver's keys are computed as deepdiff 9.1.0 does, whose keys these are."""

from __future__ import annotations

import enum

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.importers.deephash import deep_hash, key_of

SAID = [{"role": "user", "content": "a"}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=2), each, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("args", "kwargs", "key"),
    [
        (
            (),
            {"model": "m", "messages": SAID, "temperature": 1},
            "430e2ba6fcc032a2e82e02c4b8ecede3f4132f8de611aee20a2e0c346eb5790c",
        ),
        (
            (),
            {"model": "m", "messages": SAID, "temperature": 1.0},
            "977756707af7b2b769ca3acee73d684c08ee4a14a3f76e52639583b9a7e169ba",
        ),
        (
            (),
            {"é": None, "b": True, "__private": 5, "x": [[], {}, "", 1e-7, 10**30, -2.5, False]},
            "c2632c1c4e39a7f08a8dda1361187ef3f7956e298dac4ddf64f9d3754e0ae929",
        ),
        (("p",), {}, "379756cfab8a3e1734c2b0d02375ae26066bf15438b505e17f49cb0bd624ac9a"),
    ],
)
def test_keys_are_those_of_deepdiff(args, kwargs, key):
    assert key_of(kwargs, args) == key


class Pair(pydantic.BaseModel):
    a: int = 1
    b: str | None = None


class Kind(str, enum.Enum):  # noqa: UP042 - as in Google's SDK
    X = "x"

    def __format__(self, _):  # a format of its own: Python 3.11 and 3.12 differ
        return "x"


def test_objects_of_pydantic_and_enumerations_have_the_keys_that_deepdiff_gives_them():
    assert deep_hash(Pair()) == "416d35114317ae0acc520831d6c0fd26ed6d0c4016fd24a06dfc5151f26165fe"
    assert deep_hash({"p": [Pair(a=2, b="x")]}) == (
        "27cd660146b9086b2f0d154a696d0d3bd7fbfe2bf2f2acf31a7fba89d52a1f08"
    )
    assert deep_hash(Kind.X) == "736db749868c459972c3c94ca79156f1b6c414c4bd91e48a1fa817743a13f66c"


def test_what_changes_no_answer_is_left_out_as_cachesaver_does():
    assert key_of({"model": "m", "store": True, "stream": False}) == key_of({"model": "m"})
    assert key_of({"model": "m", "user": "u"}) != key_of({"model": "m"})


@given(st.lists(VALUES, max_size=4))
def test_the_order_and_the_repetition_of_items_do_not_count(items):
    assert deep_hash(items) == deep_hash([*items[::-1], *items])


def test_what_has_no_json_form_is_an_error():
    with pytest.raises(TypeError, match="cannot be computed from set"):
        key_of({"x": {1}})
