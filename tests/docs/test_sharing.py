"""The examples of the page about sharing print what the page says."""

from __future__ import annotations

import json

from pages import Page

PAGE = Page("sharing.md")


def test_the_examples_print_what_the_page_shows(tmp_path):
    (tmp_path / "roll.py").write_text(PAGE.block("example: program"))
    PAGE.check(("export", "import", "layers", "commands", "merge"), tmp_path)
    assert PAGE.printed("python", tmp_path) == PAGE.block("prints: python")


def test_a_batch_is_imported_as_the_page_shows(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body} for name in "abc"
    ]
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}
    answer = {"object": "chat.completion", "created": 1_760_000_000, "model": "m", "choices": [choice]}
    refusal = {"error": {"code": "content_policy", "message": "Not allowed."}}
    results = [(name, 200, {"id": name, **answer}) for name in "ab"] + [("c", 400, refusal)]
    rows = [
        {"id": f"batch_{name}", "custom_id": name, "response": {"status_code": status, "body": content}}
        for name, status, content in results
    ]
    for file, each in {"input": lines, "output": rows[:2], "errors": rows[2:]}.items():
        (tmp_path / f"{file}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in each))
    PAGE.check(("batch",), tmp_path)
