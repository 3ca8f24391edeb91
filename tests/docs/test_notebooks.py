"""The notebook in the documentation shows what its cells give, and gives it again for nothing.

To write its outputs anew, start ``cachepipe mock-server --seed 1``, set ``OPENAI_BASE_URL`` and
``OPENAI_API_KEY``, and run ``jupyter execute --inplace`` on a copy of it in an empty folder.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from kernels import Kernel

from cachepipe.testing import MockServer, MockSettings

PAGE = Path(__file__).parents[2] / "docs" / "notebooks.ipynb"
NOTEBOOK = nbformat.read(PAGE, as_version=4)
CELLS = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def shown(outputs):
    """What a reader sees of outputs, without keys and request ids: they depend on the URL and front end."""
    texts = [
        output.get("text") or output.data.get("text/html") or output.data["text/plain"] for output in outputs
    ]
    return [re.sub(r"<th>(key|request id)</th><td>[^<]*", "", text) for text in texts]


@pytest.fixture
def server():
    with MockServer.in_thread(MockSettings(seed=1)) as running:
        yield running


def test_its_ids_are_those_of_the_file():
    nbformat.validate(NOTEBOOK)
    assert NOTEBOOK.nbformat_minor >= 5
    assert not [cell.id for cell in CELLS if re.fullmatch("[0-9a-f]{8}", cell.id)], (
        "ids with a meaning are readable"
    )


@pytest.mark.parametrize("sends_ids", [True, False])
def test_its_cells_give_what_it_shows_and_again_for_nothing(server, tmp_path_factory, sends_ids):
    folder = tmp_path_factory.mktemp("k")
    for number in range(1 + sends_ids):  # a kernel, and a fresh one
        with Kernel(folder, OPENAI_BASE_URL=server.base_url) as kernel:
            kernel.reader = sends_ids
            for again in range(2):
                for cell in CELLS:
                    outputs = shown(kernel.outputs(cell.source, cell.id if sends_ids else None))
                    first = not number and not again
                    if first or cell.id not in ("load", "info"):  # IPython says that the extension is loaded
                        assert outputs == shown(cell.outputs), cell.id
                if not number and not again:
                    paid = server.stats.requests
        assert server.stats.requests == paid
