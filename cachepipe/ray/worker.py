"""A worker: a pipeline whose draws are identified by their request ids alone, in every process."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Final

from cachepipe import runs
from cachepipe.batch.errors import Secrets, described
from cachepipe.contract.draws import Draw, Identity
from cachepipe.pipelines import LocalAPI, OnlineAPI, Pipeline
from cachepipe.ray.settings import RaySettings
from cachepipe.stores.sums import deliveries_of
from cachepipe.typedefs import Batch, Request, Response

_KEYS: Final = re.compile(r"_(API_KEY|TOKEN|PASSWORD|SECRET)$")
_URLS: Final = re.compile(r"_URL$")


class _ById(runs.Occurrences):
    """Gives every request the number 0: a worker cannot count what others ask, or tell a repetition."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def take(self, identity: Identity) -> int:  # noqa: ARG002 - the request id alone says which draw it is
        """Return 0."""
        return 0

    def give_back(self, draw: Draw) -> None:
        """Do nothing, because nothing is counted."""

    def first_time(self, what: str) -> bool:
        """Return True for the first warning about a subject; that workers share a draw is intended."""
        return what != "shared draw" and super().first_time(what)


class _SharedRun(runs.Run):
    """The part of a run that is in this process."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _made(self, store: str) -> runs.Occurrences:  # noqa: ARG002 - it has one store
        return _ById(self._name)


class Worker:
    """A pipeline in this process, which answers the requests of a run.

    Args:
        settings: the settings.
    """

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        self._run = _SharedRun(settings.run)
        self._secrets = _secrets()
        self.pipeline = _pipeline(settings)

    def __repr__(self) -> str:
        return f"<Worker {self.pipeline!r}>"

    async def answers(self, requests: Sequence[Request]) -> list[Response | str]:
        """Return the response of each request, or its error as ``code: message`` without credentials."""
        with runs.within(self._run):
            found: Sequence[Any] = await self.pipeline.batch_request(
                Batch(list(requests)), return_exceptions=True
            )
        return [self.error(one) if isinstance(one, BaseException) else one for one in found]

    def error(self, error: BaseException) -> str:
        """Return an error as ``code: message`` without credentials."""
        code, message, _ = described(error)
        hidden: str = self._secrets.hidden(f"{code}: {message}")
        return hidden

    async def write_sums(self) -> None:
        """Write the sums of what was delivered, which a killed worker would lose."""
        await deliveries_of(self.pipeline.store).write()


def check_id(settings: RaySettings, request_id: str | None, what: str) -> None:
    """Raise an error if nothing says which draw a request is.

    Args:
        settings: the settings.
        request_id: the id, or where it is found.
        what: what the caller writes to give one.

    Raises:
        ValueError: when there is no id, and equal requests do not share one draw.
    """
    if request_id is None and settings.repeat != "same":
        raise ValueError(
            f"without ids, workers cannot tell a repeated task from another one that asks the same. Write "
            f"{what}; or repeat='same' in the settings, to give equal questions the same samples"
        )


def _pipeline(settings: RaySettings) -> Pipeline:
    service = None if settings.service is None else settings.service()
    options: dict[str, Any] = {
        name: getattr(settings, name) for name in ("mode", "scope", "repeat", "durability", "wait_for_others")
    }
    options |= {"service": service, "ordered": False}  # rows do not depend on each other
    if settings.model_batch_size is None:
        return OnlineAPI(settings.model(), settings.cache, **options)
    return LocalAPI(settings.model(), settings.cache, settings.model_batch_size, **options)


def _secrets() -> Secrets:
    """Return the credentials in the environment, which no error may show."""
    environment = os.environ.items()
    return Secrets(
        [value for name, value in environment if _URLS.search(name)],
        [value for name, value in environment if _KEYS.search(name)],
    )
