"""Tokens: divides the usage of a call between its samples, adds it up again, and counts it.

Providers report one usage per call. Fields named ``completion…`` or ``output…`` belong to the samples and are
divided between them: exactly if the answer lists the tokens of each sample, else by length. Fields named
``prompt…`` or ``input…`` belong to the question, and every sample has all of them. The total of a sample is
its prompt plus its share of the rest. A cost in money is divided like a completion, because it is that of
the whole call. Other fields, such as times, are copied. Gemini's names are known too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_OF_SAMPLE = ("completion", "output", "candidates", "thoughts")
_COSTS = frozenset({"cost", "cost_details", "cost_in_usd_ticks", "estimated_cost"})
"""What a call has cost, as OpenRouter, Perplexity, xAI and DeepInfra report it."""
_MOST_NANOS = 10**15
"""A million dollars for one sample cannot be right."""
OF_QUESTION = ("prompt", "input", "cachedContent", "cacheTokens", "toolUse")
"""The beginnings of the names of counts that belong to the question."""
_TOTALS = {
    "total_tokens": ("prompt_tokens",),
    "totalTokenCount": ("promptTokenCount", "toolUsePromptTokenCount"),  # Gemini's
}
"""The names of totals, each with the counts in it that belong to the question."""
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens")
"""The names of the counts, for all providers."""

Usage = Mapping[str, Any]


def reported_cost(usage: Any) -> int | None:
    """Return what a provider says that a call has cost, in billionths of a US dollar; None if it does not.

    OpenRouter and DeepInfra report US dollars, Perplexity a ``total_cost`` in them, xAI ten billionths.
    """
    if not isinstance(usage, Mapping):
        return None
    cost = usage.get("cost", usage.get("estimated_cost"))
    if isinstance(cost, Mapping):
        cost = cost.get("total_cost")
    ticks = usage.get("cost_in_usd_ticks")
    nanos: float = cost * 1e9 if _is_number(cost) else ticks / 10 if ticks and _is_number(ticks) else -1
    return round(nanos) if 0 <= nanos < _MOST_NANOS else None


def usage_in(answer: Mapping[str, Any]) -> Any:
    """Return the usage that an answer reports, or None."""
    if answer.get("usage") is not None:
        return answer["usage"]
    if "usageMetadata" in answer:
        return answer["usageMetadata"]
    return _of_details(answer.get("details"))


def _of_details(details: Any) -> dict[str, int] | None:
    """Return the usage in the details of a text that a server of Hugging Face's has generated.

    It is None if a part is missing. A stream reports the length of the prompt; any other
    answer lists the tokens of the prompt, if the request wants that.
    """
    if not isinstance(details, Mapping) or type(details.get("generated_tokens")) is not int:
        return None
    prefill = details.get("prefill")
    prompt = details.get("input_length") or (len(prefill) if isinstance(prefill, list) else 0)
    if type(prompt) is not int or not prompt:
        return None
    return {"prompt_tokens": prompt, "completion_tokens": details["generated_tokens"]}


def model_in(answer: Mapping[str, Any]) -> Any:
    """Return the model that an answer names, or None."""
    return answer.get("modelVersion") if answer.get("model") is None else answer["model"]


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """Return integers with a given sum, in proportion to the weights within 1.

    Each is the difference of two rounded running sums, so that there is no remainder.
    """
    whole = sum(weights)
    result, before, reached = [], 0, 0
    for weight in weights:
        reached += weight
        after = total * reached // whole
        result.append(after - before)
        before = after
    return result


def _shared_out(value: Any, weights: Sequence[int]) -> list[Any]:
    """Return one part per weight: shares of integers, mappings of shares, and copies of other values."""
    if type(value) is int:
        return shares(value, weights)
    if isinstance(value, float):
        whole = sum(weights)
        return [value * weight / whole for weight in weights]
    if isinstance(value, Mapping):
        return _rows({name: _shared_out(item, weights) for name, item in value.items()}, len(weights))
    if _by_modality(value):
        return [list(row) for row in zip(*(_shared_out(item, weights) for item in value), strict=True)]
    return [value] * len(weights)


def _rows(columns: Mapping[str, list[Any]], number: int) -> list[dict[str, Any]]:
    return [{name: column[i] for name, column in columns.items()} for i in range(number)]


def split_usage(usage: Any, weights: Sequence[int], prompts: Sequence[int]) -> list[Any]:
    """Return the usage of each sample of a call; if it is not a mapping, each sample has the whole.

    Args:
        usage: the usage of the call.
        weights: the weight of each sample in the completion; not all are 0.
        prompts: the weight of each question in the prompt, above 0. Each question has
            the same number of samples, in order.
    """
    if not isinstance(usage, Mapping):
        return [usage] * len(weights)
    per = len(weights) // len(prompts)
    columns: dict[str, list[Any]] = {}
    for name, value in usage.items():
        if name.startswith(_OF_SAMPLE) or name in _COSTS:
            columns[name] = _shared_out(value, weights)
        elif name.startswith(OF_QUESTION):
            columns[name] = [part for part in _shared_out(value, prompts) for _ in range(per)]
        elif name in _TOTALS and isinstance(value, int):
            prompt = _of_question(usage, name)
            rest = shares(prompt, prompts)
            own = shares(value - prompt, weights)
            columns[name] = [rest[i // per] + share for i, share in enumerate(own)]
        else:
            columns[name] = [value] * len(weights)
    return _rows(columns, len(weights))


def join_usage(usages: Sequence[Usage], per: int) -> dict[str, Any]:
    """Return the usage of an answer: the prompt of each question once, and the completions of all samples.

    Args:
        usages: the usage of each sample.
        per: the number of samples of each question, in order.
    """
    joined = dict(usages[0])
    for number, usage in enumerate(usages[1:], start=1):
        first = number % per == 0
        for name, value in usage.items():
            if name.startswith(_OF_SAMPLE) or name in _COSTS or (first and name.startswith(OF_QUESTION)):
                joined[name] = _sum(joined.get(name), value)
            elif name in _TOTALS:
                prompt = 0 if first else _of_question(usage, name)
                joined[name] = _integer(joined.get(name)) + _integer(value) - prompt
    return joined


def _of_question(usage: Usage, total: str) -> int:
    """Return the part of a total that belongs to the question."""
    return sum(_integer(usage.get(name)) for name in _TOTALS[total])


def _by_modality(value: Any) -> bool:
    """Return True for a list of Gemini's counts, one for each modality."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and type(item.get("tokenCount")) is int for item in value)
    )


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {**other, **{name: _sum(value, other.get(name)) for name, value in one.items()}}
    if _by_modality(one) and _by_modality(other):
        sums = {item.get("modality"): dict(item) for item in one}
        for item in other:
            known = sums.setdefault(item.get("modality"), {**item, "tokenCount": 0})
            known["tokenCount"] += item["tokenCount"]
        return [*sums.values()]
    if _is_number(one) and _is_number(other):
        return one + other
    return other if one is None else one


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0


def token_counts(usage: Any) -> dict[str, int | None]:
    """Return the counts of any provider's usage under the same names; a missing one is None.

    Anthropic's ``input_tokens`` do not include what its cache read and wrote; ``prompt_tokens`` here does.
    Gemini's counts of the prompt and the candidates include neither the results of its tools nor thoughts;
    ``prompt_tokens`` and ``completion_tokens`` here do.
    """
    if type(usage) is not dict and not isinstance(usage, Mapping):
        return dict.fromkeys(COUNTS)
    if "promptTokenCount" in usage or "totalTokenCount" in usage:
        return _of_gemini(usage)
    prompt = _first((usage,), "prompt_tokens", "input_tokens")
    completion = _first((usage,), "completion_tokens", "output_tokens")
    cached = _first((usage,), "cache_read_input_tokens", "prompt_cache_hit_tokens")
    details = usage.get("completion_tokens_details"), usage.get("output_tokens_details")
    reasoning = _first(details, "reasoning_tokens", "thinking_tokens")
    if prompt is not None:
        prompt += _integer(usage.get("cache_read_input_tokens"))
        prompt += _integer(usage.get("cache_creation_input_tokens"))
    if cached is None:
        details = usage.get("prompt_tokens_details"), usage.get("input_tokens_details")
        cached = _first((*details, usage), "cached_tokens")  # Moonshot's is not in the details
    total = _first((usage,), "total_tokens")
    if total is None and (prompt is not None or completion is not None):
        total = (prompt or 0) + (completion or 0)
    return dict(zip(COUNTS, (prompt, completion, total, cached, reasoning), strict=True))


def _of_gemini(usage: Usage) -> dict[str, int | None]:
    """Return the counts of Gemini's usage, which leaves out those that are 0."""
    prompt = _of_question(usage, "totalTokenCount")
    thoughts = _integer(usage.get("thoughtsTokenCount"))
    completion = _integer(usage.get("candidatesTokenCount")) + thoughts
    total = usage.get("totalTokenCount")
    total = total if isinstance(total, int) else prompt + completion
    cached = _first((usage,), "cachedContentTokenCount")
    return dict(zip(COUNTS, (prompt, completion, total, cached, thoughts), strict=True))


def _first(parts: Sequence[Any], *names: str) -> int | None:
    """Return the first integer with one of these names in those parts of a usage that are mappings."""
    for part in parts:
        for name in names if type(part) is dict or isinstance(part, Mapping) else ():
            value = part.get(name)
            if isinstance(value, int):
                return value
    return None
