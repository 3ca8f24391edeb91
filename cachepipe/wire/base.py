"""What all APIs of providers share: asks, samples, scopes, and which fields and headers count (C9).

A sample is an answer: exactly the JSON object that the provider would have sent to a call for this sample
alone. So a sample that is served alone is served byte for byte, and every surface that can read an answer can
read a sample. The samples of one call share its prompt, which was billed once. Therefore all but the first
begin with a mark of cachepipe, which `Api.answer` and `Api.answer_bytes` remove. A mark also says in which
pieces a sample of Gemini's was streamed.
"""

from __future__ import annotations

import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

import orjson

from cachepipe import jsontext, replaying
from cachepipe.contract.keys import AsWritten
from cachepipe.wire.errors import BadAnswer, BadRequest, MixedAnswer
from cachepipe.wire.sse import StreamRecorder
from cachepipe.wire.usage import model_in, token_counts, usage_in

Body = Mapping[str, Any]
"""A JSON object in a request or an answer; it is only read."""

Sample = dict[str, Any]
"""One sample: the answer to a call for this sample alone, perhaps with the mark in front."""

MARK = "cachepipe"
"""The first name of a sample that has a mark."""

_SHARED = {"prompt": "shared"}
"""Marks a sample: another sample of the same call has paid for the prompt."""
_MARKED_BYTES = re.compile(rb'\{"cachepipe":\{(?:"(?:pieces":[][,0-9nul]*|prompt":"shared"),?){0,2}\},')

TRANSPORT_VERSION = 2
"""The version of the lists of transport fields. A change of the lists changes the key format."""

_OPENAI_TRANSPORT = frozenset(
    {
        "stream",  # how the answer is sent; the samples are the same
        "stream_options",  # usage and padding of the stream, which are added or removed per request
        "user",  # the end user, for the provider's abuse checks and prompt cache
        "safety_identifier",  # the same
        "metadata",  # labels in the provider's log; later requests cannot refer to them
        "service_tier",  # price and speed of the same model
        "prompt_cache_key",  # the place in the provider's prompt cache; it changes price and speed
        "prompt_cache_options",  # the same; requests that generate nothing are not cached (see responses)
        "prompt_cache_retention",  # the same
    }
)
OPENAI_TRANSPORT = _OPENAI_TRANSPORT | {"store"}
"""The transport fields of chat and legacy completions, which do not change the answer.

``store`` keeps a copy in the provider's log; later requests cannot refer to it.
"""

RESPONSES_TRANSPORT = _OPENAI_TRANSPORT
"""The transport fields of responses. ``store`` counts: if it is false, no request can refer to the answer."""

EMBEDDINGS_TRANSPORT = frozenset(
    {
        "user",  # see OPENAI_TRANSPORT
        "encoding_format",  # of 32-bit floats, each format can be computed from the other; see FLOAT_FIELDS
    }
)
"""The transport fields of embeddings."""

FLOAT_FIELDS = frozenset(
    {"model", "input", "dimensions", "user", "input_type", "task", "prompt_name", "truncation", "truncate"}
)
"""If a request has only these fields, its embeddings are 32-bit floats.

With another field (``output_dtype``, ``embedding_types``, ``endianness`` …), vectors may have another type,
and then base64 and numbers cannot be computed from each other. So ``encoding_format`` counts.
"""

MODERATIONS_TRANSPORT: frozenset[str] = frozenset()
"""The transport fields of moderations: none."""

ANTHROPIC_TRANSPORT = frozenset(
    {
        "stream",  # how the answer travels
        "metadata",  # whom the provider sees behind the request, for its abuse checks
        "service_tier",  # price and speed of the same model
    }
)
"""The transport fields of Anthropic's messages. The place of generation (``inference_geo``) counts."""

GEMINI_TRANSPORT = frozenset(
    {
        "stream",  # not in bodies, but in URLs; see `cachepipe.wire.gemini`
        "labels",  # labels in Google Cloud's bills
        "serviceTier",  # price and speed of the same model
        "service_tier",
        "store",  # whether the provider's log keeps a copy
    }
)
"""The transport fields of Gemini's generateContent."""

_TOOL_SCHEMAS = frozenset({"parameters", "input_schema", "output_schema", "input_examples"})
_WHOLE: frozenset[str] = frozenset()
OPENAI_AS_WRITTEN = MappingProxyType(
    {
        "response_format": frozenset(
            {"schema", "json_schema", "value", "format"}
        ),  # the last two: TGI, xgrammar
        "tools": _TOOL_SCHEMAS,
        "functions": _TOOL_SCHEMAS,
        "messages": frozenset({"arguments", "input"}),  # some servers accept objects here
        "guided_json": _WHOLE,  # vLLM
        "structured_outputs": frozenset({"json", "structural_tag"}),  # vLLM since 0.11
        "structural_tag": _WHOLE,
        "nvext": frozenset({"guided_json"}),  # NVIDIA NIM
        "json_schema": _WHOLE,  # llama.cpp, SGLang
        "grammar": frozenset({"value"}),  # TGI
        "format": _WHOLE,  # Ollama
        "schema": _WHOLE,
        "response_schema": _WHOLE,
        "extra_body": frozenset({"response_schema", "response_json_schema"}),  # Gemini
    }
)
"""The parts of chat and legacy completions that show the model JSON schemas and tool inputs as written."""

RESPONSES_AS_WRITTEN = MappingProxyType(
    {
        **OPENAI_AS_WRITTEN,
        "text": frozenset({"schema"}),
        "input": _TOOL_SCHEMAS | {"arguments", "input"},  # tools that were found or listed, and their calls
    }
)
"""The same for responses."""

ANTHROPIC_AS_WRITTEN = MappingProxyType(
    {
        "tools": _TOOL_SCHEMAS,
        "messages": frozenset({"input", "input_schema"}),
        "output_config": frozenset({"schema"}),
        "output_format": frozenset({"schema"}),
    }
)
"""The same for Anthropic's messages."""

_GEMINI_SCHEMAS = frozenset(
    {
        *("parameters", "parametersJsonSchema", "parameters_json_schema"),
        *("response", "responseJsonSchema", "response_json_schema"),
        *("responseSchema", "response_schema", "responseFormat", "response_format"),
    }
)
GEMINI_AS_WRITTEN = MappingProxyType(
    {
        "tools": _GEMINI_SCHEMAS,
        "generationConfig": _GEMINI_SCHEMAS,
        "generation_config": _GEMINI_SCHEMAS,
        "contents": frozenset({"args", "response"}),  # of function calls
    }
)
"""The same for Gemini's generateContent, which takes names in either spelling."""

ANSWER_HEADERS = ("anthropic-beta", "anthropic-version", "openai-beta")
"""The request headers that change the answer."""

_SECRET_PARAMETERS = frozenset(
    {
        "access_token",
        "api-key",
        "api_key",
        "apikey",
        "code",
        "key",
        "sig",
        "signature",
        "subscription-key",
        "token",
        "x-amz-credential",
        "x-amz-security-token",
        "x-amz-signature",
    }
)
_BY_DEPLOYMENT = frozenset({"/completions", "/chat/completions", "/embeddings"})
"""The endpoints of which Azure has one per deployment."""
_ASK_ALIKE = MappingProxyType(
    {"streamGenerateContent": "generateContent", "batchEmbedContents": "embedContent"}
)
"""The methods of Gemini's models that ask the same questions as another one."""
_GEMINI_METHODS = frozenset({*_ASK_ALIKE, *_ASK_ALIKE.values()})
_GEMINI_FORMS = frozenset({"alt", "$alt", "prettyprint", "$prettyprint"})
"""The query parameters, in lower case, that decide how the answers of these methods are written."""
_MOST_ITEMS = 10_000
"""The largest number of questions in one request; a request with more is not cached."""
_MOST_COPIED = 16 << 20
"""The largest number of characters that the questions of one list may repeat, in total."""
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_ONE_API = MappingProxyType(
    {
        # Together's SDK sends chats to the first host, and all else to the second one. Older versions of it
        # send everything to api.together.xyz, which is also the host that tables of prices know.
        "api-inference.together.ai": "api.together.xyz",
        "api.together.ai": "api.together.xyz",
    }
)
"""Hosts of one API that a provider has under several names, with the name that stands in keys."""


class Ask(NamedTuple):
    """One question of a request, and how its answer is wanted.

    It shares values with the body that was split, so make the key before the caller can change the body.

    Attributes:
        question: the body without the number of samples and without transport fields. With ``best_of``, the
            number is part of the question.
        n: the number of samples, at least 1.
        stream: whether the answer is an event stream.
        include_usage: whether that stream ends with a chunk of usage.
        mergeable: whether several draws may share one call (not with ``seed`` or ``best_of``).
        function: whether the answer is a function of the question.
        cacheable: whether the cache may answer the request; if not, pass it through.
        reason: why not, as part of a sentence.
        transport: the transport fields, for the call upstream.
    """

    question: Body
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    mergeable: bool = True
    function: bool = False
    cacheable: bool = True
    reason: str = ""
    transport: Body = MappingProxyType({})


class Api(ABC):
    """One API of a provider: pure functions between bodies, asks, samples and event streams.

    Answers share values with the samples from which they are made: serialise them, or leave them unchanged.

    Attributes:
        name: the name of the API in listings.
        max_n: the largest number of samples per call; servers may allow fewer.
        transport: the names of the fields that are left out of the question.
        as_written: the parts of a body in which the order of mapping keys counts.
        listed: the field that may hold a list of questions, or None.
        item_types: the types of its items that may share a call with those of other requests.
        most_items: the largest number of items in one call.
        function: whether an answer is a function of its question.
    """

    name: ClassVar[str]
    max_n: ClassVar[int] = 1
    transport: ClassVar[frozenset[str]]
    as_written: ClassVar[AsWritten] = MappingProxyType({})
    listed: ClassVar[str | None] = None
    item_types: ClassVar[tuple[type, ...]] = (str, list)
    most_items: ClassVar[int] = 2048  # as OpenAI's embeddings have it
    function: ClassVar[bool] = False
    _streaming: ClassVar[frozenset[str]] = frozenset({"stream", "stream_options"})

    def __repr__(self) -> str:
        return f"<Api {self.name}>"

    def received(self, url: str, body: Body) -> Body:  # noqa: ARG002 - for APIs whose URL says more
        """Return the body of a request with what its URL says; this is the body of all other methods."""
        return body

    def sent(self, url: str, body: Body) -> tuple[str, Body]:
        """Return the URL and the body of a call, from a request's URL and a body as `received` makes it."""
        return url, body

    def media_type(self, ask: Ask) -> str:  # noqa: ARG002 - for APIs with streams of another type
        """Return the media type of a stream that answers an ask."""
        return "text/event-stream; charset=utf-8"

    @abstractmethod
    def split(self, body: Body) -> tuple[Ask, ...]:
        """Return the asks of a body: one, or one per item if it lists several prompts or inputs.

        All asks have the same number of samples, and the same settings. The answer to the body is
        ``answer(samples, asks[0])`` with the samples of all asks in order.

        Raises:
            BadRequest: when the body is not an object, or its number of samples is not a positive integer.
        """

    def merge_body(
        self, questions: Sequence[Body], n: int = 1, *, stream: bool = False, transport: Body | None = None
    ) -> dict[str, Any]:
        """Return the body that asks for n samples of each question; the questions differ only in their item.

        If a question contains its own number (``best_of``), the body has that number.

        Args:
            questions: the questions, at least one; several only if the API has `listed`.
            n: the number of samples of each.
            stream: whether to ask for an event stream, with its usage.
            transport: the transport fields of the caller: `Ask.transport`.
        """
        body = dict(questions[0]) if len(questions) == 1 else self._with_items(questions)
        if n != 1 and self.max_n == 1:
            raise ValueError(f"a call to {self.name} gives one sample; call it {n} times")
        if n != 1 and "n" not in body:
            body["n"] = n
        body.update(transport or {})
        if stream:
            return self.inject_usage({**body, "stream": True})[0]
        return {name: value for name, value in body.items() if name not in self._streaming}

    def _with_items(self, questions: Sequence[Body]) -> dict[str, Any]:
        """Return the body that lists the items of several questions.

        Raises:
            ValueError: when they cannot share a call.
        """
        if self.listed is None:
            raise ValueError(f"a call to {self.name} holds one question; got {len(questions)}")
        rest = {**questions[0], self.listed: None}
        if any({**question, self.listed: None} != rest for question in questions):
            raise ValueError(f"questions share a call when they differ in {self.listed!r} only")
        return {**rest, self.listed: [question[self.listed] for question in questions]}

    @abstractmethod
    def samples(self, answer: bytes | Body, questions: Sequence[Body] = ()) -> list[Sample]:
        """Return the samples of an upstream answer, in order of question and index.

        The completion tokens of the samples add up exactly to those of the call, also in details. Each sample
        has all tokens of the prompt, and all but the first of each question are marked (`bills_prompt`).
        A valid answer without choices gives no samples if it reports its usage.

        Args:
            answer: the body of the answer.
            questions: the questions of the call, if it merged several.

        Raises:
            BadAnswer: when it is malformed, contains an error, or has the status of a failure.
        """

    def answer(self, samples: Sequence[Sample], ask: Ask) -> dict[str, Any]:  # noqa: ARG002 - for the APIs with choices
        """Return the answer with these samples, as the provider would have written it.

        A single sample is returned unchanged. Several are numbered from 0, within the envelope of the
        first; the usage counts the prompt of each question once and adds up the completions.
        """
        if len(samples) != 1:
            raise ValueError(f"an answer of {self.name} holds one sample; got {len(samples)}")
        return unmarked(samples[0])

    def answer_bytes(self, samples: Sequence[bytes], ask: Ask) -> bytes:
        """Return the JSON of `answer` from the strict JSON of samples; a single one is not parsed."""
        if len(samples) == 1:
            return unmarked_bytes(samples[0])
        return orjson.dumps(self.answer([orjson.loads(sample) for sample in samples], ask))

    def written(self, answer: Any) -> bytes:
        """Return the JSON of an answer that `answer` has made, as the provider writes it."""
        return jsontext.dumps(answer)

    def recorder(self, questions: Sequence[Body] = (), ask: Ask | None = None) -> StreamRecorder:  # noqa: ARG002 - for APIs with streams
        """Return a new recorder for one event stream that answers these questions.

        Args:
            questions: the questions of the call, if it merged several.
            ask: the ask of the reader, if the stream is passed on to one.

        Raises:
            BadRequest: when the API has no streams.
        """
        raise BadRequest(f"{self.name} has no event streams; leave out `stream`")

    def stream(self, samples: Sequence[Sample], ask: Ask) -> Iterator[bytes]:  # noqa: ARG002 - for APIs with streams
        """Return the events of a stream with these samples, always the same for the same samples.

        Its recording gives the samples again, with these differences: several samples have the envelope of
        the first; without `Ask.include_usage`, they have no usage; tool calls have no index.

        Raises:
            BadRequest: when the API has no streams.
        """
        raise BadRequest(f"{self.name} has no event streams; leave out `stream`")

    def inject_usage(self, body: Body) -> tuple[dict[str, Any], bool]:
        """Return a body whose stream reports its usage, and whether this had to be added.

        If so, the caller gets `StreamEvent.without_usage` of each event that has it.
        """
        return dict(body), False

    def summary(self, sample: Sample) -> dict[str, Any]:
        """Return the facts about a sample that listings show.

        The names are ``text``, ``finish_reason``, ``model``, and the counts ``prompt_tokens``,
        ``completion_tokens``, ``total_tokens``, ``cached_tokens`` and ``reasoning_tokens``, each None if
        it is unknown. Prompt tokens include those read from or written to a provider's cache.
        """
        text, finish = self._gist(sample)
        return {
            "text": jsontext.mended(text),
            "finish_reason": finish,
            "model": model_in(sample),
            **token_counts(usage_in(sample)),
        }

    def plain(self, sample: Sample) -> Any:
        """Return the content of a sample: its text, its vector, or the result of a moderation."""
        return self._gist(sample)[0]

    def _weights(self, questions: Sequence[Body]) -> list[int]:
        """Return the weight of each question in the prompt of a call, by the length of its item."""
        if self.listed is None or not questions:
            return [1]
        return [len(jsontext.dumps(question[self.listed])) for question in questions]

    @abstractmethod
    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        """Return the text of a sample, or a description of it, and why it ended."""

    def _parted(self, body: Body) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the question and the transport fields of a body."""
        if not isinstance(body, Mapping):
            raise BadRequest(f"the body of a request to {self.name} must be a JSON object; got {body!r:.200}")
        left_out = self.transport
        question, transport = {}, {}
        for name, value in body.items():
            if name in left_out:
                transport[name] = value
            else:
                question[name] = value
        return question, transport

    def _asks(self, question: dict[str, Any], **facts: Any) -> tuple[Ask, ...]:
        """Return one ask per item of the field `listed`."""
        name = self.listed
        if name is None or name not in question:
            return (Ask(question, **facts),)
        items = items_of(question[name])
        if items is None:
            reason = f"its {name} is a list of a form that cannot be told apart"
            return (Ask(question, cacheable=False, reason=reason, **facts),)
        if len(items) > 1 and is_too_much(question, name, len(items)):
            reason = f"its {name} lists too much: each item is a question of its own"
            return (Ask(question, cacheable=False, reason=reason, **facts),)
        return tuple(Ask({**question, name: item}, **facts) for item in items)


class OneAnswerApi(Api):
    """An API whose calls return one answer, which is the sample.

    Attributes:
        output: the field of an answer that lists its parts.
        parts: what the parts are called.
    """

    output: ClassVar[str]
    parts: ClassVar[str]
    _recorder: ClassVar[type[StreamRecorder]]

    def split(self, body: Body) -> tuple[Ask]:
        """Return the ask of a body; it is not cacheable if it uses what the server keeps."""
        question, transport = self._parted(body)
        reason = self._uncacheable(question, transport)
        stream = bool(transport.get("stream"))
        return (Ask(question, stream=stream, cacheable=not reason, reason=reason, transport=transport),)

    def samples(self, answer: bytes | Body, questions: Sequence[Body] = ()) -> list[Sample]:  # noqa: ARG002 - one per call
        """Return the answer as the only sample; see `Api.samples`."""
        body = load(answer)
        self._check(body)
        parts = body.get(self.output)
        if not isinstance(parts, list) or len(objects(parts)) != len(parts):
            raise BadAnswer(
                f"an answer of {self.name} must hold a list of {self.parts} as its {self.output}; "
                f"it holds {sorted(body)!r:.200}"
            )
        return [body]

    def recorder(self, questions: Sequence[Body] = (), ask: Ask | None = None) -> StreamRecorder:  # noqa: ARG002 - one per call
        """Return a new recorder for one event stream; see `Api.recorder`."""
        return self._recorder(self.samples)

    @abstractmethod
    def _uncacheable(self, question: Body, transport: Body) -> str:
        """Return why a request is not cacheable, as part of a sentence, or an empty string."""

    @abstractmethod
    def _check(self, body: Body) -> None:
        """Raise `BadAnswer` if the status of an answer is not that of a complete answer."""


def is_too_much(question: Body, name: str, items: int) -> bool:
    """Return True if so many questions would cost much more than the request that lists them."""
    if items > _MOST_ITEMS:
        return True
    try:
        common = sum(len(field) + len(repr(value)) for field, value in question.items() if field != name)
    except (RecursionError, ValueError):  # it nests too deep, or holds a number of too many digits
        return True
    return items * common > _MOST_COPIED


def azure_url(base: str, path: str, model: Any, client: Any) -> str:
    """Return the URL of a path for an Azure client; for some paths, ``model`` is the deployment in it.

    Args:
        base: the client's base URL.
        path: the path below it.
        model: the field of the body.
        client: the client; if it was made for a deployment, other paths leave the deployment out.
    """
    base = base.rstrip("/")
    if path in _BY_DEPLOYMENT:
        return base + path if "/deployments" in base or model is None else f"{base}/deployments/{model}{path}"
    deployment = getattr(client, "_azure_deployment", None)
    if deployment and any("_prepare_url" in vars(kind) for kind in azure_kinds(client)):
        base = base.replace(f"/deployments/{deployment}", "")
    return base + path


def azure_kinds(client: Any) -> list[type]:
    """Return the Azure classes of the SDK of which a client is an instance."""
    return [kind for kind in type(client).__mro__ if kind.__module__ == "openai.lib.azure"]


def wanted(n: Any) -> int:
    """Return the number of samples of a body with this ``n``; None is 1.

    Raises:
        BadRequest: when it is not a positive integer.
    """
    if n is None:
        return 1
    if type(n) is not int or n < 1:
        raise BadRequest(f"n must be a whole number of samples, at least 1; got {n!r:.200}")
    return n


def items_of(value: Any) -> Sequence[Any] | None:
    """Return the items of a prompt or input: strings or token lists, each a question of its own.

    A string, null or one list of tokens is one item. The result is None for a list of another form.
    """
    if not isinstance(value, list | tuple):
        return [value]
    if not value:
        return None
    if all(isinstance(item, str) for item in value):
        return value
    if _tokens(value):
        return [value]
    return value if all(isinstance(item, list | tuple) and item and _tokens(item) for item in value) else None


def _tokens(value: Sequence[Any]) -> bool:
    return all(type(item) is int for item in value)


def load(answer: bytes | Body) -> Sample:
    """Return the JSON object of an answer; the caller may change its top level.

    Raises:
        BadAnswer: when it is not a JSON object that the SDKs can read, or contains an error.
    """
    if isinstance(answer, bytes | bytearray | memoryview):
        try:
            body = jsontext.read(bytes(answer))
        except ValueError as error:
            raise BadAnswer(
                f"the answer is not valid JSON: {error}; the connection may have been cut"
            ) from error
    else:
        body = dict(answer) if isinstance(answer, Mapping) else answer
    if not isinstance(body, dict):
        raise BadAnswer(f"the answer must be a JSON object; got {body!r:.200}")
    if body.get("error"):
        raise BadAnswer(f"the answer is an error: {body['error']!r:.500}")
    return body


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the JSON objects in a list, or an empty list for another value."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text_of(value: Any) -> str:
    """Return a string unchanged, and the empty string for another value."""
    return value if isinstance(value, str) else ""


def marked(sample: Sample) -> Sample:
    """Return a sample with the mark: its prompt was billed with another sample."""
    return with_mark(sample, _SHARED)


def with_mark(sample: Sample, mark: Mapping[str, Any]) -> Sample:
    """Return a sample whose mark holds these facts too."""
    return {MARK: {**mark_of(sample), **mark}, **unmarked(sample)}


def mark_of(sample: Body) -> Mapping[str, Any]:
    """Return the mark of a sample; it is empty if there is none."""
    mark = sample.get(MARK)
    return mark if isinstance(mark, Mapping) else {}


def unmarked(sample: Sample) -> Sample:
    """Return a sample as the provider would have written it."""
    if MARK not in sample:
        return sample
    return {name: value for name, value in sample.items() if name != MARK}


def unmarked_bytes(sample: bytes) -> bytes:
    """Return the JSON of a sample as the provider would have written it."""
    mark = _MARKED_BYTES.match(sample)
    return sample if mark is None else b"{" + sample[mark.end() :]


def by_question(samples: Sequence[Sample], questions: int, n: int) -> list[Sequence[Sample]]:
    """Return the samples of a call with several questions, grouped by question.

    Args:
        samples: the result of `Api.samples`.
        questions: the number of questions.
        n: the number of samples of each.

    Raises:
        MixedAnswer: when there are some samples, but not n of each question.
    """
    if not samples:
        return [()] * questions
    if len(samples) != questions * n:
        raise MixedAnswer(
            f"{questions} questions were asked for {n} samples each, and {len(samples)} came: "
            "which of them answer which cannot be told; ask one by one"
        )
    return [samples[begun : begun + n] for begun in range(0, len(samples), n)]


def bills_prompt(sample: Body) -> bool:
    """Return True if the prompt of a sample's call was billed with this sample."""
    return "prompt" not in mark_of(sample)


def question_document(
    ask: Ask, headers: Mapping[str, str] | None = None, api: Api | None = None
) -> dict[str, Any]:
    """Return the document from which the key of an ask is made: its body, and the headers that count.

    Args:
        ask: the ask.
        headers: the headers of the request.
        api: the API, if the document must name it (see ``named_scope``).
    """
    document: dict[str, Any] = {"body": _without_secrets(ask.question)}
    if headers and (counting := answer_headers(headers)):
        document["headers"] = counting
    if api is not None:
        document["api"] = api.name
    return document


SECRETS: Final = {
    "tools": frozenset(
        {
            *("authorization", "headers"),  # OpenAI's remote MCP servers
            *("mcpServers", "mcp_servers", "googleMaps", "google_maps", "retrieval"),  # Gemini's
        }
    ),
    "mcp_servers": frozenset({"authorization_token"}),  # Anthropic's
}
"""The names of credentials in the mappings of a field. Only their digests are keyed and stored."""


def _without_secrets(question: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a question in which digests replace credentials."""
    if SECRETS.keys().isdisjoint(question):
        return question
    changed = {
        field: [_item_without_secrets(item, names) for item in items]
        for field, names in SECRETS.items()
        if isinstance(items := question.get(field), list | tuple)
    }
    return {**question, **changed} if changed else question


def _item_without_secrets(item: Any, names: frozenset[str]) -> Any:
    if not isinstance(item, Mapping) or names.isdisjoint(item):
        return item
    return {name: _digested(value) if name in names else value for name, value in item.items()}


def _digested(value: Any) -> Any:
    """Return a value in which digests replace its texts."""
    if isinstance(value, str):
        return {"sha256": hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()}
    if isinstance(value, Mapping):
        return {name: _digested(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_digested(item) for item in value]
    return value


def answer_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that change the answer, by lower-case name, sorted."""
    found = {name.lower(): value.strip() for name, value in headers.items() if name.lower() in ANSWER_HEADERS}
    return dict(sorted(found.items()))


@functools.lru_cache(maxsize=256)
def scope_of(url: str) -> str:
    """Return the endpoint's URL in a normal form, without credentials.

    A URL of a replay's proxy stands for that of the provider. Scheme and host are in lower case. The default
    port, the fragment, repeated and trailing slashes, user name and password, and query parameters with
    credentials (``api-key``, ``sig`` …) are left out. The rest of the query is unchanged. If a provider has
    one API on several hosts, they have one URL. So have methods of Gemini's and routes of Hugging Face's
    servers that ask the same, without the parameters that decide how an answer is written.

    Raises:
        BadRequest: when the URL is not absolute.
    """
    try:
        parts = urlsplit(replaying.original(url))
    except ValueError as error:
        raise BadRequest(f"the URL of an endpoint cannot be read: {error}") from error
    if not parts.scheme or not parts.netloc:
        shown = url.partition("?")[0].rpartition("@")[2]
        raise BadRequest(
            f"the URL of an endpoint must begin with its scheme and host, as https://host; got {shown!r:.200}"
        )
    scheme = parts.scheme.lower()
    host = (
        parts.netloc.rpartition("@")[2]
        .lower()
        .removesuffix(f":{_DEFAULT_PORTS.get(scheme)}")
        .removesuffix(":")
    )
    host = _ONE_API.get(host, host)
    path = re.sub("/{2,}", "/", parts.path).rstrip("/")
    left_out = _SECRET_PARAMETERS
    start, _, method = path.rpartition(":")
    if path.endswith("/generate_stream"):  # of Hugging Face's servers
        path = path.removesuffix("_stream")
    if method in _GEMINI_METHODS:
        path = f"{start}:{_ASK_ALIKE.get(method, method)}"
        left_out |= _GEMINI_FORMS
    query = "&".join(
        pair for pair in parts.query.split("&") if unquote(pair.partition("=")[0]).lower() not in left_out
    )
    return urlunsplit((scheme, host, path, query, ""))
