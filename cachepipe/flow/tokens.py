"""Estimates how many tokens a call will use, and learns from what its answers have used.

The prompt is counted by tiktoken if it is installed and its encoding is available. Otherwise it is estimated
from the text: English has four characters per token, other scripts as few as one. The completion is estimated
as ``max_tokens`` if the request has it, because providers count that in advance too; otherwise from earlier
answers of this model, with a margin. The estimate of the prompt is corrected by the ratio that earlier
prompts have shown.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_logger = logging.getLogger(__name__)
_MESSAGE = 4  # tokens around a message
_UNKNOWN = 256.0  # tokens of an answer, if nothing is known
_SMOOTH = 0.1  # weight of a new answer in the means
_IMAGE = 1000  # tokens of a picture, sound or file in a message
_MEDIA = frozenset(
    {
        *("image_url", "image", "input_image", "video_url", "video", "input_video"),
        *("input_audio", "audio_url", "file", "input_file", "document"),
    }
)
_GEMINI_MEDIA = frozenset({"inlineData", "inline_data", "fileData", "file_data"})
_CONFIGS = ("generationConfig", "generation_config", "parameters")  # the last one is Hugging Face's
_GEMINI_COUNTS = ("candidateCount", "candidate_count")
_CONFIGURED_LIMITS = ("maxOutputTokens", "max_output_tokens", "max_new_tokens")
_LONG = 50_000
"""The characters of a text that are counted, because counting blocks the loop; the rest is assumed alike."""
_MOST = 2**31  # samples or tokens; larger numbers are taken for this one
_ASKED = (
    *("messages", "prompt", "input", "system", "instructions", "tools", "response_format"),
    *("contents", "content", "requests", "systemInstruction", "system_instruction"),  # Gemini's
    "inputs",  # Hugging Face's
)
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_tokens_to_sample")


def estimated(text: str) -> int:
    """Return the approximate number of tokens of a text, from its length and script."""
    size = len(text)
    if text.isascii():
        return math.ceil(size / 4)
    other = size - len(text.encode("ascii", "ignore"))
    return math.ceil((size - other) / 4 + other * 0.8)


def counter(name: str | Any | None) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text.

    Args:
        name: the name of a tiktoken encoding, an object with a method ``encode``, or None for `estimated`.
    """
    if name is None:
        return estimated
    if not isinstance(name, str):
        encode = name.encode
        return lambda text: len(encode(text))
    return _Counter(name)


class _Counter:
    """Counts with tiktoken once its encoding is loaded, and estimates until then.

    The first text that is counted starts a thread that loads the encoding, because that may download a file.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._encode: Callable[..., Any] | None = None
        self._begun = False

    def __call__(self, text: str) -> int:
        if self._encode is not None:
            begins = text[:_LONG]
            count = len(self._encode(begins, disallowed_special=()))
            return count if len(text) <= _LONG else math.ceil(count * len(text) / _LONG)
        begun, self._begun = self._begun, True
        if not begun and importlib.util.find_spec("tiktoken") is not None:
            threading.Thread(target=self.load, name="cachepipe-tiktoken", daemon=True).start()
        return estimated(text)

    def load(self) -> None:
        """Load the encoding. If that fails, texts are estimated."""
        try:
            self._encode = importlib.import_module("tiktoken").get_encoding(self._name).encode
        except Exception as error:  # noqa: BLE001 - it may download a file, which can fail in any way
            _logger.info(
                "tokens are estimated, because tiktoken cannot load the encoding %r (%s)", self._name, error
            )


@dataclass(slots=True)
class _Seen:
    """What the answers of one model have shown."""

    ratio: float = 1.0  # the true size of prompts divided by the estimated one
    completion: float | None = None  # the mean number of tokens of a sample
    deviation: float = 0.0

    @property
    def usual(self) -> float:
        """The number of tokens that a sample rarely exceeds."""
        return _UNKNOWN if self.completion is None else self.completion + 2 * self.deviation


@dataclass(slots=True, frozen=True)
class Estimate:
    """The estimated tokens of one call.

    Attributes:
        model: the name of the model.
        raw: the tokens of the prompt before the correction.
        prompt: the tokens of the prompt.
        completion: the tokens of all samples together.
        n: the number of samples.
    """

    model: str | None
    raw: float
    prompt: float
    completion: float
    n: int

    @property
    def total(self) -> float:
        """The tokens of the prompt and the samples."""
        return self.prompt + self.completion


class Estimator:
    """Estimates calls, and learns from their usage. Every method may be used from any thread.

    There is no lock, because a fork might leave it held. If two threads learn at once, one lesson may be
    lost.

    Args:
        encoding: as for `counter`.
    """

    def __init__(self, encoding: Any = "cl100k_base") -> None:
        self.count = counter(encoding)
        self._seen: dict[str | None, _Seen] = {}

    def estimate(self, body: Mapping[str, Any], n: int | None = None) -> Estimate:
        """Return the estimated tokens of a call with this body.

        Args:
            body: the body that is sent, or the fields of a request.
            n: the number of samples; default is that of the body. Use 0 for answers without tokens, such as
                embeddings.
        """
        model = body.get("model")
        model = model if isinstance(model, str) else None
        if n is None:
            counts = [*map(body.get, ("n", "best_of")), *_configured(body, _GEMINI_COUNTS)]
            n = max((size for count in counts if (size := _count(count))), default=1)
            n *= _prompts(body.get("prompt"))
        raw = float(sum(self._size(body.get(name)) for name in _ASKED))
        seen = self._seen.get(model) or _Seen()
        limit = limit_of(body)
        each = seen.usual if limit is None else limit
        return Estimate(model, raw, raw * seen.ratio, float(n * each), n)

    def _size(self, value: Any) -> int:
        """Return the estimated tokens of a part of a body."""
        if isinstance(value, str):
            return _IMAGE if value.startswith("data:") and ";base64," in value[:100] else self.count(value)
        if isinstance(value, Mapping):
            media = value.get("type") in _MEDIA or not _GEMINI_MEDIA.isdisjoint(value)
            return _IMAGE if media else _MESSAGE + sum(map(self._size, value.values()))
        if isinstance(value, list | tuple):
            if set(map(type, value)) == {int}:
                return len(value)  # a list of tokens
            return sum(map(self._size, value))
        return 1 if isinstance(value, int | float) else 0

    def learn(self, estimate: Estimate, prompt: int | None, completion: int | None) -> None:
        """Learn from the usage of a call that was estimated.

        Args:
            estimate: the estimate.
            prompt: the tokens of its prompt, if they were reported.
            completion: the tokens of its samples together, if they were reported.
        """
        seen = self._seen.setdefault(estimate.model, _Seen())
        if prompt and estimate.raw:
            ratio = min(max(prompt / estimate.raw, 0.1), 10.0)
            seen.ratio += _SMOOTH * (ratio - seen.ratio)
        if completion is not None and estimate.n:
            each = completion / estimate.n
            if seen.completion is None:
                seen.completion, seen.deviation = each, each / 2
            else:
                seen.deviation += _SMOOTH * (abs(each - seen.completion) - seen.deviation)
                seen.completion += _SMOOTH * (each - seen.completion)


def limit_of(body: Mapping[str, Any]) -> int | None:
    """Return the largest number of tokens of an answer that a body asks for, or None."""
    limits = [*map(body.get, _LIMITS), *_configured(body, _CONFIGURED_LIMITS)]
    return next((value for limit in limits if (value := _count(limit))), None)


def _configured(body: Mapping[str, Any], names: Iterable[str]) -> list[Any]:
    """Return the settings of a body for Gemini or Hugging Face that have one of these names."""
    configs = [config for name in _CONFIGS if isinstance(config := body.get(name), Mapping)]
    return [config[name] for config in configs for name in names if name in config]


def _count(value: Any) -> int | None:
    """Return a number of samples or tokens, or None for another value, such as -1 for no limit."""
    return min(value, _MOST) if type(value) is int and value > 0 else None


def _prompts(prompt: Any) -> int:
    """Return the number of prompts: legacy APIs take several, and answer each n times."""
    several = isinstance(prompt, list | tuple) and all(
        isinstance(item, str | list | tuple) for item in prompt
    )
    return len(prompt) or 1 if several else 1
