"""Together as a model: OpenAI's protocol through Together's own SDK."""

from __future__ import annotations

from typing import Any, Final

from cachepipe.models.openai import CHAT_COMPLETIONS, EagerConnection, OpenAIModel

_VERSIONED: Final = "/v1"


class _Connection(EagerConnection):
    package = "together"
    client_name = "AsyncTogether"


class TogetherModel(OpenAIModel):
    """A model behind Together's API, for chat, completions and embeddings.

    It takes what `OpenAIModel` takes. Errors are those of the together package, version 2 or later.

    Args:
        model: the name of the model, for requests that have no field of that name.
        client: a ``together.AsyncTogether`` (or a subclass) to use; it stays the caller's to close.
        base_url: where the API is, as the SDK's client takes it; default is ``TOGETHER_BASE_URL``, then
            Together.
        api_key: default is ``TOGETHER_API_KEY``; without one there are replays only.
        timeout: seconds for one attempt of a call; default is the SDK's.
        max_retries: how often the SDK repeats a failed call; default is the SDK's.
        endpoint: where plain requests go.
        max_n: the most samples that the server gives in one call.
        raw: whether ``Response.data`` holds samples as they are stored, or else their text, an
            embedding's vector.
    """

    _connection_class = _Connection

    def __init__(
        self,
        model: str | None = None,
        *,
        client: Any = None,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        endpoint: str = CHAT_COMPLETIONS,
        max_n: int | None = None,
        raw: bool = False,
    ) -> None:
        super().__init__(
            model,
            client=client,
            base_url=base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            endpoint=endpoint,
            max_n=max_n,
            raw=raw,
        )

    def _path(self, endpoint: str) -> str:
        """Return an endpoint as the SDK writes it: since version 3 it is not in the base URL."""
        import together  # noqa: PLC0415 - it is at hand by now

        path = super()._path(endpoint)
        path = path.removeprefix(_VERSIONED) if path.startswith(f"{_VERSIONED}/") else path
        return path if int(together.__version__.partition(".")[0]) < 3 else _VERSIONED + path
