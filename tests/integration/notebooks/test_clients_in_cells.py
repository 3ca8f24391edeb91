"""Clients, completions and sessions in cells."""

from __future__ import annotations

import pytest

CLIENTS = """
from cachepipe.clients import AsyncOpenAI, OpenAI
from cachepipe.testing import MockServer, MockSettings

running = MockServer.in_thread(MockSettings(seed=1, max_tokens=4))
server = running.__enter__()
where = {"api_key": "none", "base_url": server.base_url, "cache": FOLDER}
client, async_client = OpenAI(**where), AsyncOpenAI(**where)
options = {**where, "model": "ngram-1", "show_progress": False}
service = cachepipe.Services.OpenAI(api_key="none", base_url=server.base_url)
body = {"model": "ngram-1", "messages": [{"role": "user", "content": "Cats or dogs?"}]}
"""
SYNC = """
answer = client.chat.completions.create(**body)
print(answer.choices[0].message.content, cachepipe.info(answer).request_id)
"""
ASYNC = """
answers = await asyncio.gather(*(async_client.chat.completions.create(**body) for _ in range(3)))
print([answer.choices[0].message.content for answer in answers], cachepipe.info(answers[0]).request_id)
"""
STREAM = """
with client.chat.completions.create(**body, stream=True) as stream:
    print("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
print(cachepipe.info(stream).request_id)
"""
COMPLETIONS = """
completions = cachepipe.generate_text_completions_sync(["Tea?", "Tea?", "Coffee?"], **options)
print([(completion.message, completion.request_id) for completion in completions])
"""
SESSION = """
session = cachepipe.Session(llmconfig={"model": "ngram-1"}, service=service, cache=where["cache"])
print(await session.initiate("Mountains?"), await session.followup("Sea?"), session.info.request_id)
"""
CHAT = """
chat = cachepipe.Chat(**where, model="ngram-1").add("user:Tea?")
print(chat.complete())
with chat.add("user:Coffee?").stream() as stream:
    print("".join(stream))
print(cachepipe.info(answer).request_id)
"""
USING = """
with cachepipe.using(request_id="mine"):
    print(client.chat.completions.create(**body).choices[0].message.content)
"""


@pytest.fixture
def clients(kernel, tmp_path):
    """A kernel with clients of a mock server."""
    kernel.run(CLIENTS.replace("FOLDER", repr(str(tmp_path / "clients"))), "clients")
    yield kernel
    kernel.run("client.close()\nawait async_client.close()\nrunning.__exit__(None, None, None)", "close")


@pytest.mark.parametrize("code", [SYNC, ASYNC, STREAM, COMPLETIONS, SESSION, SYNC + CHAT])
def test_a_cell_that_is_run_again_makes_no_requests_and_other_cells_draw_their_own(clients, code):
    first = clients.run(code, "one")
    requests = clients.run("server.stats.requests")
    other = clients.run(code, "two")
    paid = clients.run("server.stats.requests")
    assert int(paid) == 2 * int(requests)
    assert "cell:one" in first
    assert "cell:two" in other
    assert clients.run(code, "one") == first
    assert clients.run(code, "two") == other
    assert clients.run("server.stats.requests") == paid


def test_cells_without_lasting_ids_draw_their_own_of_a_list_with_equal_prompts(clients):
    """Whose request ids are numbered."""
    ids = [f"vscode-notebook-cell:{name}" for name in ("one", "two")]
    code = "texts = [completion.message for completion in completions]\nprint(texts)"
    first, second = (clients.run(COMPLETIONS + code, cell_id).splitlines()[-1] for cell_id in ids)
    assert len({*eval(first), *eval(second)}) == 6  # noqa: S307 - it is a list of strings
    assert [clients.run(COMPLETIONS + code, cell_id).splitlines()[-1] for cell_id in ids] == [first, second]


def test_a_request_id_of_using_overrides_the_cells(clients):
    assert clients.run(USING, "one") == clients.run(USING, "two")
    assert clients.run("server.stats.requests") == "1"
