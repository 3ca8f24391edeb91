"""Where the id of a cell goes, and where it does not."""

from __future__ import annotations

import sys
import types

import pytest

from cachepipe import OnlineAPI, Request, cells, context, runs
from cachepipe.cells import Cell
from cachepipe.testing.models import ScriptedModel


@pytest.fixture
def cell(monkeypatch):
    monkeypatch.setattr(cells, "loaded", True)
    begun = Cell("cell:one", runs.Run())
    cells.begin(begun)
    yield begun
    cells.end()


def test_a_call_gets_the_cells_id_if_it_has_none(cell):
    assert context.current().request_id == "cell:one"
    with context.using(request_id=""), context.using(request_id=None):
        assert context.current().request_id == "cell:one"
    with context.using(request_id="own"), context.using(namespace="n"):
        assert context.current().request_id == "own"


def test_settings_that_come_from_elsewhere_do_not_get_it(cell):
    """Such as those of a request to a proxy that runs in a notebook."""
    assert context.Using(namespace="n").claimant(None, None).request_id is None


@pytest.mark.anyio
async def test_a_pipeline_gives_the_id_to_a_request_and_leaves_its_callers_object_as_it_is(cell):
    model, request = ScriptedModel(), Request(["p"])
    async with OnlineAPI(model) as pipeline:
        await pipeline.request(request)
        assert model.calls[0].request.request_id == "cell:one"
        assert request.request_id is None


def test_no_cell_is_left_when_it_has_ended(cell):
    cells.end()
    assert cells.current() is None
    assert context.current().request_id is context.INHERITED


def test_a_text_runs_again_if_ipython_has_executed_it_since_the_run_began(monkeypatch):
    history = types.SimpleNamespace(input_hist_raw=["", "ask()", "other()", "ask()"])
    shell = types.SimpleNamespace(history_manager=history)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert [cells.runs_again(since) for since in (0, 2, 3, 4)] == [True, True, False, False]
    monkeypatch.setattr(cells, "loaded", True)
    assert not cells.runs_again(0), "it was not asked in a cell"


@pytest.mark.parametrize(
    "module", [None, types.SimpleNamespace(), types.SimpleNamespace(get_ipython=lambda: None)]
)
def test_no_text_runs_again_in_a_script(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert not cells.runs_again(0)
