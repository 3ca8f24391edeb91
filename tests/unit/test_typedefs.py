"""Requests, batches and responses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from collections import OrderedDict
from dataclasses import dataclass

import pytest

from cachepipe import Batch, Request, Response
from cachepipe.typedefs import BatchRequestModel, SingleRequestModel

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "why?"}]}, ("a", ["b"]), b"c", None]


@dataclass(frozen=True)
class Chat(Request):
    model: str  # no default, after fields that have one
    temperature: float = 1
    max_completion_tokens: int = None
    stop: list[str] | None = None


@dataclass(frozen=True)
class Vision(Chat):
    detail: str = "low"


def chat(**changes):
    return Chat(copy.deepcopy(MESSAGES), **{"model": "m", "stop": ["\n"], **changes})


# Frozen, and by value.


@pytest.mark.parametrize("name", ["prompt", "n", "request_id", "namespace", "other"])
def test_a_request_is_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Request("x"), name, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(Request("x"), name)


def test_what_the_caller_changes_later_changes_nothing():
    prompt, stop = copy.deepcopy(MESSAGES), ["\n"]
    request = Chat(prompt, model="m", stop=stop)
    before = copy.deepcopy(request.prompt)
    prompt[0]["content"][0]["text"] = "because"
    prompt[1][1].append("more")
    prompt.append("more")
    stop.clear()
    assert request.prompt == before == MESSAGES
    assert request.stop == ["\n"]


@pytest.mark.parametrize(
    "value", ["text", 1, 1.5, True, None, b"bytes", (1, [2]), [1, (2,)], {"a": {"b": []}}, OrderedDict(a=[1])]
)
def test_values_reach_the_adapter_in_the_types_that_they_came_in(value):
    prompt = Request(value).prompt
    assert prompt == value
    assert type(prompt) is type(value)


def test_nested_values_keep_their_types_too():
    prompt = Request(MESSAGES).prompt
    assert [type(part) for part in prompt] == [dict, tuple, bytes, type(None)]
    assert type(prompt[0]["content"][0]) is dict
    assert type(prompt[1][1]) is list


def test_asking_shares_nothing_mutable_and_changes_only_n():
    request = chat(request_id="a", namespace="b")
    more = request.asking(5)
    assert type(more) is Chat
    assert (more.n, more.request_id, more.namespace, more.model) == (5, "a", "b", "m")
    more.prompt[0]["role"] = "system"
    assert request.prompt == MESSAGES


# Fields that are not there.


@pytest.mark.parametrize("request_", [Request("x"), chat()], ids=["base", "subclass"])
def test_a_public_field_that_is_not_there_reads_none(request_):
    assert request_.top_p is None
    assert (request_.presence_penalty or None) is None
    assert getattr(request_, "logprobs", "default") is None


@pytest.mark.parametrize("name", ["_private", "__deepcopy__x", "__getstate_x__", "_repr_html_"])
def test_a_private_one_is_an_attribute_error(name):
    assert not hasattr(Request("x"), name)
    with pytest.raises(AttributeError, match=name):
        getattr(chat(), name)


@pytest.mark.parametrize(
    "make", [Request, lambda *a, **k: Chat(*a, model="m", **k)], ids=["base", "subclass"]
)
def test_a_keyword_that_no_field_takes_is_a_type_error(make):
    with pytest.raises(TypeError):
        make("x", temperatur=1)
    with pytest.raises(TypeError):
        make("x", 5, 6, 7, 8, 9)


def test_subclass_fields_may_lack_defaults_and_stand_right_after_the_prompt():
    assert Chat("x", "gpt").model == "gpt"
    with pytest.raises(TypeError, match="model"):
        Chat("x")
    assert (Vision("x", "gpt").detail, Vision("x", "gpt", n=2).n) == ("low", 2)


# Copies, pickles, hashes, equality.


@pytest.mark.parametrize(
    "request_", [Request("x"), Request(MESSAGES, n=2, request_id="r"), chat(), chat(n=3)]
)
@pytest.mark.parametrize(
    "same",
    [
        copy.copy,
        copy.deepcopy,
        dataclasses.replace,
        *(
            lambda value, p=p: pickle.loads(pickle.dumps(value, p))
            for p in range(2, pickle.HIGHEST_PROTOCOL + 1)
        ),
    ],
)
def test_a_copy_is_equal_and_hashes_alike(request_, same):
    other = same(request_)
    assert type(other) is type(request_)
    assert other == request_
    assert hash(other) == hash(request_)
    assert len({other, request_}) == 1
    assert other.top_p is None
    assert repr(other) == repr(request_)


def test_equal_values_hash_alike_whatever_their_types():
    first = Request({"a": 1, "b": [1, 2.0]})
    second = Request(OrderedDict([("b", [1.0, 2]), ("a", True)]))
    assert first == second
    assert hash(first) == hash(second)


def test_requests_differ_in_each_field_and_in_class():
    base = chat()
    others = [
        chat(n=2),
        chat(request_id="a"),
        chat(namespace="a"),
        chat(model="other"),
        chat(temperature=0.5),
        chat(stop=None),
        Chat("x", model="m", stop=["\n"]),
        Vision(MESSAGES, model="m", stop=["\n"]),
    ]
    assert all(other != base for other in others)
    assert len({base, *others}) == len(others) + 1


def test_a_subclass_may_bring_its_own_hash():
    @dataclass(frozen=True)
    class Own(Request):
        def __hash__(self):
            return 7

    assert hash(Own("x")) == 7


def test_a_value_without_a_hash_is_no_hindrance():
    assert hash(Request({1, 2})) == hash(Request({2, 1}))
    assert Request({1, 2}) == Request({2, 1})


# What is refused.


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_sample_is_refused(n):
    with pytest.raises(ValueError, match="at least 1"):
        Request("x", n=n)


@pytest.mark.parametrize("n", [1.0, "1", None, True, [1]])
def test_an_n_that_is_no_whole_number_is_refused(n):
    with pytest.raises(TypeError, match="n must be a whole number"):
        Request("x", n=n)


def test_an_n_with_an_index_becomes_a_plain_number():
    class Five:
        def __index__(self):
            return 5

    assert type(Request("x", n=Five()).n) is int


@pytest.mark.parametrize("name", ["request_id", "namespace"])
@pytest.mark.parametrize("value", [1, b"a", ("a",), 1.5])
def test_an_id_that_is_no_string_is_refused_with_what_to_write(name, value):
    with pytest.raises(TypeError, match=rf"{name}=str\("):
        Request("x", **{name: value})


# Batches.


def test_a_batch_owns_its_list():
    requests = [Request("a"), Request("b")]
    batch = Batch(requests=requests)
    requests.clear()
    assert [request.prompt for request in batch] == ["a", "b"]
    assert len(batch) == 2
    assert batch == Batch([Request("a"), Request("b")])
    assert Batch(request for request in [Request("a")]).requests == [Request("a")]
    assert Batch([]).requests == []


def test_a_batch_holds_requests_only():
    with pytest.raises(TypeError, match=r"Request\(prompt"):
        Batch([Request("a"), "b"])


# Responses.


def test_a_response_is_a_tuple_of_three():
    response = Response(["a"], [True], [False])
    data, cached, duplicated = response
    assert (data, cached, duplicated) == (["a"], [True], [False])
    assert len(response) == 3
    assert response == (["a"], [True], [False])
    assert Response._fields == ("data", "cached", "duplicated")
    assert Response(["a"]) == (["a"], None, None)
    assert Response(data=["a"], cached=None, duplicated=None).data == ["a"]


def test_its_repr_shows_these_three():
    response = Response(["a"], [True])
    response.indices, response.key = (4,), "k2-x"
    assert repr(response) == "Response(data=['a'], cached=[True], duplicated=None)"


def whole():
    response = Response(["a"], [True], [False])
    response.indices, response.key = (4,), "k2-x"
    return response


@pytest.mark.parametrize(
    "same",
    [
        copy.copy,
        copy.deepcopy,
        lambda value: pickle.loads(pickle.dumps(value)),
        lambda value: value._replace(),
    ],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
def test_a_copy_of_a_response_keeps_indices_and_key(same):
    other = same(whole())
    assert type(other) is Response
    assert other == whole()
    assert (other.indices, other.key) == ((4,), "k2-x")


def test_replace_changes_what_it_is_told():
    other = whole()._replace(duplicated=[True])
    assert other == (["a"], [True], [True])
    assert other.indices == (4,)
    assert Response(["a"]).indices is Response(["a"]).key is None


def test_the_protocols_tell_models_apart():
    class Single:
        async def request(self, request): ...

    class Batched:
        async def batch_request(self, batch): ...

    assert isinstance(Single(), SingleRequestModel)
    assert not isinstance(Single(), BatchRequestModel)
    assert isinstance(Batched(), BatchRequestModel)


@dataclass(frozen=True, slots=True)
class Slotted(Request):
    options: object = None
    stop: str | None = None


def test_a_request_for_fewer_samples_is_the_same_but_for_those():
    for request in (
        Slotted([["a"]], n=3, options={"b": [1]}, stop="x"),
        Request({"a": ["b"]}, n=3, namespace="c"),
    ):
        fewer, same = request.asking(2), request.asking(3)
        assert (type(fewer), fewer.n, request.n) == (type(request), 2, 3)
        assert fewer == dataclasses.replace(request, n=2)
        for name, other in itertools.product(("prompt", "options"), (fewer, same)):
            assert getattr(request, name) is None or getattr(other, name) is not getattr(request, name)
        assert fewer.asking(3) == same == request
