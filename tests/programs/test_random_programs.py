"""C11 on programs that Hypothesis makes: tasks, gathers, races with losers, shared memos, pools and locks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from programs import grammar
from programs.harness import LATENCIES, Setting, difference, play, reruns

from cachepipe import MemoryStore


@settings(deadline=None)
@given(
    tasks=grammar.PROGRAMS,
    seed=st.integers(0, 1000),
    latency=st.sampled_from(sorted(LATENCIES)),
    failures=st.sampled_from([0, 0, 0.2]),
    rerun=st.sampled_from(sorted(reruns(Setting()))),
)
def test_c11_a_random_program_takes_the_same_course_again(tasks, seed, latency, failures, rerun):
    if grammar.may_ask_equal_questions(tasks):
        failures = 0  # a request that fails and is repeated could become another draw
    setting = Setting(seed=seed, latency=latency, failures=failures)
    store = MemoryStore()
    first = play(grammar.Interpreter(tasks), store, setting)
    again = play(grammar.Interpreter(tasks), store, reruns(setting)[rerun])
    assert difference(first, again) == ""
