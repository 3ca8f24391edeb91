"""The proxy: an HTTP server that answers from the cache what it can, and asks the provider for the rest.

Any tool in any language uses it by its base URL. It shares keys and samples with the library, the clients
and the command line (`cachepipe.wire` and `cachepipe.clients.exchange`), so what one of them stored is a hit
on every other. `cachepipe serve` runs it; it needs ``pip install 'cachepipe[proxy]'``.
"""
