"""C10 for Anthropic's messages: the proxy, the client with a cache and the adapter share samples."""

from __future__ import annotations

import anthropic
import pytest

from cachepipe import OnlineAPI, Request
from cachepipe.clients import AsyncAnthropic
from cachepipe.models import AnthropicModel
from cachepipe.providers.info import info
from cachepipe.proxy.settings import Upstream

ASK = {"model": "m", "max_tokens": 12, "messages": [{"role": "user", "content": "hello"}]}


async def streamed(client, **options):
    async with client.messages.stream(**ASK, **options) as stream:
        return (await stream.get_final_message()).content[0].text


@pytest.mark.anyio
async def test_c10_a_sample_of_one_surface_is_a_hit_on_the_others(serve, upstream, tmp_path):
    folder = str(tmp_path / "shared")
    proxy = serve(upstreams=(Upstream.of("claude", upstream.url, kind="anthropic"),), cache=folder)
    beta = {"extra_headers": {"anthropic-beta": "one"}}
    ours = AsyncAnthropic(base_url=upstream.url, api_key="k", cache=folder, namespace="client")
    through = anthropic.AsyncAnthropic(base_url=f"{proxy.url}/ns/proxy@1", api_key="k", max_retries=0)
    model = AnthropicModel("m", max_tokens=12, base_url=upstream.url, api_key="k")
    async with ours, through, model, OnlineAPI(model, folder) as pipeline:
        first = await ours.messages.create(**ASK)
        assert (await streamed(through)) == first.content[0].text
        assert (await pipeline.request(Request("hello"))).data == [first.content[0].text]
        assert upstream.stats.requests == 1
        second = await through.messages.create(**ASK, **beta)
        hit = await ours.messages.create(**ASK, **beta)
        assert hit == second
        assert info(hit).cached == (True,)
        assert upstream.stats.requests == 2
