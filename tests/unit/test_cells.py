"""Where the id of a cell goes, and where it does not."""

from __future__ import annotations

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
