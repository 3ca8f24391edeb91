"""Warnings point at the line of the user's that led to them."""

import asyncio
import linecache
import warnings

import diskcache

from cachepipe import MemoryStore, OnlineAPI, Request
from cachepipe.clients import OpenAI
from cachepipe.errors import EvictionDisabled, NotStored
from cachepipe.stores import DiskStore, open_store
from cachepipe.testing import ScriptedModel


def line_of(category, work):
    """Return the line of this file that a warning of a kind points at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    [warning] = [one for one in caught if one.category is category]
    assert warning.filename == __file__
    return linecache.getline(__file__, warning.lineno).strip()


def evicting(folder):
    diskcache.Cache(folder, eviction_policy="least-recently-used").close()
    return str(folder)


def test_a_warning_about_a_folder_points_at_the_line_that_named_it(tmp_path):
    opened = []

    def store():
        opened.append(DiskStore(evicting(tmp_path / "a")))

    def opening():
        opened.append(open_store(evicting(tmp_path / "b"))[0])

    def client():
        opened.append(OpenAI(api_key="k", cache=evicting(tmp_path / "c")))

    for work, said in ((store, "DiskStore("), (opening, "open_store("), (client, "OpenAI(")):
        assert said in line_of(EvictionDisabled, work)
    for one in opened:
        one.close()


async def ask(pipeline, **whose):
    return await pipeline.request(Request("p", **whose))  # the line that asks


def test_a_warning_about_a_sample_points_into_the_program():
    async def main():
        async with OnlineAPI(ScriptedModel([[object]]), MemoryStore()) as pipeline:
            await ask(pipeline)

    assert line_of(NotStored, lambda: asyncio.run(main()))
