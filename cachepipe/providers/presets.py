"""The providers that cachepipe knows, one row each: where they are, who holds their key, how they differ.

Clients, services, the proxy and the command line read this table. A provider that speaks OpenAI's protocol
needs no more than a row here; ``python tests/stubs.py`` then writes it into the stub and the documentation.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Final, NamedTuple

NO_KEY: Final = "none-needed"
"""What is sent as the API key to a server that needs none; the SDKs insist on sending one."""
_OLLAMA_PORT: Final = 11434


class Preset(NamedTuple):
    """A provider.

    Attributes:
        name: the name of its clients and its service; in lower case, that of the command line.
        url: its base URL, for clients of OpenAI's SDK.
        key: the environment variable with the API key.
        needs_key: whether calls without a key fail.
        max_n: the largest ``n`` that it honours in one call, if it is smaller than OpenAI's. Some providers
            refuse a larger one, others ignore it.
        model: the default model of sessions.
        sdk: the SDK of its clients.
        prefix: the end of `url` that its own SDK writes into its paths.
        chat: what follows `url` where it speaks OpenAI's protocol, if its own SDK speaks another.
        host: the environment variable with the host of a server on this machine, as Ollama has it.
    """

    name: str
    url: str
    key: str
    needs_key: bool = True
    max_n: int | None = None
    model: str | None = None
    sdk: str = "openai"
    prefix: str = ""
    chat: str = ""
    host: str | None = None

    @property
    def variable(self) -> str:
        """The environment variable with another base URL."""
        return f"{self.key.removesuffix('_API_KEY').removesuffix('_TOKEN')}_BASE_URL"

    @property
    def base_url(self) -> str:
        """The base URL: that of the environment if it names one, without a trailing slash."""
        host = os.environ.get(self.host) if self.host else None
        if host:
            return ollama_url(host)
        return (os.environ.get(self.variable) or self.url).rstrip("/")

    @property
    def api_key(self) -> str | None:
        """The API key in the environment, or None."""
        return os.environ.get(self.key, "").strip() or None

    def found_key(self, *, needed: bool = True) -> str:
        """Return the API key in the environment, or `NO_KEY` if calls need none.

        Args:
            needed: whether calls are made at all.

        Raises:
            ValueError: when there is no key, and one is needed.
        """
        key = self.api_key
        if key is None and needed and self.needs_key:
            raise ValueError(
                f"{self.name} needs a key: set the environment variable {self.key}, or pass api_key="
            )
        return key or NO_KEY

    @property
    def protocol(self) -> str:
        """The protocol that it speaks, by its SDK: ``"openai"``, ``"anthropic"`` or ``"google"``."""
        return self.sdk if self.sdk in {"anthropic", "google"} else "openai"


_ROWS: Final = (
    Preset("OpenAI", "https://api.openai.com/v1", "OPENAI_API_KEY", model="gpt-4-1106-preview"),
    Preset("Anthropic", "https://api.anthropic.com/v1", "ANTHROPIC_API_KEY", sdk="anthropic", prefix="/v1"),
    Preset(
        "Gemini",
        "https://generativelanguage.googleapis.com",
        "GEMINI_API_KEY",
        max_n=8,
        sdk="google",
        chat="/v1beta/openai",
    ),
    Preset("Together", "https://api.together.xyz/v1", "TOGETHER_API_KEY", sdk="together", prefix="/v1"),
    Preset(
        "Groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY", max_n=1, sdk="groq", prefix="/openai/v1"
    ),
    Preset("HuggingFace", "https://router.huggingface.co/v1", "HF_TOKEN", sdk="huggingface"),
    Preset(
        "OpenRouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", model="openai/gpt-4-1106-preview"
    ),
    Preset("Cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY", max_n=1),
    Preset("DeepInfra", "https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    Preset("DeepSeek", "https://api.deepseek.com", "DEEPSEEK_API_KEY", max_n=1),
    Preset("Fireworks", "https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
    Preset("Mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    Preset("Moonshot", "https://api.moonshot.ai/v1", "MOONSHOT_API_KEY", max_n=5),
    Preset("NVIDIA", "https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY"),
    Preset("Perplexity", "https://api.perplexity.ai", "PERPLEXITY_API_KEY", max_n=1),
    Preset("SambaNova", "https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
    Preset("XAI", "https://api.x.ai/v1", "XAI_API_KEY"),
    # On this machine, unless a variable names another.
    Preset("LMStudio", "http://localhost:1234/v1", "LMSTUDIO_API_KEY", needs_key=False, max_n=1),
    Preset(
        "Ollama", "http://localhost:11434/v1", "OLLAMA_API_KEY", needs_key=False, max_n=1, host="OLLAMA_HOST"
    ),
    Preset("SGLang", "http://localhost:30000/v1", "SGLANG_API_KEY", needs_key=False),
    Preset("VLLM", "http://localhost:8000/v1", "VLLM_API_KEY", needs_key=False),
)

PRESETS: Final[dict[str, Preset]] = {row.name: row for row in _ROWS}
"""The table, by name."""


def compatible() -> Mapping[str, Preset]:
    """Return the rows of providers that OpenAI's clients work for, by the names of their clients."""
    rows = [row for row in PRESETS.values() if row.sdk == "openai" and row.name != "OpenAI"]
    return {f"{prefix}{row.name}": row for row in rows for prefix in ("", "Async")}


def of_sdk(sdk: str) -> Preset | None:
    """Return the provider that has an SDK of its own; None for OpenAI's, which others use too."""
    return next((row for row in PRESETS.values() if row.sdk == sdk != "openai"), None)


def named(name: str) -> Preset | None:
    """Return the provider with this name, or None. Case does not matter."""
    wanted = name.lower()
    return next((row for row in PRESETS.values() if row.name.lower() == wanted), None)


def located(text: str) -> str:
    """Return the base URL of a provider that is given by its name; a URL unchanged.

    Raises:
        ValueError: when it is neither a URL nor a name.
    """
    preset = named(text)
    if preset is not None:
        return preset.base_url
    if "/" not in text and ":" not in text:
        known = ", ".join(sorted(name.lower() for name in PRESETS))
        raise ValueError(
            f"expected a base URL such as http://localhost:8000/v1, or one of {known}; got {text!r}"
        )
    return text


@functools.lru_cache(maxsize=256)
def at(scope: str) -> Preset | None:
    """Return the provider of an endpoint, by its URL in a normal form; None if it is unknown."""
    return next((row for row in PRESETS.values() if f"{scope}/".startswith(f"{row.url}/")), None)


def ollama_url(host: str, secret: str | None = None) -> str:
    """Return the base URL of an Ollama server.

    Args:
        host: as in ``OLLAMA_HOST``: a host, ``host:port``, or a URL.
        secret: the credentials of a gateway in front of it, as ``user:key``; it speaks HTTPS.
    """
    scheme, separator, place = host.rpartition("://")
    place = place.rstrip("/").removesuffix("/v1")
    if not separator:
        scheme = "http" if secret is None else "https"
        if secret is None and ":" not in place:
            place = f"{place}:{_OLLAMA_PORT}"
    if secret is not None and "@" not in place:
        place = f"{secret}@{place}"
    return f"{scheme}://{place}/v1"
