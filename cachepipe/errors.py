"""The errors and warnings. Each message is a sentence: what was expected, what arrived, what to do.

Errors of a model's own adapter are never wrapped: they reach the caller as the adapter raised them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final, NamedTuple


class CachepipeError(Exception):
    """The base of every error that cachepipe itself raises."""


class CacheMiss(CachepipeError):  # noqa: N818 - the field calls it a miss
    """Replay mode met a request whose samples are not all in the cache.

    Attributes:
        key: the key of the question.
        namespace: the namespace of the request.
        request: the request, or None if there is no request object.
        why: what the cache holds instead, and what differs; part of a sentence.
        nearest: the key of the stored question that differs least; None if the question itself is stored,
            or none is similar.
    """

    def __init__(
        self,
        key: str,
        namespace: str | None,
        request: Any = None,
        why: str = "",
        nearest: str | None = None,
    ) -> None:
        self.key = key
        self.namespace = namespace
        self.request = request
        self.why = why
        self.nearest = nearest
        super().__init__(key, namespace, request, why, nearest)

    @property
    def reason(self) -> str:
        """The key and namespace without an answer, and the reason, without the request."""
        reason = f": {self.why}" if self.why else ""
        return f"replay found no complete answer for key {self.key} in namespace {self.namespace!r}{reason}"

    def __str__(self) -> str:
        shown = repr(self.request)
        shown = shown if len(shown) <= 300 else shown[:297] + "..."
        return (
            f"{self.reason}. The request was {shown}. "
            "Run it once with mode='read-write' to generate the missing samples."
        )


class BudgetExceeded(CachepipeError):  # noqa: N818 - names the state
    """A call was not made, because it might cost more than what is left of its namespace's budget.

    Everything paid is stored: the same program goes on from there with a larger budget.

    Attributes:
        namespace: the namespace.
        budget: the budget in US dollars.
        spent: what the namespace has spent.
        needed: what the call may cost at most.
    """

    def __init__(self, namespace: str | None, budget: float, spent: float, needed: float) -> None:
        self.namespace = namespace
        self.budget = budget
        self.spent = spent
        self.needed = needed
        super().__init__(namespace, budget, spent, needed)

    def __str__(self) -> str:
        return (
            f"the budget of ${self.budget:g} of the namespace {self.namespace!r} allows no such call: "
            f"${self.spent:.6f} is spent, and the call may cost ${self.needed:.6f}. No call was made, and "
            "everything paid is stored. Raise the budget, or lower max_tokens, and run it again to go on"
        )


class UnknownCost(CachepipeError):  # noqa: N818 - names what is wrong
    """A call was not made, because a budget is set and the largest cost of the call is unknown."""


class UnkeyableValue(CachepipeError, TypeError):  # noqa: N818 - names the value, as TypeError does
    """A request has a value from which no stable key can be made (NaN, a set, an unknown class …)."""


class TooManySamples(CachepipeError, ValueError):  # noqa: N818 - names what is wrong
    """A request asks for more samples than allowed; nothing was allocated or sent for it."""


class BadAnswer(CachepipeError, ValueError):  # noqa: N818 - names the thing at fault
    """A model returned something that is not a valid answer; it is not cached."""


class ShortAnswer(BadAnswer):
    """A model kept returning fewer samples than were asked for."""


class BatchMismatch(BadAnswer):
    """A model returned a different number of responses than requests."""


class StageClosed(CachepipeError):  # noqa: N818 - names the state
    """A request was made to a stage or pipeline after it was closed."""


class StoreError(CachepipeError):
    """A store could not carry out an operation."""


class NoCache(StoreError):  # noqa: N818 - names the state
    """There is no cache to read at a place."""


class StoreUnavailable(StoreError):  # noqa: N818 - names the state
    """A store has not answered for too long: nothing is wrong with the operations."""


class StoreLocked(StoreUnavailable):
    """Another process has held the store's lock for too long."""


class StoreUnreachable(StoreUnavailable):
    """The server of a shared store has not answered for too long.

    Attributes:
        kept: whether the samples that it did not take are kept on this machine until it answers.
    """

    kept: bool = False


class FormatError(StoreError):
    """A cache has a format that this version does not know."""


class DamagedCache(StoreError):  # noqa: N818 - names the thing at fault
    """What was read from a cache is not what was written there, or a part of the cache is missing."""


class BundleError(StoreError):
    """A file is not a bundle that cachepipe has written, or is damaged."""


class SecretsFound(StoreError):  # noqa: N818 - names what was found
    """What is to be exported holds what looks like a credential or a private address.

    Attributes:
        findings: where, and of which kind; never the texts themselves.
        count: how many there are, those not named included.
    """

    def __init__(self, findings: Sequence[Finding], count: int) -> None:
        self.findings = findings
        self.count = count
        super().__init__(findings, count)

    def __str__(self) -> str:
        shown = "; ".join(map(str, self.findings[:5]))
        more = f"; and {self.count - 5:,} more" if self.count > 5 else ""
        return (
            f"nothing was exported: {self.count:,} texts look like credentials or private addresses: {shown}"
            f"{more}. Look at each with `cachepipe show KEY`. Leave its namespace out, discard the sample, "
            "or export it all the same with --allow-secrets"
        )


class Finding(NamedTuple):
    """Where a text looks like something that should not be handed on.

    Attributes:
        kind: what it looks like.
        key: the key of the question.
        where: ``"question"``, ``"draw"``, or the index of the sample.
    """

    kind: str
    key: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.key[:16]}/{self.where}"


class ImportRefused(StoreError):  # noqa: N818 - names what happened
    """A bundle or another cache contradicts a cache; nothing was changed.

    Attributes:
        conflicts: what contradicts, as sentences; at most a few.
        count: how many there are.
    """

    def __init__(self, conflicts: Sequence[str], count: int, advice: str) -> None:
        self.conflicts = conflicts
        self.count = count
        self.advice = advice
        super().__init__(conflicts, count, advice)

    def __str__(self) -> str:
        shown = "; ".join(self.conflicts[:3])
        more = f"; and {self.count - 3:,} more" if self.count > 3 else ""
        return f"nothing was changed, because the two contradict each other: {shown}{more}. {self.advice}"


class UnsafeRow(StoreError):  # noqa: N818 - names the thing at fault
    """A row of the cache is in a form that cachepipe never writes and will not load, such as a pickle."""


class NotStorable(CachepipeError, TypeError):  # noqa: N818 - names the value
    """A sample has a value that cannot be stored safely."""


class CachepipeWarning(UserWarning):
    """The base of every warning that cachepipe gives."""


_NOT_CALLERS: Final = frozenset(
    {"anthropic", "anyio", "asyncio", "cachepipe", "concurrent", "contextlib", "contextvars", "diskcache"}
    | {"functools", "groq", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "openai"}
    | {"threading", "together", "uvloop"}
)
"""The packages between the user's code and a warning."""


def warn(message: str, category: type[CachepipeWarning]) -> None:
    """Give a warning that points at the line of the user's code that caused it."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - as `warnings` does itself
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_CALLERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class LayerIgnored(CachepipeWarning):
    """A lower layer of a cache contradicts the ones above it for a question, and is not used for it."""


class SharedDraw(CachepipeWarning):
    """Two live processes made the same draw, and so share its samples."""


class WaitingForOthers(CachepipeWarning):
    """A request has waited long for a sample that another live process generates."""


class NotStored(CachepipeWarning):
    """A sample was delivered but not stored; the message says why."""


class EvictionDisabled(CachepipeWarning):
    """A diskcache.Cache came with an eviction policy, now switched off: it would delete paid samples."""


class LostSamples(CachepipeWarning):
    """The machine stopped before samples were on its disk; they are generated again."""


class ReadOnlyStore(CachepipeWarning):
    """A cache folder cannot be written: it serves hits, but new samples are not stored."""


class RepeatedCell(CachepipeWarning):
    """A cell of a notebook was run again, without the extension, and so pays again for its questions."""


class SharedReplicates(CachepipeWarning):
    """Namespaces of a run that differ only in digits have drawn the same samples."""


class FreshIds(CachepipeWarning):
    """Most draws of a run have new request ids on questions that their namespace has drawn before."""


class NoLocalCopy(CachepipeWarning):
    """A shared store is used without a copy on this machine, so known draws take round trips."""


class RiskyServer(CachepipeWarning):
    """The server of a shared store may lose samples; the message says when, and what to set."""


class FailedOver(CachepipeWarning):
    """A server of a shared store has lost its last writes, or may have; the message says what was done."""
