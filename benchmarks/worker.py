"""One cache in a process of its own environment: ``python worker.py NAME``, lines of JSON in and out.

Needs the standard library and the cache in question. Each line asks for one thing:

    {"do": "open", "folder": …, "base_url": …, "in_flight": …}
        opens the cache in the folder, in front of the server; closes one that was open.
    {"do": "ask", "asks": [{"messages": […], "n": 1, "id": "0"}, …], "namespace": …, "in_flight": 1}
        asks all of it, so many at once, and returns the seconds that this took (after a garbage
        collection, and without preparing what can be prepared), the texts per ask or null, and the errors.
        An ask may name a namespace of its own.
    {"do": "race", "slow": {ask}, "known": {ask}}
        begins the slow ask, and returns the seconds that the known one takes meanwhile.

Each cache is used as its documentation shows: its drop-in client where it has one, its disk cache, and the
settings that let it go as fast as it can with so many in flight.
"""

# ruff: noqa: ARG002, PLC0415 - peers are imported where they are, and need different things to be opened

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

MODEL = "mock"
SETTINGS: dict[str, Any] = {"temperature": 0.7, "max_completion_tokens": 400}


class Peer:
    """A cache in front of a chat API."""

    distribution = "openai"

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        """Open the cache in a folder; called once per folder and process, or again for a rerun."""
        raise NotImplementedError

    def prepared(self, ask: dict[str, Any], namespace: str) -> Any:
        """Return what a caller would have at hand: the messages as this cache takes them."""
        return ask, namespace

    async def ask(self, prepared: Any) -> list[str]:
        """Return the texts of one ask."""
        raise NotImplementedError

    async def close(self) -> None:
        """Write what is left."""

    def rerun(self) -> Any:
        """Return the context in which requests are counted from the front again."""
        return contextlib.nullcontext()


def _client(kind: Any, base_url: str, **options: Any) -> Any:
    return kind(base_url=base_url, api_key="none", max_retries=0, **options)


def _texts(completion: Any) -> list[str]:
    return [choice.message.content for choice in completion.choices]


class Bare(Peer):
    """The SDK's own client, which is the control."""

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        import openai

        self.client = _client(openai.AsyncOpenAI, base_url)

    async def ask(self, prepared: Any) -> list[str]:
        ask, _ = prepared
        return _texts(
            await self.client.chat.completions.create(
                messages=ask["messages"], model=MODEL, n=ask["n"], **SETTINGS
            )
        )


class Memory(Bare):
    """The floor of a warm hit: the SHA-256 of the sorted JSON of the body, a dict, the SDK's object."""

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        import orjson
        from openai.types.chat import ChatCompletion

        super().open(folder, base_url, in_flight)
        self.dumps, self.option, self.kind = orjson.dumps, orjson.OPT_SORT_KEYS, ChatCompletion
        self.known: dict[bytes, bytes] = {}

    async def ask(self, prepared: Any) -> list[str]:
        ask, _ = prepared
        body = {"messages": ask["messages"], "model": MODEL, "n": ask["n"], **SETTINGS}
        key = hashlib.sha256(self.dumps(body, option=self.option)).digest()
        known = self.known.get(key)
        if known is None:
            completion = await self.client.chat.completions.create(**body)
            self.known[key] = completion.model_dump_json().encode()
            return _texts(completion)
        return _texts(self.kind.model_validate_json(known))


class Cachepipe(Peer):
    """Our drop-in client."""

    distribution = "cachepipe"

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        import cachepipe
        from cachepipe.clients import AsyncOpenAI

        self.using, self.rerun = cachepipe.using, cachepipe.run  # type: ignore[method-assign,assignment]
        self.client = _client(AsyncOpenAI, base_url, cache=folder)
        self.clients: dict[str, Any] = {}

    def prepared(self, ask: dict[str, Any], namespace: str) -> Any:
        if namespace not in self.clients:
            self.clients[namespace] = self.client.with_options(namespace=namespace)
        # Request ids are given only where several draws of one question have to be told apart.
        return self.clients[namespace], ask, ask.get("id")

    async def ask(self, prepared: Any) -> list[str]:
        client, ask, name = prepared
        n = {"n": ask["n"]} if ask["n"] > 1 else {}
        if name is None:
            return _texts(
                await client.chat.completions.create(messages=ask["messages"], model=MODEL, **n, **SETTINGS)
            )
        with self.using(request_id=name):
            return _texts(
                await client.chat.completions.create(messages=ask["messages"], model=MODEL, **n, **SETTINGS)
            )

    async def close(self) -> None:
        for client in self.clients.values():
            await client.close()
        await self.client.close()


class CacheSaver(Peer):
    """CacheSaver's drop-in client; its batch is as large as what is in flight, else it goes one by one."""

    distribution = "cachesaver"

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        from cachesaver.models.openai import AsyncOpenAI

        self.client = AsyncOpenAI(
            cachedir=folder,
            batch_size=in_flight,
            timeout=0.02 if in_flight > 1 else None,
            base_url=base_url,
            api_key="none",
            max_retries=0,
        )

    async def ask(self, prepared: Any) -> list[str]:
        ask, namespace = prepared
        return _texts(  # it numbers the requests; ids of one's own must be unique in a batch
            await self.client.chat.completions.create(
                messages=ask["messages"], model=MODEL, n=ask["n"], namespace=namespace, **SETTINGS
            )
        )

    async def close(self) -> None:
        await self.client.pipeline.cleanup()


class CacheSaverPipeline(Peer):
    """CacheSaver's pipeline around a model that answers at once; the text is the question's, repeated."""

    distribution = "cachesaver"

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        from cachesaver.pipelines import OnlineAPI
        from cachesaver.typedefs import Request, Response
        from diskcache import Cache

        class Model:
            async def request(self, request: Any) -> Any:
                return Response([f"answer to {request.kwargs['messages'][-1]['content']}"] * request.n)

            async def batch_request(self, batch: Any) -> Any:
                return [await self.request(request) for request in batch.requests]

        self.kind = Request
        self.pipeline = OnlineAPI(
            Model(),
            Cache(folder, timeout=60),
            in_flight,
            timeout=0.02 if in_flight > 1 else -1,  # type: ignore[arg-type]
            allow_batch_overflow=True,
        )
        self.numbers = 0

    def prepared(self, ask: dict[str, Any], namespace: str) -> Any:
        self.numbers += 1
        return self.kind(
            (), {"messages": ask["messages"], **SETTINGS}, ask["n"], str(self.numbers), namespace
        )

    async def ask(self, prepared: Any) -> list[str]:
        texts: list[str] = (await self.pipeline.request(prepared)).data
        return texts

    async def close(self) -> None:
        await self.pipeline.cleanup()


class DSPy(Peer):
    """dspy's LM with its disk cache; ``rollout_id`` is its way to tell draws of one question apart."""

    distribution = "dspy"

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        os.environ["DSPY_CACHEDIR"] = folder
        import dspy

        dspy.configure_cache(disk_cache_dir=folder, disk_size_limit_bytes=10**10)  # forgets what is in memory
        self.model = dspy.LM(
            f"openai/{MODEL}", api_base=base_url, api_key="none", cache=True, num_retries=0, **SETTINGS
        )

    async def ask(self, prepared: Any) -> list[str]:
        ask, _ = prepared
        options = {"n": ask["n"]} if ask["n"] > 1 else {}
        if ask.get("id") is not None:
            options["rollout_id"] = int(ask["id"])
        found = await self.model.acall(messages=ask["messages"], **options)
        return [text if isinstance(text, str) else text["text"] for text in found]


class LangChain(Peer):
    """langchain's ChatOpenAI with SQLiteCache."""

    distribution = "langchain-community"

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        from langchain_community.cache import SQLiteCache
        from langchain_core.globals import set_llm_cache
        from langchain_core.messages import convert_to_messages
        from langchain_openai import ChatOpenAI

        self.convert = convert_to_messages
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        set_llm_cache(SQLiteCache(str(where / "langchain.db")))
        self.model = ChatOpenAI(base_url=base_url, api_key="none", model=MODEL, max_retries=0, **SETTINGS)

    async def ask(self, prepared: Any) -> list[str]:
        ask, _ = prepared
        if ask["n"] == 1:
            return [(await self.model.ainvoke(ask["messages"])).content]
        found = await self.model.agenerate([self.convert(ask["messages"])], n=ask["n"])
        return [each.text for each in found.generations[0]]


class Inspect(Peer):
    """inspect_ai's model with ``cache=``; one call gives one text."""

    distribution = "inspect-ai"

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        os.environ["INSPECT_CACHE_DIR"] = folder
        from inspect_ai.model import (
            CachePolicy,
            ChatMessageAssistant,
            ChatMessageSystem,
            ChatMessageUser,
            GenerateConfig,
            get_model,
        )

        self.kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
        self.policy = CachePolicy(expiry=None)
        config = GenerateConfig(
            temperature=0.7, max_tokens=400, max_connections=max(in_flight, 10), max_retries=0
        )
        self.model = get_model(
            f"openai/{MODEL}",
            base_url=base_url,
            api_key="none",
            config=config,
            responses_api=False,
            memoize=False,
        )

    def prepared(self, ask: dict[str, Any], namespace: str) -> Any:
        return [self.kinds[each["role"]](content=each["content"]) for each in ask["messages"]], ask["n"]

    async def ask(self, prepared: Any) -> list[str]:
        messages, n = prepared
        return [(await self.model.generate(messages, cache=self.policy)).completion for _ in range(n)]


class LiteLLM(Peer):
    """litellm's completion with its disk cache."""

    distribution = "litellm"

    def open(self, folder: str, base_url: str, in_flight: int) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        import litellm

        self.litellm, self.base_url = litellm, base_url
        litellm.cache = litellm.Cache(type="disk", disk_cache_dir=folder)
        litellm.suppress_debug_info = True

    async def ask(self, prepared: Any) -> list[str]:
        ask, _ = prepared
        return _texts(
            await self.litellm.acompletion(
                model=f"openai/{MODEL}",
                messages=ask["messages"],
                n=ask["n"],
                api_base=self.base_url,
                api_key="none",
                caching=True,
                num_retries=0,
                **SETTINGS,
            )
        )

    async def close(self) -> None:
        await asyncio.sleep(0.5)  # it writes in tasks of its own


PEERS: dict[str, type[Peer]] = {
    "bare": Bare,
    "memory": Memory,
    "cachepipe": Cachepipe,
    "cachesaver": CacheSaver,
    "cachesaver-pipeline": CacheSaverPipeline,
    "dspy": DSPy,
    "langchain": LangChain,
    "inspect": Inspect,
    "litellm": LiteLLM,
}


class Worker:
    def __init__(self, name: str) -> None:
        self.kind = PEERS[name]
        self.peer: Peer | None = None

    async def do(self, asked: dict[str, Any]) -> dict[str, Any]:
        what = asked.pop("do")
        result: dict[str, Any] = await getattr(self, what)(**asked)
        return result

    async def open(self, **where: Any) -> dict[str, Any]:
        await self.close()
        self.peer = self.kind()
        self.peer.open(**where)
        return {}

    async def close(self) -> dict[str, Any]:
        if self.peer is not None:
            await self.peer.close()
        self.peer = None
        return {}

    async def version(self) -> dict[str, Any]:
        import importlib.metadata

        return {"version": importlib.metadata.version(self.kind.distribution)}

    async def ask(self, asks: list[dict[str, Any]], namespace: str, in_flight: int = 1) -> dict[str, Any]:
        peer = self.peer
        assert peer is not None
        texts: list[list[str] | None] = [None] * len(asks)
        errors: list[str] = []
        waiting = [*enumerate([peer.prepared(ask, ask.get("namespace", namespace)) for ask in asks])][::-1]

        async def work() -> None:
            while waiting:
                place, prepared = waiting.pop()
                try:
                    texts[place] = await peer.ask(prepared)
                except Exception as error:  # noqa: BLE001 - told to who asked
                    errors.append(f"{type(error).__name__}: {error}"[:300])

        with peer.rerun():
            gc.collect()
            start = time.perf_counter()
            if in_flight == 1:
                await work()
            else:
                await asyncio.gather(*[work() for _ in range(in_flight)])
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "texts": texts, "errors": errors}

    async def race(self, slow: dict[str, Any], known: dict[str, Any], namespace: str) -> dict[str, Any]:
        peer = self.peer
        assert peer is not None
        with peer.rerun():
            waiting = asyncio.create_task(peer.ask(peer.prepared(slow, namespace)))
            await asyncio.sleep(0.2)  # its call is under way
            prepared = peer.prepared(known, namespace)
            gc.collect()
            start = time.perf_counter()
            texts = await peer.ask(prepared)
            seconds = time.perf_counter() - start
            during = not waiting.done()
            await waiting
        return {"seconds": seconds, "texts": texts, "during": during}


async def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    worker = Worker(sys.argv[1])
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            answer = await worker.do(json.loads(line))
        except Exception as error:  # noqa: BLE001 - told to who asked
            answer = {"failed": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()
    await worker.close()


if __name__ == "__main__":
    asyncio.run(main())
