"""Gemini's models: content and embeddings, at Google AI and at Vertex AI.

The URL of a request says which model it asks, and whether the answer is a stream. So `Api.received` adds both
to the body as the fields ``model`` and ``stream``, and `Api.sent` takes them out again. All else works as for
the other APIs: ``streamGenerateContent`` is the same question as ``generateContent``, and each item of
``batchEmbedContents`` the same as an ``embedContent``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote

from cachepipe import jsontext
from cachepipe.contract.demands import is_mergeable
from cachepipe.wire.base import (
    GEMINI_AS_WRITTEN,
    GEMINI_TRANSPORT,
    Api,
    Ask,
    Body,
    Sample,
    load,
    mark_of,
    marked,
    objects,
    text_of,
    unmarked,
    wanted,
    with_mark,
)
from cachepipe.wire.errors import BadAnswer, BadRequest, MixedAnswer
from cachepipe.wire.sse import (
    Finish,
    Kind,
    ServerEvent,
    StreamEvent,
    StreamRecorder,
    data_event,
    joined,
    pieces,
    read_object,
)
from cachepipe.wire.usage import OF_QUESTION, join_usage, split_usage

_FAILED: Final = frozenset({"FINISH_REASON_UNSPECIFIED", "OTHER", "IMAGE_OTHER"})
"""The reasons to finish that report a failure of the service. All others end an answer, also SAFETY."""

_CONFIGS: Final = ("generationConfig", "generation_config")
_COUNTS: Final = ("candidateCount", "candidate_count")
_MERGED: Final = frozenset({"text", "thought"})
"""The fields of parts that are pieces of one text. A part with a signature must stay as it is."""
_GROWING: Final = frozenset({"chosenCandidates", "topCandidates", "citationSources", "citations"})
"""The lists of a streamed candidate that grow with its text."""


def model_of(url: str) -> str:
    """Return the model in the URL of a request, without the folder of Google's own models."""
    *_, folder, name = ["", *url.partition("?")[0].partition("#")[0].split("/")]
    model = unquote(name.rpartition(":")[0])
    return model if folder == "models" else f"{folder}/{model}"


def _parameters(url: str) -> dict[str, str]:
    """Return the query parameters of a URL by their names in lower case, still encoded."""
    pairs = (pair.partition("=") for pair in url.partition("?")[2].split("&") if pair)
    return {unquote(name).lower(): value for name, _, value in pairs}


def _at(url: str, method: str, *, events: bool = False) -> str:
    """Return a URL with another method, for an answer as JSON or as events."""
    path, _, query = url.partition("?")
    pairs = [pair for pair in query.split("&") if pair and _form(pair) is None]
    if events:
        pairs.append("alt=sse")
    return f"{path.rpartition(':')[0]}:{method}{'?' if pairs else ''}{'&'.join(pairs)}"


def _form(pair: str) -> str | None:
    """Return the form of an answer that a query parameter names, or None."""
    name, _, value = pair.partition("=")
    return value if unquote(name).lower() in ("alt", "$alt") else None


def _form_in(url: str) -> str:
    parameters = _parameters(url)
    return parameters.get("alt") or parameters.get("$alt") or "json"


class _PathApi(Api):
    """An API whose URL names the model."""

    transport = GEMINI_TRANSPORT

    def received(self, url: str, body: Body) -> Body:
        """Return the body with the model, and how a stream is written: ``"sse"`` or ``"json"``, an array."""
        form, method = _form_in(url), url.partition("?")[0].rpartition(":")[2]
        rest = {name: value for name, value in body.items() if name not in ("model", "stream", "alt")}
        whole = {"model": model_of(url), **rest}
        if method == "streamGenerateContent":
            whole["stream"] = form
        elif form != "json":
            whole["alt"] = form
        return whole

    @staticmethod
    def _reason(body: Body) -> str:
        """Return why a request is not cacheable, as part of a sentence, or an empty string."""
        form = body.get("alt", body.get("stream", "json"))
        return "" if form in ("json", "sse") else f"it asks for the form {form!r:.50}"


class _ContentRecorder(StreamRecorder):
    """Assembles the candidates of a stream.

    No event says that it is the last one. So an event in which every candidate has ended is held back until
    another one or the end of the body follows, and is the terminal event in the second case.

    Args:
        finish: returns the samples of a whole answer.
        array: whether the reader gets an array of JSON instead of events.
    """

    _may_lack_terminal = True

    def __init__(self, finish: Finish, *, array: bool = False) -> None:
        super().__init__(finish)
        self._array = array
        self._begun = False
        self._held: list[StreamEvent] = []
        self._head: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._candidates: dict[int, _Candidate] = {}

    def feed(self, chunk: bytes) -> list[StreamEvent]:
        """Return the events that end within this chunk, to pass them on."""
        if self._array and self._most is not None and self._size + len(chunk) > self._most:
            self.error = self.error or BadAnswer(
                f"the stream has more than {self._most} bytes; it is passed on and not cached"
            )
            self._most = None
        events = [*self._held, *super().feed(chunk)]
        self._held = []
        if events and self.error is None and self._has_ended():
            self._held = [events.pop()]
        return events

    def close(self, *, in_order: bool = False) -> list[StreamEvent]:
        """Return the rest of the events at the end of the stream; see `StreamRecorder.close`."""
        held, self._held = self._held, []
        events = [*held, *super().close(in_order=in_order or self._has_ended())]
        if self._array and events and (self.complete or in_order):
            events[-1] = events[-1]._replace(raw=events[-1].raw + b"]")
        if self.complete:
            events[-1] = events[-1]._replace(terminal=True)
        return events

    def _record(self, event: ServerEvent) -> StreamEvent:
        recorded = super()._record(event)
        if not self._array:
            return recorded
        mark, self._begun = b",\r\n" if self._begun else b"[", self._begun or bool(event.data)
        return recorded._replace(raw=mark + event.data if event.data else b"")

    def _has_ended(self) -> bool:
        """Return True if every candidate so far has its reason to finish."""
        ended = ["finishReason" in candidate.fields for candidate in self._candidates.values()]
        return bool(ended) and all(ended)

    def _conclude(self) -> Kind:
        samples = self._finish(self._whole())
        pieces = [candidate.pieces for _, candidate in sorted(self._candidates.items())]
        self._samples = [
            with_mark(sample, {"pieces": each}) for sample, each in zip(samples, pieces, strict=True)
        ]
        return "terminal"

    def _take(self, event: ServerEvent) -> Kind:
        chunk = read_object(event)
        for candidate in objects(chunk.pop("candidates", None)):
            index = candidate.get("index") or 0
            self.started = self._candidates.setdefault(index, _Candidate()).add(candidate) or self.started
        self._usage |= chunk.pop("usageMetadata", None) or {}
        self._head |= {name: value for name, value in chunk.items() if value is not None}
        return ""

    def _whole(self) -> dict[str, Any]:
        candidates = [
            {**candidate.whole(), "index": index} for index, candidate in sorted(self._candidates.items())
        ]
        usage = {"usageMetadata": self._usage} if self._usage else {}
        return {**({"candidates": candidates} if candidates else {}), **usage, **self._head}


class _Candidate:
    """A candidate that comes in pieces.

    Attributes:
        fields: its fields, apart from its content.
        pieces: of each piece the number of each part and the length of its text, one after the other. The
            length of a part that is no text, and a piece without content, are None.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.pieces: list[list[int | None] | None] = []
        self._content: dict[str, Any] | None = None
        self._parts: list[tuple[dict[str, Any], list[str]]] = []

    def add(self, piece: Mapping[str, Any]) -> bool:
        """Read a piece; return True if it has content."""
        for name, value in piece.items():
            if name not in ("content", "index") and value is not None:
                self.fields[name] = _grown(self.fields.get(name), value)
        content = piece.get("content")
        if content is None:
            self.pieces.append(None)
            return False
        parts = content.get("parts") or ()
        others = {name: value for name, value in content.items() if name != "parts"}
        self._content = {**(self._content or {}), **others}
        taken: list[int | None] = []
        for part in parts:
            length = self._add_part(part)
            taken += [len(self._parts) - 1, length]
        self.pieces.append(taken)
        return bool(parts)

    def _add_part(self, part: dict[str, Any]) -> int | None:
        """Add a part to the last one if both are text; return the length of its text."""
        if not _is_plain_text(part):
            self._parts.append((part, []))
            return None
        last, texts = self._parts[-1] if self._parts else ({}, [])
        if texts and last.get("thought") == part.get("thought"):
            texts.append(part["text"])
        else:
            self._parts.append((part, [part["text"]]))
        return len(part["text"])

    def whole(self) -> dict[str, Any]:
        """Return the candidate."""
        if self._content is None:
            return self.fields
        content = self._content
        if self._parts:
            parts = [{**part, "text": joined(texts)} if texts else part for part, texts in self._parts]
            content = {"parts": parts, **content}
        return {"content": content, **self.fields}


def _grown(before: Any, value: Any) -> Any:
    """Return a field of a candidate: the latest value, with all items of lists that grow."""
    if not isinstance(before, Mapping) or not isinstance(value, Mapping):
        return value
    lists = {
        name: [*before[name], *value[name]]
        for name in _GROWING & before.keys() & value.keys()
        if isinstance(before[name], list) and isinstance(value[name], list)
    }
    return {**before, **value, **lists} if lists else value


class GenerateContentApi(_PathApi):
    """``POST …/models/MODEL:generateContent``, also ``:streamGenerateContent``."""

    name = "generate content"
    max_n = 8
    as_written = GEMINI_AS_WRITTEN

    def sent(self, url: str, body: Body) -> tuple[str, Body]:
        """Return the URL and the body of a call; a stream always comes as events."""
        rest = {name: value for name, value in body.items() if name not in ("model", "stream", "alt")}
        if body.get("stream"):
            return _at(url, "streamGenerateContent", events=True), rest
        return _at(url, "generateContent"), rest

    def media_type(self, ask: Ask) -> str:
        """Return the media type of a stream: events, or an array of JSON."""
        return "application/json" if ask.transport.get("stream") == "json" else super().media_type(ask)

    def split(self, body: Body) -> tuple[Ask]:
        """Return the ask of a body; see `Api.split`."""
        question, transport = self._parted(body)
        n, seed = 1, None
        for name in _CONFIGS:
            config = question.get(name)
            if not isinstance(config, Mapping):
                continue
            seed = config.get("seed") if seed is None else seed
            n = next((wanted(config[count]) for count in _COUNTS if count in config), n)
            rest = {field: value for field, value in config.items() if field not in _COUNTS}
            if rest:
                question[name] = rest
            else:  # the SDK writes an empty one where nothing is set
                del question[name]
        reason = self._reason(body)
        stream = bool(transport.get("stream"))
        return (
            Ask(
                question,
                n=n,
                stream=stream,
                include_usage=stream,
                mergeable=is_mergeable(seed, None),
                cacheable=not reason,
                reason=reason,
                transport=transport,
            ),
        )

    def merge_body(
        self, questions: Sequence[Body], n: int = 1, *, stream: bool = False, transport: Body | None = None
    ) -> dict[str, Any]:
        """Return the body that asks for n samples of a question; see `Api.merge_body`."""
        body = dict(questions[0]) if len(questions) == 1 else self._with_items(questions)
        if n != 1:
            name = next((each for each in _CONFIGS if each in body), _CONFIGS[0])
            body[name] = {**(body.get(name) or {}), _COUNTS[0]: n}
        body |= {name: value for name, value in (transport or {}).items() if name != "stream"}
        return {**body, "stream": "sse"} if stream else body

    def samples(self, answer: bytes | Body, questions: Sequence[Body] = ()) -> list[Sample]:  # noqa: ARG002 - one per call
        """Return one sample per candidate; see `Api.samples`."""
        body = load(answer)
        candidates = body.get("candidates")
        if not isinstance(candidates, list) or not candidates:
            raise BadAnswer(_nothing(body))
        for candidate in candidates:
            _check(candidate)
        if len(candidates) == 1 and not candidates[0].get("index"):
            return [body]
        candidates = sorted(candidates, key=lambda candidate: candidate.get("index") or 0)
        usage = body.get("usageMetadata")
        parts = split_usage(usage, _weights(candidates, usage), [1])
        samples = []
        for number, (candidate, part) in enumerate(zip(candidates, parts, strict=True)):
            sample = {**body, "candidates": [{**candidate, "index": 0}]}
            if "usageMetadata" in body:
                sample["usageMetadata"] = part
            samples.append(marked(sample) if number else sample)
        return samples

    def answer(self, samples: Sequence[Sample], ask: Ask) -> dict[str, Any]:  # noqa: ARG002 - other APIs need it
        """Return the answer with these samples; see `Api.answer`."""
        if not samples:
            raise ValueError(f"an answer of {self.name} holds at least one sample; got none")
        whole = dict(unmarked(samples[0]))
        if len(samples) == 1:
            return whole
        whole["candidates"] = [
            {**sample["candidates"][0], "index": number} for number, sample in enumerate(samples)
        ]
        usages = [sample.get("usageMetadata") for sample in samples]
        if all(isinstance(usage, Mapping) for usage in usages):
            whole["usageMetadata"] = join_usage(usages, len(samples))  # type: ignore[arg-type]  # all are mappings
        else:
            whole.pop("usageMetadata", None)  # a partial sum would look like the whole
        return whole

    def recorder(self, questions: Sequence[Body] = (), ask: Ask | None = None) -> StreamRecorder:  # noqa: ARG002 - one per call
        """Return a new recorder for one event stream; see `Api.recorder`."""
        return _ContentRecorder(self.samples, array=ask is not None and ask.transport.get("stream") == "json")

    def stream(self, samples: Sequence[Sample], ask: Ask) -> Iterator[bytes]:
        """Return the events of a stream with these samples, or its array; see `Api.stream`.

        A sample that was streamed has the pieces that it had then, because chats keep the pieces and send
        them in their next request. Any other has a word in each, and its adjacent texts become one when the
        stream is recorded.
        """
        whole = self.answer(samples, ask)
        usage = whole.pop("usageMetadata", None)
        candidates = whole.pop("candidates")
        chunks = [
            {"candidates": [piece]}
            for candidate, sample in zip(candidates, samples, strict=True)
            for piece in _pieces_of(candidate, mark_of(sample).get("pieces"))
        ]
        begun = _usage_of_prompt(usage)
        array = ask.transport.get("stream") == "json"
        for number, chunk in enumerate(chunks, start=1):
            last = number == len(chunks)
            told = {} if usage is None else {"usageMetadata": usage if last else begun}
            event = {**chunk, **told, **whole}
            if array:
                ending = b"]" if last else b""
                yield (b"[" if number == 1 else b",\r\n") + jsontext.dumps(event) + ending
            else:
                yield data_event(event)

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        candidate = sample["candidates"][0]
        texts = []
        for part in objects((candidate.get("content") or {}).get("parts")):
            call = part.get("functionCall")
            if isinstance(part.get("text"), str):
                if not part.get("thought"):
                    texts.append(part["text"])
            elif isinstance(call, Mapping):
                texts.append(f"{call.get('name')}({jsontext.dumps(call.get('args') or {}).decode()})")
        return "".join(texts), candidate.get("finishReason")


def _nothing(body: Mapping[str, Any]) -> str:
    """Return why an answer without candidates is not an answer."""
    feedback = body.get("promptFeedback")
    if isinstance(feedback, Mapping) and feedback.get("blockReason"):
        return f"the prompt was blocked: {feedback['blockReason']!r:.100}; nothing was generated"
    return f"an answer of {GenerateContentApi.name} must list its candidates; it holds {sorted(body)!r:.200}"


def _check(candidate: Any) -> None:
    """Refuse a candidate that is not an answer.

    Raises:
        BadAnswer: when it has another form, has failed, or has not ended.
    """
    content = candidate.get("content") if isinstance(candidate, Mapping) else candidate
    parts = (content.get("parts") or []) if isinstance(content, Mapping) else []
    if (
        not isinstance(candidate, Mapping)
        or not isinstance(content, Mapping | None)
        or objects(parts) != parts
    ):
        raise BadAnswer(f"a candidate must hold its content, a list of parts; got {candidate!r:.200}")
    reason = text_of(candidate.get("finishReason"))
    if not reason:
        raise BadAnswer("a candidate has no finishReason; it is not a whole answer")
    if reason in _FAILED:
        raise BadAnswer(f"a candidate failed: {candidate!r:.500}")


def _weights(candidates: Sequence[Mapping[str, Any]], usage: Any) -> list[int]:
    """Return the share of each candidate in the completion: its tokens if all say them, else its length."""
    said = (candidate.get("tokenCount") for candidate in candidates)
    counts = [count for count in said if isinstance(count, int) and count >= 0]
    total = usage.get("candidatesTokenCount") if isinstance(usage, Mapping) else 0
    if len(counts) == len(candidates) and sum(counts) == total != 0:
        return counts
    return [len(jsontext.dumps(candidate.get("content") or {})) + 1 for candidate in candidates]


def _usage_of_prompt(usage: Any) -> dict[str, Any]:
    """Return the usage that the events before the last one report."""
    if not isinstance(usage, Mapping):
        return {}
    begun = {name: value for name, value in usage.items() if name.startswith(OF_QUESTION)}
    return {**begun, "totalTokenCount": usage["promptTokenCount"]} if "promptTokenCount" in usage else begun


def _pieces_of(candidate: Mapping[str, Any], recorded: Any) -> Iterator[dict[str, Any]]:
    """Yield the pieces of a candidate; its other fields come with the last one.

    Args:
        candidate: the candidate.
        recorded: in which pieces it came, as `_Candidate.pieces` has it; anything else is ignored.
    """
    content, index = candidate.get("content"), {"index": candidate.get("index") or 0}
    rest = {name: value for name, value in candidate.items() if name not in ("content", "index")}
    if not isinstance(content, Mapping):
        yield {**rest, **index}
        return
    others = {name: value for name, value in content.items() if name != "parts"}
    parts = objects(content.get("parts"))
    told = _as_recorded(parts, recorded) or [[part] for part in _in_words(parts)] or [[]]
    contents = [
        {} if piece is None else {"content": {**({"parts": piece} if piece else {}), **others}}
        for piece in told
    ]
    for each in contents[:-1]:
        yield {**each, **index}
    yield {**contents[-1], **rest, **index}


def _in_words(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parts with one of their words in each."""
    return [
        part if piece is None else {**part, "text": piece}
        for part in parts
        for piece in (pieces(part["text"]) or [""] if _is_plain_text(part) else [None])
    ]


def _as_recorded(parts: Sequence[dict[str, Any]], recorded: Any) -> list[list[dict[str, Any]] | None] | None:
    """Return the parts of each piece as they were recorded, or None if they are not these parts."""
    if not isinstance(recorded, list):
        return None
    told: list[list[dict[str, Any]] | None] = []
    place, begun = -1, 0  # how many parts have begun, and how much of the last one has come
    for piece in recorded:
        if piece is None:
            told.append(None)
            continue
        if not isinstance(piece, list) or len(piece) % 2:
            return None
        own = []
        for number, length in zip(piece[::2], piece[1::2], strict=True):
            if number == place + 1 and begun == _length(parts, place):
                place, begun = number, 0
            part = parts[number] if number == place < len(parts) else {}
            if length is None:
                own.append(part)
            elif type(length) is int and length >= 0 and _is_plain_text(part):
                own.append({**part, "text": part["text"][begun : begun + length]})
                begun += length
            else:
                return None
        told.append(own)
    return told if place == len(parts) - 1 and begun == _length(parts, place) else None


def _length(parts: Sequence[Mapping[str, Any]], place: int) -> int:
    """Return the length of the text of a part; 0 if there is none."""
    return len(parts[place]["text"]) if place >= 0 and _is_plain_text(parts[place]) else 0


def _is_plain_text(part: Mapping[str, Any]) -> bool:
    return bool(part) and part.keys() <= _MERGED and isinstance(part.get("text"), str)


class EmbedContentApi(_PathApi):
    """``POST …/models/MODEL:embedContent``, also ``:batchEmbedContents``: each item is a question."""

    name = "embed content"
    transport = frozenset({"named"})  # the model as the body names it beside its URL
    listed = "content"
    item_types = (dict,)
    most_items = 100
    function = True
    _streaming = frozenset()

    def received(self, url: str, body: Body) -> Body:
        """Return the body with the model, and whether it lists its questions."""
        whole = super().received(url, body)
        if url.partition("?")[0].endswith(":batchEmbedContents"):
            return {**whole, "requests": body.get("requests")}
        return {**whole, "named": body["model"]} if "model" in body else whole

    def sent(self, url: str, body: Body) -> tuple[str, Body]:
        """Return the URL and the body of a call."""
        rest = {name: value for name, value in body.items() if name not in ("alt", "model", "named")}
        named = {"model": body["named"]} if "named" in body else {}
        if "requests" not in body:
            return _at(url, "embedContent"), {**rest, **named}
        requests = [{**request, **named} for request in rest["requests"]]
        return _at(url, "batchEmbedContents"), {**rest, "requests": requests}

    def split(self, body: Body) -> tuple[Ask, ...]:
        """Return one ask per item; see `Api.split`."""
        question, transport = self._parted(body)
        batch = {"batch": True} if "requests" in question else {}
        requests = question.pop("requests", [{}])
        if not requests or objects(requests) != requests:
            raise BadRequest(f"requests must be a list of objects; got {requests!r:.200}")
        named = requests[0].get("model", transport.get("named"))
        names = [request.get("model", named) for request in requests]
        reason = self._reason(question)
        if not all(name == named and _is_same(name, question.get("model")) for name in names):
            reason = "it names another model than its URL"
        transport = batch if named is None else {**batch, "named": named}
        asks = [
            {**question, **{name: value for name, value in request.items() if name != "model"}}
            for request in requests
        ]
        facts: dict[str, Any] = {"function": True, "transport": transport, "reason": reason}
        return tuple(Ask(each, cacheable=not reason, **facts) for each in asks)

    def merge_body(
        self, questions: Sequence[Body], n: int = 1, *, stream: bool = False, transport: Body | None = None
    ) -> dict[str, Any]:
        """Return the body that asks these questions; see `Api.merge_body`."""
        if n != 1 or stream:
            raise ValueError(f"a call to {self.name} gives one sample of each question, and no stream")
        told = {name: value for name, value in (transport or {}).items() if name != "batch"}
        if len(questions) == 1 and not (transport or {}).get("batch"):
            return {**questions[0], **told}
        model = questions[0].get("model")
        requests = [
            {name: value for name, value in question.items() if name != "model"} for question in questions
        ]
        return {"named": f"models/{model}", **told, "model": model, "requests": requests}

    def samples(self, answer: bytes | Body, questions: Sequence[Body] = ()) -> list[Sample]:
        """Return one sample per embedding, in the form of embedContent; see `Api.samples`."""
        body = load(answer)
        if "embeddings" not in body:
            _vector_of(body.get("embedding"))
            return [body]
        results = body.pop("embeddings")
        for result in results if isinstance(results, list) else [None]:
            _vector_of(result)
        if questions and len(results) != len(questions):
            raise MixedAnswer(
                f"{len(questions)} contents were sent to {self.name}; {len(results)} embeddings came back"
            )
        prompts = self._weights(questions) if questions else [1] * len(results)
        parts = split_usage(body.get("usageMetadata"), [1] * len(results), prompts)
        samples = [{"embedding": result, **body} for result in results]
        if "usageMetadata" in body:
            for sample, part in zip(samples, parts, strict=True):
                sample["usageMetadata"] = part
        return samples

    def answer(self, samples: Sequence[Sample], ask: Ask) -> dict[str, Any]:
        """Return the answer with these samples; see `Api.answer`."""
        if not ask.transport.get("batch"):
            return super().answer(samples, ask)
        whole = {name: value for name, value in samples[0].items() if name != "embedding"}
        usages = [sample.get("usageMetadata") for sample in samples]
        if all(isinstance(usage, Mapping) for usage in usages):
            whole["usageMetadata"] = join_usage(usages, 1)  # type: ignore[arg-type]  # all are mappings
        return {"embeddings": [sample["embedding"] for sample in samples], **whole}

    def answer_bytes(self, samples: Sequence[bytes], ask: Ask) -> bytes:
        """Return the JSON of `answer`."""
        if not ask.transport.get("batch"):
            return super().answer_bytes(samples, ask)
        return jsontext.dumps(self.answer([jsontext.loads(sample) for sample in samples], ask))

    def plain(self, sample: Sample) -> Any:
        """Return the vector as a list of numbers."""
        return _vector_of(sample["embedding"])

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        return f"{len(self.plain(sample))} numbers", None


def _is_same(name: Any, model: Any) -> bool:
    """Return True if the model that a body names, if any, is the one in its URL."""
    return name is None or (
        isinstance(name, str) and name.rpartition("/")[2] == str(model).rpartition("/")[2]
    )


def _vector_of(embedding: Any) -> list[Any]:
    """Return the numbers of an embedding.

    Raises:
        BadAnswer: when it has none.
    """
    values = embedding.get("values") if isinstance(embedding, Mapping) else None
    if not isinstance(values, list):
        raise BadAnswer(f"an embedding must hold its values, a list of numbers; got {embedding!r:.200}")
    return values


GENERATE_CONTENT = GenerateContentApi()
EMBED_CONTENT = EmbedContentApi()
METHODS: Final[Mapping[str, Api]] = {
    "generateContent": GENERATE_CONTENT,
    "streamGenerateContent": GENERATE_CONTENT,
    "embedContent": EMBED_CONTENT,
    "batchEmbedContents": EMBED_CONTENT,
}
"""The APIs by the methods of models that they serve."""
