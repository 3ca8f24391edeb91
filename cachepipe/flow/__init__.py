"""Flow control: how fast an endpoint is called, by whom first, and what is tried again."""

from cachepipe.flow.clock import Clock
from cachepipe.flow.limits import FlowStats, Limits, Quota
from cachepipe.flow.retries import Retries
from cachepipe.flow.stages import AsyncLimiter, AsyncRetrier
from cachepipe.flow.tokens import Estimator

__all__ = ["AsyncLimiter", "AsyncRetrier", "Clock", "Estimator", "FlowStats", "Limits", "Quota", "Retries"]
