"""The shared part of chat completions and legacy completions: answers with several choices.

One call returns up to `n` choices, so several draws can share it. Each choice becomes a sample.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

from cachepipe import jsontext
from cachepipe.contract.demands import is_mergeable
from cachepipe.wire.base import (
    OPENAI_AS_WRITTEN,
    OPENAI_TRANSPORT,
    Api,
    Ask,
    Body,
    Sample,
    load,
    marked,
    objects,
    text_of,
    unmarked,
    wanted,
)
from cachepipe.wire.errors import BadAnswer, MixedAnswer
from cachepipe.wire.sse import (
    DONE,
    IDENTITIES,
    Kind,
    ServerEvent,
    StreamRecorder,
    TextTemplate,
    data_event,
    extend,
    merge,
    pieces,
    read_object,
)
from cachepipe.wire.usage import join_usage, split_usage

_FAILED = frozenset({"error", "abort", "insufficient_system_resource"})
"""Reasons to finish by which OpenRouter, vLLM and DeepSeek report a failure under status 200."""

Lane = tuple[Callable[[Any], Any], str | list[Any]]
"""A function that makes a delta of a piece, and the text or list that is streamed in pieces."""

_CONTENTS = frozenset({"delta", "message", "text"})
"""The fields of a streamed choice with its content, or with a copy, such as Perplexity's ``message``."""
_NOT_COPIED = _CONTENTS | {"index"}
_GROWING = frozenset({"content", "reasoning", "reasoning_content", "refusal", "text"})
"""The fields of a delta to which further texts are appended."""
_IN_EVERY_CHUNK = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier"})
_GROQ = "x_groq"
"""Groq's own field: the id of a request, and the usage of a stream in its last chunk with a choice."""


class ChoicesApi(Api):
    """An API whose answers have choices.

    Attributes:
        content: the field of a choice with the sampled content.
        delta: the field of a streamed choice with a part of the content.
        no_delta: the value of that field without content.
        chunk_object: the field ``object`` of a streamed answer.
        whole_object: the field ``object`` of an answer that is not streamed.
    """

    max_n = 128
    transport = OPENAI_TRANSPORT
    as_written = OPENAI_AS_WRITTEN
    content: ClassVar[str]
    delta: ClassVar[str]
    no_delta: ClassVar[Any]
    chunk_object: ClassVar[str]
    whole_object: ClassVar[str]

    def split(self, body: Body) -> tuple[Ask, ...]:
        """Return the asks of a body; see `Api.split`."""
        question, transport = self._parted(body)
        n = wanted(question.pop("n", None))
        best_of = question.get("best_of")
        if best_of is not None:
            question["n"] = n
        options = transport.get("stream_options")
        return self._asks(
            question,
            n=n,
            stream=bool(transport.get("stream")),
            include_usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
            mergeable=is_mergeable(question.get("seed"), best_of),
            transport=transport,
        )

    def inject_usage(self, body: Body) -> tuple[dict[str, Any], bool]:
        """Return a body whose stream reports its usage, and whether this had to be added."""
        options = body.get("stream_options") or {}
        if not body.get("stream") or not isinstance(options, Mapping) or options.get("include_usage"):
            return dict(body), False
        return {**body, "stream_options": {**options, "include_usage": True}}, True

    def samples(self, answer: bytes | Body, questions: Sequence[Body] = ()) -> list[Sample]:
        """Return the samples of an upstream answer; see `Api.samples`."""
        body = load(answer)
        choices = self._choices_of(body)
        if len(choices) == 1 and len(questions) < 2 and not choices[0].get("index"):
            return [body]
        prompts = self._weights(questions)
        choices = _in_order(choices, len(prompts))
        usage = body.get("usage")
        parts = split_usage(usage, self._shares(choices, usage), prompts)
        samples = []
        for number, (choice, part) in enumerate(zip(choices, parts, strict=True)):
            sample = {**body, "choices": [{**choice, "index": 0}]}
            if "usage" in body:
                sample["usage"] = part
            samples.append(marked(sample) if number % (len(choices) // len(prompts)) else sample)
        return samples

    def _choices_of(self, body: Mapping[str, Any]) -> list[Any]:
        """Return the choices of an answer.

        Raises:
            BadAnswer: when they are missing or invalid.
        """
        choices = body.get("choices")
        if not isinstance(choices, list):
            raise BadAnswer(
                f"an answer of {self.name} must hold a list of choices; it holds {sorted(body)!r:.200}"
            )
        if not choices and body.get("usage") is None:
            raise BadAnswer(f"an answer of {self.name} holds no choice, and no usage: nothing was generated")
        for choice in choices:
            self._check(choice)
        return choices

    def _shares(self, choices: Sequence[Mapping[str, Any]], usage: Any) -> list[int]:
        """Return the share of each choice in the completion: its tokens if all list them, else its length."""
        tokens = [_tokens(choice) for choice in choices]
        counts = [count for count in tokens if count is not None]
        total = usage.get("completion_tokens") if isinstance(usage, Mapping) else 0
        if len(counts) == len(choices) and sum(counts) == total != 0:
            return counts
        return [_length(choice[self.content]) + 1 for choice in choices]

    def answer(self, samples: Sequence[Sample], ask: Ask) -> dict[str, Any]:
        """Return the answer with these samples; see `Api.answer`."""
        if len(samples) == 1:
            return unmarked(samples[0])
        if not samples:
            raise ValueError(f"an answer of {self.name} holds at least one sample; got none")
        whole = dict(unmarked(samples[0]))
        whole["choices"] = [
            {**sample["choices"][0], "index": number} for number, sample in enumerate(samples)
        ]
        usages = [sample.get("usage") for sample in samples]
        if all(isinstance(usage, Mapping) for usage in usages):
            whole["usage"] = join_usage(usages, ask.n)  # type: ignore[arg-type]  # all are mappings
        elif any("usage" in sample for sample in samples):
            whole["usage"] = None  # a partial sum would look like the whole
        return whole

    def recorder(self, questions: Sequence[Body] = (), ask: Ask | None = None) -> StreamRecorder:  # noqa: ARG002 - all readers get events
        """Return a new recorder for one event stream; see `Api.recorder`."""
        return _ChoicesRecorder(self, questions)

    def stream(self, samples: Sequence[Sample], ask: Ask) -> Iterator[bytes]:
        """Return the events of a stream with these samples; see `Api.stream`."""
        whole = self.answer(samples, ask)
        head = dict(whole)
        choices, usage = head.pop("choices"), head.pop("usage", None)
        if head.get("object") == self.whole_object:
            head["object"] = self.chunk_object
        usual = {name: value for name, value in head.items() if name in _IN_EVERY_CHUNK}
        if ask.include_usage:
            head["usage"] = usual["usage"] = None
        begin = b"data: " + jsontext.dumps({**head, "choices": []})[:-2]
        rest = b"data: " + jsontext.dumps({**usual, "choices": []})[:-2]
        chunks = [
            {"index": index, **chunk}
            for turn in zip_longest(*map(self._chunks, choices))
            for index, chunk in enumerate(turn)
            if chunk is not None
        ]
        for chunk in chunks[:-1]:
            yield begin + jsontext.dumps(chunk) + b"]}\n\n"
            begin = rest
        if isinstance(head.get(_GROQ), Mapping) and usage is not None:
            yield data_event({**usual, "choices": chunks[-1:], _GROQ: {**head[_GROQ], "usage": usage}})
        else:
            yield begin + jsontext.dumps(chunks[-1]) + b"]}\n\n"
        if ask.include_usage and usage is not None:
            yield data_event({**usual, "choices": [], "usage": usage})
        yield DONE

    @abstractmethod
    def delta_of(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return the part of the content in a streamed choice, as a mapping."""

    @abstractmethod
    def settle(self, content: dict[str, Any]) -> Any:
        """Return the content from the merged deltas."""

    def _check(self, choice: Any) -> None:
        kind = type(choice.get(self.content)) if isinstance(choice, dict) else None
        if kind is not (str if self.content == "text" else dict):
            raise BadAnswer(f"a choice of {self.name} must hold its {self.content}; got {choice!r:.200}")
        if choice.get("error") or text_of(choice.get("finish_reason")) in _FAILED:
            raise BadAnswer(f"a choice of {self.name} failed: {choice!r:.500}")

    def _chunks(self, choice: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return a choice as the choices of a stream's chunks, without their index."""
        first, lanes = self._deltas(choice[self.content])
        unsent = choice.get("logprobs")
        plain = {"logprobs": None} if "logprobs" in choice else {}
        chunks: list[dict[str, Any]] = []
        for make, text in lanes:
            parts = by_token(unsent, text)
            if parts:
                unsent = None
            words = pieces(text) if isinstance(text, str) else text
            for part, own in parts or [(word, plain) for word in words]:
                chunks.append({self.delta: make(part), **own, "finish_reason": None})
        head = {self.delta: first, **dict.fromkeys(plain, unsent), "finish_reason": None}
        rest = {name: value for name, value in choice.items() if name not in ("logprobs", *_NOT_COPIED)}
        return [head, *chunks, {self.delta: self.no_delta, **plain, **rest}]

    @abstractmethod
    def _deltas(self, content: Any) -> tuple[Any, list[Lane]]:
        """Return the first delta of a choice's content, and the texts that follow in pieces."""


class _ChoicesRecorder(StreamRecorder):
    """Assembles the choices of a stream, in any order of their chunks."""

    _may_lack_terminal = True  # each choice has its finish_reason

    def __init__(self, api: ChoicesApi, questions: Sequence[Body]) -> None:
        super().__init__(lambda whole: api.samples(whole, questions))
        self._api = api
        self._head: dict[str, Any] = {}
        self._usage: Any = None
        self._usages: dict[int, dict[str, Any]] = {}  # in choices, as Moonshot sends them
        self._choices: dict[int, dict[str, Any]] = {}
        self._elsewhere: set[int] = set()  # choices with content in another field than that of deltas
        self._template: TextTemplate | None = None

    def _continues(self, event: ServerEvent) -> bool:
        """Read an event that equals the one before it except for its text."""
        template, self._template = self._template, None
        if template is None or event.name or not template.take(event.data):
            return False
        self._template = template
        self.started = True
        return True

    def _take(self, event: ServerEvent) -> Kind:
        if event.data.startswith(b"[DONE]"):
            return "terminal"
        chunk = read_object(event)
        choices = chunk.pop("choices", None) or []
        usage = chunk.pop("usage", None)
        chunk.pop("obfuscation", None)
        groq = chunk.get(_GROQ)
        if isinstance(groq, dict):
            if groq.get("error"):
                raise BadAnswer(f"the stream was stopped early: {groq['error']!r:.500}")
            self._usage = groq.pop("usage", None) or self._usage
        if sum(part.get("index") is None for part in choices) > 1:
            raise BadAnswer("several choices of a chunk have no index; they cannot be told apart")
        for part in choices:
            self._add(part)
        self._add_head(chunk)
        self._usage = usage or self._usage
        if len(choices) == 1 and not usage and groq is None:
            self._template = self._template_of(event.data, choices[0])
        return _without_usage(chunk) if usage and not choices else ""

    def _template_of(self, data: bytes, part: dict[str, Any]) -> TextTemplate | None:
        """Return the template of a chunk that adds nothing but a text, however often it comes."""
        api = self._api
        delta = api.delta_of(part)
        rest = part.keys() - _NOT_COPIED
        names = [name for name, value in delta.items() if value is not None and name not in IDENTITIES]
        if len(names) != 1 or names[0] not in _GROWING or any(part[name] not in (None, "") for name in rest):
            return None
        [name] = names
        return TextTemplate.of(data, name, self._choices[part.get("index") or 0][api.content].get(name))

    def _add_head(self, chunk: Mapping[str, Any]) -> None:
        """Read the fields of a chunk beside its choices and usage."""
        for name, value in chunk.items():
            if not self._head.get(name) or (value and name not in _IN_EVERY_CHUNK):
                self._head[name] = value  # a repeated field, such as a report, replaces the earlier one

    def _add(self, part: dict[str, Any]) -> None:
        """Read one choice of a chunk."""
        api = self._api
        index = part.get("index") or 0
        choice = self._choices.setdefault(index, {api.content: {}})
        self._note_elsewhere(index, part)
        delta = api.delta_of(part)
        if delta:
            merge(choice[api.content], delta)
            self.started = self.started or _says(delta)
        for name, value in part.items():
            if name == "logprobs":
                self._add_logprobs(choice, value, delta, part)
            elif name == "usage" and isinstance(value, dict):
                self._usages[index] = value
            elif name == "token_ids":  # from vLLM, some with each delta
                extend(choice, {name: value})
            elif name not in _NOT_COPIED and (value not in (None, "") or not choice.get(name)):
                choice[name] = value

    def _note_elsewhere(self, index: int, part: Mapping[str, Any]) -> None:
        """Note a choice whose chunk has content in another field than that of deltas."""
        field = self._api.delta
        if any(_says(part.get(name)) for name in _CONTENTS - {field}):
            if part.get(field) is None:
                raise BadAnswer(f"a chunk of the stream has its content elsewhere than in {field!r}")
            self._elsewhere.add(index)

    @staticmethod
    def _add_logprobs(
        choice: dict[str, Any], value: Any, delta: dict[str, Any], part: dict[str, Any]
    ) -> None:
        """Read log probabilities: lists that grow, or one number per token, as Together sends them."""
        before = choice.setdefault("logprobs", None)
        if value is None or value == []:
            return
        if isinstance(value, int | float):
            token = delta.get("content", delta.get("text"))
            value = {"tokens": [token], "token_logprobs": [value]}
            told = part.get("delta") or part
            if "token_id" in told:
                value["token_ids"] = [told["token_id"]]
        if before is None:
            choice["logprobs"] = value
        else:
            extend(before, value)

    def _whole(self) -> dict[str, Any]:
        api = self._api
        choices = []
        for index, choice in sorted(self._choices.items()):
            if not choice.get("finish_reason"):
                raise BadAnswer(
                    f"choice {index} of the stream has no finish_reason; it is not a whole answer"
                )
            content = api.settle(choice[api.content])
            if index in self._elsewhere and not _says(content):
                raise BadAnswer(
                    f"choice {index} of the stream has no {api.delta}, but content in other fields"
                )
            choices.append({"index": index, **choice, api.content: content})
        if not choices:
            raise BadAnswer("the stream brought no choice; ask again")
        head, usage = self._head, self._usage
        if usage is None and self._usages:
            usage = join_usage([*self._usages.values()], len(self._usages))
        if head.get("object") == api.chunk_object:
            head["object"] = api.whole_object
        usual: dict[str, Any] = {
            name: head.pop(name) for name in ("id", "object", "created", "model") if name in head
        }
        return {**usual, "choices": choices, "usage": usage, **head}


def _without_usage(chunk: Mapping[str, Any]) -> bytes:
    """Return the event of a chunk without its usage and choices; nothing if it has no field of its own."""
    bare = all(value is None or name in _IN_EVERY_CHUNK for name, value in chunk.items())
    return b"" if bare else data_event({**chunk, "choices": []})


def _says(content: Any) -> bool:
    """Return True if a text, a message or a delta is not empty."""
    if isinstance(content, Mapping):
        return any(value for name, value in content.items() if name != "role")
    return bool(content)


def by_token(logprobs: Any, text: Any) -> list[tuple[str, dict[str, Any]]] | None:
    """Return the tokens of a text, each with its log probabilities, or None if they do not fit."""
    tokens = _token_texts(logprobs)
    if not tokens or "".join(tokens) != text:
        return None
    lists = {name: value for name, value in logprobs.items() if value is not None}
    if any(not isinstance(value, list) or len(value) != len(tokens) for value in lists.values()):
        return None
    return [
        (token, {"logprobs": {**logprobs, **{name: value[i : i + 1] for name, value in lists.items()}}})
        for i, token in enumerate(tokens)
    ]


def _token_texts(logprobs: Any) -> list[str]:
    """Return the tokens that log probabilities list; none if some are not texts."""
    if not isinstance(logprobs, Mapping):
        return []
    tokens = logprobs.get("tokens")
    if tokens is None:
        tokens = [entry.get("token") for entry in objects(logprobs.get("content"))]
    return tokens if set(map(type, tokens)) == {str} else []


def _in_order(choices: list[dict[str, Any]], questions: int) -> list[dict[str, Any]]:
    """Return choices in the order of their index; with several questions, the indices must be complete."""
    indices = [choice.get("index") for choice in choices]
    if all(isinstance(index, int) for index in indices):
        choices = sorted(choices, key=lambda choice: choice["index"])
        complete = [choice["index"] for choice in choices] == list(range(len(choices)))
    else:
        complete = not any(index is not None for index in indices)
    if questions > 1 and (len(choices) % questions or not complete):
        raise MixedAnswer(
            f"{len(choices)} choices with indices {indices!r:.200} cannot be told apart as answers to "
            f"{questions} questions; ask one by one"
        )
    return choices


def _tokens(choice: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a choice lists, as ids or with log probabilities, or None."""
    if isinstance(choice.get("token_ids"), list):
        return len(choice["token_ids"])
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        return None
    parts = [
        part for name in ("tokens", "content", "refusal") if isinstance(part := logprobs.get(name), list)
    ]
    return sum(map(len, parts)) if parts else None


def _length(content: Any) -> int:
    """Return the number of characters of a choice's content, its share in the completion of a call."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, Mapping):
        return sum(_length(value) for value in content.values())
    return sum(_length(value) for value in content) if isinstance(content, list) else 0
