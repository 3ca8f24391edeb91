"""Embeddings and moderations, whose answers are functions of their questions.

Each item of an input list is a separate question, so a request pays only for the items that are new.
"""

from __future__ import annotations

import base64
import contextlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import orjson

from cachepipe import jsontext
from cachepipe.wire.base import (
    EMBEDDINGS_TRANSPORT,
    FLOAT_FIELDS,
    MODERATIONS_TRANSPORT,
    Api,
    Ask,
    Body,
    Sample,
    load,
    objects,
)
from cachepipe.wire.errors import BadAnswer, MixedAnswer
from cachepipe.wire.usage import join_usage, split_usage

_FORMATS = ("float", "base64")


class _FunctionApi(Api):
    """An API that answers each item of ``input`` with one result.

    Attributes:
        results: the field of an answer with the list of results.
    """

    listed = "input"
    function = True
    _streaming = frozenset()  # `stream` has no meaning here, so it counts and is sent
    results: ClassVar[str]

    def split(self, body: Body) -> tuple[Ask, ...]:
        """Return one ask per item of the input; see `Api.split`."""
        question, transport = self._parted(body)
        return self._asks(question, function=True, transport=transport)

    def samples(self, answer: bytes | Body, questions: Sequence[Body] = ()) -> list[Sample]:
        """Return one sample per result, with its share of the prompt's tokens; see `Api.samples`."""
        body = load(answer)
        results = body.get(self.results)
        if objects(results) != results:
            raise BadAnswer(
                f"an answer of {self.name} must list its {self.results}; it holds {sorted(body)!r:.200}"
            )
        if questions and len(results) != len(questions):
            raise MixedAnswer(
                f"{len(questions)} inputs were sent to {self.name}; {len(results)} results came back"
            )
        results = self._stored(results)
        if len(results) == 1:
            return [{**body, self.results: results}]
        prompts = self._weights(questions) if questions else [1] * len(results)
        parts = split_usage(body.get("usage"), [1] * len(results), prompts)
        samples = [{**body, self.results: [result]} for result in results]
        if "usage" in body:
            for sample, part in zip(samples, parts, strict=True):
                sample["usage"] = part
        return samples

    def answer(self, samples: Sequence[Sample], ask: Ask) -> dict[str, Any]:
        """Return the answer with the results of these samples in order; see `Api.answer`."""
        if not samples:
            raise ValueError(f"an answer of {self.name} holds at least one sample; got none")
        whole = dict(samples[0])
        whole[self.results] = self._worded([sample[self.results][0] for sample in samples], ask)
        usages = [sample.get("usage") for sample in samples]
        if len(samples) > 1 and all(isinstance(usage, Mapping) for usage in usages):
            whole["usage"] = join_usage(usages, 1)  # type: ignore[arg-type]  # all are mappings
        return whole

    def _stored(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return results in the order of the inputs, in the form of samples."""
        return results

    def _worded(self, results: list[dict[str, Any]], ask: Ask) -> list[dict[str, Any]]:  # noqa: ARG002 - embeddings need it
        """Return the results of samples in the form that the request asks for."""
        return results


class EmbeddingsApi(_FunctionApi):
    """``POST …/embeddings``.

    A sample contains its vector in base64 if that is exact, else as the original numbers.
    """

    name = "embeddings"
    transport = EMBEDDINGS_TRANSPORT
    results = "data"

    def _parted(self, body: Body) -> tuple[dict[str, Any], dict[str, Any]]:
        question, transport = super()._parted(body)
        wanted = transport.get("encoding_format")
        if wanted is not None and (wanted not in _FORMATS or not question.keys() <= FLOAT_FIELDS):
            question["encoding_format"] = transport.pop("encoding_format")  # floats cannot give this format
        return question, transport

    def answer_bytes(self, samples: Sequence[bytes], ask: Ask) -> bytes:
        """Return the JSON of `answer`."""
        return jsontext.dumps(self.answer([orjson.loads(sample) for sample in samples], ask))

    def _stored(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        indices: list[Any] = [result.get("index") for result in results]
        if any(index is not None for index in indices):
            by_index = {result["index"]: result for result in results if type(result.get("index")) is int}
            if sorted(by_index) != list(range(len(results))):
                raise BadAnswer(f"embeddings must be numbered from 0; their indices are {indices!r:.200}")
            results = [by_index[index] for index in range(len(results))]
        return [{**result, "index": 0, "embedding": packed(result.get("embedding"))} for result in results]

    def _worded(self, results: list[dict[str, Any]], ask: Ask) -> list[dict[str, Any]]:
        kept = "encoding_format" in ask.question  # the vectors may have another type, so they are unchanged
        wanted = (ask.question if kept else ask.transport).get("encoding_format")
        worded = []
        for index, result in enumerate(results):
            vector = result["embedding"]
            if wanted == "base64" and isinstance(vector, list) and not kept:
                with contextlib.suppress(
                    OverflowError, struct.error
                ):  # a vector that does not fit into base64 stays a list
                    vector = to_base64(vector)
            elif wanted in (None, "float") and isinstance(vector, str):
                vector = to_floats(vector)
            worded.append({**result, "index": index, "embedding": vector})
        return worded

    def plain(self, sample: Sample) -> Any:
        """Return the vector as a list of numbers, or unchanged if it has another encoding."""
        vector = sample["data"][0]["embedding"]
        if isinstance(vector, str):
            with contextlib.suppress(ValueError, struct.error):
                return to_floats(vector)
        return vector

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        vector = self.plain(sample)
        return vector if isinstance(vector, str) else f"{len(vector)} numbers", None


class ModerationsApi(_FunctionApi):
    """``POST …/moderations``. A list of parts (text, images) is one input."""

    name = "moderations"
    transport = MODERATIONS_TRANSPORT
    results = "results"

    def split(self, body: Body) -> tuple[Ask, ...]:
        """Return one ask per text of the input; see `Api.split`."""
        question, transport = self._parted(body)
        parts = question.get("input")
        if isinstance(parts, list | tuple) and parts and all(isinstance(part, Mapping) for part in parts):
            return (Ask(question, function=True, transport=transport),)
        return self._asks(question, function=True, transport=transport)

    def plain(self, sample: Sample) -> Any:
        """Return the result: the flags by category, with scores."""
        return sample["results"][0]

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        categories = sample["results"][0].get("categories") or {}
        return "flagged: " + (
            ", ".join(sorted(name for name, is_it in categories.items() if is_it)) or "no"
        ), None


def to_base64(vector: Sequence[float]) -> str:
    """Return a vector as base64 of little-endian 32-bit floats."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def to_floats(text: str) -> list[float]:
    """Return the vector of base64 of little-endian 32-bit floats; `to_base64` gives the text again."""
    data = base64.b64decode(text)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def packed(vector: Any) -> Any:
    """Return a vector in base64 if its numbers are exactly 32-bit floats, else unchanged.

    Raises:
        BadAnswer: when it is neither a string nor a list.
    """
    if isinstance(vector, str):
        return vector
    if not isinstance(vector, list):
        raise BadAnswer(f"an embedding must be a list of numbers or a string; got {vector!r:.200}")
    if not vector or not all(type(number) is float for number in vector):
        return vector  # integers are another encoding, or would become floats
    try:
        text = to_base64(vector)
    except OverflowError:
        return vector
    return text if to_floats(text) == vector else vector


EMBEDDINGS = EmbeddingsApi()
MODERATIONS = ModerationsApi()
