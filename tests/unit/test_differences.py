"""What differs between two questions, as people read it."""

import pytest

from cachepipe import wire
from cachepipe.contract.keys import provider_question
from cachepipe.differences import NO_VALUE, Difference, described, differences, traits
from cachepipe.providers.exchange import questions_of

DAYS = ("2026-12-01", "2026-11-30")
HERE = "https://here/v1/chat/completions"


def asked(scope=HERE, **body):
    body = {"model": "m", "messages": [{"role": "user", "content": "Cats or dogs?"}], **body}
    return provider_question(scope, {"body": {name: value for name, value in body.items() if value != "-"}})


def paths(one, other):
    return [found.path for found in differences(one.scope, one.document, other.scope, other.document)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"scope": "https://there/v1/chat/completions"}, ["scope"]),
        ({"temperature": 1}, ["temperature"]),
        ({"stop": ["a"], "top_p": 0.5}, ["stop", "top_p"]),
        ({"model": "other"}, ["model"]),
        ({"messages": [{"role": "user", "content": "Cats or dogs"}]}, ["messages[0].content"]),
        ({"messages": [{"role": "developer", "content": "Cats or dogs?"}]}, ["messages[0].role"]),
        ({"seed": 2**70}, ["seed"]),
        ({"logit_bias": None}, ["logit_bias"]),
    ],
)
def test_a_difference_names_the_place(changes, expected):
    assert paths(asked(), asked(**changes)) == expected
    assert paths(asked(**changes), asked()) == expected


def test_a_message_that_was_added_is_one_difference_wherever_it_stands():
    user, system = {"role": "user", "content": "Cats or dogs?"}, {"role": "system", "content": "Be brief."}
    one, other = asked(), asked(messages=[system, user])
    assert paths(one, other) == ["messages[0]"]
    assert paths(one, asked(messages=[user, system])) == ["messages[1]"]


def test_integers_beyond_64_bits_differ_by_one():
    assert paths(asked(seed=2**64 + 1), asked(seed=2**64)) == ["seed"]


def test_true_and_one_differ():
    assert paths(asked(top_k=True), asked(top_k=1)) == ["top_k"]


def test_a_setting_that_was_left_out_is_told_apart_from_null():
    assert str(Difference("temperature", 0.5, NO_VALUE)) == "temperature (asked: 0.5, stored: nothing)"
    assert str(Difference("temperature", NO_VALUE, None)).endswith("asked: nothing, stored: null)")


def test_long_texts_are_shown_from_where_they_part():
    before = "The quick brown fox jumps over the lazy dog. " * 50
    shown = str(Difference("prompt", before + "Yes?" + "!" * 500, before + "No?"))
    assert "'…e lazy dog. Yes?!!!" in shown
    assert "'…e lazy dog. No?'" in shown
    assert len(shown) < 200


def test_the_same_names_in_another_order_are_told_as_such():
    one = b'{"body":{"schema":{"a":1,"b":2}}}'
    other = b'{"body":{"schema":{"b":2,"a":1}}}'
    assert described(differences(None, one, None, other)) == "schema (the same names in another order)"


def test_c9_the_order_of_a_tools_parameters_is_told_as_such():
    def key(*names):
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        ask = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [tool]}
        return questions_of(wire.CHAT, wire.CHAT.split(ask), HERE, {})[0]

    assert paths(key("a", "b"), key("b", "a")) == ["tools[0].function.parameters.properties"]


def test_many_differences_are_counted():
    many = {f"x{number}": number for number in range(9)}
    found = differences(HERE, asked().document, HERE, asked(**many).document)
    assert described(found).endswith("; 5 more")


@pytest.mark.parametrize(
    "document", [b"", b"[]", b"1", b'{"body":[]}', b"[" * 5000, b'{"hash":"x"}', b'"\\ud800"']
)
def test_a_document_that_is_none_of_ours_still_has_differences_and_traits(document):
    assert differences(HERE, asked().document, HERE, document)
    assert traits(document)


def test_similar_questions_share_traits_and_others_do_not():
    def shared(one, other):
        return bool({*traits(one.document)} & {*traits(other.document)})

    long = "Explain in plain words why the sky of the earth is blue by day and red at dusk"
    say = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    assert shared(asked(), asked(temperature=1))
    assert shared(asked(), asked(messages=say("  cats OR dogs?\n")))
    assert shared(asked(messages=say(long)), asked(messages=say(long + ", in French")))
    assert shared(asked(messages=say(long)), asked(messages=say("Please. " + long)))
    assert not shared(asked(), asked(messages=say("Tea or coffee?")))


@pytest.mark.parametrize(
    ("path", "asked", "stored", "kind"),
    [
        ("scope", "https://a/v1/chat/completions", "http://b:8/x/v1/chat/completions", "host"),
        ("scope", "https://a/v1/chat/completions", "https://a/v1/embeddings", None),
        ("scope", "mine", "yours", None),
        ("temperature", 1, NO_VALUE, "default"),
        ("temperature", NO_VALUE, 1.0, "default"),
        ("temperature", 0, NO_VALUE, None),
        ("temperature", True, NO_VALUE, None),
        ("logprobs", NO_VALUE, False, "default"),
        ("logprobs", NO_VALUE, 0, None),
        ("response_format", {"type": "text"}, NO_VALUE, "default"),
        ("stop", None, NO_VALUE, "default"),
        ("tools[0].x", 1, NO_VALUE, None),
        ("messages[0].content", "It is 2026-12-01.", "It is 2026-11-30.", "date"),
        ("prompt", "Monday, December 1, 2026: go", "Sunday, 30 November 2026: go", "date"),
        ("prompt", "at 2026-12-01T09:30:00Z", "at 2026-12-01 10:31", "date"),
        ("prompt", "at 9:30 am", "at 10:45", "date"),
        ("prompt", "2 of 3", "2 of 4", None),
        ("prompt", "1.2.3", "1.2.4", None),
        ("schema", {"a": 1, "b": 2}, {"b": 2, "a": 1}, "order"),
    ],
)
def test_differences_that_leave_what_is_asked_as_it_is_are_recognised(path, asked, stored, kind):
    difference = Difference(path, asked, stored)
    assert difference.kind == kind
    assert difference.size == 0.5 if kind else difference.size >= 1
    assert difference.as_dict()["kind"] == kind


def test_such_a_difference_is_named():
    assert str(Difference("temperature", 1, NO_VALUE)) == (
        "temperature (the default, written out in one of them; asked: 1, stored: nothing)"
    )
    assert "(another date or time; asked: '…" in str(
        Difference("prompt", "Today is the day 2026-12-01", "Today is the day 2026-11-30")
    )
    assert "(another host; asked: " in str(Difference("scope", "https://a/v1/x", "https://b/v1/x"))


def test_questions_that_differ_in_a_date_share_traits():
    one, other = (asked(messages=[{"role": "user", "content": f"It is {day}. Hi"}]) for day in DAYS)
    assert {*traits(one.document)}.intersection(traits(other.document))
