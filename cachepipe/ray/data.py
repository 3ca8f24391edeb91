"""A stage for Ray Data: asks for each row of a dataset, and adds the samples to the row."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from cachepipe import jsontext
from cachepipe.batch.files import Ids
from cachepipe.ray.cluster import check_cluster, pa, ray
from cachepipe.ray.rows import OUTPUT, Rows, written
from cachepipe.ray.settings import RaySettings
from cachepipe.ray.worker import Worker, check_id
from cachepipe.typedefs import Request, Response

if TYPE_CHECKING:
    from ray.data import Dataset


class Stage:
    """Asks for the rows of batches.

    Pass the class to ``Dataset.map_batches``, with ``batch_format="pyarrow"``. It adds the columns
    ``completions``, ``cached`` and ``duplicated``, lists with an item per sample, and ``error``. If a row
    fails, ``error`` is ``code: message``, and the other three are null. A sample that is neither a text nor a
    vector is written as JSON text.

    Args:
        settings: how the worker makes its pipeline.
        rows: what a row asks.
    """

    def __init__(self, settings: RaySettings, rows: Rows) -> None:
        check_id(settings, rows.id, "Rows(id='column')")
        check_cluster(settings)
        self._rows = rows
        self._worker = Worker(settings)

    async def __call__(self, batch: Any) -> AsyncIterator[Any]:
        """Yield the batch with the added columns, an Arrow table.

        Raises:
            TypeError: when the batch is not an Arrow table.
            ValueError: when a column is missing, or one of the added columns exists.
        """
        if not isinstance(batch, pa.Table):
            raise TypeError(
                f"a batch is an Arrow table; got a {type(batch).__name__}. Write batch_format='pyarrow'"
            )
        answers = await self._answers(self._read(batch))
        await self._worker.write_sums()
        yield _with_answers(batch, self._rows.prefix, answers)

    def _read(self, batch: Any) -> list[dict[str, Any]]:
        """Return the rows with the columns that are needed."""
        names = batch.column_names
        missing = [name for name in self._rows.columns() if name not in names]
        if missing:
            raise ValueError(f"the dataset has no column {missing[0]!r}; it has {', '.join(names)}")
        added = [f"{self._rows.prefix}{name}" for name in OUTPUT]
        taken = [name for name in added if name in names]
        if taken:
            raise ValueError(
                f"the dataset has a column {taken[0]!r} already; drop it, or choose Rows(prefix=…)"
            )
        rows: list[dict[str, Any]] = batch.select(self._rows.columns()).to_pylist()
        return rows

    async def _answers(self, rows: Sequence[dict[str, Any]]) -> list[Response | str]:
        """Return the response of each row, or its error."""
        answers: list[Response | str] = [""] * len(rows)
        requests: dict[int, Request] = {}
        for place, row in enumerate(rows):
            try:
                requests[place] = self._rows.request(row)
            except (TypeError, ValueError) as error:
                answers[place] = f"bad_request: {error}"
        for place, answer in zip(requests, await self._worker.answers([*requests.values()]), strict=True):
            answers[place] = answer
        return answers


def _with_answers(batch: Any, prefix: str, answers: Sequence[Response | str]) -> Any:
    """Return a batch with the columns of the answers.

    Where no row has samples, their columns are of the type null, which goes with every other type.
    """
    found = [None if isinstance(answer, str) else answer for answer in answers]
    cells = [None if answer is None else [written(sample) for sample in answer.data] for answer in found]
    flags = pa.list_(pa.bool_()) if any(found) else pa.null()
    columns = (
        _samples(cells),
        pa.array([answer and answer.cached for answer in found], flags),
        pa.array([answer and answer.duplicated for answer in found], flags),
        pa.array([answer if isinstance(answer, str) else None for answer in answers], pa.string()),
    )
    for name, column in zip(OUTPUT, columns, strict=True):
        batch = batch.append_column(f"{prefix}{name}", column)
    return batch


def _samples(cells: Sequence[list[str | list[float]] | None]) -> Any:
    """Return the column of the samples: lists of vectors if all are vectors, else lists of texts."""
    kinds = {type(sample) for sample in chain.from_iterable(filter(None, cells))}
    if not kinds:
        return pa.nulls(len(cells))
    if kinds == {list}:
        return pa.array(cells, pa.list_(pa.list_(pa.float64())))
    texts = [
        cell and [sample if isinstance(sample, str) else jsontext.dumps(sample).decode() for sample in cell]
        for cell in cells
    ]
    return pa.array(texts, pa.list_(pa.string()))


def ask(
    dataset: Dataset,
    settings: RaySettings,
    rows: Rows,
    *,
    workers: int = 2,
    batch_size: int = 16,
    duplicates: Literal["error", "same"] = "error",
    **options: Any,
) -> Dataset:
    """Return a dataset with the samples of each row; see `Stage` for the columns that it adds.

    Like every transformation of Ray Data, it asks when the returned dataset is read. If it is read again, the
    samples come from the cache.

    Args:
        dataset: the dataset.
        settings: how each worker makes its pipeline.
        rows: what a row asks.
        workers: how many workers ask. Ray Data gives each of them 4 batches at a time.
        batch_size: rows in a batch.
        duplicates: ``"error"`` reads the column of ids first, and refuses ids that occur twice. With
            ``"same"``, rows with equal ids and questions get the same samples.
        options: further arguments of ``Dataset.map_batches``, such as ``num_cpus`` and ``runtime_env``.

    Raises:
        StoreError: when the cache is a folder, and the cluster has several nodes.
        ValueError: when an id occurs twice, or there are no ids and equal questions do not share a draw.
    """
    if duplicates not in ("error", "same"):
        raise ValueError(f"duplicates is 'error' or 'same'; got {duplicates!r}")
    check_id(settings, rows.id, "Rows(id='column')")
    check_cluster(settings)
    if rows.id is not None and duplicates == "error":
        _check_ids(dataset, rows.id)
    answers: Dataset = dataset.map_batches(
        Stage,
        **{
            "fn_constructor_args": (settings, rows),
            "batch_format": "pyarrow",
            "batch_size": batch_size,
            "compute": ray.data.ActorPoolStrategy(size=workers),
            **options,
        },
    )
    return answers


def _check_ids(dataset: Dataset, column: str) -> None:
    """Raise an error if an id occurs twice; memory is bounded."""
    ids, place = Ids(), 0
    for batch in dataset.select_columns([column]).iter_batches(batch_format="pyarrow", batch_size=4096):
        for value in batch.column(column).to_pylist():
            place += 1
            earlier = None if value is None else ids.add(str(value), place)
            if earlier is not None:
                raise ValueError(
                    f"rows {earlier} and {place} have the same id {value!r:.80} in the column {column!r}, so "
                    "they would get the same samples. Give each row an id of its own, or write "
                    "duplicates='same' if that is meant"
                )
