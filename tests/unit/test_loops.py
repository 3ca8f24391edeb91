"""Without an asyncio loop, as under trio, every asynchronous surface says that it needs one."""

from __future__ import annotations

import pytest

from cachepipe import (
    AsyncBatcher,
    AsyncCacher,
    AsyncDeduplicator,
    Batch,
    Chat,
    LocalAPI,
    MemoryStore,
    OnlineAPI,
    Request,
    Response,
    Service,
    Session,
    alcall,
    generate_text_completion,
)
from cachepipe.batch import run_file
from cachepipe.clients import AsyncOpenAI
from cachepipe.models import OpenAIModel

ASK = Request("hello")


class Model:
    """A model that needs no loop itself."""

    model = "m"

    async def request(self, request):
        return Response(["hi"] * request.n)


def endpoint():
    return {"base_url": "http://127.0.0.1:9/v1", "api_key": "k"}


def client():
    return AsyncOpenAI(**endpoint(), cache=MemoryStore())


def asked(**more):
    messages = [{"role": "user", "content": "hello"}]
    return client().chat.completions.create(model="m", messages=messages, **more)


async def nothing(_):
    return None


WAYS = {
    "pipeline": lambda: OnlineAPI(Model(), MemoryStore()).request(ASK),
    "batch": lambda: OnlineAPI(Model(), MemoryStore()).batch_request(Batch([ASK])),
    "local pipeline": lambda: LocalAPI(Model(), MemoryStore()).request(ASK),
    "closing": lambda: OnlineAPI(Model(), MemoryStore()).close(),
    "deduplicator": lambda: AsyncDeduplicator(Model()).request(ASK),
    "cacher": lambda: AsyncCacher(Model(), MemoryStore()).request(ASK),
    "batcher": lambda: AsyncBatcher(Model()).request(ASK),
    "adapter": lambda: OpenAIModel(model="m", **endpoint()).request(ASK),
    "client": asked,
    "stream": lambda: asked(stream=True),
    "closing a client": lambda: client().close(),
    "session": lambda: Session(service=Service(**endpoint(), model="m"), cache=MemoryStore()).initiate("hi"),
    "session of a client": lambda: Session(client=client()).initiate("hi"),
    "closing a service": lambda: Service(**endpoint(), model="m").close(),
    "completion": lambda: generate_text_completion("hi", **endpoint(), cache=MemoryStore()),
    "chat": lambda: Chat(messages=["user:hi"], **endpoint(), cache=MemoryStore()).acomplete(),
    "alcall": lambda: alcall([1], nothing),
    "batch file": lambda: run_file(__file__, "/nowhere/out.jsonl"),
}


@pytest.mark.parametrize("way", WAYS)
def test_without_an_asyncio_loop_the_error_says_that_asyncio_is_needed_and_what_to_do(way):
    """Another library steps through a coroutine as is done here, with no loop of asyncio's."""
    with pytest.raises(RuntimeError, match=r"needs asyncio.*trio.*asyncio\.run"):
        WAYS[way]().send(None)
