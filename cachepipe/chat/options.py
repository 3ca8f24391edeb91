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


class Options(AccessOptions, total=False):
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
        top_p: from how much of the probability they are drawn.
        max_tokens: the most tokens of an answer, by its old name.
        max_completion_tokens: the most tokens of an answer.
        stop: where an answer ends.
        seed: passed on; two draws stay independent.
        frequency_penalty: passed on.
        presence_penalty: passed on.
        logit_bias: passed on.
        reasoning_effort: passed on.
        verbosity: passed on.
        tool_choice: passed on.
        parallel_tool_calls: passed on.
        audio: passed on.
        modalities: passed on.
        prediction: passed on.
        web_search_options: passed on.
        extra_query: added to the URL.
        user: passed on, and not part of the question; this also holds for the following fields.
        service_tier: passed on.
        metadata: passed on.
        store: passed on.
        safety_identifier: passed on.
        prompt_cache_key: passed on.
        extra_body: further fields of the request's body.
        extra_headers: headers of this request.
        timeout: seconds after which a call is given up.
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


class _CrowdOptions(Options, total=False):
    n_parallel: int
    show_progress: bool


class ManyOptions(_CrowdOptions, total=False):
    """The options of functions that complete many conversations: those of `Options`, and the following.

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
