"""Messages and conversations: order, forms, and what is printed of them."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

from cachepipe import Chat, Conversation, Message, terminal

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}


def said(*roles):
    return Conversation([Message(role, f"{role} {place}") for place, role in enumerate(roles)])


# Order.


@pytest.mark.parametrize(
    "roles",
    [
        ["user", "assistant", "user", "assistant"],
        ["system", "user", "assistant"],
        ["system", "developer", "user"],
        ["system", "assistant", "user", "assistant"],
    ],
)
def test_messages_are_added_in_turn(roles):
    conversation = Conversation()
    for role in roles:
        conversation.add_message(Message(role, "…"))
    assert [message.role for message in conversation] == roles


@pytest.mark.parametrize(
    ("roles", "wrong", "told"),
    [
        (
            [],
            "assistant",
            "at the start .* expects .* 'system' or 'developer' or 'user'; got one by 'assistant'",
        ),
        (
            ["user"],
            "user",
            "after a message by 'user' .* expects a message by 'assistant'; got one by 'user'",
        ),
        (["user"], "system", "expects a message by 'assistant'"),
        (["user", "assistant"], "assistant", "expects a message by 'user'"),
        (["system"], "tool", "got one by 'tool'"),
    ],
)
def test_a_role_out_of_turn_is_refused_with_what_was_expected(roles, wrong, told):
    conversation = said(*roles)
    with pytest.raises(ValueError, match=told):
        conversation.add_message(Message(wrong, "…", tool_call_id="x"))
    assert len(conversation) == len(roles)


def test_calls_of_tools_are_answered_before_anything_else_is_said():
    conversation = said("user")
    conversation.add_message(Message("assistant", None, tool_calls=[CALL, {**CALL, "id": "c2"}]))
    with pytest.raises(ValueError, match="expects a message by 'tool'; got one by 'user'"):
        conversation.add_message("user:And?")
    with pytest.raises(ValueError, match="no open call of a tool has the id 'c9'; open are 'c1', 'c2'"):
        conversation.add_message(Message("tool", "3", tool_call_id="c9"))
    conversation.add_message(Message("tool", "3", tool_call_id="c2"))
    assert conversation.expected_roles() == ("tool",)
    conversation.add_message(Message("tool", "4", tool_call_id="c1"))
    conversation.add_message("assistant:Seven.")
    assert conversation.expected_roles() == ("user",)


# Messages.


def test_a_message_as_text_keeps_what_stands_after_the_first_colon():
    assert Message.of("user:a: b") == Message("user", "a: b")
    assert Message.of({"role": "user", "content": "a"}) == Message("user", "a")


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        ("Hello", ValueError, "begins with its role and a colon"),
        ("robot:Hello", ValueError, "begins with its role"),
        ({"content": "Hello"}, ValueError, "has a 'role'"),
        ({"role": "user", "content": "a", "colour": 1}, ValueError, "got colour"),
        ({"role": "user"}, TypeError, "is a string; got None"),
        ({"role": "user", "content": 3}, TypeError, "got 3"),
        ({"role": "robot", "content": ""}, ValueError, "got 'robot'"),
        ({"role": "tool", "content": ""}, ValueError, "give it tool_call_id="),
        (5, TypeError, "got 5"),
        (
            {"role": "user", "content": ["a"]},
            TypeError,
            "a part of a message's content is a mapping .* got 'a'",
        ),
        ({"role": "assistant", "tool_calls": ["a"]}, TypeError, "a call of a tool is a mapping .* got 'a'"),
        ({"role": "user", "content": "a", "name": 5}, TypeError, "name of a message is a string; got 5"),
        (
            {"role": "tool", "content": "a", "tool_call_id": 5},
            TypeError,
            "tool_call_id of a message is a string",
        ),
        (Message, TypeError, "a message is a Message, a mapping or a text"),
    ],
)
def test_what_is_no_message_is_refused(wrong, error, told):
    with pytest.raises(error, match=told):
        Message.of(wrong)


@pytest.mark.parametrize("wrong", ["user:Hello", None, 5, Message("user", "a"), {"role": "user"}], ids=repr)
def test_messages_that_are_no_list_are_refused(wrong):
    with pytest.raises(TypeError, match="the messages of a conversation are a list; got"):
        Conversation(wrong)
    with pytest.raises(TypeError, match="the messages of a conversation are a list; got"):
        Chat(messages=wrong)


def test_a_part_that_has_no_text_is_none_of_the_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": None}, {"type": "image_url"}]
    assert Message("user", parts).text == "a"


def test_a_message_of_an_sdk_is_taken_as_it_is_and_as_it_is_dumped():
    """As the SDK takes its own messages among those that are sent."""
    answer = {"role": "assistant", "content": "Rome", "annotations": [], "tool_calls": []}
    for said in (ChatCompletionMessage(**answer), ChatCompletionMessage(**answer).model_dump(), answer):
        assert Message.of(said) == Message("assistant", "Rome")
        assert Message.of(said).to_dict() == {"role": "assistant", "content": "Rome"}
    calling = ChatCompletionMessage(role="assistant", tool_calls=[CALL])
    assert Message.of(calling) == Message("assistant", None, tool_calls=[CALL])
    refusing = ChatCompletionMessage(role="assistant", refusal="I will not.")
    for said in (refusing, refusing.model_dump()):
        assert Message.of(said) == Message("assistant", "I will not.")


def test_a_message_is_taken_by_value():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]
    message = Message("user", parts)
    parts[0]["text"] = "b"
    assert message.text == "a"
    message.to_dict()["content"].clear()
    assert len(message.content) == 2


def test_a_copy_goes_on_by_itself():
    conversation = said("user")
    branch = conversation.copy()
    branch.add_message("assistant:Yes.")
    assert (len(conversation), len(branch)) == (1, 2)


# Forms.

texts = st.text(st.characters(), max_size=20)  # line separators and lone surrogates included
messages = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts),
    st.builds(
        Message, st.just("user"), st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}))
    ),
    st.builds(Message, st.just("assistant"), st.none(), tool_calls=st.just([CALL])),
    st.builds(Message, st.just("tool"), texts, tool_call_id=texts),
)


@given(st.lists(messages, max_size=5))
def test_a_conversation_comes_back_from_json_and_from_lines(said):
    conversation = Conversation(said)
    for text in (conversation.to_json(), conversation.to_jsonl()):
        text.encode()
    assert Conversation.from_json(conversation.to_json()) == conversation
    assert Conversation.from_jsonl(conversation.to_jsonl()) == conversation
    assert Conversation(conversation.to_messages()) == conversation


def test_a_file_of_lines_is_read(tmp_path):
    conversation = said("system", "user", "assistant")
    path = tmp_path / "talk.jsonl"
    path.write_text(conversation.to_jsonl() + "\n")
    with path.open() as file:
        assert Conversation.from_jsonl(file) == conversation
    assert Conversation.from_jsonl(path.read_bytes()) == conversation


def test_the_line_at_fault_is_named():
    with pytest.raises(ValueError, match=r"line 2 is not a message: .*got 'robot'"):
        Conversation.from_jsonl('{"role":"user","content":"a"}\n{"role":"robot","content":"a"}\n')
    with pytest.raises(ValueError, match="line 1 is not a message"):
        Conversation.from_jsonl("[1]")
    with pytest.raises(ValueError, match="as JSON is"):
        Conversation.from_json(json.dumps({"messages": 3}))
    with pytest.raises(ValueError, match=r"has an invalid message: .* got 1"):
        Conversation.from_json("[1]")


# For people.


def test_roles_have_colours_and_separators():
    shown = said("system", "user", "assistant").to_pretty_string(color=True)
    assert [re.findall(r"\x1b\[1;(\d+)m── (\w+) ─+\x1b\[0m", shown)] == [
        [("35", "system"), ("32", "user"), ("34", "assistant")]
    ]
    assert "\x1b[32muser 1\x1b[0m" in shown


def test_without_a_terminal_it_is_plain(monkeypatch):
    conversation = said("user")
    assert "\x1b" not in conversation.to_pretty_string()
    assert str(conversation).splitlines() == ["── user ".ljust(80, "─"), "user 0"]
    monkeypatch.setattr(terminal, "on_terminal", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" in conversation.to_pretty_string()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in conversation.to_pretty_string()


@given(texts)
def test_nothing_that_a_terminal_would_obey_is_printed(text):
    calls = [{"id": "1", "function": {"name": text, "arguments": text}}]
    said = [Message("user", text, name=text), Message("assistant", None, tool_calls=calls)]
    assert not terminal.UNSAFE.search(str(Conversation(said)))
