"""The proxy: an HTTP server that answers from the cache, and asks the provider for what the cache lacks.

Any tool in any language can use it as its base URL. It shares keys and samples with the library, the clients
and the command line (`cachepipe.wire` and `cachepipe.providers.exchange`), so a sample that one of them
stored is a hit on every other. `cachepipe serve` runs it; it needs ``pip install 'cachepipe[proxy]'``.
"""

from importlib import import_module

for _needed in ("aiohttp", "httptools", "httpx2", "prometheus_client", "uvicorn"):
    try:
        import_module(_needed)
    except ImportError as error:  # pragma: no cover - they are in the extra
        message = f"the proxy needs {error.name}: pip install 'cachepipe[proxy]'"
        raise ImportError(message, name=error.name) from error
