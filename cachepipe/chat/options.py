"""The options of completions, chats and sessions, for type checkers and for ``help()``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypedDict

import pydantic

from cachepipe.services import Service
from cachepipe.typedefs import Mode, Repeat


class AccessOptions(TypedDict, total=False):
    """The options for the client and the cache.

    Attributes:
        cache: a folder, a store, or a ``diskcache.Cache``; else ``CACHEPIPE_DIR``, else the default folder.
        namespace: the unit within which samples are independent; else ``CACHEPIPE_NAMESPACE``.
        request_id: which draw this is among equal questions of the namespace.
        replicate: which of several independent repetitions of the experiment this belongs to.
        mode: ``"read-write"``, ``"replay"`` (which needs no key), ``"refresh"`` or ``"bypass"``.
        repeat: ``"fresh"``: a repeated request gets a fresh sample; ``"same"``: it gets the same again.
        service: makes the client, and limits and retries its calls.
        client: a client to use, with or without a cache. An object that is not an SDK's client, but has an
            asynchronous ``chat.completions.create``, is used unchanged.
        api_key: the key; else ``OPENAI_API_KEY``.
        base_url: the base URL of the API; else ``OPENAI_BASE_URL``. If neither URL nor key is found,
            ``OLLAMA_HOST``.
    """

    cache: Any
    namespace: str | None
    request_id: str | None
    replicate: str | int | None
    mode: Mode | None
    repeat: Repeat | None
    service: Service | None
    client: Any
    api_key: str | None
    base_url: str | None


NAMES: Final = tuple(AccessOptions.__annotations__)
"""The options for the client and the cache; all others become fields of the request."""


class CompletionOptions(AccessOptions, total=False):
    """The options of every function here, in addition to those of `AccessOptions`.

    All other parameters of the SDK's ``chat.completions.create`` are accepted too.

    Attributes:
        model: the model; else ``CACHEPIPE_MODEL`` of the environment, else `DEFAULT_MODEL`.
        log_probs: whether to get the log probabilities of the tokens.
        top_log_probs: how many of the most probable tokens to get at each position, at most 20.
        response_format: a pydantic class for ``completion.parsed``, or a mapping as the provider takes it.
        tools: Python functions that the model may call, or mappings as the provider takes them. The calls are
            in the completion's ``tool_calls``; `Chat` makes them.
        temperature: how much the samples vary.
        top_p: the share of the probability from which samples are drawn.
        max_tokens: the older name of ``max_completion_tokens``.
        max_completion_tokens: the largest number of tokens in an answer.
        stop: a text, or several, before which an answer ends.
        seed: passed to the provider; two draws stay independent.
        frequency_penalty: passed to the provider.
        presence_penalty: passed to the provider.
        logit_bias: passed to the provider.
        reasoning_effort: passed to the provider.
        verbosity: passed to the provider.
        tool_choice: passed to the provider.
        parallel_tool_calls: passed to the provider.
        audio: passed to the provider.
        modalities: passed to the provider.
        prediction: passed to the provider.
        web_search_options: passed to the provider.
        extra_query: added to the URL.
        user: passed to the provider, and not part of the question, like the following fields.
        service_tier: passed to the provider.
        metadata: passed to the provider.
        store: passed to the provider.
        safety_identifier: passed to the provider.
        prompt_cache_key: passed to the provider.
        extra_body: further fields of the request's body.
        extra_headers: headers of this request.
        timeout: seconds after which a call fails.
    """

    model: str | None
    log_probs: bool
    top_log_probs: int | None
    response_format: type[pydantic.BaseModel] | Mapping[str, Any] | None
    tools: Sequence[Callable[..., Any] | Mapping[str, Any]] | None
    temperature: float
    top_p: float
    max_tokens: int
    max_completion_tokens: int
    stop: str | Sequence[str]
    seed: int
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[str, int]
    reasoning_effort: str
    verbosity: str
    tool_choice: Any
    parallel_tool_calls: bool
    audio: Any
    modalities: Sequence[str]
    prediction: Any
    web_search_options: Any
    extra_query: Mapping[str, Any]
    user: str
    service_tier: str
    metadata: Mapping[str, str]
    store: bool
    safety_identifier: str
    prompt_cache_key: str
    extra_body: Mapping[str, Any]
    extra_headers: Mapping[str, str]
    timeout: float


class _CrowdOptions(CompletionOptions, total=False):
    n_parallel: int
    show_progress: bool


class ManyOptions(_CrowdOptions, total=False):
    """The options of functions that complete many conversations: `CompletionOptions`, and these.

    Attributes:
        n_parallel: the number of concurrent requests; 5 by default.
        show_progress: show a progress bar, in terminals and notebooks; True by default.
        return_exceptions: return errors in the places of completions; False by default: they are raised
            together when all have ended.
    """

    return_exceptions: bool


class StrictOptions(_CrowdOptions, total=False):
    """`ManyOptions` with which failures are raised, so that all results are completions."""

    return_exceptions: Literal[False]
