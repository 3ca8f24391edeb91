"""Makes ``cache`` and ``texts.json`` beside this file, with CacheSaver 0.0.6 and a server of made-up answers.

``texts.json`` holds the texts of each entry as CacheSaver itself reads them, in the order of the entries.

In an environment of its own with ``cachesaver==0.0.6``, which is not one of cachepipe's dependencies, and
while ``cachepipe mock-server --port 8000 --seed 1`` runs in another one:

    export OPENAI_API_KEY=none ANTHROPIC_API_KEY=none TOGETHER_API_KEY=none GEMINI_API_KEY=none HF_TOKEN=none
    python make.py http://127.0.0.1:8000
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from cachesaver.models.anthropic import AsyncAnthropic
from cachesaver.models.gemini import AsyncGemini
from cachesaver.models.huggingface import AsyncInferenceClient
from cachesaver.models.openai import AsyncOpenAI
from cachesaver.models.together import AsyncTogether
from cachesaver.pipelines import OnlineAPI
from cachesaver.typedefs import Request, Response
from diskcache import Cache

FOLDER = str(Path(__file__).with_name("cache"))
URL = sys.argv[1]
os.environ["TOGETHER_BASE_URL"] = URL


def said(*texts):
    return [{"role": "user", "content": text} for text in texts]


class Dice:
    """A model of the user's own."""

    async def request(self, request):
        return Response([f"{request.kwargs['sides']} sides: {number}" for number in range(request.n)])


async def main():
    openai = AsyncOpenAI(namespace="one", cachedir=FOLDER, base_url=f"{URL}/v1")
    ask = openai.chat.completions.create
    city = {"model": "ngram-1", "messages": said("Name a city."), "temperature": 0.7}
    await ask(**city, n=3, store=True)
    await ask(**city, namespace="two")
    river = {"model": "ngram-1", "messages": said("Name a river."), "max_tokens": 40, "stop": ["x", "y"]}
    await ask(**river)
    await ask(**river)
    await ask(
        model="ngram-1", messages=said("Name a lake."), max_tokens=20, n=110
    )  # so large that diskcache keeps it in a file of its own
    await ask(model="ngram-1", messages=said("first", "second"), max_tokens=10)
    await ask(model="ngram-1", messages=said("second", "first"), max_tokens=10, namespace="two")
    anthropic = AsyncAnthropic(namespace="one", cachedir=FOLDER, base_url=URL)
    await anthropic.messages.create(model="ngram-1", max_tokens=30, messages=said("hi"))
    together = AsyncTogether(namespace="one", cachedir=FOLDER)
    await together.chat.completions.create(model="ngram-1", messages=said("Name a sea."), max_tokens=20)
    own = OnlineAPI(model=Dice(), cache=Cache(FOLDER), batch_size=1, timeout=1)
    await own.request(Request(args=(), kwargs={"sides": 6}, n=2, request_id="1", namespace="one"))
    # Without a config: with one, the key depends on the fields that google-genai's version has.
    gemini = AsyncGemini(namespace="one", cachedir=FOLDER, http_options={"base_url": URL})
    await gemini.models.generate_content(model="ngram-1", contents="Name a hill.")
    hub = AsyncInferenceClient(namespace="one", cachedir=FOLDER, base_url=f"{URL}/v1")
    await hub.chat.completions.create(model="ngram-1", messages=said("Name a lane."), max_tokens=20, n=2)
    clients = (openai, anthropic, together, gemini, hub)
    for each in (*(client.pipeline for client in clients), own):
        await each.cleanup()


def text_of(sample):
    if isinstance(sample, str):
        return sample
    if hasattr(sample, "candidates"):
        return sample.text
    return sample.content[0].text if hasattr(sample, "content") else sample.choices[0].message.content


asyncio.run(main())
names = ("city", "river", "lake", "order", "hi", "sea", "dice", "hill", "lane")
with Cache(FOLDER) as cache:
    texts = [[text_of(sample) for sample in cache[key]] for key in cache]
Path(__file__).with_name("texts.json").write_text(json.dumps(dict(zip(names, texts, strict=True)), indent=1))
