"""The questions and answers of the benchmarks: about 1 KB each, the same in every run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from cachepipe import Request, Response

_TEXT = (
    "a about after again all and answer any are as at be because been before between both but by can cache "
    "could do down each even every first for from give go good great had has have he her here him his how "
    "I if in into is it its just know large last left like line little long look made make man many may me "
    "model more most much must my name never new no not now number of off old on once one only or other our "
    "out over own part people place right said same sample see she should so some still such take tell than "
    "that the their them then there these they thing think this time to two under up us use very was way we"
)
_WORDS = _TEXT.split()
SYSTEM = "You are a careful assistant. Think step by step, then give the answer on a line of its own."
SIZE = 1000


@dataclass(frozen=True)
class ChatRequest(Request):
    """A chat request as adapters define it."""

    temperature: float | None = None
    max_completion_tokens: int | None = None


def text(seed: str, size: int = SIZE) -> str:
    """Return ``size`` characters of words, the same for the same seed."""
    random_words = random.Random(seed)
    words = [seed]
    length = len(seed)
    while length < size:
        words.append(random_words.choice(_WORDS))
        length += len(words[-1]) + 1
    return " ".join(words)[:size]


def question(name: str, *, chat: bool = True) -> dict[str, Any]:
    """Return what is asked, as the plain values that a request body has: about 1 KB of JSON.

    The prompt is two messages, or one string.
    """
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text(f"question {name}:", 800)},
        ]
        if chat
        else text(f"question {name}:", 960),
        "temperature": 0.7,
        "max_completion_tokens": 400,
    }


def request(
    asked: dict[str, Any], request_id: str | None = None, namespace: str | None = None
) -> ChatRequest:
    """Return the request that asks a question."""
    return ChatRequest(
        asked["prompt"],
        request_id=request_id,
        namespace=namespace,
        temperature=asked["temperature"],
        max_completion_tokens=asked["max_completion_tokens"],
    )


def requests(questions: Sequence[dict[str, Any]], namespace: str) -> list[ChatRequest]:
    """Return a request for each question, with its place as its id."""
    return [request(asked, str(place), namespace) for place, asked in enumerate(questions)]


def user(asked: Request) -> str:
    """Return what the user says, which no other question has."""
    prompt: str = asked.prompt if isinstance(asked.prompt, str) else asked.prompt[1]["content"]
    return prompt


def answer(asked: Request) -> str:
    """Return the one right answer to a request: 1 KB that depends on the question."""
    return text("answer to " + user(asked)[:40])


def key(asked: dict[str, Any]) -> str:
    """Return the cheapest safe key of a question: SHA-256 of JSON with sorted keys."""
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()


class InstantModel:
    """A model that has its answers ready, and counts its calls."""

    cache_scope = "benchmark"

    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = answers
        self.calls = 0

    async def request(self, request: Request) -> Response:
        """Return the right answer, ``request.n`` times."""
        self.calls += 1
        return Response([self._answers[user(request)]] * request.n)


def answers_of(asked: Sequence[Request]) -> dict[str, str]:
    """Return the right answers by what the user says."""
    return {user(each): answer(each) for each in asked}
