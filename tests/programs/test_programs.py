"""C11 on programs whose tasks share state: a rerun asks and receives the same in the same order.

The first run of each program has random latencies. ``CACHEPIPE_TRIALS=200`` makes that many trials of each.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from profiles import sized
from programs.examples import PROGRAMS
from programs.harness import LATENCIES, Setting, difference, play, reruns

from cachepipe import MemoryStore

TRIALS = int(os.environ.get("CACHEPIPE_TRIALS", "1"))
TESTS = Path(__file__).parents[1]
EVERY = pytest.mark.parametrize("name", PROGRAMS)


def trials(name):
    """Return the settings of first runs: their latencies take turns, and in every third one, calls fail."""
    begin = list(PROGRAMS).index(name)
    kinds = itertools.islice(itertools.cycle(LATENCIES), begin % len(LATENCIES), None)
    for trial, latency in zip(range(TRIALS), kinds, strict=False):
        fails = (begin + trial) % 3 == 0 and not PROGRAMS[name].equal_questions
        yield Setting(seed=trial, latency=latency, failures=0.2 if fails else 0)


def tried(name, kinds):
    """Return the kinds of reruns that the profile tries on a program: every other one, or each."""
    begin = list(PROGRAMS).index(name) // len(LATENCIES) % 2
    return kinds[sized(begin, 0) :: sized(2, 1)]


@EVERY
def test_c11_a_rerun_takes_the_same_course(name, tmp_path):
    """In the same namespace, in a new one, and there with other request ids; with any latencies."""
    program = PROGRAMS[name]
    for number, setting in enumerate(trials(name)):
        folder = tmp_path / str(number)
        first = play(program.run, folder, setting)
        assert first.calls > 0
        again = reruns(setting, own_ids=program.own_ids)
        for what in list(again) if program.own_ids else tried(name, list(again)):
            assert difference(first, play(program.run, folder, again[what])) == "", (setting, what)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # of tasks that were stopped before
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # likewise
@EVERY
def test_c11_a_run_that_was_stopped_is_resumed_on_the_same_course(name, tmp_path):
    """What the stopped run received comes first, in its order. The resumed run has reruns like any other."""
    program = PROGRAMS[name].run
    for number, setting in enumerate(trials(name)):
        whole = play(program, MemoryStore(), setting)
        until = whole.seconds * random.Random(number).uniform(0.1, 0.9)
        store = MemoryStore()
        stopped = play(program, store, replace(setting, until=until))
        resumed = play(program, store, replace(setting, seed=setting.seed + 1))
        assert resumed.trace[: len(stopped.trace)] == stopped.trace, setting
        for what in tried(name, ["same namespace", "new namespace"]):
            again = play(program, store, reruns(setting)[what])
            assert difference(resumed, again) == "", (setting, what)


@EVERY
def test_c11_a_rerun_takes_the_same_course_on_uvloop(name, tmp_path):
    """There quiet is counted in turns. Time is real, so a slow machine may send a loser's request."""
    turns = 50 if name == "tasks_that_sleep_for_turns" else None
    setting = Setting(scale=0.02, ordered=turns)
    program = PROGRAMS[name].run
    first = play(program, tmp_path, setting, loop=uvloop.new_event_loop)
    again = play(program, tmp_path, reruns(setting)["new namespace"], loop=uvloop.new_event_loop)
    assert difference(first, replace(again, calls=0)) == ""


def test_c11_a_rerun_in_another_process_takes_the_same_course(tmp_path):
    """Strings have other hashes there, so programs that make request ids of hashes have others."""
    for name, program in PROGRAMS.items():
        first = play(program.run, tmp_path / name, Setting())
        (tmp_path / f"{name}.json").write_text(json.dumps(first.as_json()))
    namespaces = [Setting().namespace, "second", *sized([], ["third"])]
    for seed, namespace in enumerate(namespaces, 1):
        command = [sys.executable, "-m", "programs.rerun", str(tmp_path), namespace]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run(
            command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "".join(f"{name}: the same\n" for name in PROGRAMS)


def test_without_the_schedule_reruns_differ():
    """So the programs are a test: each but the sequential one depends on whose answer comes first."""
    differ = set()
    for name, program in PROGRAMS.items():
        setting = Setting(ordered=False)
        store = MemoryStore()
        first = play(program.run, store, setting)
        if difference(first, play(program.run, store, reruns(setting)["same namespace"])):
            differ.add(name)
    assert differ == set(PROGRAMS) - {"one_by_one"}
