"""What several integration tests share."""

from __future__ import annotations

import inspect
import json

import httpx
import openai
import pytest


def _response(answer):
    if isinstance(answer, BaseException):
        raise answer
    if isinstance(answer, str):
        return httpx.Response(200, html=answer)
    if isinstance(answer, dict):
        body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", **answer}
        return httpx.Response(200, content=json.dumps(body), headers={"content-type": "application/json"})
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    events = [json.dumps({**chunk, "choices": [{"index": 0, **choice}]}) for choice in answer]
    stream = "".join(f"data: {event}\n\n" for event in (*events, "[DONE]"))
    return httpx.Response(200, text=stream, headers={"content-type": "text/event-stream"})


@pytest.fixture
def answering():
    """A function that makes a client of a real SDK which gets the given answers, one after the other.

    A mapping is the body of an answer, a list has the choices of a stream's chunks, a text is what a website
    would answer, and an error is raised in the place of an answer.
    """
    opened = []

    def make(*answers, kind=openai.OpenAI):
        left = iter(answers)
        transport = httpx.MockTransport(lambda _: _response(next(left)))
        waits = not inspect.iscoroutinefunction(kind.request)
        http_client = (httpx.Client if waits else httpx.AsyncClient)(transport=transport)
        client = kind(api_key="x", base_url="http://server/v1", http_client=http_client, max_retries=0)
        if waits:
            opened.append(client)
        return client

    yield make
    for client in opened:
        client.close()
