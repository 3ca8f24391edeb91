"""Flow control: how fast an endpoint is called, which call goes first, and which are repeated."""

from cachepipe.flow.budget import Budget
from cachepipe.flow.calls import FlowStats
from cachepipe.flow.clock import Clock
from cachepipe.flow.limiter import AsyncLimiter
from cachepipe.flow.limits import Limits
from cachepipe.flow.retrier import AsyncRetrier
from cachepipe.flow.retries import Retries
from cachepipe.flow.tokens import Estimator
from cachepipe.flow.windows import Quota

__all__ = [
    "AsyncLimiter",
    "AsyncRetrier",
    "Budget",
    "Clock",
    "Estimator",
    "FlowStats",
    "Limits",
    "Quota",
    "Retries",
]
