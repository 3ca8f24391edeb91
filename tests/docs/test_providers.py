"""The page about providers: its examples print what it shows, and its table is that of the code."""

from __future__ import annotations

import contextlib
import io
import re
import shlex

import pytest
import stubs
from click.testing import CliRunner
from pages import DOCS, Page

from cachepipe.cli.group import cli
from cachepipe.providers.presets import PRESETS
from cachepipe.proxy.settings import Upstream
from cachepipe.testing import MockServer, MockSettings

PAGE = Page("providers.md")
TEXT = (DOCS / "providers.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```\n\n```\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(autouse=True, name="server")
def _server(tmp_path, monkeypatch):
    """Every provider is the mock server, and the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    with MockServer.in_thread(MockSettings(seed=1, max_tokens=12)) as server:
        for row in PRESETS.values():
            monkeypatch.setenv(row.variable, server.url if row.sdk == "groq" else server.base_url)
            monkeypatch.setenv(row.key, "any")
        monkeypatch.delenv("OLLAMA_HOST", raising=False)
        yield server


@pytest.mark.parametrize(("code", "printed"), [pytest.param(c, p, id=name) for name, c, p in EXAMPLES])
def test_an_example_prints_what_the_page_shows(code, printed):
    if "Groq(" in code:
        pytest.importorskip("groq")
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(code, "providers.md", "exec"), {"__name__": "example"})  # noqa: S102 - it is our own page
    assert told.getvalue() == printed


def test_the_commands_run_and_the_second_one_asks_nothing(server, tmp_path, monkeypatch):
    commands, _ = PAGE.session("commands")
    line, _, file = commands[0].removeprefix("echo ").partition(" > ")
    (tmp_path / file).write_text(f"{shlex.split(line)[0]}\n", encoding="utf-8")
    for command in commands[1:]:
        done = CliRunner().invoke(cli, shlex.split(command)[1:])
        assert (done.exit_code, done.output, server.stats.requests) == (0, "", 1)
        monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)


def test_the_proxy_is_where_the_page_says(monkeypatch):
    for row in PRESETS.values():
        monkeypatch.delenv(row.variable)
    shown = PAGE.block("shown: serve")
    for name in re.findall(r"--upstream (\w+)", shown):
        upstream = Upstream.of(name, name)
        assert f"{upstream.mount} in front of {upstream.url}" in shown


def test_the_tables_are_those_of_the_code_and_of_the_tests_of_the_clients():
    assert stubs.page(TEXT) == TEXT, "run: python tests/stubs.py"
