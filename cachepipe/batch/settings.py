"""The settings of a run, which `run_file` and the command line share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

from cachepipe.bounds import check_n
from cachepipe.flow.budget import Budget
from cachepipe.prices import Prices
from cachepipe.typedefs import Mode, Repeat, check_replicate

if TYPE_CHECKING:
    from cachepipe.batch.report import Report


def _do_nothing() -> None:
    """Do nothing."""


class Stop:
    """Stops a run early. Call its methods on the run's event loop, for example in a signal handler."""

    def __init__(self) -> None:
        self.asked = self.forced = False
        self.heard: Callable[[], None] = _do_nothing

    def soon(self) -> None:
        """Begin no new requests, and wait for those in flight."""
        self.asked = True
        self.heard()

    def now(self) -> None:
        """Stop without waiting for anything."""
        self.forced = True
        self.soon()

    def listen(self, heard: Callable[[], None] = _do_nothing) -> None:
        """Call a function whenever the run is asked to stop; by default none."""
        self.heard = heard


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """The settings of a run of a batch file."""

    model: Annotated[str | None, "Default model for lines without a model."] = None
    base_url: Annotated[
        str | None,
        "The base URL of the API, such as http://localhost:8000/v1, or the name of a known provider, such as "
        "openrouter.  [default: OpenAI's]",
    ] = None
    api_key: Annotated[
        str | None, "The API key; an empty one for a server that needs none. Replays need no key."
    ] = None
    client: Annotated[Any, "An openai.AsyncOpenAI to use instead of a new client."] = None
    timeout: Annotated[float | None, "Seconds for each attempt of a call."] = None
    max_retries: Annotated[int | None, "The number of retries of a failed call.  [default: 2]"] = None
    max_n: Annotated[int | None, "The largest number of samples that the server returns in one call."] = None
    n: Annotated[int, "Samples per request."] = 1
    temperature: Annotated[float | None, "Default for lines without a temperature."] = None
    max_tokens: Annotated[int | None, "Default for lines without a limit."] = None
    max_completion_tokens: Annotated[
        int | None, "The same by its newer name, for models that require it."
    ] = None
    seed: Annotated[int | None, "Default for lines without a seed."] = None
    cache: Annotated[
        Any, "A folder, a URL, a diskcache.Cache, a store, a list of layers, or None for the default folder."
    ] = field(default=None, repr=False)  # a URL may have credentials
    namespace: Annotated[str | None, "The experiment; samples are independent within it."] = None
    replicate: Annotated[
        str | int | None,
        "The repetition of the experiment that this run is; each repetition has samples of its own.",
    ] = None
    replicates: Annotated[
        int | None, "Run each line once per replicate, in the replicates 0, 1, 2 … of this number."
    ] = None
    mode: Annotated[Mode, "How the cache is used.  [default: read-write]"] = "read-write"
    scope: Annotated[
        str | None,
        "Use the samples of another endpoint: a scope that `cachepipe ls` shows, a base URL, or any name.",
    ] = None
    repeat: Annotated[Repeat, "Give equal questions of different lines fresh samples, or the same ones."] = (
        "fresh"
    )
    ids: Annotated[
        bool,
        "Identify a line also by its id: a line with a new id gets fresh samples. By default, a line is "
        "identified by its question and by the number of earlier lines with the same question.",
    ] = False
    durability: Annotated[str, "'process' or 'full', if the run opens the cache."] = "process"
    max_cost: Annotated[
        float | None,
        "The US dollars that the namespace may spend in this cache, over all runs. A call that may cost more "
        "than what is left is not made.",
    ] = None
    prices: Annotated[Prices | None, "Prices of tokens that come before the table of genai-prices."] = None
    concurrency: Annotated[int, "Requests in flight."] = 16
    limit: Annotated[int | None, "Run only this many requests, from the first."] = None
    progress: Annotated[
        Callable[["Report"], None] | None,
        "Called with the report when the input has been checked, and whenever a line has ended.",
    ] = None
    why: Annotated[
        Callable[[int, str, str], None] | None,
        "Called for each question that lacks samples with the number of its line, its key, and why.",
    ] = None
    stop: Annotated[Stop, "Stops the run early."] = field(default_factory=Stop)
    grace: Annotated[float, "Seconds that requests in flight have after the run is asked to stop."] = 60.0

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        check_n(self.n)
        check_replicate(self.replicate)
        if self.concurrency < 1 or self.n < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError("concurrency, n and limit are whole numbers, at least 1")
        self._check_replicates()
        if self.max_cost is not None:
            Budget(self.max_cost)

    @property
    def budget(self) -> Budget | None:
        """The budget of the run, if it has one."""
        return None if self.max_cost is None else Budget(self.max_cost, prices=self.prices)

    def _check_replicates(self) -> None:
        """Refuse a number of replicates that cannot be run."""
        count = self.replicates
        if count is None:
            return
        if type(count) is not int or count < 1:
            raise ValueError(f"replicates must be a whole number, at least 1; got {count!r}")
        if self.replicate is not None:
            raise ValueError("replicate names one replicate, and replicates is their number; give only one")
        if self.repeat == "same" and count > 1:
            raise ValueError(
                "with repeat='same', equal questions get the same samples in all replicates; "
                "leave out repeat or replicates"
            )

    @property
    def each_replicate(self) -> Sequence[str | int | None]:
        """The replicates in which each line is run."""
        return (self.replicate,) if self.replicates is None else range(self.replicates)


HELP: Final[Mapping[str, str]] = {
    name: annotation.__metadata__[0] for name, annotation in BatchSettings.__annotations__.items()
}
"""The description of each setting, for help texts."""

_ATTRIBUTES = "\n".join(f"        {name}: {text}" for name, text in HELP.items())
BatchSettings.__doc__ = f"{BatchSettings.__doc__}\n\n    Attributes:\n{_ATTRIBUTES}\n    "
