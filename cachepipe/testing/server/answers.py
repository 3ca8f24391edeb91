"""The model's answer, and the parts of an answer that several dialects write alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from cachepipe.testing.server.schemas import instance

if TYPE_CHECKING:
    from cachepipe.testing.ngram import DrawnText
    from cachepipe.testing.server.calls import ModelCall

__all__ = [
    "DONE",
    "FINGERPRINT",
    "EventStream",
    "ModelAnswer",
    "SampledChoice",
    "choice_of",
    "data_event",
    "named_event",
    "part_of",
    "pieces_in_turn",
    "token_entries",
    "wants_usage",
]

FINGERPRINT: Final = "fp_ngram_1"
DONE: Final = b"data: [DONE]\n\n"
_FRAGMENT: Final = 16  # characters of JSON in an event of a stream


class SampledChoice(NamedTuple):
    """One sample as a client gets it: its text (or arguments), cut into the pieces of a stream."""

    sample: DrawnText
    text: str
    pieces: Sequence[str]


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """Everything that a dialect needs to write an answer."""

    call: ModelCall
    choices: Sequence[SampledChoice]
    identity: str
    created: int
    tokens_out: int

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens as OpenAI's older endpoints count them."""
        tokens_in = self.call.tokens_in
        return {
            "prompt_tokens": tokens_in,
            "completion_tokens": self.tokens_out,
            "total_tokens": tokens_in + self.tokens_out,
        }


class EventStream(NamedTuple):
    """A stream in two parts: the events with content, and those that end it."""

    content: list[bytes]
    ending: list[bytes]


def data_event(value: object) -> bytes:
    """Return an event that has only data."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def named_event(value: Mapping[str, Any]) -> bytes:
    """Return an event that is named after its type."""
    return b"event: " + str(value["type"]).encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n"


def choice_of(call: ModelCall, sample: DrawnText) -> SampledChoice:
    """Return a sample as a client gets it: JSON that fits the schema if there is one, else its text."""
    if call.schema is not None:
        text = orjson.dumps(instance(call.schema, sample.text, call.schema)).decode()
        return SampledChoice(
            sample, text, [text[at : at + _FRAGMENT] for at in range(0, len(text), _FRAGMENT)]
        )
    pieces = list(sample.tokens)
    if pieces and sample.stop is not None:  # the last token may extend beyond the stop sequence
        pieces[-1] = sample.text[sum(map(len, pieces[:-1])) :]
    return SampledChoice(sample, sample.text, pieces)


def _token_entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def token_entries(sample: DrawnText, alternatives: int) -> list[dict[str, Any]]:
    """Return one entry per token with its log probability and the most probable alternatives."""
    return [
        {
            **_token_entry(token, logprob),
            "top_logprobs": [
                _token_entry(*pair)
                for pair in zip(table.tokens[:alternatives], table.logarithms[:alternatives], strict=True)
            ],
        }
        for token, logprob, table in zip(sample.tokens, sample.logprobs, sample.tables, strict=True)
    ]


def part_of(sample: DrawnText, only: slice) -> DrawnText:
    """Return some tokens of a sample with their probabilities."""
    return replace(
        sample, tokens=sample.tokens[only], logprobs=sample.logprobs[only], tables=sample.tables[only]
    )


def wants_usage(call: ModelCall) -> bool:
    """Return True if the last event of a stream contains the usage."""
    options = call.body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def pieces_in_turn(answer: ModelAnswer) -> Iterator[tuple[int, SampledChoice, int, str]]:
    """Yield index, choice, position and piece of all choices, token by token as a real server would."""
    for position in range(max((len(choice.pieces) for choice in answer.choices), default=0)):
        for index, choice in enumerate(answer.choices):
            if position < len(choice.pieces):
                yield index, choice, position, choice.pieces[position]
