"""Experiments: clients and pipelines in one block share a namespace, a cache, a mode and a budget.

    with cachepipe.experiment("run-1", cache="caches/mine", budget=5) as exp:
        client = OpenAI()
        ...
    exp.summary()

The block sets what ``cachepipe.using`` sets, and where clients and pipelines find their cache and budget.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from cachepipe import context, listings, markup, runs, sharing
from cachepipe.accounting import Account
from cachepipe.context import INHERITED, Inherited
from cachepipe.contract.draws import Draw, label, namespace_of
from cachepipe.contract.entries import Entry, EntrySample, EntrySegment
from cachepipe.differences import loaded
from cachepipe.flow.budget import Budget
from cachepipe.frames import Library, data_frame
from cachepipe.prices import Prices
from cachepipe.stores import cache_for, open_store
from cachepipe.stores.base import Sample
from cachepipe.stores.bundles.reader import is_bundle
from cachepipe.stores.sums import statements, write_all
from cachepipe.typedefs import MODES, Mode, check_replicate

if TYPE_CHECKING:
    from types import TracebackType

    from cachepipe.stores.bundles.manifest import Manifest

COLUMNS: Final = (
    "prompt",
    "answer",
    "model",
    "request_id",
    "replicate",
    "occurrence",
    "position",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "generated_at",
    "scope",
    "key",
    "sample",
)
"""The columns of the results."""

_SUMS: Final = ("spent", "billed", "saved", "wasted")
_HEAD: Final = ("", "samples", "prompt tokens", "completion tokens", "US dollars")


@dataclass(frozen=True)
class Summary:
    """What an experiment holds and has cost. It prints as a table, and notebooks show it as one.

    Attributes:
        name: the name of the experiment.
        questions: the number of different questions.
        draws: the number of requests that have drawn samples.
        samples: the number of samples that they drew.
        replicates: the number of replicates.
        budget: its budget in US dollars, or None.
        sums: by name (``drawn``, ``spent``, ``billed``, ``saved``, ``wasted``), the samples, tokens and
            ``cost`` in US dollars, or None where no price is known. A bundle has only ``drawn``: what its
            samples have cost.
    """

    name: str
    questions: int
    draws: int
    samples: int
    replicates: int
    budget: float | None
    sums: Mapping[str, Mapping[str, Any]]

    def _facts(self) -> list[tuple[str, Any]]:
        facts = [("experiment", self.name)]
        facts += [
            (name, f"{getattr(self, name):,}") for name in ("questions", "draws", "samples", "replicates")
        ]
        return facts if self.budget is None else [*facts, ("budget", f"${self.budget:,.6g}")]

    def _rows(self) -> list[tuple[Any, ...]]:
        names = ("samples", "prompt_tokens", "completion_tokens", "cost")
        return [(name, *(sums[each] for each in names)) for name, sums in self.sums.items()]

    def __str__(self) -> str:
        lines = [[name, *map(_cell, cells)] for name, *cells in self._rows()]
        table = [_HEAD, *lines]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        shown = [
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        facts = [f"{name:<10}  {value}" for name, value in self._facts()]
        return "\n".join([*facts, "", *shown])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return markup.table(self._facts()) + markup.table(self._rows(), _HEAD)


def _cell(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.6f}" if isinstance(value, float) else f"{value:,}"


class Experiment:
    """An experiment: a namespace of a cache, and a block for what is asked in it; see `experiment`.

    It can be entered with ``with`` and with ``async with``, one time after another. Each block is a run of
    its own, so that the same block again replays.

    Attributes:
        name: the namespace.
        cache: the cache that clients and pipelines get.
        budget: the budget, or None.
    """

    def __init__(
        self,
        name: str,
        *,
        cache: Any = None,
        mode: Mode | Inherited = INHERITED,
        budget: Any = None,
        replicate: str | int | Inherited | None = INHERITED,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"an experiment's name must be a string; got {name!r}. Write str(...)")
        if not isinstance(mode, Inherited) and mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}; got {mode!r}")
        if not isinstance(replicate, Inherited):
            check_replicate(replicate)
        self.name = name
        self.cache = cache_for(cache)
        self.budget = None if budget is None else Budget.of(budget)
        self._settings = context.Using(
            name,
            mode=mode,
            replicate=replicate,
            cache=self.cache,
            budget=INHERITED if self.budget is None else self.budget,
        )
        self._open: contextlib.ExitStack | None = None

    def __repr__(self) -> str:
        return f"<Experiment {self.name!r}{' open' if self._open is not None else ''}>"

    def __enter__(self) -> Self:
        if self._open is not None:
            raise RuntimeError(f"the block of {self!r} has begun already; make another experiment")
        with contextlib.ExitStack() as stack:
            stack.enter_context(context.within(self._settings))
            stack.enter_context(runs.run())
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            opened, self._open = self._open, None
            opened.__exit__(kind, error, trace)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def summary(self) -> Summary:
        """Return what the experiment holds and has cost so far, over all of its runs.

        Raises:
            StoreError: when the cache cannot be read.
        """
        prices = Prices() if self.budget is None else self.budget.prices
        drawn, draws, questions, samples = Account(), set[Draw](), 0, 0
        for entry in self._entries():
            questions += 1
            draws.update(entry.draws)
            samples += sum(len(_positions(segments)) for segments in entry.draws.values())
            headers = [sample.header for sample in entry.samples if sample.discarded is None]
            drawn.add_all(headers, entry.scope or "")
        accounts = {"drawn": drawn, **self._statement()}
        return Summary(
            self.name,
            questions,
            len(draws),
            samples,
            len({draw.replicate for draw in draws}),
            None if self.budget is None else self.budget.limit(self.name),
            {name: account.as_dict(prices.cost_of_sum) for name, account in accounts.items()},
        )

    def _statement(self) -> dict[str, Account]:
        """Return the sums of the namespace. A bundle has no sums, as its samples were bought elsewhere."""
        first = self.cache[0] if isinstance(self.cache, list | tuple) else self.cache
        if isinstance(first, str | os.PathLike) and is_bundle(first):
            return {}
        write_all()
        store, owned = open_store(first, read_only=True)
        try:
            found = statements(store).get(label(self.name))
        finally:
            if owned:
                store.close()
        accounts = {} if found is None else found.accounts()
        return {name: accounts.get(name, Account()) for name in _SUMS}

    def results(self, library: Library | None = None) -> Any:
        """Return the samples that the experiment has drawn as a data frame, one row each, in their order.

        ``position`` is the place of a sample among those of its request, ``generated_at`` is in seconds since
        1970, and ``answer`` is the text of a provider's answer, else the sample itself. `rows` returns the
        same without a data frame.

        Args:
            library: ``"pandas"`` or ``"polars"``; None uses the first one that is installed.

        Raises:
            ImportError: when neither is installed.
            StoreError: when the cache cannot be read.
        """
        return data_frame(self.rows(), COLUMNS, library)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of `results` as mappings."""
        found = [
            (segments[0].stamp, position, _row(entry, draw, position, samples[name]))
            for entry in self._entries()
            for samples in ({sample.id: sample for sample in entry.samples},)
            for draw, segments in entry.draws.items()
            for position, name in _positions(segments).items()
            if name in samples
        ]
        return [row for *_, row in sorted(found, key=lambda each: each[:2])]

    def export(
        self, path: str | os.PathLike[str], *, allow_secrets: bool = False, overwrite: bool = False
    ) -> Manifest:
        """Write what replays the experiment into a bundle; see `cachepipe.export`.

        Args:
            path: the file, by convention with the ending ``.cachepipe``.
            allow_secrets: whether texts that look like credentials or private addresses are exported.
            overwrite: whether a file with other content is replaced.

        Raises:
            SecretsFound: when a text looks like a credential or a private address; then no file is written.
            StoreError: when the cache cannot be read, or the experiment has drawn nothing.
        """
        return sharing.export(
            self.cache, path, namespaces=[self.name], allow_secrets=allow_secrets, overwrite=overwrite
        )

    def _entries(self) -> Iterator[Entry]:
        return sharing.slices(self.cache, [self.name])


def _positions(segments: list[EntrySegment]) -> dict[int, str]:
    """Return the ids of a draw's samples by position; later segments override earlier ones."""
    found = {
        position: name
        for segment in segments
        for position, name in enumerate(segment.samples, segment.position)
        if name is not None
    }
    return dict(sorted(found.items()))


def _row(entry: Entry, draw: Draw, position: int, sample: EntrySample) -> dict[str, Any]:
    document = loaded(entry.document)
    told = listings.sample_fields(Sample(sample.index, sample.id, sample.payload, sample.header), entry.scope)
    summary = told["summary"] or {}
    stamp = told["meta"].get("stamp")
    return {
        "prompt": listings.prompt_in(document),
        "answer": summary.get("text", told["value"]),
        "model": summary.get("model") or listings.model_in(document),
        "request_id": draw.request_id or None,
        "replicate": namespace_of(draw.replicate),
        "occurrence": draw.occurrence,
        "position": position,
        **{name: summary.get(name) for name in ("finish_reason", "prompt_tokens", "completion_tokens")},
        "generated_at": stamp / 1e6 if isinstance(stamp, int) else None,
        "scope": entry.scope,
        "key": entry.key,
        "sample": sample.id,
    }


def experiment(
    name: str,
    *,
    cache: Any = None,
    mode: Mode | Inherited = INHERITED,
    budget: Any = None,
    replicate: str | int | Inherited | None = INHERITED,
) -> Experiment:
    """Return an experiment: a block in which clients and pipelines share a namespace and more.

    Clients and pipelines that are made in the block without ``cache=`` or ``budget=`` take those of the
    experiment. Calls of all clients in the block, and requests of pipelines that name no namespace or
    replicate, belong to the experiment. The block follows tasks and threads as ``cachepipe.using`` does.

    Args:
        name: the namespace.
        cache: a folder, a URL, a bundle, a store, a list of these, or None for the default folder.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``; default is what each client and
            pipeline says.
        budget: the US dollars that the experiment may spend in this cache, over all runs, or a
            ``cachepipe.Budget``.
        replicate: which of several independent repetitions it is; default is what each client and request
            says.
    """
    return Experiment(name, cache=cache, mode=mode, budget=budget, replicate=replicate)
