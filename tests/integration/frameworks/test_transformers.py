"""Local models in true batches: a tiny one of transformers, randomly initialised here, and its tokenizer."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cachepipe import Batch, LocalAPI, MemoryStore, Request, wire
from cachepipe.accounting import Account, usage_of
from cachepipe.clients import AsyncHFTransformers, HFTransformers
from cachepipe.models import TransformersModel
from cachepipe.models.samples import Listener
from cachepipe.models.transformers import _HeardText, _Text

pytestmark = pytest.mark.anyio
PROMPTS = ("Hi", "A much longer prompt than that", "Sort a list.")


@dataclass(frozen=True)
class Asked(Request):
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    stop: list[str] | None = None
    seed: int | None = None


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>")
    made.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    return made


@pytest.fixture(scope="module")
def network(tokenizer):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture
def model(network, tokenizer):
    return TransformersModel(network, tokenizer, name="tiny", max_new_tokens=6)


@pytest.fixture
def whole(network, tokenizer):
    return TransformersModel(network, tokenizer, name="tiny", max_new_tokens=6, raw=True)


async def alone(model, *requests):
    return [(await model.request(request)).data for request in requests]


def said(samples):
    return [wire.COMPLETIONS.summary(sample)["text"] for sample in samples]


async def test_a_batch_is_one_call_and_each_request_gets_its_samples(model):
    async with LocalAPI(model, MemoryStore(), batch_size=6, timeout=5) as api:
        sizes = (1, 2, 3)
        responses = await asyncio.gather(
            *(api.request(Asked(prompt, n=n)) for prompt, n in zip(PROMPTS, sizes, strict=True))
        )
        assert [len(response.data) for response in responses] == [1, 2, 3]
        assert model.calls == 1
        assert len({text for response in responses for text in response.data}) == 6
        again = await asyncio.gather(
            *(
                api.request(Asked(prompt, n=n, namespace="b"))
                for prompt, n in zip(PROMPTS, sizes, strict=True)
            )
        )
    assert [response.data for response in again] == [response.data for response in responses]
    assert model.calls == 1


async def test_padding_changes_no_answer(model, network, tokenizer):
    """With the likeliest tokens taken, an answer does not show what stood beside its prompt in the batch."""
    requests = [Asked(prompt, temperature=0) for prompt in PROMPTS]
    batch = [said(response.data) for response in await model.batch_request(Batch(requests))]
    assert model.calls == 1
    assert [said(data) for data in await alone(model, *requests)] == batch
    for prompt, texts in zip(PROMPTS, batch, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")
        made = network.generate(**tokens, do_sample=False, max_new_tokens=6, pad_token_id=0)
        own = tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        assert texts == [own]


async def test_samples_are_those_of_the_model(whole, network, tokenizer):
    """The first token of 3000 samples, in one batch with another prompt, is distributed as the model says."""
    prompt, n = "Hi", 3000
    requests = Batch([Asked(prompt, n=n, max_tokens=1, top_k=4), Asked(PROMPTS[1], max_tokens=1, top_k=4)])
    torch.manual_seed(1)
    texts = said((await whole.batch_request(requests))[0].data)
    with torch.inference_mode():
        logits = network(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    likeliest = torch.topk(logits, 4)
    shares = torch.softmax(likeliest.values, 0)
    expected = dict.fromkeys(texts, 0.0)
    for token, share in zip(likeliest.indices.tolist(), shares.tolist(), strict=True):
        expected[tokenizer.decode([token], skip_special_tokens=True)] += share
    for text, share in expected.items():
        seen = texts.count(text) / n
        assert abs(seen - share) < 5 * (share * (1 - share) / n) ** 0.5, (text, seen, share)
    assert len(expected) > 1


async def test_requests_with_other_settings_are_calls_of_their_own(model):
    batch = Batch([Asked("Hi"), Asked("Hi", temperature=0.5), Asked("Ho"), Asked("Hi", seed=1)])
    assert len(await model.batch_request(batch)) == 4
    assert model.calls == 3


async def test_a_seed_begins_anew_whatever_is_in_the_batch_and_leaves_others_alone(model):
    seeded = Asked("Hi", n=3, seed=7)
    first = said((await model.batch_request(Batch([Asked("Other"), seeded])))[1].data)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    second = said((await model.request(seeded)).data)
    assert torch.rand(1) == expected
    assert first == second
    assert len(set(first)) == 3
    assert not model.question(seeded).mergeable
    assert said((await model.request(Asked("Hi", n=3, seed=8))).data) != first


async def test_answers_end_at_the_end_token_and_at_stop_texts(whole, network, tokenizer):
    free = said((await whole.request(Asked("Hi", temperature=0, max_tokens=12))).data)[0]
    middle = free[3]
    sample = (await whole.request(Asked("Hi", temperature=0, max_tokens=12, stop=[middle]))).data[0]
    summary = wire.COMPLETIONS.summary(sample)
    assert summary["text"] == free[: free.index(middle)]
    assert summary["finish_reason"] == "stop"
    assert summary["completion_tokens"] <= 12
    # The likeliest third token becomes the one that ends a text.
    tokens = tokenizer("Hi", return_tensors="pt")
    made = network.generate(**tokens, do_sample=False, max_new_tokens=3, pad_token_id=0)[0].tolist()
    before = network.generation_config.eos_token_id
    network.generation_config.eos_token_id = made[-1]
    try:
        batch = Batch([Asked("Hi", temperature=0), Asked(PROMPTS[1], temperature=0)])
        ended = wire.COMPLETIONS.summary((await whole.batch_request(batch))[0].data[0])
    finally:
        network.generation_config.eos_token_id = before
    first = next(place for place, token in enumerate(made[2:]) if token == made[-1])
    assert (ended["finish_reason"], ended["completion_tokens"]) == ("stop", first + 1)
    long = (await whole.request(Asked("Hi", temperature=0, max_tokens=2))).data[0]
    assert wire.COMPLETIONS.summary(long)["finish_reason"] == "length"


async def test_a_request_may_say_which_token_ends_its_answer(whole, network, tokenizer):
    """Whatever the batch is filled with after that token is no part of the answer."""
    tokens = tokenizer("Hi", return_tensors="pt")
    made = network.generate(**tokens, do_sample=False, max_new_tokens=3, pad_token_id=0)[0, 2:].tolist()
    requests = [
        Odd("Hi", temperature=0, eos_token_id=made[-1]),
        Odd("Ho", temperature=0, eos_token_id=made[-1]),
    ]
    tokenizer.pad_token = "!"
    try:
        ended = (await whole.batch_request(Batch(requests)))[0].data[0]
    finally:
        tokenizer.pad_token = None
    summary = wire.COMPLETIONS.summary(ended)
    length = made.index(made[-1]) + 1
    assert (summary["finish_reason"], summary["completion_tokens"]) == ("stop", length)
    assert summary["text"] == tokenizer.decode(made[:length], skip_special_tokens=True)


@pytest.mark.parametrize("setting", ["num_return_sequences", "num_beams", "return_dict_in_generate"])
async def test_the_models_own_configuration_makes_no_other_rows(model, network, monkeypatch, setting):
    plain = said((await model.request(Asked("Hi", n=2, temperature=0))).data)
    monkeypatch.setattr(network.generation_config, setting, 2 if setting.startswith("num") else True)
    assert said((await model.request(Asked("Hi", n=2, temperature=0))).data) == plain


async def test_stop_texts_of_the_models_own_configuration_end_answers_too(whole, network, monkeypatch):
    free = said((await whole.request(Asked("Hi", temperature=0, max_tokens=12))).data)[0]
    monkeypatch.setattr(network.generation_config, "stop_strings", [free[3]])
    ended = (await whole.request(Asked("Hi", temperature=0, max_tokens=12))).data
    assert said(ended) == [free[: free.index(free[3])]]


async def test_what_is_generated_first_is_told_first(model):
    told = []
    batch = Batch([Asked("Hi"), Asked("Hi", temperature=-1.0), Asked("Ho", top_k=2), Asked("Hu")])
    answers = await model.batch_request(batch, arrived=lambda *answer: told.append((*answer, model.calls)))
    assert [(place, calls) for place, _, calls in told] == [(0, 1), (3, 1), (1, 2), (2, 3)]
    assert [answer for _, answer, _ in sorted(told, key=lambda each: each[0])] == answers


async def test_usage_counts_the_prompt_once_as_billed(whole):
    async with LocalAPI(whole, MemoryStore(), batch_size=8) as api:
        response = await api.request(Asked("Hello", n=3, max_tokens=4))
    spent = Account()
    spent.spend(map(usage_of, response.data), "")
    counts = spent.counts()
    assert (counts["prompt_tokens"], counts["samples"]) == (5, 3)
    assert counts["completion_tokens"] <= 12
    assert {sample["model"] for sample in response.data} == {"tiny"}


async def test_c6_each_sample_has_the_tokens_that_it_took(whole, monkeypatch):
    took = [_Text("a rather long text", 1, ended=True), _Text("b", 9, ended=True)]
    monkeypatch.setattr(whole, "_generate", lambda rows: took)
    async with LocalAPI(whole, MemoryStore(), batch_size=8) as api:
        samples = (await api.request(Asked("Hello", n=2))).data
    assert [sample["usage"]["completion_tokens"] for sample in samples] == [1, 9]
    assert [sample["usage"]["total_tokens"] for sample in samples] == [6, 14]


async def test_messages_go_through_the_chat_template(whole, network, tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    sample = (await whole.request(Asked(messages, temperature=0))).data[0]
    assert sample["choices"][0]["message"]["role"] == "assistant"
    plain = (await whole.request(Asked("[user]Hi[assistant]", temperature=0))).data[0]
    assert wire.CHAT.summary(sample)["text"] == said([plain])[0]
    assert whole.present(sample) is sample
    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>"
    )
    with pytest.raises(wire.BadRequest, match="no chat template"):
        await TransformersModel(network, bare, name="tiny").request(Asked(messages))


@dataclass(frozen=True)
class Odd(Asked):
    num_beams: int | None = None
    wishes: str | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    validate: bool | None = None
    max_new_tokens: int | None = None


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Asked("x" * 125), "do not fit into the 128 positions"),
        (Asked("Hi", max_tokens=0), "at least 1"),
        (Asked("Hi", seed="one"), "whole number"),
        (Asked(7), "list of token ids or a list of messages"),
        (Odd("Hi", num_beams=2), "num_beams"),
        (Odd("Hi", wishes="none"), "wishes"),
        (Odd("Hi", pad_token_id=1), "pad_token_id"),
        (Odd("Hi", validate=True), "validate"),
        (Asked("Hi", stop=5), "a list of texts"),
        (Asked("Hi", stop=[5]), "a list of texts"),
        (Odd("Hi", max_tokens=3, max_new_tokens=4), "one of max_new_tokens"),
        (Asked("Hi", temperature=-1.0), "temperature"),
    ],
)
async def test_a_bad_request_fails_alone(model, request_, why):
    answers = await model.batch_request(Batch([request_, Asked("Hi")]))
    assert len(answers[1].data) == 1
    assert isinstance(answers[0], Exception)
    assert why in str(answers[0])
    store = MemoryStore()
    async with LocalAPI(model, store, batch_size=2) as api:
        with pytest.raises(type(answers[0])):
            await api.request(request_)
    assert [sample for key in list(store.keys()) for sample in store.samples(key.key)] == []


async def test_where_memory_does_not_suffice_the_batch_is_halved(model, monkeypatch):
    sizes = []
    generate = type(model._model).generate

    def scarce(self, *, input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("no memory")
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model._model), "generate", scarce)
    assert len((await model.request(Asked("Hi", n=5))).data) == 5
    assert sizes == [5, 2, 3, 1, 2]


async def test_the_loop_goes_on_while_a_batch_is_generated(model, monkeypatch):
    gate, begun, loop = threading.Event(), asyncio.Event(), asyncio.get_running_loop()
    generate = type(model._model).generate

    def slow(self, **options):
        loop.call_soon_threadsafe(begun.set)
        assert gate.wait(30)
        return generate(self, **options)

    monkeypatch.setattr(type(model._model), "generate", slow)
    task = asyncio.ensure_future(model.request(Asked("Hi")))
    await begun.wait()
    gate.set()
    assert len((await task).data) == 1


def test_a_model_is_loaded_by_name_and_named_in_keys(network, tokenizer, tmp_path):
    network.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded = TransformersModel(str(tmp_path / "m"))
    assert loaded.cache_scope == f"transformers:{tmp_path / 'm'}"
    assert loaded.question(Asked("Hi")).scope == loaded.cache_scope
    other = TransformersModel(network, tokenizer, name="other")
    assert other.question(Asked("Hi")).key != loaded.question(Asked("Hi")).key
    assert other.question(Asked("Hi"), "elsewhere").scope == "elsewhere"
    with pytest.raises(ValueError, match="has no name"):
        TransformersModel(network, tokenizer)
    with pytest.raises(TypeError, match="comes with its tokenizer"):
        TransformersModel(network)
    with pytest.raises(TypeError, match="device_map"):
        TransformersModel(network, tokenizer, name="x", device_map="cpu")


def test_c9_the_order_in_the_arguments_of_a_tool_call_counts(model):
    """Chat templates write them as they are."""

    def key_of(call, **message):
        calls = [{"type": "function", "function": {"name": "f", "arguments": call}}]
        return model.question(Asked([{"role": "assistant", "tool_calls": calls, **message}])).key

    assert key_of({"a": 1, "b": 2}) != key_of({"b": 2, "a": 1})
    assert key_of({"a": 1}, content="", name="x") == key_of({"a": 1}, name="x", content="")


async def test_a_client_speaks_as_openais_sdk_does(network, tokenizer):
    options = {"name": "tiny", "max_new_tokens": 6, "batch_size": 8, "timeout": 5}
    messages = [{"role": "user", "content": "Hi"}]
    async with AsyncHFTransformers(network, tokenizer, cache=MemoryStore(), **options) as client:
        created = client.chat.completions.create
        pair = await asyncio.gather(created(messages=messages, n=3), client.generate("Hi", n=5))
        assert client.model.calls == 1  # their settings are equal
        texts = [choice.message.content for choice in pair[0].choices]
        assert len(set(texts)) == 3
        again = client.in_namespace("b")
        assert (await again.chat.completions.create(messages=messages, n=3)).choices == pair[0].choices
        stream = await again.in_namespace("c").chat.completions.create(messages=messages, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == texts[0]
        tokens = tokenizer("Hi", return_tensors="pt")
        alone = await client.generate(tokens, temperature=0)
        assert alone == await client.generate("Hi", temperature=0)
        assert await again.generate(tokens, temperature=0) == alone
        with pytest.raises(wire.BadRequest, match="num_beams"):
            await client.generate("Hi", num_beams=2)


def test_a_synchronous_client_loads_a_model_by_name(network, tokenizer, tmp_path):
    network.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    texts = []
    for _ in range(2):
        with HFTransformers(
            model_name=str(tmp_path / "tiny"), cache=tmp_path / "cache", namespace="a", batch_size=2
        ) as client:
            create = client.chat.completions.create
            answer = create(messages=[{"role": "user", "content": "Hi"}], max_new_tokens=4, n=2)
            texts.append([choice.message.content for choice in answer.choices])
            texts.append(client.generate("Hi", max_new_tokens=4))
            calls = client.model.calls
    assert texts[:2] == texts[2:]
    assert calls == 0


@pytest.fixture
def spaced(tokenizer):
    """Settings of answers with many short words."""
    return {"max_new_tokens": 60, "sequence_bias": [[tokenizer("a b")["input_ids"][1:2], 4.0]]}


@pytest.fixture
def stepwise(monkeypatch):
    """Makes a generation wait until a reader has read what it was told."""
    read, hear = threading.Semaphore(0), Listener.hear

    def waiting(self, place, words):
        hear(self, place, words)
        assert read.acquire(timeout=20)

    monkeypatch.setattr(Listener, "hear", waiting)
    return read


def test_words_come_while_the_model_generates(network, tokenizer, spaced, stepwise):
    with HFTransformers(network, tokenizer, cache=MemoryStore(), name="tiny") as client:
        said = []
        for word in client.generate("Hi", stream=True, **spaced):
            said.append((word, client.pipeline.stats().in_flight))
            stepwise.release()
        words = [word for word, _ in said]
        assert [in_flight for _, in_flight in said[:3]] == [1, 1, 1]
        assert client.in_namespace("b").generate("Hi", **spaced) == "".join(words)
        assert [*client.in_namespace("c").generate("Hi", stream=True, **spaced)] == words
        assert client.model.calls == 1


async def test_streams_of_a_batch_come_side_by_side_and_stop_texts_are_not_told(network, tokenizer, spaced):
    options = {"batch_size": 4, "timeout": 5, "name": "tiny"}
    async with AsyncHFTransformers(network, tokenizer, cache=MemoryStore(), **options) as client:

        async def read(stop):
            stream = await client.chat.completions.create(
                messages=[{"role": "user", "content": stop}], stream=True, stop=[" ", stop], **spaced
            )
            chunks = [chunk async for chunk in stream]
            return chunks, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        found = await asyncio.gather(*(read(stop) for stop in ("a b", "b c", "c d", "d e")))
        again = client.in_namespace("b")
        for stop, (chunks, text) in zip(("a b", "b c", "c d", "d e"), found, strict=True):
            answer = await again.chat.completions.create(
                messages=[{"role": "user", "content": stop}], stop=[" ", stop], **spaced
            )
            assert answer.choices[0].message.content == text
            assert {chunk.id for chunk in chunks} == {answer.id}
            assert " " not in text


@pytest.mark.parametrize("tokens", [1, 5, 500])
def test_what_a_listener_hears_begins_the_answer(tokens):
    heard = Listener(1, lambda _place, _words: None)
    heard.begin({})
    text = "So it  goes on, STOP there."
    job = SimpleNamespace(listener=heard, stop=("STOP x", "  nothing"))
    growing = _HeardText(job, 0, [0], lambda told: text[: len(told)])
    for number in range(1, min(tokens, len(text)) + 1):
        growing.take(number)
    assert text.startswith(heard.texts[0])
    assert heard.texts[0] == {1: "", 5: "So ", 500: "So it  goes on, STOP "}[tokens]
    growing.take(0)
    growing.take(7)
    assert text.startswith(heard.texts[0])
