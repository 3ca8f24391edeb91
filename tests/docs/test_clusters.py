"""The page about clusters, and its Slurm scripts, which run as plain processes here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forked
import pytest

from cachepipe import valkey_server
from cachepipe.testing import MockServer, MockSettings

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "clusters.md").read_text()

pytestmark = pytest.mark.slow


def example(name):
    return re.search(
        rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
    )[1]


def command(name):
    return [line.removeprefix("$ ") for line in example(name).splitlines()]


@pytest.fixture
def upstream():
    with MockServer.in_thread(MockSettings(seed=1)) as server:
        yield server


@pytest.fixture
def project(tmp_path):
    """A folder on the shared disk with the scripts and programs of the page, and a stand-in for srun."""
    folder = tmp_path / "shared disk"
    shutil.copytree(DOCS / "slurm", folder)
    for name in ("with_proxy.py", "with_server.py"):
        (folder / name).write_text(example(name))
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (folder / "bin" / "srun").chmod(0o700)
    (folder / "local").mkdir()
    return folder


class Slurm:
    """Starts the tasks of arrays as Slurm would, in one folder."""

    def __init__(self, folder, upstream):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{forked.programs()}:{os.environ['PATH']}",
            "TMPDIR": str(folder / "local"),
            "UPSTREAM": upstream.base_url,
            "OPENAI_BASE_URL": upstream.base_url,
            "OPENAI_API_KEY": "key-of-the-lab",
            "SLURM_SUBMIT_DIR": str(folder),
        }
        self.arrays = 0
        self.started = []

    def sbatch(self, line, count=2, starting=None):
        """Start the tasks of a new array, or some of them; return their processes."""
        self.arrays += 1
        assert line.startswith("sbatch ")
        return [self.task(line, task, count) for task in (range(count) if starting is None else starting)]

    def task(self, line, task, count=2):
        variables = {
            "SLURM_ARRAY_JOB_ID": str(self.arrays),
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_COUNT": str(count),
        }
        process = subprocess.Popen(
            ["bash", *line.split()[1:]],
            cwd=self.folder,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    @staticmethod
    def ended(processes):
        """Wait until tasks have ended well; return the lines that their programs printed."""
        told = [process.communicate(timeout=100) for process in processes]
        codes = [process.returncode for process in processes]
        assert codes == [0] * len(processes), told
        return sorted(re.findall(r"^\d \d .*$", "".join(output for output, _ in told), re.MULTILINE))

    def close(self):
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        for place in (*self.folder.glob("local/*/cache"), *self.folder.glob("lab")):
            valkey_server.stop(place)


@pytest.fixture
def slurm(project, upstream):
    made = Slurm(project, upstream)
    yield made
    made.close()


@pytest.mark.parametrize("name", ["proxy", "valkey"])
def test_a_rerun_of_an_array_makes_no_call(slurm, project, upstream, name):
    [line] = command(name)
    first = slurm.ended(slurm.sbatch(line))
    assert [each[:3] for each in first] == [f"{task} {number}" for task in range(2) for number in range(3)]
    assert len({each[2:] for each in first}) == 6  # the tasks have samples of their own
    assert upstream.stats.samples_generated == 6
    assert slurm.ended(slurm.sbatch(line)) == first
    assert upstream.stats.samples_generated == 6
    # What is left is the saved cache alone: no secret, nothing on the local disk.
    shared = project / f"{name}-cache"
    assert sorted(each.name for each in shared.iterdir()) == ["cache", (shared / "cache").readlink().name]
    assert list((project / "local").iterdir()) == []
    if name == "proxy":
        [look] = command("look")
        done = subprocess.run(
            [*look.split(), "--json"],
            cwd=project,
            env=slurm.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["samples"] == 6


def until(true):
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it has not happened")


def test_at_its_time_limit_the_owner_saves_what_was_stored(slurm, project, upstream):
    """The second task never starts before the first one, which waits for it, is warned by Slurm."""
    [line] = command("proxy")
    [owner] = slurm.sbatch(line, starting=[0])
    until((project / "proxy-cache" / "job-1" / "done-0").exists)
    [other] = slurm.sbatch(line, starting=[0])  # of another array, on the same cache
    assert "array 1 owns" in other.communicate(timeout=60)[1]
    assert other.returncode == 1
    owner.send_signal(signal.SIGTERM)
    owner.communicate(timeout=60)
    assert owner.returncode == 143
    slurm.arrays = 1
    late = slurm.task(line, 1)
    assert "the first task of the array has ended" in late.communicate(timeout=60)[1]
    assert late.returncode == 1
    slurm.arrays = 2
    assert upstream.stats.samples_generated == 3
    slurm.ended(slurm.sbatch(line, count=1))
    assert upstream.stats.samples_generated == 3


def test_an_owner_that_is_warned_while_its_program_works_saves_too(slurm, project, upstream):
    works = f"{example('with_server.py')}    open('asked', 'w')\n    __import__('time').sleep(100)\n"
    (project / "with_server.py").write_text(works)
    [line] = command("valkey")
    [owner] = slurm.sbatch(line, starting=[0])
    until((project / "asked").exists)
    owner.send_signal(signal.SIGTERM)
    owner.communicate(timeout=60)
    assert owner.returncode == 143
    assert upstream.stats.samples_generated == 3
    (project / "with_server.py").write_text(example("with_server.py"))
    slurm.ended(slurm.sbatch(line, count=1))
    assert upstream.stats.samples_generated == 3


def test_a_server_that_does_not_start_ends_the_array_and_leaves_the_saved_cache(slurm, project):
    def saved():
        folder = project / "proxy-cache" / "cache"
        return {each.name: each.read_bytes() for each in folder.rglob("*") if each.is_file()}

    slurm.ended(slurm.sbatch("sbatch serve.sh true", count=1))
    before = saved()
    assert "cache.db" in before
    link = project / "proxy-cache" / "cache"
    content = link.resolve()
    link.unlink()
    content.rename(link)  # a folder, as a user copies it there
    slurm.environment |= {"UPSTREAM": "nonsense"}
    for process in slurm.sbatch("sbatch serve.sh true"):
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (1, "")
        assert "nonsense" in errors or "the first task of the array has ended" in errors
    assert saved() == before
    assert link.is_symlink()  # so it can be replaced at once
    assert not (project / "proxy-cache" / "owner").is_symlink()


def test_the_server_of_the_page_is_started_used_and_stopped(slurm, project):
    done = subprocess.run(
        ["bash", "-ec", "\n".join(command("server"))],
        cwd=project,
        env=slurm.environment | {"SLURM_ARRAY_TASK_ID": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n7 ") == 3
    assert "has stopped" in done.stdout
