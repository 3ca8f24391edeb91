"""Answers of models: text, tokens with their probabilities, calls of tools, times and cost."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, overload

import pydantic

from cachepipe import markup, terminal, wire
from cachepipe.chat.conversations import Conversation, Message, text_of
from cachepipe.errors import BadAnswer
from cachepipe.providers.info import Info
from cachepipe.wire.sse import merge

_COLOURS: Final = ((0.9, "32"), (0.6, "92"), (0.3, "33"), (0.1, "91"), (0.0, "31"))
"""The colours of tokens by their lowest probability, from green to red."""


@dataclass(frozen=True)
class TokenLogProb:
    """A token and how probable it was.

    Attributes:
        token: the token.
        log_prob: the natural logarithm of its probability; nan if the provider does not report it.
        raw: its bytes, if they differ from those of ``token``, as for a part of a character.
    """

    token: str
    log_prob: float
    raw: bytes | None = field(default=None, repr=False)

    @property
    def probability(self) -> float:
        """The probability, limited to the range from 0 to 1; nan if it is unknown."""
        return math.exp(min(self.log_prob, 0.0))


def _characters(tokens: Iterable[TokenLogProb]) -> Iterator[tuple[str, list[TokenLogProb]]]:
    """Iterate over texts of complete characters with their tokens, usually one."""
    parts: list[TokenLogProb] = []
    for token in tokens:
        if token.raw is None:
            yield from ((part.token, [part]) for part in parts)  # they are not a character
            parts = []
            yield token.token, [token]
            continue
        parts.append(token)
        with contextlib.suppress(UnicodeDecodeError):
            yield b"".join(part.raw or b"" for part in parts).decode(), parts
            parts = []
    yield from ((part.token, [part]) for part in parts)


class _Cost:
    """A field that may be given as an `Info`; its price is looked up when it is first read."""

    @overload
    def __get__(self, completion: None, _: type) -> None: ...
    @overload
    def __get__(self, completion: TextCompletion, _: type) -> float | None: ...
    def __get__(self, completion: TextCompletion | None, _: type) -> float | None:
        if completion is None:
            return None  # the field's default
        given = vars(completion)["cost"]
        if isinstance(given, Info):
            given = vars(completion)["cost"] = given.as_asked_cost
        return given  # type: ignore[no-any-return]

    def __set__(self, completion: TextCompletion, given: Info | float | None) -> None:
        vars(completion)["cost"] = given


@dataclass(frozen=True)
class TextCompletion:
    """An answer of a model, with its times, tokens and cost.

    Times are seconds since 1970. The times of the generation are stored with the sample: a cached completion
    has the times of the call that made it, and separate times of its retrieval.

    Attributes:
        conversation: the conversation that was completed.
        model: the model in the request.
        message: the text of the answer; empty if there is none, for example with tool calls.
        start_time: the start of its generation.
        end_time: the end of its generation.
        cached: False exactly if it was generated on this request's behalf.
        retrieval_start_time: the time of the request.
        retrieval_end_time: the time at which the answer was available.
        token_log_probs: the tokens of the answer with their log probabilities; None if not asked for.
        full_token_log_probs: the most probable tokens at each position; None if not asked for.
        usage: token counts as asked: those of the request alone, whether it was cached or not.
        cost: the price of ``usage`` in US dollars; None if it is unknown.
        finish_reason: why it ended, in the provider's words.
        refusal: the model's refusal message, if the provider reports refusals separately.
        tool_calls: the calls of tools that the model wants, as the provider's JSON has them.
        parsed: the answer as an instance of ``response_format``, if that was a class.
        key: the key of the question; None without a cache.
        index: the sample's index in the list of its key.
        namespace: the namespace of the draw.
        request_id: which draw it is among equal questions.
        replicate: which repetition of the experiment it belongs to.
    """

    conversation: Conversation
    model: str
    message: str
    start_time: float
    end_time: float
    cached: bool = False
    retrieval_start_time: float = 0.0
    retrieval_end_time: float = 0.0
    token_log_probs: list[TokenLogProb] | None = field(default=None, repr=False)
    full_token_log_probs: list[list[TokenLogProb]] | None = field(default=None, repr=False)
    usage: Mapping[str, int] = field(default_factory=dict)
    cost: _Cost = _Cost()
    finish_reason: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    parsed: Any = None
    key: str | None = None
    index: int | None = None
    namespace: str | None = None
    request_id: str | None = None
    replicate: str | int | None = None

    @property
    def duration(self) -> float:
        """The duration of its generation in seconds."""
        return self.end_time - self.start_time

    @property
    def retrieval_duration(self) -> float:
        """The duration of its retrieval in seconds; for a cached one, from the cache."""
        return self.retrieval_end_time - self.retrieval_start_time

    def _repr_html_(self) -> str:
        facts = {"model": self.model, "cached": self.cached, "seconds": self.duration, **self.usage}
        return markup.table(
            [
                ("answer", self.to_message().content),
                *(("tool call", call.get("function", call)) for call in self.tool_calls),
                *((name.replace("_", " "), value) for name, value in facts.items()),
                ("US dollars", self.cost),
            ]
        )

    def to_message(self) -> Message:
        """Return the answer as an assistant message; if it has no text, with the refusal message."""
        text = self.message or self.refusal or (None if self.tool_calls else "")
        return Message("assistant", text, tool_calls=self.tool_calls or None)

    def to_pretty_string(self, *, color: bool | None = None) -> str:
        """Return the conversation with the answer in readable form; see `Conversation.to_pretty_string`."""
        whole = Conversation([*self.conversation.messages, self.to_message()])
        return whole.to_pretty_string(color=color)

    def to_pretty_log_probs_string(
        self, *, show_probabilities: bool = False, color: bool | None = None
    ) -> str:
        """Return the answer's tokens, each coloured by its probability: from green (high) to red (low).

        Args:
            show_probabilities: write the probability after each token, such as ``Paris[0.9731]``.
            color: whether to use colours; None uses them on a terminal without NO_COLOR.

        Raises:
            ValueError: when the completion has no log probabilities.
        """
        if self.token_log_probs is None:
            raise ValueError("this completion has no log probabilities; ask for it with log_probs=True")
        color = terminal.shows_colours(color)
        pieces = []
        for text, tokens in _characters(self.token_log_probs):
            least = min(token.probability for token in tokens)
            codes = next((codes for bound, codes in _COLOURS if least >= bound), None)
            shown = terminal.visible(text, lines=True)
            pieces.append(shown if codes is None else terminal.coloured(shown, codes, color=color))
            if show_probabilities:
                pieces += [terminal.coloured(f"[{one.probability:.4f}]", "2", color=color) for one in tokens]
        return "".join(pieces)


def parsed_answer(
    kind: type[pydantic.BaseModel], text: str, finish_reason: str | None, key: str | None, index: int | None
) -> pydantic.BaseModel:
    """Return an answer as an instance of a class.

    Args:
        kind: the class.
        text: the answer.
        finish_reason: why it ended.
        key: the key of the question, for the error message.
        index: the sample's index in the list of its key, for the error message.

    Raises:
        BadAnswer: when it does not fit.
    """
    try:
        return kind.model_validate_json(text)
    except pydantic.ValidationError as error:
        cut = " (it was cut off: raise max_completion_tokens)" if finish_reason == "length" else ""
        raise BadAnswer(
            f"the answer is not a valid {kind.__name__}{cut}: {text!r:.200}. It stays in the cache as "
            f"sample {index} of key {key}; another request_id draws another"
        ) from error


class AnsweredCall:
    """A model's answer, complete or assembled from a stream as the cache does it."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.log_probs: list[TokenLogProb] | None = None
        self.alternatives: list[list[TokenLogProb]] | None = None
        self.usage: Mapping[str, Any] = {}

    @classmethod
    def of(cls, choice: Any, usage: Any) -> Self:
        """Return a choice of a complete answer."""
        made = cls()
        made.said = dumped(choice.message)
        made.finish_reason = choice.finish_reason
        made.add_log_probs(choice.logprobs)
        made.usage = {} if usage is None else dumped(usage)
        return made

    def add(self, chunk: Any) -> str:
        """Add a chunk of a stream; return its text."""
        if chunk.usage is not None:
            self.usage = dumped(chunk.usage)
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        self.finish_reason = choice.finish_reason or self.finish_reason
        delta = {} if choice.delta is None else dumped(choice.delta)
        merge(self.said, delta)
        text = text_of(delta.get("content"))
        self.add_log_probs(choice.logprobs, text)
        return text or str(delta.get("refusal") or "")

    def check_ended(self) -> None:
        """Raise an error if the stream ended before the answer did.

        Raises:
            BadAnswer: when no chunk had a finish reason.
        """
        if self.finish_reason is None:
            raise BadAnswer("the stream ended before the answer did; expected a choice with a finish_reason")

    def parts(self) -> tuple[str, str | None, list[dict[str, Any]]]:
        """Return the text, the refusal, and the calls of tools as the provider's JSON has them.

        Raises:
            BadAnswer: for a content that is neither a text nor a list of parts.
        """
        message = wire.CHAT.settle(self.said)
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise BadAnswer(f"the content of an answer is a text or a list of parts; got {content!r:.100}")
        return text_of(content), message.get("refusal"), message.get("tool_calls") or []

    def add_log_probs(self, told: Any, text: str = "") -> None:
        """Add the log probabilities of a choice, or of a chunk of one."""
        if isinstance(told, int | float):  # Together's, of the one token that a chunk brings
            told = {"tokens": [text], "token_logprobs": [told]}
        entries = None if told is None else _entries(dumped(told))
        if entries is None:
            return
        self.log_probs = self.log_probs or []
        self.alternatives = self.alternatives or []
        for entry in entries:
            self.log_probs.append(_token(entry))
            self.alternatives.append([_token(top) for top in entry.get("top_logprobs") or ()])


def _entries(told: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    """Return log probabilities in OpenAI's form, an entry for each token; None if the answer has none."""
    if told.get("content") is not None or not told.get("tokens"):
        return told.get("content")
    values, tops = told.get("token_logprobs") or (), told.get("top_logprobs") or ()  # Together's
    return [
        {"token": token, "logprob": value, "top_logprobs": _listed(top)}
        for token, value, top in itertools.zip_longest(told["tokens"], values, tops)
    ]


def _token(entry: Mapping[str, Any]) -> TokenLogProb:
    value, text = entry.get("logprob"), str(entry.get("token") or "")
    raw = None
    with contextlib.suppress(TypeError, ValueError):  # servers send odd values
        raw = bytes(list(entry.get("bytes") or ())) or None
    if raw == text.encode("utf-8", "surrogatepass"):
        raw = None
    return TokenLogProb(text, math.nan if value is None else value, raw)


def _listed(top: Any) -> list[dict[str, Any]]:
    return [{"token": token, "logprob": value} for token, value in (top or {}).items()]


def choices_of(answer: Any) -> Sequence[Any]:
    """Return the choices of an answer.

    Raises:
        BadAnswer: when there is none, or one has no message; with the provider's text.
    """
    choices = getattr(answer, "choices", None)
    if not choices or any(getattr(choice, "message", None) is None for choice in choices):
        told = getattr(answer, "error", None)
        if isinstance(answer, str):  # as the SDK returns a page of a website
            told = f"{answer!r:.200}; does base_url end as the provider's does, often in /v1?"
        raise BadAnswer(
            "the provider answered without a choice that has a message; expected one"
            + ("" if told is None else f". It says: {told!s:.400}")
        )
    return choices  # type: ignore[no-any-return]


def dumped(thing: Any) -> dict[str, Any]:
    """Return the fields of an SDK's object."""
    dumped: dict[str, Any] = (
        thing if isinstance(thing, dict) else thing.model_dump(exclude_none=True, warnings=False)
    )
    return dumped
