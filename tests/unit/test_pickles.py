"""The reader of pickles runs nothing, whatever a pickle holds; its time and memory follow from its size."""

from __future__ import annotations

import os
import pickle
import pickletools
import subprocess
import time

import pytest
from google.genai import types
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from profiles import sized

from cachepipe.importers import pickles
from cachepipe.importers.pickles import BadPickle, Instance, Plain, read

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_760_000_000,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]},
            "message": {"role": "assistant", "content": "hi\ud83d\ude00é", "reasoning": "extra"},
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    "from_the_server": {"extra": [1, 2.5, None, True]},
}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each) | st.tuples(each, each),
    max_leaves=8,
)


class Reduced:
    """An object whose pickle calls a function with arguments."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def plain(data):
    return Plain(64 * len(data) + 1000).of(read(data))


def test_c12_an_answer_becomes_the_json_that_the_sdk_has_parsed():
    answer = ChatCompletion.construct(**ANSWER)
    answer._request_id = "req-1"
    for protocol in (4, 5):  # diskcache writes 5
        assert plain(pickle.dumps([answer, answer], protocol=protocol)) == [ANSWER, ANSWER]


@given(PLAIN, st.integers(3, 5))  # lower protocols write bytes as a call of a function
def test_plain_values_come_back(value, protocol):
    assert plain(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "hostile",
    [
        Reduced(os.system, ("touch owned",)),
        Reduced(subprocess.run, (["touch", "owned"],)),
        Reduced(eval, ("open('owned', 'w')",)),
        Reduced(print, ("owned",)),
    ],
)
def test_c12_a_pickle_that_runs_something_is_refused(hostile, protocol, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadPickle, match="which is not a class of an answer"):
        read(pickle.dumps([hostile], protocol))
    assert [*tmp_path.iterdir()] == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"cos\nsystem\n(S'touch owned'\ntR.", "names os.system"),
        (b"(Vtouch owned\nios\nsystem\n.", "the opcode INST"),
        (b"copenai.types.chat\nChatCompletion\n(S'x'\ntR.", "the opcode"),
        (b"copenai.types.chat\nChatCompletion\n)R.", "the opcode REDUCE"),
        (b"cgoogle.genai.types\nFinishReason\n)R.", "the opcode REDUCE"),
        (b"cgoogle.genai.types\nFinishReason\n(VSTOP\nVx\ntR.", "the opcode REDUCE"),
        (b"cgoogle.genai.types\nFinishReason\n(cgoogle.genai.types\nPart\ntR.", "the opcode REDUCE"),
        (b"cgoogle.genai.types\nFinishReason\nVSTOP\nR.", "the opcode REDUCE"),
        (b"VSTOP\n(VSTOP\ntR.", "the opcode REDUCE"),
        (b"cgoogle.genai.client\nClient\n(VSTOP\ntR.", "names google.genai.client.Client"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "it holds tensors"),
        (b"\x80\x02copenai.types.chat\nChatCompletion\nK\x01\x85\x81.", "an instance with arguments"),
        (b"\x80\x02copenai.types.chat os\nsystem\n.", "names openai.types.chat.os system"),
        (b"\x80\x02copenai.types\n__subclasses__\n.", "names openai.types.__subclasses__"),
        (b"\x80\x02copenai\nos\n.", "names openai.os"),
        (b"P1\n.", "the opcode PERSID"),
        (b"\x80\x02\x82\x01.", "the opcode EXT1"),
        (b"\x80\x05]K\x01K\x02s.", "something else than a mapping"),
        (b"\x80\x05]}b.", "the state of something else than an answer"),
        (b"\x80\x05]", "is damaged"),
        (b"", "is damaged"),
        (b"\x80\x05.", "is damaged"),
        (b"\x80\x05h\x07.", "is damaged"),
        (b"\x80\x05\x8d\xff\xff\xff\xff\xff\xff\xff\x00.", "is damaged"),
        (b"\x80\x05(0.", "is damaged"),
        (b"\x80\x05}K\x01K\x01s.", "whose keys are not strings"),
    ],
)
def test_c12_what_is_not_data_is_refused_in_a_sentence(data, told):
    with pytest.raises(BadPickle, match=told):
        read(data)


def test_a_member_of_an_enumeration_of_google_is_its_string():
    assert read(pickle.dumps([types.FinishReason.STOP])) == ["STOP"]


def test_c12_deep_nesting_and_cycles_are_refused():
    for data in (b"\x80\x05" + b"]" * 100_000 + b"a" * 99_999 + b".", b"\x80\x05]\x94h\x00a."):
        value = read(data)
        with pytest.raises(BadPickle, match="levels deep"):
            Plain(1 << 30).of(value)


def test_c12_a_bomb_of_references_is_refused_before_it_expands():
    value = ["x" * 1000]
    for _ in range(60):
        value = [value, value]
    data = pickle.dumps(value)
    assert len(data) < 2000
    begun = time.process_time()
    with pytest.raises(BadPickle, match="much more than its own size"):
        plain(data)
    assert time.process_time() - begun < 1


def test_c12_any_bytes_are_data_or_an_error():
    answer = pickle.dumps([ChatCompletion.construct(**ANSWER)])
    for place in range(0, len(answer), sized(7, 1)):
        for change in (answer[:place], answer[:place] + bytes([answer[place] ^ 0x55]) + answer[place + 1 :]):
            try:
                plain(change)
            except BadPickle:
                continue


def test_only_data_opcodes_are_known():
    runs = {
        "OBJ",
        "INST",
        "NEWOBJ_EX",
        "PERSID",
        "BINPERSID",
        "EXT1",
        "EXT2",
        "EXT4",
        "NEXT_BUFFER",
    }
    known = {*pickles._OPCODES, *pickles._VALUES, "STOP"}
    assert known.isdisjoint(runs)
    assert known <= {opcode.name for opcode in pickletools.opcodes}
    assert isinstance(read(b"\x80\x02copenai.types.chat\nChatCompletion\n)\x81."), Instance)
