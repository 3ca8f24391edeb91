"""A model server on the loopback interface that speaks OpenAI's protocol, Anthropic's messages and Gemini's.

The n-gram model of `cachepipe.testing.ngram` answers; it is random and has a known distribution.
Settings add latency, rate limits and the faults of real providers. The server counts what it
serves, so a test can check what a cache has saved.

    async with MockServer(Settings(latency=0.05)) as server:
        client = AsyncOpenAI(base_url=server.base_url, api_key="any")

The modules, top to bottom:

- `mock`: the server that tests use, and `run_server`.
- `connection`, `traffic`: HTTP through h11, and the open connections. Only these wait for time to pass.
- `responder`: which answer, error or fault a request gets. `faults`: how a fault changes an answer.
- `dialects`: the endpoints. `chat`, `completions`, `responses`, `messages`, `embeddings`, `gemini`: the
  requests and answers of each. `calls`, `answers`, `tools`, `schemas`, `refusals`: what they share.
- `settings`, `stats`: how the server behaves, and what it counts.

The server imports nothing of cachepipe outside `cachepipe.testing`, so that it judges independently how
`cachepipe.wire` reads and writes the same protocols.

The steps of a request are: key, rate limit, fault, validation, sampling, latency, writing. So
samples are drawn in the order of arrival, and a server with a seed answers the same sequence of requests
with the same sequence of samples, whatever the latency.

Over HTTP: ``GET`` and ``POST /mock/settings`` (a JSON object of `Settings` to change), ``GET
/mock/stats``, ``POST /mock/reset``. For one request alone, headers override the settings: x-mock-latency,
x-mock-latency-per-token, x-mock-stream-delay, and x-mock-fault with a fault in any form that
`Fault.parse` takes, or ``none``.

The server accepts and ignores parameters that the model does not use (penalties, `top_k`, `logit_bias`
…). The name of the model only changes the seed, unless `any_model` is false.
"""

from __future__ import annotations

from cachepipe.testing.server.mock import MockServer, run_server
from cachepipe.testing.server.settings import FAULTS, Fault, Settings
from cachepipe.testing.server.stats import LogEntry, MockStats

__all__ = ["FAULTS", "Fault", "LogEntry", "MockServer", "MockStats", "Settings", "run_server"]
