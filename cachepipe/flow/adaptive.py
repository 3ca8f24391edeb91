"""What the answers of a provider teach about how fast it may be called. Pure: the time is passed in.

Three things are learned of each model.

*The number of calls at once.* Concurrency starts small and grows by half per round of answers until a call is
refused. A refusal or an overload halves it, and from then on it grows by one per round (additive increase,
multiplicative decrease, as in TCP: Jacobson 1988). At least as many calls may be in flight as the learned
rate needs at the measured latency (Little's law). Concurrency stops growing when more calls at once bring no
more answers per second, because this machine or the provider is fully used.

*The rate.* At the moment of a refusal, the provider's allowance is used up. So between two such moments, the
provider let through exactly what it grants: that number of answers, divided by the time, is its rate, with or
without bursts. Calls are then paced slightly below it. The pace rises by one hundredth of the rate per
second's worth of answers, and faster the longer nothing is refused, so that a limit that was raised is found.

*What is left* of a quota, if the provider's headers say so: what remained, less what was sent since, plus
what comes back until the quota is whole.

A call that fails alone, such as one that the provider cannot process, is not an overload; a certain share of
failures is. A refusal teaches once: calls that were already in flight when something was learned teach
nothing more.
"""

from __future__ import annotations

import math

from cachepipe.flow.headers import Hint

_FIRST = 16.0  # calls at once before anything is known
_STEP = 0.5  # growth of concurrency per answer at first
_RISE = 1.25  # growth of concurrency after which its effect is measured
_GAIN = 1.1  # growth of answers per second that shows that more concurrency helps
_ENOUGH = 32  # answers that such a measurement needs
_FEW = 5  # answers between two refusals that are enough to compute a rate
_LONG = 1.0  # seconds between two refusals after which part of the allowance may have gone unused
_LESS = 0.85  # of the pace before, after a longer time
_BELOW = 0.97  # of the learned rate
_CREEP = 0.01  # of the learned rate, per second's worth of answers
_SEEK = 0.4  # growth per round of answers, while there were too few answers to compute the rate
_ROUND = 0.1  # seconds of the shortest such round
_SOON = 60.0  # seconds' worth of answers after which the rate has doubled; then it grows faster
_CLUMP = 0.2  # seconds of the pace that may be caught up at once, because timers and loops are late
_SLACK = 1.5  # calls in flight for each one that the learned rate needs
_SLOWEST = 0.1  # calls per second
_NOTABLE = 0.15  # share of failures from which on the provider is overloaded
_SMOOTH = 0.2  # weight of a new latency in the mean
_SMOOTH_FAILING = 0.1  # weight of a new outcome in the share of failures


class Budget:
    """What is left of a provider's own quota, according to its latest answer."""

    def __init__(self) -> None:
        self.spent = 0.0
        self._hint: Hint | None = None
        self._at = self._sent = 0.0
        self._spent_then = 0.0

    def learn(self, hint: Hint, spent_then: float, sent: float, now: float) -> None:
        """Learn from an answer, unless its call was sent before that of the latest answer.

        Args:
            hint: what the answer says.
            spent_then: `spent` just after its call was let go. The answer may not count what came later.
            sent: the time at which its call was let go.
            now: the time.
        """
        if self._hint is not None and sent < self._sent and now < self._at + self._hint.reset:
            return
        self._hint, self._at, self._sent, self._spent_then = hint, now, sent, spent_then

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until an amount may be spent, as far as is known."""
        hint = self._hint
        if hint is None:
            return 0.0
        passed = now - self._at
        if passed >= hint.reset:
            self._hint = None
            return 0.0
        if hint.limit is not None:
            amount = min(amount, hint.limit)
        missing = amount - (hint.remaining - (self.spent - self._spent_then))
        if missing <= 0:
            return 0.0
        if hint.limit is None or hint.limit <= hint.remaining:
            return hint.reset - passed
        back = (hint.limit - hint.remaining) / hint.reset  # units per second
        return min(hint.reset, missing / back) - passed if missing / back > passed else 0.0


class Adaptive:
    """What is known of one model.

    Args:
        most: the largest number of calls at once.
        learns: whether refusals and overloads slow calls down. Otherwise only Retry-After and headers do.
    """

    def __init__(self, most: float = math.inf, *, learns: bool = True) -> None:
        self.most = most
        self.learns = learns
        self.concurrency = min(most, _FIRST) if learns else most
        self.requests, self.tokens = Budget(), Budget()
        self.paused_until = -math.inf
        self._threshold = math.inf  # below it, concurrency grows by a fixed step per answer
        self._rate: float | None = None
        self._factor = _BELOW
        self._seeks = False  # whether the rate is still unknown
        self._next = -math.inf  # the time of the next call at this pace
        self._lesson = -math.inf  # the time of the latest lesson from a refusal
        self._mark: float | None = None  # the time from which answers are counted
        self._answers = 0
        self._latency = 0.0
        self._failing = 0.0  # share of the latest calls that failed because of an overload
        self._looked, self._looked_at = (
            -math.inf,
            self.concurrency,
        )  # the latest measurement: time, concurrency
        self._speed, self._round = 0.0, 0  # answers per second before it, and answers since

    @property
    def pace(self) -> float | None:
        """Calls per second, or None while nothing is known."""
        return None if self._rate is None else self._rate * self._factor

    @property
    def room(self) -> float:
        """How many calls may be in flight: at least what the learned rate needs at the measured latency."""
        pace = self.pace
        needed = 1.0 if pace is None else _SLACK * pace * self._latency
        return min(self.most, max(1.0, self.concurrency, needed))

    def wait(self, in_flight: int, now: float, tokens: float = 0.0) -> float:
        """Return 0 if a call may be made now, else the seconds after which to ask again."""
        if in_flight + 1 > self.room + 1e-9:
            return math.inf
        paced = 0.0 if self._rate is None else self._next - now
        return max(
            0.0, self.paused_until - now, paced, self.requests.wait(1, now), self.tokens.wait(tokens, now)
        )

    def sent(self, tokens: float, now: float) -> tuple[float, float]:
        """Learn that a call was let go; return the requests and tokens that are spent now."""
        if self._mark is None:
            self._mark = self._looked = now
        self.requests.spent += 1
        self.tokens.spent += tokens
        pace = self.pace
        if pace is not None:
            self._next = max(self._next, now - _CLUMP) + 1 / pace
        return self.requests.spent, self.tokens.spent

    def unsent(self, tokens: float) -> None:
        """Learn that a call that was let go was not made."""
        self.requests.spent -= 1
        self.tokens.spent -= tokens

    def learn_hint(self, hint: Hint, spent: tuple[float, float], sent: float, now: float) -> None:
        """Learn what an answer says about a quota.

        Args:
            hint: what it says.
            spent: what `sent` has returned for its call.
            sent: the time at which its call was let go.
            now: the time.
        """
        if hint.kind == "requests":
            self.requests.learn(hint, spent[0], sent, now)
        else:
            self.tokens.learn(hint, spent[1], sent, now)

    def answered(self, sent: float, in_flight: int, now: float) -> None:
        """Learn that a call was answered.

        Args:
            sent: the time at which it was let go.
            in_flight: the number of calls in flight, with this one.
            now: the time.
        """
        self._answers += 1
        self._round += 1
        self._failing -= _SMOOTH_FAILING * self._failing
        self._latency += (1.0 if not self._latency else _SMOOTH) * (now - sent - self._latency)
        if not self.learns:
            return
        if in_flight >= self.concurrency / 2:  # otherwise more would not be used
            step = _STEP if self.concurrency < self._threshold else 1.0 / self.concurrency
            self.concurrency = min(self.most, self.concurrency + step)
            self._look(now)
        if self._rate is not None:
            if self._seeks:
                self._factor *= 1 + _SEEK / max(1.0, self._rate * self._factor * max(self._latency, _ROUND))
            else:
                seconds = self._answers / self._rate
                self._factor = _BELOW + _CREEP * seconds + (seconds / _SOON) ** 3

    def _look(self, now: float) -> None:
        """Return to the last measured concurrency if more calls have not brought more answers per second."""
        if self._round < max(2 * self._looked_at, _ENOUGH) or self.concurrency < _RISE * self._looked_at:
            return
        speed = self._round / max(now - self._looked, 1e-9)
        if speed < _GAIN * self._speed:
            self.concurrency = self._threshold = max(1.0, self._looked_at)
        self._begin_round(now, speed)

    def _begin_round(self, now: float, speed: float) -> None:
        self._looked, self._looked_at, self._speed, self._round = now, self.concurrency, speed, 0

    def refused(self, sent: float, retry_after: float | None, now: float) -> None:
        """Learn that a call was refused because too many came."""
        self._pause(retry_after, now)
        if not self.learns or sent <= self._lesson:
            return
        elapsed = now - (sent if self._mark is None else self._mark)
        seen = self._answers / elapsed if elapsed > 0 else math.inf
        before = self.pace
        if before is None:  # the provider may have let a burst through
            self._rate = min(max(seen, 1 / max(elapsed, 1e-4)), 1e4) / 2
        elif elapsed > _LONG:  # part of the allowance may have gone unused
            self._rate = max(seen, before * _LESS)
        elif self._answers >= _FEW:
            self._rate = min(seen, before)
        else:
            self._rate = before / 2
        self._seeks = before is None or self._answers < _FEW
        self._rate = max(self._rate, _SLOWEST)
        self._factor = _BELOW
        self._next = now
        self._lower(now)

    def overloaded(self, sent: float, retry_after: float | None, now: float) -> None:
        """Learn that a call failed because the provider is overloaded or cannot be reached."""
        self._pause(retry_after, now)
        self._failing += _SMOOTH_FAILING * (1 - self._failing)
        if self.learns and sent > self._lesson and self._failing > _NOTABLE:
            if self._rate is not None:
                self._rate = max(self._rate * self._factor / 2, _SLOWEST)
                self._factor, self._seeks = 1.0, True
            self._lower(now)

    def _pause(self, seconds: float | None, now: float) -> None:
        if seconds is not None:
            self.paused_until = max(self.paused_until, now + seconds)

    def _lower(self, now: float) -> None:
        self.concurrency = self._threshold = max(1.0, self.concurrency / 2)
        self._lesson = now
        self._mark, self._answers = now, 0
        self._begin_round(now, 0.0)
