"""Together as a model: OpenAI's protocol through Together's own SDK."""

from __future__ import annotations

from typing import Final

from cachepipe.models.connection import EagerConnection
from cachepipe.models.openai import OpenAIModel

_VERSIONED: Final = "/v1"


class TogetherModel(OpenAIModel):
    """A model behind Together's API, for chat, completions and embeddings.

    It takes what `OpenAIModel` takes. The ``client`` is a ``together.AsyncTogether``, ``base_url`` is the
    API's address as that client takes it (default is ``TOGETHER_BASE_URL``, then Together), and ``api_key``
    is ``TOGETHER_API_KEY`` by default; without a key there are replays only. Errors are those of the together
    package, version 2 or later.
    """

    _connect = (EagerConnection, "together", "AsyncTogether")

    def _path(self, endpoint: str) -> str:
        """Return an endpoint as the SDK writes it: since version 3 it is not in the base URL."""
        import together  # noqa: PLC0415 - the connection has imported it

        path = super()._path(endpoint)
        path = path.removeprefix(_VERSIONED) if path.startswith(f"{_VERSIONED}/") else path
        return path if int(together.__version__.partition(".")[0]) < 3 else _VERSIONED + path
