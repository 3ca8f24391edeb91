"""C10 for Groq: its SDK through the proxy, its client with a cache and OpenAI's share samples."""

from __future__ import annotations

import pytest

from cachepipe.clients import OpenAI
from cachepipe.providers import presets
from cachepipe.providers.info import info
from cachepipe.proxy.settings import Upstream

groq = pytest.importorskip("groq")
from cachepipe.clients import Groq  # noqa: E402 - only with the SDK

ASK = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def test_c10_a_sample_of_one_surface_is_a_hit_on_the_others(serve, upstream, tmp_path):
    folder, place = str(tmp_path / "shared"), f"{upstream.url}/openai/v1"
    proxy = serve(upstreams=(Upstream.of("groq", place, mount="/openai/v1"),), cache=folder)
    ours = Groq(base_url=upstream.url, api_key="k", cache=folder, namespace="client")
    through = groq.Groq(base_url=f"{proxy.url}/ns/proxy@1", api_key="k", max_retries=0)
    openais = OpenAI(base_url=place, api_key="k", cache=folder, namespace="openai")
    with ours, through, openais:
        first = ours.chat.completions.create(**ASK)
        hit = through.chat.completions.create(**ASK)
        assert hit == first
        chunks = list(through.chat.completions.create(**ASK, temperature=0.5, stream=True))
        second = ours.chat.completions.create(**ASK, temperature=0.5)
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            == second.choices[0].message.content
        )
        assert chunks[-1].x_groq.usage == second.usage
        assert (
            openais.chat.completions.create(**ASK).choices[0].message.content
            == hit.choices[0].message.content
        )
        assert info(second).cached == (True,)
        with pytest.raises(groq.BadRequestError):
            through.chat.completions.create(**{**ASK, "messages": []})
    assert upstream.stats.samples_generated == 2


def test_c4_the_proxy_asks_a_provider_that_answers_one_choice_per_call_as_often_as_needed(
    serve, upstream, http, asked, monkeypatch
):
    row = presets.Preset("Mine", f"{upstream.url}/openai/v1", "MINE_API_KEY", max_n=1)
    monkeypatch.setitem(presets.PRESETS, "Mine", row)
    presets.at.cache_clear()
    proxy = serve(upstreams=(Upstream.of("mine", "mine"),))
    for run in "12":
        answer = http.post(f"{proxy.url}/ns/a@{run}/v1/chat/completions", json={**asked, "n": 3})
        assert len({choice["message"]["content"] for choice in answer.json()["choices"]}) == 3
    presets.at.cache_clear()
    assert upstream.stats.requests == upstream.stats.samples_generated == 3
