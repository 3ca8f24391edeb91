"""Temporary folders are removed when their block ends, and those of killed processes by the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cachepipe import MemoryStore
from cachepipe.sharing import export, unpacked
from cachepipe.stores.scratch import scratch_folder

HOLDER = """
import sys
from cachepipe.stores.scratch import scratch_folder

with scratch_folder() as folder:
    (folder / "content").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Make the folders in a folder of the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_is_gone_after_its_block_also_after_an_error(temporary):
    def fail():
        with scratch_folder() as folder:
            (folder / "content").write_text("x")
            assert folder.parent == temporary
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [*temporary.iterdir()] == []


def test_a_bundle_is_unpacked_into_such_a_folder(temporary, tmp_path_factory):
    bundle = tmp_path_factory.mktemp("bundle") / "empty.cachepipe"
    store = MemoryStore()
    export(store, bundle)
    store.close()
    with unpacked(bundle) as store:
        (folder,) = temporary.iterdir()
        assert store.folder == folder
    assert [*temporary.iterdir()] == []


def test_what_a_killed_process_left_is_removed_and_what_others_use_stays(temporary):
    held = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=held, stdout=held, text=True) as process:
        theirs = Path(process.stdout.readline().strip())
        with scratch_folder():
            assert (theirs / "content").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (theirs / "content").exists()
        with scratch_folder() as mine:
            assert [*temporary.iterdir()] == [mine]


def test_a_link_and_a_file_with_such_a_name_are_left_alone(temporary):
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "content").write_text("x")
    (temporary / "cachepipe-scratch-link").symlink_to(elsewhere)
    (temporary / "cachepipe-scratch-file").write_text("x")
    with scratch_folder():
        pass
    assert (elsewhere / "content").exists()
    assert len([*temporary.iterdir()]) == 3
