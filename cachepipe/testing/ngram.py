"""A small text model with an exactly known distribution, to which statistical tests compare samples.

It is a word trigram model, interpolated with its bigrams, trained on the English text of the problems in
`data/humaneval.jsonl`. It is a real model: its answers vary in content and length, depend on the
prompt, and carry log probabilities. Its probabilities are public: `distribution` returns the
numbers that `sample` draws with, so a test can compare many samples with the truth.

The prompt sets the weights. A sentence of the training text that shares words with the prompt has a greater
weight, and rare words count more than common ones. With weight w(s) for sentence s,

    P(t | u, v) = 0.6 · Σ w(s) · count_s(u, v, t) / Σ w(s) · count_s(u, v)
                + 0.4 · Σ w(s) · count_s(v, t)    / Σ w(s) · count_s(v)

where u and v are the two tokens before t. If (u, v) does not occur in the training text, only the bigram
counts. If v does not occur either, a new sentence begins. A new sentence also begins after a line break, in
an empty context, and at the start of every chat answer. Sentences begin with one of about a dozen words, each
with a considerable probability, which makes a chi-square test of first tokens practical.

A *nonce* is for tests that need many different requests with one known distribution: the text
``[nonce: …]`` is removed from a prompt before the model reads it.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate, pairwise
from random import Random
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "END",
    "DrawnText",
    "NGramModel",
    "Table",
    "default_model",
    "embed",
    "flatten",
    "generator",
    "strip_nonces",
    "tokenise",
]

_K = TypeVar("_K")
_V = TypeVar("_V")

END: Final = "<|end|>"
"""The token that ends an answer. It appears in distributions, never in texts."""

_START: Final = ""  # stands before the first token of a sentence; no token is empty
# The module reads the file when it is imported, because a model may be made in an event loop.
_TEXT: Final = files("cachepipe.testing").joinpath("data", "humaneval.jsonl").read_bytes()
_TRIGRAM_SHARE: Final = 0.6
_TOPIC: Final = 6.0  # a sentence with all known words of the prompt has the weight 1 + this
_OPENER_COUNT: Final = 6  # a word that begins fewer sentences of the training text begins no answer
_MEMORY: Final = 512  # prompts whose tables are kept; with more, all are removed
_LONG: Final = 20_000  # tables of longer prompts are not kept

_TOKEN: Final = re.compile(r" ?[^\W\d_]+(?:'[a-z]+)?| ?\d{1,3}| ?[^\w\s]| ?_|\s")
_NONCE: Final = re.compile(r"\[nonce:[^\]]*\][^\S\n]?")
_DOCSTRING: Final = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)
# The start of a problem's examples, which are code and not English.
_EXAMPLES: Final = re.compile(
    r">>>|==>|^\s*(?:for )?examples?\b|^\s*\[input|for example|^\s*\w+\(.*\)\s*(?:==|=>|->|➞|=)",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def tokenise(text: str) -> list[str]:
    """Return the tokens of a text; joined, they give the text again.

    A word keeps the space before it, numbers come in at most three digits, and every other
    character is a token of its own.
    """
    return _TOKEN.findall(text)


def strip_nonces(text: str) -> str:
    """Return the text as the model reads it: without each ``[nonce: …]`` and the blank after it."""
    return _NONCE.sub("", text) if "[nonce:" in text else text


def flatten(messages: Sequence[Mapping[str, Any]]) -> str:
    r"""Return a chat as the model reads it: a line ``role: text`` per message.

    The texts of a list of content parts are joined. Any other part is written as its type in brackets, and a
    tool call as its function's name and arguments. The line ``assistant:`` follows the last message, so that
    an answer begins a sentence. If the last message is the assistant's, nothing follows it, and the answer
    continues its text.
    """
    lines = [f"{message.get('role', 'user')}: {_text_of(message)}" for message in messages]
    if not messages or messages[-1].get("role") != "assistant":
        lines.append("assistant:\n")
    return "\n".join(lines)


def generator(seed: object, *parts: object) -> Random:
    """Return a source of random numbers that depends on the seed and the parts only.

    The same arguments give the same numbers in every process and version of Python; any other
    argument gives independent ones.
    """
    digest = hashlib.blake2b(repr((seed, *parts)).encode("utf-8", "surrogatepass"), digest_size=16)
    return Random(int.from_bytes(digest.digest(), "big"))  # noqa: S311 - samples, not secrets


def embed(text: str, dimensions: int = 256) -> array[float]:
    """Return a vector of length one (32-bit floats) that depends on the text alone.

    Each word and each pair of neighbouring words is hashed to a dimension and a sign, so texts that
    share words are close to each other. Nonces are not removed.
    """
    words = [word for token in tokenise(text) if (word := token.strip().lower())]
    features = Counter(words)
    features.update(f"{first} {second}" for first, second in pairwise(words))
    vector = [0.0] * dimensions
    for feature, count in features.items():
        code = zlib.crc32(feature.encode("utf-8", "surrogatepass"))
        vector[(code >> 1) % dimensions] += math.sqrt(count) if code & 1 else -math.sqrt(count)
    length = math.hypot(*vector)
    if length == 0.0:  # no words, or words that cancel out
        vector[0] = length = 1.0
    return array("f", (value / length for value in vector))


@dataclass(frozen=True, slots=True)
class Table:
    """One distribution over next tokens: the most probable first, and none with probability zero.

    Attributes:
        tokens: The tokens.
        probabilities: Their probabilities, in the same order; the sum is one.
        cumulative: The running sum; its last entry is exactly one.
        logarithms: The natural logarithms of the probabilities.
    """

    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]
    cumulative: tuple[float, ...]
    logarithms: tuple[float, ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Table:
        """Return the distribution proportional to the weights."""
        ranked = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
        total = math.fsum(weights.values())
        probabilities = tuple(weight / total for _, weight in ranked)
        cumulative = (*list(accumulate(probabilities))[:-1], 1.0)
        return cls(
            tuple(token for token, _ in ranked),
            probabilities,
            cumulative,
            tuple(map(math.log, probabilities)),
        )

    def shaped(self, temperature: float, top_p: float) -> Table:
        """Return the distribution at a temperature, cut to its nucleus and normalised again.

        At temperature zero that is the most probable token alone (the first in alphabetical order
        of several). The nucleus is the smallest number of top tokens that reaches `top_p`.
        """
        if temperature <= 0.0:
            return Table.of({self.tokens[0]: 1.0})
        # Relative to the top, so that no temperature overflows; what underflows is impossible.
        top = self.logarithms[0]
        scaled = ((value - top) / temperature for value in self.logarithms)
        table = Table.of(
            {token: math.exp(value) for token, value in zip(self.tokens, scaled, strict=True) if value > -700}
        )
        if top_p >= 1.0:
            return table
        kept = bisect_right(table.cumulative, top_p - 1e-12) + 1
        return Table.of(dict(zip(table.tokens[:kept], table.probabilities[:kept], strict=True)))

    def draw(self, random: Random) -> int:
        """Return the position of a token drawn with its probability."""
        return bisect_right(self.cumulative, random.random())


@dataclass(frozen=True, slots=True)
class DrawnText:
    """One answer of the model.

    Attributes:
        text: The answer, cut off before a stop sequence.
        tokens: The tokens sampled, without `END`. Of a token that a stop sequence cuts in two the
            text has only the beginning; a token that has no part in the text is left out.
        logprobs: The natural logarithm of each token's probability when it was drawn.
        tables: The distribution that each token was drawn from.
        finish_reason: ``"stop"`` at `END` or a stop sequence, ``"length"`` at the limit.
        stop: The stop sequence that ended the answer, if one did.
    """

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    tables: tuple[Table, ...]
    finish_reason: str
    stop: str | None = None


class _Focus:
    """The model as seen from one prompt: its weights for sentences, and the tables made so far."""

    __slots__ = ("tables", "weights")

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = weights
        self.tables: dict[tuple[str, str, float, float], Table] = {}


class NGramModel:
    """A trigram model of sentences, conditioned on a prompt as the module describes.

    Args:
        sentences: What to train on, one sentence each; the shipped text when not given. The first
            words of sentences that open fewer than six of them are not learnt as openers, unless
            all are that rare.

    A model is safe to use from several threads.
    """

    def __init__(self, sentences: Iterable[str] | None = None) -> None:
        corpus = [tokenise(text) for text in (_shipped_sentences() if sentences is None else sentences)]
        corpus = [tokens for tokens in corpus if tokens]
        if not corpus:
            raise ValueError("NGramModel needs at least one sentence to learn from, and got none.")
        opened = Counter(tokens[0] for tokens in corpus)
        least = min(_OPENER_COUNT, max(opened.values()))
        # Followers of one and of two tokens, each with the sentence where it was seen.
        self._pairs: dict[str, list[tuple[int, str]]] = {}
        self._triples: dict[tuple[str, str], list[tuple[int, str]]] = {}
        self._places: dict[str, set[int]] = {}  # in which sentences a word occurs
        for number, tokens in enumerate(corpus):
            self._learn(number, tokens, may_open=opened[tokens[0]] >= least)
        self._size = len(corpus)
        self._rarity = {word: math.log(self._size / len(where)) for word, where in self._places.items()}
        self.vocabulary: tuple[str, ...] = tuple(sorted({token for tokens in corpus for token in tokens}))
        self._foci: dict[frozenset[str], _Focus] = {}
        self._contexts: dict[str, tuple[_Focus, tuple[str, str]]] = {}

    def __repr__(self) -> str:
        return f"<NGramModel {self._size} sentences, {len(self.vocabulary)} tokens>"

    def distribution(
        self,
        context: str,
        answer: Sequence[str] = (),
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> dict[str, float]:
        """Return the exact probability of every possible next token; they sum to one.

        Args:
            context: The prompt of a completion, or a chat from `flatten`. Nonces are ignored.
            answer: The tokens of the answer so far.
            temperature: Probabilities are raised to the power of 1 / temperature; 0 selects the most probable
                token.
            top_p: The probability mass to keep.
        """
        focus, state = self._conditioned(context)
        for token in answer:
            state = (state[1], token.strip())
        table = self._table(focus, state, temperature, top_p)
        return dict(zip(table.tokens, table.probabilities, strict=True))

    def first_token_distribution(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> dict[str, float]:
        """Return the exact probability of every whole answer to a chat with ``max_tokens=1``."""
        table = self.distribution(flatten(messages), temperature=temperature, top_p=top_p)
        answers: dict[str, float] = {}
        for token, probability in table.items():
            answers["" if token == END else token] = probability
        return answers

    def sample(
        self,
        context: str,
        random: Random,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
    ) -> DrawnText:
        """Return one answer, drawn token by token from `distribution` with the given random numbers."""
        focus, state = self._conditioned(context)
        tables: list[Table] = []
        tokens: list[str] = []
        logprobs: list[float] = []
        found: tuple[int, str] | None = None
        finish_reason = "length"
        for _ in range(max_tokens):
            table = self._table(focus, state, temperature, top_p)
            position = table.draw(random)
            token = table.tokens[position]
            if token == END:
                finish_reason = "stop"
                break
            tables.append(table)
            tokens.append(token)
            logprobs.append(table.logarithms[position])
            state = (state[1], token.strip())
            if stop and (found := _first_stop("".join(tokens), stop)):
                finish_reason = "stop"
                break
        text = "".join(tokens)
        if found:
            text = text[: found[0]]
            kept = _tokens_within(tokens, len(text))
            del tokens[kept:], logprobs[kept:], tables[kept:]
        return DrawnText(
            text, tuple(tokens), tuple(logprobs), tuple(tables), finish_reason, found[1] if found else None
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids: positions in `vocabulary`, modulo its length."""
        return "".join(self.vocabulary[number % len(self.vocabulary)] for number in ids)

    def _learn(self, number: int, tokens: Sequence[str], *, may_open: bool) -> None:
        words = [token.strip() for token in tokens]
        before = [(_START, _START), (_START, words[0]), *pairwise(words)]
        for place, (state, token) in enumerate(zip(before, (*tokens, END), strict=True)):
            if place or may_open:
                seen = (number, sys.intern(token))
                self._pairs.setdefault(state[1], []).append(seen)
                self._triples.setdefault(state, []).append(seen)
        for word in words:
            if len(word) >= 3 and word.isalpha():  # punctuation and articles say nothing about a topic
                self._places.setdefault(word.lower(), set()).add(number)

    def _conditioned(self, context: str) -> tuple[_Focus, tuple[str, str]]:
        """Return the weights of the sentences and the two tokens before the answer, which the prompt sets."""
        text = strip_nonces(context)
        if (known := self._contexts.get(text)) is not None:
            return known
        tokens = tokenise(text)
        words = frozenset({token.strip().lower() for token in tokens}.intersection(self._places))
        if (focus := self._foci.get(words)) is None:
            focus = _Focus(self._weights(words))
            self._foci = _kept(self._foci, words, focus)
        # Blanks at the end are ignored, but a line break, which `strip` removes too, ends a sentence.
        tail = [token.strip() for token in tokenise(text[-64:].rstrip(" \t"))[-2:]]
        last = tail[-1] if tail else _START
        state = (tail[0] if len(tail) == 2 and last else _START, last)
        if len(text) <= _LONG:
            self._contexts = _kept(self._contexts, text, (focus, state))
        return focus, state

    def _weights(self, words: frozenset[str]) -> list[float]:
        weights = [1.0] * self._size
        total = math.fsum(self._rarity[word] for word in words)
        if total:
            for word in sorted(words):  # in a fixed order: sums of floats depend on it
                share = _TOPIC * self._rarity[word] / total
                for number in self._places[word]:
                    weights[number] += share
        return weights

    def _table(self, focus: _Focus, state: tuple[str, str], temperature: float, top_p: float) -> Table:
        key = (*state, temperature, top_p)
        if (table := focus.tables.get(key)) is None:
            if temperature == 1.0 and top_p >= 1.0:
                table = Table.of(self._followers(focus.weights, state))
            else:
                table = self._table(focus, state, 1.0, 1.0).shaped(temperature, top_p)
            focus.tables = _kept(focus.tables, key, table, 8 * _MEMORY)
        return table

    def _followers(self, weights: Sequence[float], state: tuple[str, str]) -> dict[str, float]:
        pairs = self._pairs.get(state[1])
        if pairs is None:  # an unknown word: a new sentence follows, after a blank
            openers = _normalised(self._pairs[_START], weights)
            return {f" {token}": weight for token, weight in openers.items()}
        followers = _normalised(pairs, weights)
        triples = self._triples.get(state)
        if triples is not None:
            for token in followers:
                followers[token] *= 1.0 - _TRIGRAM_SHARE
            for token, weight in _normalised(triples, weights).items():
                followers[token] += _TRIGRAM_SHARE * weight
        return followers


@cache
def default_model() -> NGramModel:
    """Return the model trained on the shipped text, the same object each time."""
    return NGramModel()


def _shipped_sentences() -> list[str]:
    """Return the sentences of the shipped problems: their docstrings without the examples."""
    sentences: list[str] = []
    for line in _TEXT.splitlines():
        docstrings = _DOCSTRING.findall(orjson.loads(line)["prompt"])
        if docstrings:
            prose = " ".join(_EXAMPLES.split("".join(docstrings[-1]))[0].split())
            sentences.extend(text for text in _SENTENCE_END.split(prose) if len(text) > 10)
    return sentences


def _normalised(seen: Iterable[tuple[int, str]], weights: Sequence[float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for number, token in seen:
        sums[token] = sums.get(token, 0.0) + weights[number]
    total = math.fsum(sums.values())
    return {token: value / total for token, value in sums.items()}


def _kept(memory: dict[_K, _V], key: _K, value: _V, limit: int = _MEMORY) -> dict[_K, _V]:
    """Return the memory with another entry, or a new one with only this entry if it is full.

    A full memory is replaced and not emptied, because another thread may be reading it.
    """
    if len(memory) >= limit:
        return {key: value}
    memory[key] = value
    return memory


def _first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    found = [(place, sequence) for sequence in stop if sequence and (place := text.find(sequence)) >= 0]
    return min(found, default=None)


def _tokens_within(tokens: Sequence[str], length: int) -> int:
    """Return the number of tokens that begin within the first `length` characters."""
    count = covered = 0
    while covered < length:
        covered += len(tokens[count])
        count += 1
    return count


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = [content] if isinstance(content, str) else content or []
    texts = [
        part if isinstance(part, str) else str(part.get("text", f"[{part.get('type', 'part')}]"))
        for part in parts
    ]
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        texts.append(f"{function.get('name', '')}({function.get('arguments', '')})")
    return "".join(texts)
