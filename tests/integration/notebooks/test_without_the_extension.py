"""Without the extension, a cell that is run again pays again, and its user is told once how to avoid it."""

from __future__ import annotations

import pytest


@pytest.fixture
def plain(kernel):
    """A kernel without the extension."""
    kernel.run("%unload_ext cachepipe")
    yield kernel
    kernel.run("%load_ext cachepipe")


def warned(outputs):
    return [output.text for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("code", ["pets = await ask('cats')", "pets = [await ask('cats') for _ in range(3)]"])
def test_a_cell_that_is_run_again_warns_once_and_says_what_to_load(plain, code):
    assert not warned(plain.outputs(code))
    [text] = warned(plain.outputs(code))
    assert "RepeatedCell" in text
    assert "%load_ext cachepipe" in text
    assert not warned(plain.outputs(code))


def test_other_cells_hits_and_refreshes_do_not_warn(plain, tmp_path):
    for code in (
        "pets = [await ask('cats') for _ in range(3)]",
        "more = await ask('cats')",
        "hit = await ask('dogs')\nwith cachepipe.run():\n    hit = await ask('dogs')",
        f"anew = OnlineAPI(model, {str(tmp_path / 'anew')!r}, mode='refresh')",
    ):
        assert not warned(plain.outputs(code))
    for code in (
        "with cachepipe.run():\n    hit = await ask('dogs')",
        "await anew.request(Request('cats'))",
    ) * 2:
        assert not warned(plain.outputs(code))
    plain.run("await anew.close()")
