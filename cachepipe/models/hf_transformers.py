"""Clients of models of Hugging Face ``transformers`` on this machine.

``client = HFTransformers("Qwen/Qwen3-0.6B", cache="caches/exp", namespace="run-1", batch_size=8)``
"""

from __future__ import annotations

from typing import Any, Final

from cachepipe.models.local import AsyncLocalClient, LocalCalls, LocalClient
from cachepipe.models.transformers import TransformersModel

_OF_PIPELINES: Final = frozenset(
    {"mode", "scope", "repeat", "window", "classes", "durability", "wait_for_others", "ordered", "service"}
    | {"budget", "hash", "in_flight", "allow_batch_overflow", "correctness"}
)


def _parted(model: Any, given: dict[str, Any]) -> tuple[TransformersModel, dict[str, Any]]:
    """Return the adapter, and the options of the pipeline."""
    options = {name: given.pop(name) for name in _OF_PIPELINES & given.keys()}
    return TransformersModel(model, raw=True, **given), options


class _OfTransformers(LocalCalls):
    """A client of a model of ``transformers``; see `AsyncHFTransformers`."""

    def __init__(
        self,
        model_name: Any,
        tokenizer: Any = None,
        *,
        cache: Any = None,
        namespace: str | None = None,
        batch_size: int = 1,
        timeout: float = 0.0,
        replicate: str | int | None = None,
        **options: Any,
    ) -> None:
        model, options = _parted(model_name, {**options, "tokenizer": tokenizer})
        super().__init__(
            model,
            cache,
            namespace=namespace,
            batch_size=batch_size,
            timeout=timeout,
            replicate=replicate,
            **options,
        )


class AsyncHFTransformers(_OfTransformers, AsyncLocalClient):
    """A client of a model of ``transformers``, for programs with an event loop; see `AsyncLocalClient`.

    Args:
        model_name: the name or folder to load the model from, or a model.
        tokenizer: its tokenizer; default is that of the same name.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        namespace: the unit within which samples are independent, in practice one experiment.
        batch_size: the largest number of samples that are generated together.
        timeout: seconds that a batch stays open for more after its first request.
        replicate: which of several independent repetitions of the experiment the calls belong to.
        options: other parameters of `LocalAPI` (``mode``, ``scope``, ``repeat``, ``ordered`` …) and of
            `TransformersModel` (``name``, ``max_new_tokens``, ``device_map`` …).
    """


class HFTransformers(_OfTransformers, LocalClient):
    """A client of a model of ``transformers``, for programs without an event loop; see `LocalClient`.

    The parameters are those of `AsyncHFTransformers`.
    """
