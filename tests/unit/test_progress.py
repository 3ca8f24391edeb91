"""The progress bar: where people are, and nowhere else."""

from __future__ import annotations

import io
import sys
import types

import pytest
import rich.console

from cachepipe import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def put(monkeypatch):
    """A function that puts a stream in the place of standard error, once the test has begun."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def put(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


def test_a_terminal_shows_how_many_are_done_hits_and_failed(put):
    terminal = put(Terminal())
    with progress.shown(4, "completions") as tick:
        tick()
        tick(cached=True)
        tick(cached=True)
        tick(failed=True)
    shown = terminal.getvalue()
    assert "completions" in shown
    assert "4/4" in shown
    assert "2 hits, 1 failed" in shown


def test_a_narrow_terminal_shows_the_figures_and_no_bar(put, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = put(Terminal())
    with progress.shown(4, "completions") as tick:
        for _ in range(4):
            tick(cached=True)
    assert "4/4" in terminal.getvalue()
    assert "4 hits" in terminal.getvalue()
    assert "…" not in terminal.getvalue()


def test_bars_at_once_do_not_disturb_each_other(put):
    terminal = put(Terminal())
    with progress.shown(1, "one") as one, progress.shown(1, "two") as two:
        one()
        two()
    assert "1/1" in terminal.getvalue()


def test_a_notebook_shows_a_line_that_changes_and_needs_no_widgets(monkeypatch):
    lines = []

    class Handle:
        def update(self, shown, raw):
            lines.append(shown["text/plain"])

    def display(shown, raw, display_id):
        lines.append(shown["text/plain"])
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    with progress.shown(2, "completions") as tick:
        tick()
        tick(cached=True)
    assert lines[0] == f"completions {'░' * 40} 0/2"
    assert lines[-1] == f"completions {'█' * 40} 2/2  1 hit"


@pytest.mark.parametrize(("total", "show"), [(0, True), (3, False)])
def test_nothing_is_shown_where_nothing_is_wanted(put, total, show):
    terminal = put(Terminal())
    with progress.shown(total, "completions", show=show) as tick:
        tick()
    assert terminal.getvalue() == ""


def test_a_pipe_gets_nothing(put):
    pipe = put(io.StringIO())
    with progress.shown(3, "completions") as tick:
        tick(cached=True)
    assert pipe.getvalue() == ""


def test_a_terminal_shows_what_is_being_done_and_how_many_are_done(put):
    terminal = put(Terminal())
    with progress.counting() as told:
        told("checking", 500)
        told("checking", 501)  # too few more to be worth an update
        told("writing", 7)
    shown = terminal.getvalue()
    assert "writing" in shown
    assert "7/?" in shown


def test_counting_shows_nothing_outside_terminals(put):
    stream = put(io.StringIO())
    with progress.counting() as told:
        told("checking", 500)
    assert stream.getvalue() == ""
