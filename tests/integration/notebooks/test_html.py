"""What a notebook shows of values and of progress."""

from __future__ import annotations

import re
from html import escape

import pytest

from cachepipe import TextCompletion
from cachepipe.chat.conversations import Conversation, Message
from cachepipe.flow.calls import FlowStats
from cachepipe.providers.info import Info
from cachepipe.stages import Stats


def shown_by(kernel, code):
    [output] = kernel.outputs(code)
    return output.data["text/html"]


def cells_of(html):
    """The texts in the cells of tables, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_a_notebook_shows_stats_info_and_completions_as_tables(kernel, tmp_path):
    kernel.run("pets = [await ask('cats') for _ in range(1234)]")
    assert ["misses", "1,234"] in cells_of(shown_by(kernel, "api.stats()"))
    kernel.run(
        "from cachepipe.testing import MockServer, MockSettings\n"
        "from cachepipe.clients import OpenAI\n"
        f"body = {{'model': 'ngram-1', 'cache': {str(tmp_path / 'c')!r}}}\n"
        "with MockServer.in_thread(MockSettings(seed=1)) as server:\n"
        "    where = {'api_key': 'none', 'base_url': server.base_url}\n"
        "    with OpenAI(cache=body['cache'], namespace='<b>', **where) as client:\n"
        "        messages = [{'role': 'user', 'content': 'Cats?'}]\n"
        "        answer = client.chat.completions.create(model='ngram-1', messages=messages, n=2)\n"
        "        service = cachepipe.Services.OpenAI(**where)\n"
        "        completion = cachepipe.generate_text_completion_sync('Tea?', **body, service=service)"
    )
    rows = cells_of(shown_by(kernel, "cachepipe.info(answer)"))
    assert ["namespace", "&lt;b&gt;"] in rows
    assert ["cached", "0 of 2"] in rows
    assert ["", "as asked", "billed", "saved"] in rows
    assert ["samples", "2", "2", "0"] in rows
    rows = cells_of(shown_by(kernel, "completion"))
    assert ["model", "ngram-1"] in rows
    assert ["cached", "False"] in rows
    assert rows[0] == ["answer", escape(kernel.run("print(completion.message)").strip())]
    assert ["calls", "1"] in cells_of(shown_by(kernel, "service.stats()"))


def test_a_notebook_shows_progress_as_a_bar(kernel):
    [shown] = kernel.outputs("done = cachepipe.lcall([1, 2], lambda number: number, show_progress=True)")
    assert shown.data["text/html"] == "&lt;lambda&gt; <progress value='2' max='2'></progress> 2/2"
    assert shown.data["text/plain"].endswith("2/2")


@pytest.mark.parametrize(
    "value",
    [
        Stats(),
        FlowStats(),
        Info("<i>", ("<i>",), "<i>", "<i>", "<i>"),
        Info(
            "<i>", ("<i>",), "<i>", None, None, cached=(True,), as_asked={"samples": 1}, billed={"samples": 0}
        ),
        TextCompletion(Conversation([Message("user", "<i>")]), "<i>", "<i>\u202e", 0.0, 1.0),
        TextCompletion(Conversation([Message("user", "u")]), "m", "", 0.0, 1.0, tool_calls=[{"id": "<i>"}]),
    ],
)
def test_all_text_in_tables_is_escaped(value):
    shown = value._repr_html_()
    assert shown.startswith("<table>")
    assert shown.endswith("</table>")
    assert "<i>" not in shown
    assert "\u202e" not in shown
