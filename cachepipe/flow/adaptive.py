"""What the answers of a provider teach about how fast it may be asked. Pure: it is told the time.

Three things are learned, of each model by itself.

*How many calls at once.* Concurrency begins at a few and grows by half of itself per round of answers until
something is refused; a refusal or an overload halves it, and from then on it grows by one per round
(additive increase, multiplicative decrease, as in TCP: Jacobson 1988). What the learned rate needs at
the latency seen (Little's law) may be under way in any case. Where more calls at once bring no more
answers in a time, as when this machine or the provider has its hands full, it grows no further.

*How fast.* At the moment of a refusal the provider's allowance is used up. So between two such moments
it let through what it grants: that number over that time is its rate, burst or no burst. Calls are then
paced a little below it, creep up by one hundredth of it per second's worth of answers, and the faster
the longer nothing is refused, so that a limit that was raised is found.

*How much is left*, where the provider says so in its headers: what it said remains, less what was sent
since, plus what it said will be back by when.

A call that fails alone, as one that a provider cannot digest, is no overload: a share of them is. One refusal
teaches once: calls that were under way already when the lesson was learned teach nothing more.
"""

from __future__ import annotations

import math

from cachepipe.flow.headers import Hint

_FIRST = 16.0  # calls at once before anything is known
_STEP = 0.5  # how much concurrency grows with each answer at first
_RISE = 1.25  # growth of concurrency after which it is looked at whether that has helped
_GAIN = 1.1  # of the answers in a time that such a growth brings at least, where it helps
_ENOUGH = 32  # answers by which that can be told
_FEW = 5  # answers between two refusals from which a rate can be told
_LONG = 1.0  # seconds between two refusals in which a provider may have granted more than was used
_LESS = 0.85  # of the pace before, after a longer time
_BELOW = 0.97  # of the learned rate
_CREEP = 0.01  # of the learned rate, per second's worth of answers
_SEEK = 0.4  # growth per round of answers, while too few of them have told the rate
_ROUND = 0.1  # seconds of the shortest such round
_SOON = 60.0  # second's worth of answers after which the rate has been doubled, and soon more
_CLUMP = 0.2  # seconds of pace that may be caught up with at once: timers and loops are late
_SLACK = 1.5  # calls under way for each that the learned rate needs
_SLOWEST = 0.1  # calls per second
_NOTABLE = 0.15  # share of calls that fail from which it is an overload, not a single bad call
_SMOOTH = 0.2  # weight of a new latency in the mean
_SMOOTH_FAILING = 0.1  # weight of a new outcome in the share of failures


class Budget:
    """What is left of a provider's own quota, by what its last answer said."""

    def __init__(self) -> None:
        self.spent = 0.0
        self._hint: Hint | None = None
        self._at = self._sent = 0.0
        self._spent_then = 0.0

    @property
    def told(self) -> bool:
        """Whether anything is known of what is left."""
        return self._hint is not None

    def learn(self, hint: Hint, spent_then: float, sent: float, now: float) -> None:
        """Take what an answer said; that of a call sent earlier than the one before is stale.

        Args:
            hint: what it said.
            spent_then: `spent` just after its call was let go: what came later it may not have counted.
            sent: when its call was let go.
            now: the time.
        """
        if self._hint is not None and sent < self._sent and now < self._at + self._hint.reset:
            return
        self._hint, self._at, self._sent, self._spent_then = hint, now, sent, spent_then

    def wait(self, amount: float, now: float) -> float:
        """Return in how many seconds so much may be spent, as far as is known."""
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
        most: calls at once at most.
        learns: whether refusals change anything but a pause; without it only Retry-After and headers do.
    """

    def __init__(self, most: float = math.inf, *, learns: bool = True) -> None:
        self.most = most
        self.learns = learns
        self.concurrency = min(most, _FIRST) if learns else most
        self.requests, self.tokens = Budget(), Budget()
        self.paused_until = -math.inf
        self._threshold = math.inf  # below it, concurrency grows with each answer
        self._rate: float | None = None
        self._factor = _BELOW
        self._seeks = False  # whether the rate is still to be found
        self._next = -math.inf  # when the next call is due at this pace
        self._lesson = -math.inf  # when something was last learned from a refusal
        self._mark: float | None = None  # since when answers are counted
        self._answers = 0
        self._latency = 0.0
        self._failing = 0.0  # share of the latest calls that failed for overload
        self._looked, self._looked_at = -math.inf, self.concurrency  # when concurrency was looked at last
        self._speed, self._round = 0.0, 0  # answers per second before that, and answers since

    @property
    def pace(self) -> float | None:
        """Calls per second, or None while nothing is known."""
        return None if self._rate is None else self._rate * self._factor

    @property
    def room(self) -> float:
        """How many calls may be under way: no fewer than the learned rate needs at the latency seen."""
        pace = self.pace
        needed = 1.0 if pace is None else _SLACK * pace * self._latency
        return min(self.most, max(1.0, self.concurrency, needed))

    def wait(self, in_flight: int, now: float) -> float:
        """Return 0 when a call may be made now, else in how many seconds it is worth asking again."""
        if in_flight + 1 > self.room + 1e-9:
            return math.inf
        wait = max(0.0, self.paused_until - now)
        pace = self.pace
        if pace is not None:
            wait = max(wait, self._next - now)
        return wait

    def sent(self, tokens: float, now: float) -> None:
        """Learn that a call was let go."""
        if self._mark is None:
            self._mark = self._looked = now
        self.requests.spent += 1
        self.tokens.spent += tokens
        pace = self.pace
        if pace is not None:
            self._next = max(self._next, now - _CLUMP) + 1 / pace

    def unsent(self, tokens: float) -> None:
        """Learn that a call that was let go was not made."""
        self.requests.spent -= 1
        self.tokens.spent -= tokens

    def answered(self, sent: float, in_flight: int, now: float) -> None:
        """Learn that a call was answered.

        Args:
            sent: when it was let go.
            in_flight: how many calls are under way, this one included.
            now: the time.
        """
        self._answers += 1
        self._round += 1
        self._failing -= _SMOOTH_FAILING * self._failing
        self._latency += (1.0 if not self._latency else _SMOOTH) * (now - sent - self._latency)
        if not self.learns:
            return
        if in_flight >= self.concurrency / 2:  # else more would not have been used
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
        """Go back to the concurrency of the last look if more has not brought more answers in a time."""
        if self._round < max(2 * self._looked_at, _ENOUGH) or self.concurrency < _RISE * self._looked_at:
            return
        speed = self._round / max(now - self._looked, 1e-9)
        if speed < _GAIN * self._speed:
            self.concurrency = self._threshold = max(1.0, self._looked_at)
        self._begin_round(now, speed)

    def _begin_round(self, now: float, speed: float) -> None:
        self._looked, self._looked_at, self._speed, self._round = now, self.concurrency, speed, 0

    def refused(self, sent: float, retry_after: float | None, now: float) -> None:
        """Learn that a call was refused for coming too fast."""
        if retry_after is not None:
            self.paused_until = max(self.paused_until, now + retry_after)
        if not self.learns or sent <= self._lesson:
            return
        elapsed = now - (sent if self._mark is None else self._mark)
        seen = self._answers / elapsed if elapsed > 0 else math.inf
        before = self.pace
        if before is None:  # a burst may have been let through
            self._rate = min(max(seen, 1 / max(elapsed, 1e-4)), 1e4) / 2
        elif elapsed > _LONG:  # some of the allowance may have gone unused
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
        """Learn that a call failed because the provider has too much to do, or cannot be reached."""
        if retry_after is not None:
            self.paused_until = max(self.paused_until, now + retry_after)
        self._failing += _SMOOTH_FAILING * (1 - self._failing)
        if self.learns and sent > self._lesson and self._failing > _NOTABLE:
            if self._rate is not None:
                self._rate = max(self._rate * self._factor / 2, _SLOWEST)
                self._factor, self._seeks = 1.0, True
            self._lower(now)

    def _lower(self, now: float) -> None:
        self.concurrency = self._threshold = max(1.0, self.concurrency / 2)
        self._lesson = now
        self._mark, self._answers = now, 0
        self._begin_round(now, 0.0)
