"""OpenAI's legacy completions: a prompt, or a list of prompts, each of which is a separate question."""

from __future__ import annotations

from typing import Any

from cachepipe.wire.base import Sample
from cachepipe.wire.choices import ChoicesApi, Lane
from cachepipe.wire.sse import settled


class CompletionsApi(ChoicesApi):
    """``POST …/completions``."""

    name = "completions"
    listed = "prompt"
    content = "text"
    delta = "text"
    no_delta = ""
    chunk_object = "completion.chunk"  # Together's; OpenAI's chunks and answers share one name
    whole_object = "text.completion"

    def delta_of(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return the part of the text in a streamed choice."""
        return {"text": part.get("text") or ""}

    def settle(self, content: dict[str, Any]) -> str:
        """Return the text from the merged deltas."""
        text: str = settled(content).get("text", "")
        return text

    def _deltas(self, content: str) -> tuple[str, list[Lane]]:
        return "", [(str, content)]

    def _gist(self, sample: Sample) -> tuple[str, str | None]:
        choice = sample["choices"][0]
        return choice["text"], choice.get("finish_reason")


COMPLETIONS = CompletionsApi()
