"""The settings of workers. They travel by value, so they hold no client, no key and no open store."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from cachepipe.adapting import has_batch, has_request
from cachepipe.errors import StoreError
from cachepipe.stores import default_folder
from cachepipe.stores.folders import expanded
from cachepipe.stores.remote import is_url, shown
from cachepipe.typedefs import Mode, Repeat

_FACTORY: Final = "a function without parameters, which each worker calls to make its own"


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """How each worker makes its pipeline, and the run that all of them belong to.

    Attributes:
        model: a function without parameters that returns the model; each worker calls it once. A key comes
            from the worker's environment, such as ``OPENAI_API_KEY``.
        cache: the URL of a server that all workers reach, or a folder if the cluster is one machine; None
            means the default cache. The URL has no password: it comes from the environment of the workers
            and of the driver.
        mode: ``"read-write"``, ``"replay"``, ``"refresh"`` or ``"bypass"``.
        scope: identifies the model in cache keys; default is the model's.
        repeat: ``"fresh"``: each id is a draw of its own; ``"same"``: equal questions share one draw.
        durability: ``"process"``, or ``"full"`` to survive a crash of the machine with the cache.
        wait_for_others: seconds to wait for a sample that another worker generates; None waits as long as
            that worker lives.
        service: a function without parameters that returns a `cachepipe.Service`, whose limits then hold in
            each worker; with ``shared=`` a folder, for all workers of a machine together.
        model_batch_size: the samples that a model on the worker's own hardware generates in one batch; None
            sends each request by itself.
        run: the name of the run, drawn at random; ``summary`` sums up the requests of this run.
    """

    model: Callable[[], Any]
    cache: str | os.PathLike[str] | None = field(default=None)
    mode: Mode = "read-write"
    scope: str | None = None
    repeat: Repeat = "fresh"
    durability: str = "process"
    wait_for_others: float | None = None
    service: Callable[[], Any] | None = None
    model_batch_size: int | None = None
    run: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        """Refuse what cannot travel to a worker, and name the cache as every worker does."""
        made = not isinstance(self.model, type) and (has_request(self.model) or has_batch(self.model))
        if made or not callable(self.model):
            raise TypeError(
                f"model is {_FACTORY}; got {self.model!r:.200}. Write model=lambda: OpenAIModel(…)"
            )
        if self.service is not None and not callable(self.service):
            raise TypeError(f"service is {_FACTORY}; got {self.service!r:.200}")
        object.__setattr__(self, "cache", _named(default_folder() if self.cache is None else self.cache))


def _named(cache: str | os.PathLike[str]) -> str:
    """Return the URL of a cache without a password, or its folder as an absolute path.

    Raises:
        StoreError: when the URL has a password.
    """
    if not isinstance(cache, str | os.PathLike):
        raise TypeError(
            f"cache is a URL or a folder, because an open store stays in its process; got {cache!r:.200}"
        )
    if not isinstance(cache, str) or not is_url(cache):
        return str(expanded(cache))
    place, _, options = cache.partition("://")[2].partition("?")
    if ":" in place.rpartition("@")[0] or options != shown(cache).partition("?")[2]:
        raise StoreError(
            f"the URL of the cache {shown(cache)} has a password, which Ray would store. Leave it out of "
            "the URL, and set CACHEPIPE_VALKEY_PASSWORD or PGPASSWORD in the environment of the workers and "
            "the driver, or name a file with password_file= or passfile="
        )
    return cache


def check_nodes(cache: str | os.PathLike[str] | None, nodes: int) -> None:
    """Refuse a folder as the cache of a cluster with several nodes: each node would have a cache of its own.

    Args:
        cache: the cache of the settings.
        nodes: the number of nodes that are alive.

    Raises:
        StoreError: when it is a folder, and there are several nodes.
    """
    if nodes > 1 and not is_url(str(cache)):
        raise StoreError(
            f"the cache {cache} is a folder of one machine, and this Ray cluster has {nodes} nodes. Use a "
            "cache on a server that all nodes reach: cache='postgresql://host/db' or cache='valkey://host:6379'"
        )
