"""Models of Hugging Face ``transformers`` on this machine, for ``LocalAPI``, which runs a batch in one call.

A stored sample has the form of a provider's answer, so listings, token counts and `cachepipe.wire` read it
like any other.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from cachepipe import wire
from cachepipe.contract.keys import Question, provider_question
from cachepipe.models.samples import Listener, ProviderSamples, fields_of, listener_of
from cachepipe.typedefs import Batch, Request, Response

try:
    import torch
    import transformers
except ImportError as error:
    raise ImportError(
        "TransformersModel needs transformers and torch: pip install 'cachepipe[transformers]'"
    ) from error

_LENGTHS: Final = ("max_new_tokens", "max_tokens", "max_completion_tokens")
_NOT_SETTINGS: Final = frozenset({"model", "messages", "prompt", "seed", "stop", *_LENGTHS})
_RULED: Final = frozenset(  # parameters that only the adapter sets
    {
        "do_sample",
        "num_return_sequences",
        "num_beams",
        "max_length",
        "pad_token_id",
        "stop_strings",
        "return_dict_in_generate",
        "transformers_version",
    }
)
_DECODINGS: Final = 64
"""How often a text is decoded while its length doubles, at most, for a reader of a stream."""


@dataclass(frozen=True)
class _Job:
    """A request in the form that ``generate`` takes.

    Attributes:
        place: its place in the batch.
        n: the number of samples.
        body: the body, of which its key is made.
        tokens: the prompt.
        settings: the parameters of the generation.
        stop: texts that end an answer.
        seed: the seed, or None.
        head: the fields that its samples have in common.
        listener: hears the samples while they are generated, or None.
    """

    place: int
    n: int
    body: wire.Body
    tokens: list[int]
    settings: dict[str, Any]
    stop: tuple[str, ...]
    seed: int | None
    head: Mapping[str, Any]
    listener: Listener | None

    @property
    def group(self) -> Any:
        """The same for all jobs of one call of ``generate``; a job with a seed has a call of its own."""
        own = self.place if self.seed is not None else None
        return orjson.dumps([self.settings, self.stop, own], option=orjson.OPT_SORT_KEYS)


@dataclass(frozen=True)
class _Text:
    """One generated answer, its number of tokens, and whether it is complete."""

    text: str
    tokens: int
    ended: bool


class _HeardText:
    """A text that grows token by token; a listener gets its words as soon as they cannot change any more.

    Args:
        job: the request that it answers.
        place: its place among the samples of the request.
        ends: the tokens that end it.
        decoded: returns the text of tokens.
    """

    def __init__(
        self, job: _Job, place: int, ends: Sequence[int], decoded: Callable[[list[int]], str]
    ) -> None:
        self._job, self._place, self._ends, self._decoded = job, place, ends, decoded
        self._tokens: list[int] = []
        self._read = 0
        self._told = 0
        self._ended = False

    def take(self, token: int) -> None:
        """Add a token. A long text is decoded less often, so that the time grows with its length only."""
        self._ended = self._ended or token in self._ends
        if self._ended:
            return
        self._tokens.append(token)
        length = len(self._tokens)
        if self._job.listener is None or length - self._read < max(1, length // _DECODINGS):
            return
        self._read = length
        text = self._decoded(self._tokens)
        self._ended = any(stop in text for stop in self._job.stop)
        # The last word may grow, and what may begin a stop text is not part of the answer.
        safe = min([len(text), *(len(text) - _overlap(text, stop) for stop in self._job.stop)])
        told = 0
        for word in wire.pieces(text)[:-1]:
            if told + len(word) > safe:
                break
            told += len(word)
        if told > self._told and not self._ended:
            self._job.listener.hear(self._place, text[self._told : told])
            self._told = told


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop text begins with."""
    return next((length for length in range(len(stop), 0, -1) if text.endswith(stop[:length])), 0)


class _Streamer:
    """Passes on the tokens of a call, as ``generate`` makes them; a ``transformers.BaseStreamer`` in form."""

    def __init__(self, texts: Sequence[_HeardText | None]) -> None:
        self._texts = texts
        self._begun = False

    def put(self, value: Any) -> None:
        """Take the next token of each row; at first, the prompts."""
        if self._begun:
            for text, token in zip(self._texts, value.tolist(), strict=True):
                if text is not None:
                    text.take(token)
        self._begun = True

    def end(self) -> None:
        """Learn that the call ends."""


class TransformersModel(ProviderSamples):
    """A causal language model of ``transformers``: it generates the samples of a batch together.

    The model continues a prompt that is a string or a list of token ids; the tokenizer's chat template turns
    a list of messages into a prompt. The other fields of a request, unless they are None, are ``max_tokens``,
    ``stop`` (texts that end an answer and are not part of it), ``seed``, and parameters of
    ``transformers.GenerationConfig`` such as ``temperature``, ``top_p`` and ``top_k``. The model's
    ``generation_config`` gives the defaults, except that answers are always sampled; with ``temperature=0``
    the model takes the most likely token. Every sample is independent of the rest of its batch. A request
    with a seed gets a call of its own, which begins from the seed: repeated calls for a question give the
    same samples, so ask for all of them at once.

    Use it with ``LocalAPI``; its ``batch_size`` is the number of samples that are generated together.

    Args:
        model: a model, or the name or folder to load one from.
        tokenizer: its tokenizer; default is that of the same name.
        name: identifies the model in cache keys; default is the model's name or folder and revision. Give
            another name after training or changing a model.
        max_new_tokens: the largest number of tokens of an answer, for requests that set none.
        raw: whether ``Response.data`` holds samples as they are stored, mappings in the form of whole
            answers; by default it holds their text.
        loading: parameters of ``from_pretrained``, such as ``torch_dtype`` and ``device_map``.

    Attributes:
        name: identifies the model.
        cache_scope: the scope of its keys.
        calls: the number of calls of ``generate``.

    Raises:
        ValueError: when a model has no name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        max_new_tokens: int = 256,
        raw: bool = False,
        **loading: Any,
    ) -> None:
        if isinstance(model, str):
            tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(model)
            model = transformers.AutoModelForCausalLM.from_pretrained(model, **loading)
        elif loading:
            raise TypeError(f"{', '.join(sorted(loading))}: a model that is loaded takes no more of these")
        elif tokenizer is None:
            raise TypeError(
                "a model that is loaded comes with its tokenizer: TransformersModel(model, tokenizer)"
            )
        config = model.config
        revision = getattr(config, "_commit_hash", None)
        own = "@".join(filter(None, (getattr(config, "_name_or_path", ""), revision)))
        if not (name or own):
            raise ValueError(
                "the model has no name, so its answers could be taken for another's: give name=..."
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens!r}")
        self.name = name or own
        self.cache_scope = f"transformers:{self.name}"
        self.calls = 0
        self.raw = raw
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._longest = max_new_tokens
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<TransformersModel {self.name!r}, {self.calls} calls>"

    # What is asked.

    def question(self, request: Request, scope: str | None = None) -> Question:
        """Return what a request asks.

        Args:
            request: the request.
            scope: replaces the model's name in the key.

        Raises:
            BadRequest: when it has a field that is not a parameter of the generation.
        """
        body = self._body(request)
        return provider_question(
            scope or self.cache_scope,
            {"body": body},
            as_written=wire.CHAT.as_written,
            mergeable="seed" not in body,
        )

    def present(self, sample: wire.Sample) -> Any:
        """Return what ``Response.data`` holds of a stored sample: its text; with ``raw=True``, all of it."""
        if self.raw:
            return sample
        api = wire.CHAT if sample["object"] == "chat.completion" else wire.COMPLETIONS
        return api.summary(sample)["text"]

    def _body(self, request: Request) -> dict[str, Any]:
        """Return what a request asks, in the words of OpenAI's API."""
        body = _asked(request.prompt)
        for name, value in fields_of(request).items():
            body[name] = list(value) if isinstance(value, tuple) else value
        unknown = [name for name in body if name not in _NOT_SETTINGS and not _is_setting(name)]
        if unknown:
            raise wire.BadRequest(
                f"{', '.join(unknown)}: neither max_tokens, stop or seed nor a parameter of "
                "transformers.GenerationConfig that may be set here"
            )
        if sum(name in body for name in _LENGTHS) > 1:
            raise wire.BadRequest(f"a request sets one of {', '.join(_LENGTHS)}")
        return body

    def _job(self, place: int, request: Request) -> _Job:
        """Return a request in the form that ``generate`` takes.

        Raises:
            BadRequest: when it has a value that ``generate`` does not take.
        """
        body = self._body(request)
        settings = {name: value for name, value in body.items() if name not in _NOT_SETTINGS}
        length = next((body[name] for name in _LENGTHS if name in body), self._longest)
        if type(length) is not int or length < 1:
            raise wire.BadRequest(f"the most tokens of an answer must be at least 1; got {length!r:.200}")
        tokens = self._prompt_tokens(body)
        config = self._model.config
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and len(tokens) + length > most:
            raise wire.BadRequest(
                f"a prompt of {len(tokens)} tokens and an answer of {length} do not fit into the {most} "
                f"positions of {self.name}; shorten the one or the other"
            )
        settings["max_new_tokens"] = length
        seed = body.get("seed")
        if type(seed) not in (int, type(None)):
            raise wire.BadRequest(f"a seed is a whole number; got {seed!r:.200}")
        head = {
            "id": f"local-{uuid.uuid4().hex}",
            "object": "chat.completion" if "messages" in body else "text_completion",
            "created": int(time.time()),
            "model": self.name,
        }
        stop, listener = self._stop_texts(body), listener_of(request)
        return _Job(place, request.n, body, tokens, settings, stop, seed, head, listener)

    def _prompt_tokens(self, body: wire.Body) -> list[int]:
        """Return the tokens of a prompt, at least one."""
        if isinstance(body.get("prompt"), list):
            tokens = body["prompt"]
        elif "prompt" in body:
            tokens = self._tokenizer(body["prompt"])["input_ids"]
        elif getattr(self._tokenizer, "chat_template", None) is None:
            raise wire.BadRequest(f"{self.name} has no chat template; its prompts are strings")
        else:
            text = self._tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, tokenize=False
            )
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        start = getattr(self._tokenizer, "bos_token_id", None)
        if not tokens and start is None:
            raise wire.BadRequest(f"the prompt is empty, and {self.name} has no token to begin with")
        return list(tokens) or [start]

    def _stop_texts(self, body: wire.Body) -> tuple[str, ...]:
        """Return the texts that end an answer."""
        usual = self._model.generation_config
        stop = body.get("stop") or getattr(usual, "stop_strings", None) or ()
        stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
            raise wire.BadRequest(f"stop is a text or a list of texts; got {stop!r:.200}")
        return tuple(filter(None, stop))

    # Generation.

    async def request(self, request: Request) -> Response:
        """Return ``request.n`` samples as they are stored, whatever ``raw`` is."""
        answer = (await self.batch_request(Batch([request])))[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def batch_request(
        self, batch: Batch, *, arrived: Callable[[int, Any], None] | None = None
    ) -> list[Response]:
        """Return the response of each request, or its error.

        Requests with equal settings are generated in one call, in a thread, so that the loop goes on.

        Args:
            batch: the requests.
            arrived: called with the place and the answer of each request as soon as its call has ended.
        """
        answers: list[Any] = [None] * len(batch)
        groups: dict[Any, list[_Job]] = {}
        for place, request in enumerate(batch):
            try:
                job = self._job(place, request)
            except (wire.BadRequest, ValueError, TypeError) as error:
                answers[place] = error
            else:
                groups.setdefault(job.group, []).append(job)
        for jobs in groups.values():
            for place, answer in (await asyncio.to_thread(self._answers, jobs)).items():
                answers[place] = answer
                if arrived is not None:
                    arrived(place, answer)
        return answers

    def _answers(self, jobs: Sequence[_Job]) -> dict[int, Response | Exception]:
        """Return the answers to jobs that share a call, by place."""
        rows = [job for job in jobs for _ in range(job.n)]
        try:
            with self._lock:
                texts = self._generate(rows)
        except Exception as error:  # noqa: BLE001 - it belongs to those who asked
            return {job.place: error for job in jobs}
        answers: dict[int, Response | Exception] = {}
        for job in jobs:
            own, texts = texts[: job.n], texts[job.n :]
            answers[job.place] = Response(self._samples(job, own))
        return answers

    def _generate(self, rows: Sequence[_Job]) -> list[_Text]:
        """Return one answer per row, generated in halves if memory does not suffice."""
        try:
            return self._called(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1 or rows[0].seed is not None:
                raise
        half = len(rows) // 2  # outside of the handler, which would keep the memory
        return self._generate(rows[:half]) + self._generate(rows[half:])

    def _called(self, rows: Sequence[_Job]) -> list[_Text]:
        """Return the answers of one call. Prompts are padded on the left, so that all end at one place."""
        first = rows[0]
        device = self._model.device
        ends = self._ends(first.settings)
        padding = self._tokenizer.pad_token_id
        if padding is None:
            padding = next(iter(ends), 0)
        width = max(len(row.tokens) for row in rows)
        tokens = [[padding] * (width - len(row.tokens)) + row.tokens for row in rows]
        mask = [[0] * (width - len(row.tokens)) + [1] * len(row.tokens) for row in rows]
        settings = copy.deepcopy(self._model.generation_config)
        asked = dict(first.settings)
        if greedy := asked.get("temperature") == 0:
            del asked["temperature"]
        # Beams are not independent samples, so the model's own configuration must not ask for them.
        one_each = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
        ending = {"eos_token_id": ends or None, "stop_strings": list(first.stop) or None}
        settings.update(**{**asked, **one_each, **ending, "do_sample": not greedy, "pad_token_id": padding})
        self.calls += 1
        devices = [device] if device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices, enabled=first.seed is not None):
            if first.seed is not None:
                torch.manual_seed(first.seed)
            output = self._model.generate(
                input_ids=torch.tensor(tokens, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
                tokenizer=self._tokenizer,  # finds stop texts
                streamer=self._streamer(rows, ends),
            )
        return [
            self._text(row, made, ends) for row, made in zip(rows, output[:, width:].tolist(), strict=True)
        ]

    def _streamer(self, rows: Sequence[_Job], ends: Sequence[int]) -> _Streamer | None:
        """Return a streamer for the listeners of a call; None if it has no listeners."""
        whole = {job.place: job for job in rows if job.listener is not None and rows.count(job) == job.n}
        open_ = {place for place, job in whole.items() if job.listener and job.listener.begin(job.head)}
        if not open_:
            return None
        heard: list[_HeardText | None] = []
        counts: Counter[int] = Counter()
        for job in rows:
            text = _HeardText(job, counts[job.place], ends, self._decoded) if job.place in open_ else None
            heard.append(text)
            counts[job.place] += 1
        return _Streamer(heard)

    def _ends(self, settings: Mapping[str, Any]) -> list[int]:
        """Return the tokens that end an answer."""
        ends = settings.get("eos_token_id", self._model.generation_config.eos_token_id)
        if ends is None:
            ends = self._tokenizer.eos_token_id
        return [] if ends is None else ends if isinstance(ends, list) else [ends]

    def _text(self, row: _Job, tokens: list[int], ends: Sequence[int]) -> _Text:
        """Return an answer up to its end, which is a token or a text."""
        length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
        ended = bool(length) and tokens[length - 1] in ends
        text = self._decoded(tokens[:length])
        cuts = [place for place in map(text.find, row.stop) if place >= 0]
        if not cuts:
            return _Text(text, length, ended)
        # The batch goes on until all answers have ended, so more tokens may follow the end of this one.
        cut = min(cuts)
        while length > 1 and any(stop in self._decoded(tokens[: length - 1]) for stop in row.stop):
            length -= 1
        return _Text(text[:cut], length, ended=True)

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _samples(self, job: _Job, texts: Sequence[_Text]) -> list[wire.Sample]:
        """Return answers as samples; the prompt is counted once for all of them."""
        chat = "messages" in job.body
        prompt = len(job.tokens)
        samples: list[wire.Sample] = []
        for text in texts:
            said = {"message": {"role": "assistant", "content": text.text}} if chat else {"text": text.text}
            reason = "stop" if text.ended else "length"
            choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
            usage = {
                "prompt_tokens": prompt,
                "completion_tokens": text.tokens,
                "total_tokens": prompt + text.tokens,
            }
            sample = {**job.head, "choices": [choice], "usage": usage}
            samples.append(wire.marked(sample) if samples else sample)
        return samples


def _asked(prompt: Any) -> dict[str, Any]:
    """Return the field of a body that holds a prompt."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, list | tuple) and prompt and all(type(token) is int for token in prompt):
        return {"prompt": list(prompt)}
    if isinstance(prompt, list | tuple) and all(isinstance(message, Mapping) for message in prompt):
        return {"messages": [dict(message) for message in prompt]}
    raise wire.BadRequest(
        f"a prompt is a string, a list of token ids or a list of messages; got {prompt!r:.200}"
    )


def _is_setting(name: str) -> bool:
    """Return True if a field is a parameter of the generation that a request may set."""
    return name not in _RULED and name in vars(transformers.GenerationConfig())
