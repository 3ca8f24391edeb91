"""How many tokens a call will use, told before it is made, and put right by what its answers used.

The prompt is counted by tiktoken where it is installed and its encoding is at hand, else estimated from
the text: English has four characters to a token, other scripts have up to one. What is to come is
``max_tokens`` where the request says so, since providers count that beforehand too; else what answers of
this model have had so far, with room. Both are multiplied by what experience shows.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

_logger = logging.getLogger(__name__)
_MESSAGE = 4  # tokens around a message
_UNKNOWN = 256.0  # tokens of an answer of which nothing is known
_SMOOTH = 0.1  # weight of a new answer in the means
_IMAGE = 1000  # tokens of a picture, sound or file in a message
_MEDIA = frozenset(
    {
        *("image_url", "image", "input_image", "video_url", "video", "input_video"),
        *("input_audio", "audio_url", "file", "input_file", "document"),
    }
)
_LONG = 50_000  # letters beyond which a text is taken to go on as it has begun: counting holds up the loop
_MOST = 2**31  # samples or tokens; nobody means more
_ASKED = ("messages", "prompt", "input", "system", "instructions", "tools", "response_format")
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_tokens_to_sample")


def estimated(text: str) -> int:
    """Return about how many tokens a text has, from its length and script."""
    size = len(text)
    if text.isascii():
        return math.ceil(size / 4)
    other = size - len(text.encode("ascii", "ignore"))
    return math.ceil((size - other) / 4 + other * 0.8)


def counter(name: str | Any | None) -> Callable[[str], int]:
    """Return what counts the tokens of a text.

    Args:
        name: the name of an encoding of tiktoken, anything with a method ``encode``, or None for `estimated`.
    """
    if name is None:
        return estimated
    if not isinstance(name, str):
        encode = name.encode
        return lambda text: len(encode(text))
    return _Counter(name)


class _Counter:
    """Counts with tiktoken once that has its encoding, which may be a download; until then it estimates.

    It is loaded in a thread of its own, by the first text that is to be counted.
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
        """Load the encoding; where that fails, estimates go on."""
        try:
            self._encode = importlib.import_module("tiktoken").get_encoding(self._name).encode
        except Exception as error:  # noqa: BLE001 - it may fetch a file, which fails in any way
            _logger.info("tokens are estimated: tiktoken has no encoding %r (%s)", self._name, error)


class _Seen:
    """What answers of one model have shown."""

    __slots__ = ("completion", "deviation", "ratio")

    def __init__(self) -> None:
        self.ratio = 1.0  # of the prompt's true size to the estimated one
        self.completion: float | None = None  # tokens of one sample
        self.deviation = 0.0

    @property
    def usual(self) -> float:
        """The tokens that one sample rarely has more of."""
        return _UNKNOWN if self.completion is None else self.completion + 2 * self.deviation


class Estimate:
    """The tokens of one call, told beforehand: of its prompt and of what is to come."""

    __slots__ = ("completion", "model", "n", "prompt", "raw")

    def __init__(self, model: str | None, raw: float, prompt: float, completion: float, n: int) -> None:
        self.model = model
        self.raw = raw
        self.prompt = prompt
        self.completion = completion
        self.n = n

    @property
    def total(self) -> float:
        """All of them."""
        return self.prompt + self.completion


class Estimator:
    """Estimates calls, and learns from their usage. Every method may be used from any thread.

    There is no lock, which a fork might leave held: where two threads learn at once, one lesson may be lost.

    Args:
        encoding: as for `counter`.
    """

    def __init__(self, encoding: Any = "cl100k_base") -> None:
        self.count = counter(encoding)
        self._seen: dict[str | None, _Seen] = {}

    def estimate(self, body: Mapping[str, Any], n: int | None = None) -> Estimate:
        """Return the tokens of a call with this body.

        Args:
            body: what is sent, or the fields of a request.
            n: how many samples it asks for; default is what the body says. 0 is for answers that have
                no tokens, such as embeddings.
        """
        model = body.get("model")
        model = model if isinstance(model, str) else None
        if n is None:
            n = max((size for name in ("n", "best_of") if (size := _count(body.get(name)))), default=1)
            n *= _prompts(body.get("prompt"))
        raw = float(sum(self._size(body.get(name)) for name in _ASKED))
        seen = self._seen.get(model) or _Seen()
        limit = next((value for name in _LIMITS if (value := _count(body.get(name)))), None)
        each = seen.usual if limit is None else limit
        return Estimate(model, raw, raw * seen.ratio, float(n * each), n)

    def _size(self, value: Any) -> int:
        """Return the tokens of a part of a body, or of all its parts."""
        if isinstance(value, str):
            return _IMAGE if value.startswith("data:") and ";base64," in value[:100] else self.count(value)
        if isinstance(value, Mapping):
            if value.get("type") in _MEDIA:
                return _IMAGE
            return _MESSAGE + sum(self._size(item) for item in value.values())
        if isinstance(value, list | tuple):
            if value and all(type(item) is int for item in value):
                return len(value)  # tokens themselves
            return sum(self._size(item) for item in value)
        return 1 if isinstance(value, int | float) else 0

    def learn(self, estimate: Estimate, prompt: int | None, completion: int | None) -> None:
        """Take the usage of a call that was estimated.

        Args:
            estimate: what was told of it.
            prompt: how many tokens its prompt had, if that was told.
            completion: how many its samples had together, if that was told.
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


def _count(value: Any) -> int | None:
    """Return a number of samples or tokens; None for what is none, as -1 is where it stands for no limit."""
    return min(value, _MOST) if type(value) is int and value > 0 else None


def _prompts(prompt: Any) -> int:
    """Return how many prompts there are: old APIs take several, each of which is answered n times."""
    several = isinstance(prompt, list | tuple) and all(
        isinstance(item, str | list | tuple) for item in prompt
    )
    return len(prompt) or 1 if several else 1
