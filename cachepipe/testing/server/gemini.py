"""Requests and answers of Gemini's models: `/v1beta/models/{id}:generateContent` and its siblings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, unquote

import orjson

from cachepipe.testing.ngram import embed, flatten, tokenise
from cachepipe.testing.server.answers import EventStream, ModelAnswer, SampledChoice, pieces_in_turn
from cachepipe.testing.server.calls import ModelCall, bad, integer, messages_of, n_of, sampling, stops
from cachepipe.testing.server.embeddings import EmbeddingCall
from cachepipe.testing.server.tools import tool_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cachepipe.testing.ngram import NGramModel
    from cachepipe.testing.server.refusals import RefusalError
    from cachepipe.testing.server.settings import Settings

__all__ = [
    "COUNT",
    "EMBEDDINGS",
    "GENERATE",
    "STREAM",
    "body_of",
    "error",
    "error_event",
    "known_path",
    "read",
    "read_embeddings",
    "stream",
    "write",
    "write_embeddings",
]

_MODELS: Final = "/v1/models/{id}:"
GENERATE: Final = f"{_MODELS}generateContent"
STREAM: Final = f"{_MODELS}streamGenerateContent"
COUNT: Final = f"{_MODELS}countTokens"
EMBEDDINGS: Final = (f"{_MODELS}embedContent", f"{_MODELS}batchEmbedContents")
_PATHS: Final = frozenset({GENERATE, STREAM, COUNT, *EMBEDDINGS})

_STATUS: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_THOUGHT: Final = "The question is short, and so is the answer."
_MODES: Final = {"ANY": "required", "NONE": "none"}
_BY_ROLE: Final = {"model": "assistant"}


def known_path(path: str) -> str:
    """Return a path with `{id}` in place of a model, for the methods of models; other paths unchanged.

    The version and, on Vertex AI, the project and the publisher do not matter.
    """
    before, colon, method = path.rpartition(":")
    known = f"{_MODELS}{method}"
    return known if colon and known in _PATHS and "/models/" in before else path


def body_of(path: str, target: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a request with what its target says: the model, and the form of a stream."""
    raw, _, query = target.partition("?")
    model = unquote(raw.rpartition(":")[0].rpartition("/")[2])
    form = parse_qs(query).get("alt", ["json"])[-1]
    return {**body, "model": model, "stream": path == STREAM, "array": form != "sse"}


def read(body: Mapping[str, Any], settings: Settings, _model: NGramModel) -> ModelCall:
    """Return the call in the body of a request for content."""
    config = _object(body.get("generationConfig"))
    fields = {
        "model": body["model"],
        "stream": body["stream"],
        "temperature": config.get("temperature"),
        "top_p": config.get("topP"),
        "seed": config.get("seed"),
        "maxOutputTokens": config.get("maxOutputTokens"),
        "candidateCount": config.get("candidateCount"),
        "stopSequences": config.get("stopSequences"),
    }
    messages = _messages(body)
    context = flatten(messages)
    arguments = {**sampling(fields, settings, "maxOutputTokens"), "body": body}
    if config.get("responseMimeType") == "application/json":
        schema = config.get("responseSchema") or config.get("responseJsonSchema")
        arguments["schema"] = _lower(schema) or {"type": "object", "properties": {"answer": {}}}
    arguments |= tool_of({**_tools(body), "messages": messages}, settings, "parameters")
    return ModelCall(
        **arguments,
        contexts=(context,),
        tokens_in=len(tokenise(context)),
        n=n_of(fields, settings, "candidateCount"),
        stop=stops(fields, "stopSequences", 5),
    )


def _messages(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the contents as messages that `flatten` reads."""
    contents = messages_of(body.get("contents"), "contents")
    system = body.get("systemInstruction")
    return [
        *([_message({**_object(system), "role": "system"})] if system else []),
        *map(_message, contents),
    ]


def _message(content: Mapping[str, Any]) -> dict[str, Any]:
    parts = content.get("parts") or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise bad("parts", "a list of objects", parts)
    role = content.get("role") or "user"
    return {"role": _BY_ROLE.get(role, role), "content": [_part(part) for part in parts]}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part as OpenAI's dialects have it."""
    if isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    for name, kind in (("functionCall", "function_call"), ("functionResponse", "function_response")):
        call = part.get(name)
        if isinstance(call, dict):
            value = call.get("args") or call.get("response") or {}
            text = f"{call.get('name')}({orjson.dumps(value).decode()})"
            return {"type": kind, "name": call.get("name"), "text": text}
    return {"type": next(iter(part), "part")}


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tools and the choice between them as OpenAI's dialects have them."""
    functions = [
        {
            "name": function.get("name"),
            "parameters": _lower(function.get("parameters") or _json_schema(function)),
        }
        for tool in body.get("tools") or ()
        for function in _object(tool).get("functionDeclarations") or ()
    ]
    config = _object(_object(body.get("toolConfig")).get("functionCallingConfig"))
    allowed = config.get("allowedFunctionNames")
    if allowed:
        functions = [function for function in functions if function["name"] in allowed]
    return {"tools": functions, "tool_choice": _MODES.get(str(config.get("mode")), "auto")}


def _json_schema(function: Mapping[str, Any]) -> Any:
    return function.get("parametersJsonSchema") or function.get("parameters_json_schema")


def _lower(schema: Any) -> Any:
    """Return a schema with its types in lower case, as JSON Schema has them."""
    if isinstance(schema, list):
        return [_lower(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: value.lower() if name == "type" and isinstance(value, str) else _lower(value)
        for name, value in schema.items()
    }


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def write(answer: ModelAnswer) -> dict[str, Any]:
    """Return the body of an answer."""
    candidates = [
        {
            "content": {"parts": [*_thoughts(answer.call), *_parts(answer, choice)], "role": "model"},
            "finishReason": _finish(answer.call, choice),
            "index": index,
        }
        for index, choice in enumerate(answer.choices)
    ]
    return {"candidates": candidates, "usageMetadata": _usage(answer), **_tail(answer)}


def stream(answer: ModelAnswer) -> EventStream:
    """Return an answer as a stream: of events, or as an array that grows."""
    call, array = answer.call, answer.call.body["array"]
    begun = {"promptTokenCount": call.tokens_in, "totalTokenCount": call.tokens_in}

    def chunk(index: int, part: Mapping[str, Any] | None, finish: str | None = None) -> dict[str, Any]:
        content = {} if part is None else {"content": {"parts": [part], "role": "model"}}
        reason = {} if finish is None else {"finishReason": finish}
        candidate = {**content, **reason, "index": index}
        return {"candidates": [candidate], "usageMetadata": begun, **_tail(answer)}

    chunks = [chunk(index, part) for index in range(len(answer.choices)) for part in _thoughts(call)]
    if call.tool is None:
        chunks += [chunk(index, {"text": piece}) for index, _, _, piece in pieces_in_turn(answer)]
    else:
        for index, choice in enumerate(answer.choices):
            chunks += [chunk(index, part) for part in _parts(answer, choice)]
    content = len(chunks)
    for index, choice in enumerate(answer.choices):
        chunks.append(chunk(index, {"text": ""} if call.tool is None else None, _finish(call, choice)))
    chunks[-1] = {**chunks[-1], "usageMetadata": _usage(answer)}
    events = [_event(each, number, array=array) for number, each in enumerate(chunks)]
    return EventStream(events[:content], [*events[content:], *([b"]"] if array else [])])


def _event(chunk: Mapping[str, Any], number: int, *, array: bool) -> bytes:
    if array:
        return (b",\r\n" if number else b"[") + orjson.dumps(chunk)
    return b"data: " + orjson.dumps(chunk) + b"\r\n\r\n"


def _tail(answer: ModelAnswer) -> dict[str, Any]:
    return {"modelVersion": answer.call.model, "responseId": answer.identity}


def _thoughts(call: ModelCall) -> list[dict[str, Any]]:
    """Return the thoughts of a candidate, if the request wants them."""
    config = _object(_object(call.body.get("generationConfig")).get("thinkingConfig"))
    wanted = config.get("includeThoughts") or config.get("include_thoughts")
    return [{"text": _THOUGHT, "thought": True}] if wanted else []


def _parts(answer: ModelAnswer, choice: SampledChoice) -> list[dict[str, Any]]:
    if answer.call.tool is None:
        return [{"text": choice.text}]
    return [{"functionCall": {"name": answer.call.tool, "args": orjson.loads(choice.text)}}]


def _finish(call: ModelCall, choice: SampledChoice) -> str:
    cut = choice.sample.finish_reason == "length" and call.schema is None  # JSON is always whole
    return "MAX_TOKENS" if cut else "STOP"


def _usage(answer: ModelAnswer) -> dict[str, Any]:
    call = answer.call
    thoughts = len(tokenise(_THOUGHT)) * len(answer.choices) if _thoughts(call) else 0
    return {
        "promptTokenCount": call.tokens_in,
        "candidatesTokenCount": answer.tokens_out,
        **({"thoughtsTokenCount": thoughts} if thoughts else {}),
        "totalTokenCount": call.tokens_in + answer.tokens_out + thoughts,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": call.tokens_in}],
    }


def read_embeddings(body: Mapping[str, Any], settings: Settings, path: str) -> EmbeddingCall:
    """Return the texts to embed in a body."""
    requests = body.get("requests") if path == EMBEDDINGS[1] else [body]
    if not isinstance(requests, list) or not requests or len(requests) > 100:
        raise bad("requests", "a list of 1 to 100 requests", requests)
    texts = [_text_of(_object(request).get("content")) for request in requests]
    size = integer(requests[0], "outputDimensionality", 1, 4096, settings.dimensions)
    tokens = sum(len(tokenise(text)) for text in texts)
    return EmbeddingCall(body["model"], texts, tokens, size or settings.dimensions)


def _text_of(content: Any) -> str:
    parts: Sequence[Any] = _object(content).get("parts") or ()
    texts = [text for part in parts if isinstance(text := _object(part).get("text"), str)]
    if not any(texts):
        raise bad("content", "parts with text that is not empty", content)
    return "".join(texts)


def write_embeddings(call: EmbeddingCall, count: int, path: str) -> dict[str, Any]:
    """Return the embeddings of the first `count` texts."""
    vectors = [{"values": embed(text, call.size).tolist()} for text in call.texts[:count]]
    usage = {"promptTokenCount": call.tokens_in, "totalTokenCount": call.tokens_in}
    if path == EMBEDDINGS[1]:
        return {"embeddings": vectors, "usageMetadata": usage}
    return {"embedding": vectors[0], "usageMetadata": usage}


def error(refusal: RefusalError) -> dict[str, Any]:
    """Return the body of an error as Google writes it, with the time to wait in it."""
    status = _STATUS.get(refusal.status, "INVALID_ARGUMENT" if refusal.status < 500 else "INTERNAL")
    value: dict[str, Any] = {"code": refusal.status, "message": refusal.message, "status": status}
    wait = dict(refusal.headers).get(b"retry-after-ms")
    if wait is not None:
        kind = "type.googleapis.com/google.rpc.RetryInfo"
        value["details"] = [{"@type": kind, "retryDelay": f"{int(wait) / 1000:g}s"}]
    return {"error": value}


def error_event(refusal: RefusalError, _number: int) -> bytes:
    """Return an error in a stream of events."""
    return b"data: " + orjson.dumps(error(refusal)) + b"\r\n\r\n"
