"""Hugging Face's own routes: text generation and feature extraction, of its hub and of its servers.

The hub has one URL for each model (``…/models/MODEL``, ``…/models/MODEL/pipeline/feature-extraction``); its
servers for text generation and for embeddings also have ``/generate`` and ``/embed``. Chats, and the calls
that the hub passes on to other providers, have the formats of `cachepipe.wire.chat` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Final

import orjson

from cachepipe import jsontext
from cachepipe.contract.demands import is_mergeable
from cachepipe.wire.base import Api, Ask, Body, Sample, is_too_much, objects, unmarked
from cachepipe.wire.errors import BadAnswer, MixedAnswer
from cachepipe.wire.sse import Finish, Kind, ServerEvent, StreamRecorder, data_event, pieces, read_object

TRANSPORT: Final = frozenset(
    {
        "stream",  # how the answer is sent
        "options",  # whether to wait for the model, and to use the hub's own cache
    }
)
"""The transport fields of both APIs."""

_OF_STREAM: Final = ("finish_reason", "generated_tokens", "seed", "input_length")
"""The details that the last event of a stream has."""


class _TextRecorder(StreamRecorder):
    """Assembles a generated text from the tokens of a stream; the last event also has the whole text."""

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish)
        self._tokens: list[Any] = []
        self._tops: list[Any] = []
        self._last: dict[str, Any] = {}

    def _take(self, event: ServerEvent) -> Kind:
        if event.data.startswith(b"[DONE]"):
            return ""
        value = read_object(event)
        if (token := value.get("token")) is not None:
            self._tokens.append(token)
            self._tops.append(value.get("top_tokens"))
            self.started = self.started or bool(token.get("text"))
        if not isinstance(value.get("generated_text"), str):
            return ""
        self._last = value
        return "terminal"

    def _whole(self) -> dict[str, Any]:
        details = {**(self._last.get("details") or {}), "tokens": self._tokens}
        if any(self._tops):
            details["top_tokens"] = self._tops
        return {"generated_text": self._last["generated_text"], "details": details}


class TextGenerationApi(Api):
    """``POST …/models/MODEL``, of which the answer is a list with one text.

    A sample that came as a stream has all its tokens in its ``details``, like an answer with details, but has
    no ``prefill``.

    Attributes:
        in_list: whether an answer is a list.
    """

    name = "text generation"
    transport = TRANSPORT
    as_written = MappingProxyType({"parameters": frozenset({"value"})})  # the schema of a grammar
    in_list: ClassVar[bool] = True

    def split(self, body: Body) -> tuple[Ask]:
        """Return the ask of a body; see `Api.split`."""
        question, transport = self._parted(body)
        parameters = _parameters(question)
        reason = ""
        if not isinstance(question.get("inputs"), str):
            reason = "its inputs are not one text"
        elif parameters.get("num_return_sequences") not in (None, 1):
            reason = "it asks for several texts in one answer"
        return (
            Ask(
                question,
                stream=bool(transport.get("stream")),
                mergeable=is_mergeable(parameters.get("seed"), parameters.get("best_of")),
                cacheable=not reason,
                reason=reason,
                transport=transport,
            ),
        )

    def samples(self, answer: bytes | Body, questions: Sequence[Body] = ()) -> list[Sample]:  # noqa: ARG002 - one per call
        """Return the generated text as the only sample; see `Api.samples`."""
        value = _read(answer)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, dict) or not isinstance(value.get("generated_text"), str):
            raise BadAnswer(f"an answer of {self.name} must hold one generated_text; got {value!r:.200}")
        return [value]

    def answer(self, samples: Sequence[Sample], ask: Ask) -> dict[str, Any]:
        """Return the answer with this sample; `written` puts it into a list."""
        whole = super().answer(samples, ask)
        details = whole.get("details")
        if not isinstance(details, Mapping) or "prefill" in details:
            return whole
        whole = {name: value for name, value in whole.items() if name != "details"}
        if _parameters(ask.question).get("details"):
            own = {name: value for name, value in details.items() if name != "input_length"}
            whole["details"] = {"best_of_sequences": None, "prefill": [], **own}
        return whole

    def answer_bytes(self, samples: Sequence[bytes], ask: Ask) -> bytes:
        """Return the JSON of an answer."""
        return self.written(self.answer([orjson.loads(sample) for sample in samples], ask))

    def written(self, answer: Any) -> bytes:
        """Return the JSON of an answer; see `Api.written`."""
        return jsontext.dumps([answer] if self.in_list else answer)

    def recorder(self, questions: Sequence[Body] = (), ask: Ask | None = None) -> StreamRecorder:  # noqa: ARG002 - one per call
        """Return a new recorder for one event stream; see `Api.recorder`."""
        return _TextRecorder(self.samples)

    def stream(self, samples: Sequence[Sample], ask: Ask) -> Iterator[bytes]:
        """Return the events of a stream with this sample: one for each token.

        A sample that came without details has words instead of tokens, without ids and log probabilities.
        """
        if len(samples) != 1:
            raise ValueError(f"an answer of {self.name} holds one sample; got {len(samples)}")
        whole = unmarked(samples[0])
        text, details = whole["generated_text"], whole.get("details")
        details = details if isinstance(details, Mapping) else {}
        tokens: Sequence[Any] = objects(details.get("tokens"))
        tops = details.get("top_tokens") if tokens else None
        if not tokens:
            own = text
            if _parameters(ask.question).get("return_full_text"):
                own = text.removeprefix(str(ask.question.get("inputs")))
            unknown = {"id": None, "logprob": None, "special": False}
            tokens = [{**unknown, "text": piece} for piece in pieces(own) or [""]]
        for index, token in enumerate(tokens, 1):
            event: dict[str, Any] = {"index": index, "token": token}
            if isinstance(tops, list) and index <= len(tops) and tops[index - 1] is not None:
                event["top_tokens"] = tops[index - 1]
            last = index == len(tokens)
            event["generated_text"] = text if last else None
            event["details"] = {name: details.get(name) for name in _OF_STREAM} if last and details else None
            yield data_event(event)

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        details = sample.get("details")
        finish = details.get("finish_reason") if isinstance(details, Mapping) else None
        return sample["generated_text"], finish


class GenerateApi(TextGenerationApi):
    """``POST …/generate``, of which the answer is the text itself, and ``…/generate_stream``."""

    in_list = False

    def received(self, url: str, body: Body) -> Body:
        """Return the body with ``stream``, as the URL decides that."""
        is_stream = url.partition("?")[0].rstrip("/").endswith("_stream")
        return {**body, "stream": is_stream} if isinstance(body, Mapping) else body

    def sent(self, url: str, body: Body) -> tuple[str, Body]:
        """Return the URL and the body of a call."""
        path, mark, query = url.partition("?")
        ending = "/generate_stream" if body.get("stream") else "/generate"
        rest = {name: value for name, value in body.items() if name != "stream"}
        return f"{path.rstrip('/').rpartition('/')[0]}{ending}{mark}{query}", rest


class FeatureExtractionApi(Api):
    """``POST …/models/MODEL/pipeline/feature-extraction``, and ``…/embed``.

    Each text of a list is a question of its own, and its answer is a list with one item. The answer to a text
    outside of a list has another form on some servers, so it is another question. A sample is an object that
    holds the answer.
    """

    name = "feature extraction"
    transport = frozenset({"options"})  # see TRANSPORT
    listed = "inputs"
    function = True
    _streaming = frozenset()

    def split(self, body: Body) -> tuple[Ask, ...]:
        """Return one ask for each text of a list, else one; see `Api.split`."""
        question, transport = self._parted(body)
        inputs = question.get("inputs")
        if not isinstance(inputs, list | tuple) or not all(isinstance(text, str) for text in inputs):
            reason = "" if inputs else "it has no inputs"
            facts: dict[str, Any] = {"cacheable": not reason, "reason": reason, "mergeable": False}
            return (Ask(question, function=True, transport=transport, **facts),)
        if not inputs or (len(inputs) > 1 and is_too_much(question, "inputs", len(inputs))):
            reason = "its inputs list nothing, or too much: each item is a question of its own"
            return (Ask(question, cacheable=False, reason=reason, function=True, transport=transport),)
        return tuple(
            Ask({**question, "inputs": [text]}, function=True, transport=transport) for text in inputs
        )

    def _with_items(self, questions: Sequence[Body]) -> dict[str, Any]:
        whole = super()._with_items(questions)
        return {**whole, "inputs": [text for texts in whole["inputs"] for text in texts]}

    def samples(self, answer: bytes | Body, questions: Sequence[Body] = ()) -> list[Sample]:
        """Return one sample per question; see `Api.samples`."""
        value = _read(answer)
        if not _is_nested(value):
            raise BadAnswer(f"an answer of {self.name} must hold numbers in lists; got {value!r:.200}")
        if not questions:
            return [{"embeddings": value}]
        if len(value) != len(questions):
            raise MixedAnswer(
                f"{len(questions)} texts were sent to {self.name}; {len(value)} results came back"
            )
        return [{"embeddings": [item]} for item in value]

    def answer(self, samples: Sequence[Sample], ask: Ask) -> dict[str, Any]:  # noqa: ARG002 - other APIs need it
        """Return an object with the answer, which `written` takes out of it."""
        if not samples:
            raise ValueError(f"an answer of {self.name} holds at least one sample; got none")
        if len(samples) == 1:
            return unmarked(samples[0])
        return {"embeddings": [item for sample in samples for item in sample["embeddings"]]}

    def answer_bytes(self, samples: Sequence[bytes], ask: Ask) -> bytes:
        """Return the JSON of an answer."""
        return self.written(self.answer([orjson.loads(sample) for sample in samples], ask))

    def written(self, answer: Any) -> bytes:
        """Return the JSON of an answer; see `Api.written`."""
        return jsontext.dumps(answer["embeddings"])

    def plain(self, sample: Sample) -> Any:
        """Return the numbers, in lists as the server nests them."""
        return sample["embeddings"]

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        sizes = []
        value = sample["embeddings"]
        while isinstance(value, list):
            sizes.append(str(len(value)))
            value = value[0] if value else None
        return f"{' by '.join(sizes)} numbers", None


def _parameters(question: Body) -> Mapping[str, Any]:
    """Return the parameters of a question."""
    parameters = question.get("parameters")
    return parameters if isinstance(parameters, Mapping) else {}


def _read(answer: bytes | Body) -> Any:
    """Return the JSON value of an answer.

    Raises:
        BadAnswer: when it is not valid JSON, or is an error.
    """
    value: Any = answer
    if isinstance(answer, bytes | bytearray | memoryview):
        try:
            value = jsontext.read(bytes(answer))
        except ValueError as error:
            raise BadAnswer(
                f"the answer is not valid JSON: {error}; the connection may have been cut"
            ) from error
    if isinstance(value, Mapping) and value.get("error"):
        raise BadAnswer(f"the answer is an error: {value['error']!r:.500}")
    return value


def _is_nested(value: Any) -> bool:
    """Return True for numbers in lists of any depth; only the first item of each list is looked at."""
    depth = 0
    while isinstance(value, list) and value:
        value, depth = value[0], depth + 1
    return depth > 0 and type(value) in (int, float)


TEXT_GENERATION = TextGenerationApi()
GENERATE_TEXT = GenerateApi()
FEATURE_EXTRACTION = FeatureExtractionApi()


def inference_at(segments: Sequence[str]) -> Api | None:
    """Return the API of a path by its segments, the last ones of which name it; None for other paths."""
    match segments:
        case [*_, "api", "generate" | "generate_stream" | "embed"]:  # Ollama's
            return None
        case [*_, "pipeline", "feature-extraction"] | [*_, "embed"]:
            return FEATURE_EXTRACTION
        case [*_, "generate" | "generate_stream"]:
            return GENERATE_TEXT
        case [*_, "models", name] | [*_, "models", _, name] if name and ":" not in name:
            return TEXT_GENERATION
    return None
