"""Copies of a shared store on this machine: what they answer and notice, and that nothing depends on them."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
import warnings

import pytest

import cachepipe
from cachepipe import Batch, OnlineAPI, Request
from cachepipe.contract.draws import SHARED, Draw, label
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.contract.schedule import Place
from cachepipe.errors import NoLocalCopy, StoreError, StoreUnreachable
from cachepipe.runs import Occurrences
from cachepipe.stores import mounts
from cachepipe.stores.base import Claim, Commit, Discard, NotePlace
from cachepipe.stores.remote import local, rows
from cachepipe.stores.remote.engine import Unreachable
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.testing import MemoryEngine, ScriptedModel

KEY, OTHER = "k2-" + "a" * 64, "k2-" + "b" * 64


def asked(key=KEY):
    return Question(key, "https://api.example/v1", b'{"fields":{"prompt":"why?"}}')


def drawn(request_id="", *, namespace=None, key=KEY):
    return Draw(label(namespace), key, request_id, 0)


@pytest.fixture
def engine():
    return MemoryEngine()


@pytest.fixture
def start(engine, tmp_path):
    """A function that opens the store as another process of a machine, which follows when a test says so."""
    stores = []

    def begin(machine="one", *, read_only=False, megabytes=10, of=engine, **options):
        copies = local.copies_in(tmp_path / machine, of, megabytes)
        session = Session(of, **{"renews": False, "sleep": lambda _: None, "copies": copies, **options})
        stores.append(RemoteStore(session, read_only=read_only))
        return stores[-1]

    yield begin
    engine.before_swap = engine.after_swap = None
    engine.down = False
    for store in stores:
        store.close()


@pytest.fixture
def store(start):
    return start()


def claim(store, draw, n=1, **more):
    [grant] = store.write([Claim(draw, n, asked(draw.key), "t", **more)])
    return grant


def fill(store, draw, n=1):
    grant = claim(store, draw, n)
    if grant.mine:
        store.write([Commit(draw.key, index, b"%d" % index, {}) for index in grant.mine])
    return grant


def filled(store, draw, n=1):
    """Draw samples, and have them copied."""
    fill(store, draw, n)
    store.session.local.follow()


def begin_run(*stores):
    """Begin another run; the stores ask for changes at once."""
    Occurrences()
    for store in stores:
        store.session.local.follow()


def on_a_loop(store, draw, n=1):
    async def recall():
        return store.recall(draw, n)

    return asyncio.run(recall())


def payloads(grant):
    return None if grant is None else [sample.payload for sample in grant.samples]


class Counted:
    """A lock that counts the threads that have wanted it."""

    def __init__(self, lock):
        self._lock = lock
        self.wanted = 0

    def __enter__(self):
        self.wanted += 1
        return self._lock.__enter__()

    def __exit__(self, *error):
        return self._lock.__exit__(*error)


def trips(engine, ask):
    before = engine.trips
    found = ask()
    return engine.trips - before, found


# Answers.


def test_a_known_draw_is_answered_without_a_round_trip(engine, start):
    filled(start(), drawn("a"), 3)
    store = start()
    begin_run(store)
    assert trips(engine, lambda: payloads(on_a_loop(store, drawn("a"), 2))) == (0, [b"0", b"1"])
    assert trips(engine, lambda: payloads(store.recall(drawn("a"), 3))) == (0, [b"0", b"1", b"2"])
    assert trips(engine, lambda: payloads(claim(store, drawn("a"), 3))) == (0, [b"0", b"1", b"2"])
    taken = IntervalSet()
    assert trips(engine, lambda: payloads(store.replay(drawn("a"), 2, taken))) == (0, [b"0", b"1"])
    assert list(taken) == [(0, 2)]
    assert on_a_loop(store, drawn("a"), 4) is None, "the store is asked for more"


def test_a_rerun_of_a_worker_makes_no_round_trip_for_known_draws(engine, start, tmp_path):
    requests = Batch([Request(f"p{number}", n=number % 3 + 1) for number in range(100)])

    async def run(store, model):
        async with OnlineAPI(model, store, ordered=False) as pipeline:
            before = engine.trips
            responses = await pipeline.batch_request(requests)
            responses += [await pipeline.request(Request("p1", n=2, namespace="x")) for _ in range(1)]
            return engine.trips - before, [response.data for response in responses]

    first = start()
    _, data = asyncio.run(run(first, ScriptedModel()))
    first.close()
    again = start()
    begin_run(again)
    count, same = asyncio.run(run(again, ScriptedModel()))
    assert same == data
    assert count <= 2, "it asks for changes once, and which processes are alive"


def test_a_run_that_begins_while_a_loop_is_busy_asks_for_changes_and_not_for_draws(
    engine, start, monkeypatch
):
    def read_soon(reads, then):
        asyncio.get_running_loop().call_soon(then, engine.read(reads))
        return True

    monkeypatch.setattr(engine, "read_soon", read_soon)
    requests = [Request(f"p{number}") for number in range(20)]

    async def main():
        store = start()
        async with OnlineAPI(ScriptedModel(), store, ordered=False) as pipeline:
            await pipeline.batch_request(Batch(requests))
            store.session.local.follow()
            store.session.expects_new = False  # as after known draws that were not copied
            with cachepipe.run():
                before = engine.trips
                responses = [await pipeline.request(request) for request in requests]
                return engine.trips - before, [response.cached for response in responses]

    count, cached = asyncio.run(main())
    assert cached == [[True]] * 20
    assert count <= 2, "it asks for changes once, and which processes are alive"


def test_what_was_asked_of_the_store_is_copied_too(engine, start):
    fill(start("elsewhere"), drawn("a"))
    store = start()
    begin_run(store)
    assert on_a_loop(store, drawn("a")) is None
    assert payloads(store.recall(drawn("a"), 1)) == [b"0"]
    store.session.local.follow()
    assert trips(engine, lambda: payloads(on_a_loop(store, drawn("a")))) == (0, [b"0"])


def test_a_read_only_store_and_a_replay_use_and_make_copies(engine, start):
    fill(start("elsewhere"), drawn("a"))
    store = start(read_only=True)
    begin_run(store)
    assert payloads(store.replay(drawn("a"), 1, IntervalSet())) == [b"0"]
    store.session.local.follow()
    assert trips(engine, lambda: payloads(store.replay(drawn("a"), 1, IntervalSet()))) == (0, [b"0"])


def test_a_draw_that_is_not_complete_is_not_copied(start):
    store = start()
    grant = claim(store, drawn("a"), 2)
    store.write([Commit(KEY, grant.mine[0], b"x", {})])
    begin_run(store)
    assert on_a_loop(store, drawn("a")) is None
    store.write([Commit(KEY, grant.mine[1], b"y", {})])
    begin_run(store)
    assert payloads(on_a_loop(store, drawn("a"), 2)) == [b"x", b"y"]


def test_what_is_queued_is_copied_when_a_store_is_closed(engine, start):
    store = start()
    begin_run(store)
    fill(store, drawn("a"))
    store.close()
    again = start()
    begin_run(again)
    assert trips(engine, lambda: payloads(on_a_loop(again, drawn("a")))) == (0, [b"0"])


def test_the_first_use_of_a_shared_draw_is_recorded_on_the_store(engine, start):
    shared = drawn()._replace(namespace=SHARED)
    filled(start(), shared)
    store = start()
    begin_run(store)
    claim(store, shared, user="=a")
    assert [name for name in engine.rows[KEY] if name.startswith(rows.USE)] == [b"u/=a"]


def test_c1_a_draw_that_a_live_process_made_is_told(start):
    maker, store = start(), start()
    filled(maker, drawn("a"))
    begin_run(store, maker)
    assert on_a_loop(store, drawn("a")).shared
    assert not on_a_loop(maker, drawn("a")).shared
    maker.close()
    begin_run(store)
    assert not on_a_loop(store, drawn("a")).shared


def test_c3_stamps_of_copied_samples_are_seen(engine, start):
    maker = start()
    maker.session._offset += 3_600_000_000  # an hour ahead
    filled(maker, drawn("a"))
    store = start()
    begin_run(store)
    before = store.session.stamp()
    on_a_loop(store, drawn("a"))
    assert store.session.stamp() > before + 3_000_000_000


# Changes.


@pytest.fixture(params=["one", "another"])
def pair(request, start):
    """Two processes, of one machine or two, with a copied draw."""
    first, second = start("one"), start(request.param)
    filled(first, drawn("a"), 2)
    second.recall(drawn("a"), 2)
    begin_run(first, second)
    assert payloads(on_a_loop(second, drawn("a"), 2)) == [b"0", b"1"]
    return first, second


def test_c2_a_run_that_begins_after_a_discard_gets_another_sample(pair):
    first, second = pair
    first.write([Discard(KEY, 0, "it is wrong")])
    Occurrences()
    assert on_a_loop(second, drawn("a"), 2) is None
    assert second.recall(drawn("a"), 2) is None
    assert fill(second, drawn("a"), 2).indices == [2, 1]
    begin_run(first, second)
    for store in pair:
        store.recall(drawn("a"), 2)
        store.session.local.follow()
        assert payloads(on_a_loop(store, drawn("a"), 2)) == [b"2", b"1"]


def test_c2_a_process_notices_its_own_discard_at_once(pair):
    first, _ = pair
    first.write([Discard(KEY, 0, "it is wrong")])
    assert on_a_loop(first, drawn("a"), 2) is None
    assert first.replay(drawn("a"), 2, IntervalSet()) is None


def test_c2_a_claim_behind_a_discard_sees_it(pair):
    first, _ = pair
    _, grant = first.write([Discard(KEY, 0, "it is wrong"), Claim(drawn("a"), 2, asked(), "t")])
    assert grant.indices == [2, 1]


def test_a_running_program_notices_a_discard_within_seconds(pair, monkeypatch):
    first, second = pair
    first.write([Discard(KEY, 0, "it is wrong")])
    now = time.monotonic()
    monkeypatch.setattr(local.time, "monotonic", lambda: now + local.TRUSTED + 0.1)
    assert on_a_loop(second, drawn("a"), 2) is None
    second.session.local.follow()
    assert on_a_loop(second, drawn("a"), 2) is None


def test_c2_a_refreshed_draw_is_noticed(pair):
    first, second = pair
    grant = claim(first, drawn("a"), 2, refresh=True)
    first.write([Commit(KEY, index, b"new %d" % index, {}) for index in grant.mine])
    Occurrences()
    assert payloads(second.recall(drawn("a"), 2)) == [b"new 2", b"new 3"]


def test_c11_a_noted_place_is_noticed(pair):
    first, second = pair
    first.write([NotePlace(drawn("a"), 2, Place(17, 1))])
    Occurrences()
    assert second.recall(drawn("a"), 2).place == Place(17, 1)
    for store in pair:
        begin_run(store)
        store.session.local.follow()
        store.recall(drawn("a"), 2)
        store.session.local.follow()
        assert on_a_loop(store, drawn("a"), 2).place == Place(17, 1)


def test_c2_rows_that_were_read_before_a_change_are_not_copied_after_it(engine, start):
    writer, reader = start("one"), start("one")
    fill(writer, drawn("a"))
    begin_run(reader)
    reader.recall(drawn("a"), 1)  # reads the rows, which are queued
    writer.write([Discard(KEY, 0, "it is wrong")])
    begin_run(reader)  # forgets the key, then writes what is queued
    assert on_a_loop(reader, drawn("a")) is None


def test_c2_rows_that_are_read_between_an_announcement_and_its_change_are_not_copied(engine, start):
    writer, reader = start("one"), start("another")
    fill(writer, drawn("a"))
    begin_run(reader)

    def meanwhile(_swaps):
        engine.before_swap = None
        begin_run(reader)  # it learns of the change
        assert payloads(reader.recall(drawn("a"), 1)) == [b"0"]
        reader.session.local.follow()

    engine.before_swap = meanwhile
    writer.write([Discard(KEY, 0, "it is wrong")])
    assert on_a_loop(reader, drawn("a")) is None
    begin_run(reader)
    assert on_a_loop(reader, drawn("a")) is None


def test_c2_a_new_machine_does_not_copy_what_is_being_changed(engine, start):
    writer = start("one")
    fill(writer, drawn("a"))

    def meanwhile(_swaps):
        engine.before_swap = None
        reader = readers[0] = start("new")
        begin_run(reader)
        reader.recall(drawn("a"), 1)
        reader.session.local.follow()

    readers = [None]
    engine.before_swap = meanwhile
    writer.write([Discard(KEY, 0, "it is wrong")])
    begin_run(readers[0])
    assert on_a_loop(readers[0], drawn("a")) is None


def test_a_changed_draw_is_copied_again(engine, pair):
    first, second = pair
    first.write([NotePlace(drawn("a"), 2, Place(17, 1))])
    begin_run(second)
    second.recall(drawn("a"), 2)
    second.session.local.follow()
    assert trips(engine, lambda: on_a_loop(second, drawn("a"), 2).indices) == (0, [0, 1])


def test_a_copy_that_has_missed_changes_is_emptied(engine, pair, monkeypatch):
    monkeypatch.setattr("cachepipe.testing.engines.CHANGES", 3)
    first, second = pair
    first.write([Discard(KEY, 0, "it is wrong")])
    for _ in range(5):
        engine.announce([OTHER])
    begin_run(second)
    assert on_a_loop(second, drawn("a"), 2) is None


def test_a_copy_is_emptied_when_the_engine_may_have_lost_writes(engine, pair):
    _, second = pair
    engine.epoch = "restarted"
    begin_run(second)
    assert on_a_loop(second, drawn("a"), 2) is None
    assert payloads(second.recall(drawn("a"), 2)) == [b"0", b"1"]
    second.session.local.follow()
    assert payloads(on_a_loop(second, drawn("a"), 2)) == [b"0", b"1"]


def test_rows_that_were_read_before_writes_were_lost_are_not_copied(engine, start):
    store = start()
    fill(store, drawn("a"))
    begin_run(store)
    store.recall(drawn("a"), 1)
    engine.epoch = "restarted"
    del engine.rows[KEY]
    begin_run(store)
    assert on_a_loop(store, drawn("a")) is None


def test_a_copy_is_emptied_when_the_engine_has_lost_its_changes(engine, pair):
    first, second = pair
    first.write([NotePlace(drawn("a"), 2, Place(17, 1))])
    begin_run(second)
    engine._changes.clear()
    begin_run(second)
    assert second.session.local._copies.known() == 0
    assert on_a_loop(second, drawn("a"), 2) is None


def test_while_the_engine_is_away_copies_are_used_for_seconds_only(engine, pair, monkeypatch):
    _, second = pair
    second.session.patience = 0.01
    engine.down = True
    assert payloads(on_a_loop(second, drawn("a"), 2)) == [b"0", b"1"]
    Occurrences()
    assert on_a_loop(second, drawn("a"), 2) is None
    with pytest.raises(StoreUnreachable):
        second.recall(drawn("a"), 2)


def test_two_stores_never_mix(start, tmp_path):
    engines = [MemoryEngine(), MemoryEngine()]
    stores = [start(of=each) for each in engines]
    filled(stores[0], drawn("a"))
    begin_run(*stores)
    assert on_a_loop(stores[0], drawn("a")) is not None
    assert on_a_loop(stores[1], drawn("a")) is None


# Damage.


def files(folder):
    return list(folder.glob("*-*.db"))


def test_c12_a_damaged_copy_is_not_used(start, tmp_path):
    store = start()
    filled(store, drawn("a"), 2)
    begin_run(store)
    [path] = files(tmp_path / "one")
    with sqlite3.connect(path) as connection:
        [[blob]] = connection.execute("SELECT rows FROM draws").fetchall()
    for at in range(len(blob)):
        damaged = blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE draws SET rows = ?", (damaged,))
        found = on_a_loop(store, drawn("a"), 2)
        assert found is None or payloads(found) == [b"0", b"1"], at
    connection.close()
    assert payloads(store.recall(drawn("a"), 2)) == [b"0", b"1"]


@pytest.mark.parametrize("damage", ["", "rubbish", "middle"])
def test_c12_a_damaged_file_is_replaced(start, tmp_path, damage):
    store = start()
    for number in range(200):
        fill(store, drawn(str(number)))
    begin_run(store)
    store.close()
    [path] = files(tmp_path / "one")
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes({"": b"", "rubbish": b"rubbish" * 1000, "middle": content[:half] + b"?" * half}[damage])
    for _ in range(2):
        again = start()
        begin_run(again)
        for number in range(200):
            assert payloads(again.recall(drawn(str(number)), 1)) == [b"%d" % number]
        again.session.local.follow()
    assert payloads(on_a_loop(again, drawn("7"))) == [b"7"]
    assert len(files(tmp_path / "one")) == 1


def test_c12_a_copy_that_does_not_know_what_it_has_seen_is_replaced(start, tmp_path):
    store = start()
    filled(store, drawn("a"))
    store.close()
    [path] = files(tmp_path / "one")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE state SET row = replace(row, 'x', 'y') || 'z'")
    connection.close()
    again = start()
    begin_run(again)
    assert on_a_loop(again, drawn("a")) is None
    assert payloads(again.recall(drawn("a"), 1)) == [b"0"]


def test_a_folder_that_cannot_be_used_is_left_out_with_one_warning(engine, start, tmp_path):
    (tmp_path / "one").write_text("a file")
    with pytest.warns(NoLocalCopy, match="CACHEPIPE_LOCAL") as told:
        store = start()
    assert len(told) == 1
    fill(store, drawn("a"))
    assert payloads(store.recall(drawn("a"), 1)) == [b"0"]


def test_an_engine_that_refuses_to_tell_changes_leaves_the_copy_out(engine, start, monkeypatch):
    def refuse(_since):
        raise StoreError("no permission")

    monkeypatch.setattr(engine, "changes", refuse)
    store = start()
    with pytest.warns(NoLocalCopy, match="no permission"):
        fill(store, drawn("a"))
    assert payloads(store.recall(drawn("a"), 1)) == [b"0"]


def test_an_engine_that_does_not_answer_is_not_asked_for_changes_by_each_claim(engine, start):
    store = start(patience=0.01)
    engine.down = True
    asked = trips(engine, lambda: [store.session.local.ready() for _ in range(5)])
    assert asked == (1, [False] * 5)


@pytest.mark.anyio
async def test_threads_do_not_ask_a_silent_engine_for_changes_one_after_another(engine, start, until):
    store = start()
    begin_run(store)
    Occurrences()
    answers, asked = threading.Event(), []

    def silent(since):
        asked.append(since)
        answers.wait()
        raise Unreachable("no answer within 5 s")

    engine.changes = silent
    copies = store.session.local
    copies._syncing = Counted(copies._syncing)
    found = []
    threads = [threading.Thread(target=lambda: found.append(copies.sync())) for _ in range(5)]
    for thread in threads:
        thread.start()
    await until(lambda: asked and copies._syncing.wanted == 5)
    answers.set()
    for thread in threads:
        thread.join()
    assert (len(asked), found) == (1, [False] * 5)


def test_a_draw_that_is_asked_for_again_and_again_takes_no_more_room_in_the_queue(start):
    store = start()
    begin_run(store)
    fill(store, drawn("a"))
    for _ in range(3):
        store.session.recall([(drawn("a"), 1)])
    store.session.local.follow()
    assert store.session.local._bytes == 0


def test_c12_a_forked_child_replaces_a_damaged_file(start, tmp_path):
    store = start()
    filled(store, drawn("a"))
    copies = store.session.local._copies
    store.session.local.inherit()
    [file] = (tmp_path / "one").glob("*-*.db")
    for ending in ("-wal", "-shm"):
        file.with_name(file.name + ending).unlink(missing_ok=True)
    file.write_bytes(b"not a database at all" * 1000)
    found = []
    asking = threading.Thread(target=lambda: found.append(copies.get(drawn("a"), b"")), daemon=True)
    asking.start()
    asking.join(20)
    assert found == [None]


def test_a_folder_on_a_network_file_system_is_left_out(start, monkeypatch, tmp_path):
    monkeypatch.setattr(mounts, "mounted", lambda: [mounts.Mount(str(tmp_path), "nfs4", "host:/home")])
    with pytest.warns(NoLocalCopy, match="is on a network file system"):
        store = start()
    fill(store, drawn("a"))
    assert payloads(store.recall(drawn("a"), 1)) == [b"0"]
    assert not (tmp_path / "one").exists()


def test_a_link_to_a_network_file_system_is_followed(start, monkeypatch, tmp_path):
    (tmp_path / "nfs").mkdir()
    (tmp_path / "one").symlink_to(tmp_path / "nfs")
    monkeypatch.setattr(mounts, "mounted", lambda: [mounts.Mount(str(tmp_path / "nfs"), "nfs4", "server:/x")])
    with pytest.warns(NoLocalCopy, match="network file system"):
        assert start().session.local is None


def test_a_folder_that_others_may_enter_is_made_private(start, tmp_path):
    (tmp_path / "one").mkdir(mode=0o777)
    filled(start(), drawn("a"))
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o700


def test_a_full_disk_leaves_the_copy_out_with_one_warning(start, tmp_path):
    store = start()
    begin_run(store)
    fill(store, drawn("a"))
    writing = store.session.local._copies._opened()[1]
    [[count]] = writing.execute("PRAGMA page_count").fetchall()
    writing.execute(f"PRAGMA max_page_count = {count}")
    fill(store, drawn("b", key=OTHER), 5)
    big = claim(store, drawn("c"))
    store.write([Commit(KEY, big.mine[0], b"x" * 100_000, {})])
    with pytest.warns(NoLocalCopy, match="full") as told:
        store.session.local.follow()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert payloads(store.recall(drawn("a"), 1)) == [b"0"]
        store.write([Discard(KEY, 0, "it is wrong")])
        assert on_a_loop(store, drawn("a")) is None


# Size.


def test_copies_that_were_used_longest_ago_are_deleted_first(start, tmp_path, monkeypatch):
    store = start(megabytes=1)
    begin_run(store)
    now = time.time()
    for number in range(12):
        monkeypatch.setattr("cachepipe.stores.remote.copies.time.time", lambda at=now + 7200 * number: at)
        for part in range(100):
            grant = claim(store, drawn(f"{number} {part}"))
            store.write([Commit(KEY, index, b"x" * 1000, {}) for index in grant.mine])
        store.session.local.follow()
        begin_run(store)
        on_a_loop(store, drawn("0 0"))
    monkeypatch.undo()
    begin_run(store)
    [path] = files(tmp_path / "one")
    with sqlite3.connect(path) as connection:
        [[count]] = connection.execute("SELECT count(*) FROM draws").fetchall()
    connection.close()
    assert 0 < count < 1000
    assert on_a_loop(store, drawn("11 99")) is not None
    assert on_a_loop(store, drawn("0 1")) is None
    assert on_a_loop(store, drawn("0 0")) is not None, "it was used lately"


def leave(start, days, *, size=0, of=None):
    """Make the copies of another store, of at least so many bytes, which is used last so many days ago."""
    store = start(of=of or MemoryEngine())
    for number in range(1 + size // 100_000):
        grant = claim(store, drawn(str(number)))
        store.write([Commit(KEY, index, b"x" * 100_000, {}) for index in grant.mine])
    store.session.local.follow()
    copies = store.session.local._copies
    path = copies._path(copies._number)
    store.close()
    os.utime(path, (time.time() - 86_400 * days,) * 2)
    return path


def test_copies_of_stores_that_were_not_used_for_a_month_are_deleted(start, tmp_path):
    old, recent = leave(start, 31), leave(start, 29)
    start()
    assert not old.exists()
    assert recent.exists()
    assert not [path for path in (tmp_path / "one").iterdir() if path.name.startswith(old.name)]


def test_copies_that_a_process_uses_are_not_deleted(start, engine):
    path = leave(start, 31, of=engine)
    used = start()
    begin_run(used)
    os.utime(path, (0, 0))
    start(of=MemoryEngine(), megabytes=0.01)
    assert path.exists()
    assert payloads(on_a_loop(used, drawn("0"))) is not None
    used.close()
    os.utime(path, (0, 0))
    start(of=MemoryEngine())
    assert not path.exists()


def test_all_copies_together_take_the_size_that_was_given(start):
    first, second, third = (leave(start, days, size=400_000) for days in (1, 3, 2))
    start(megabytes=1.4)
    assert [path.exists() for path in (first, second, third)] == [True, False, True], "the oldest goes"
    start(megabytes=0.1)
    assert not first.exists()
    assert not third.exists()


def test_a_file_that_was_replaced_is_deleted(start, engine, tmp_path):
    path = leave(start, 0, of=engine)
    later = path.with_name(path.name.replace("-0.db", "-1.db"))
    path.rename(later)
    path.touch()
    store = start()
    begin_run(store)
    assert payloads(on_a_loop(store, drawn("0"))) is not None
    assert files(tmp_path / "one") == [later]


# Threads.


@pytest.mark.anyio
async def test_a_thread_copies_and_follows_by_itself(start, until):
    store = start(renews=True)
    await asyncio.to_thread(fill, store, drawn("a"))
    await until(lambda: store.recall(drawn("a"), 1) is not None)
    Occurrences()
    await until(lambda: store.recall(drawn("a"), 1) is not None)


def test_many_threads_use_one_copy(engine, start):
    maker = start()
    for number in range(20):
        fill(maker, drawn(str(number)))
    maker.session.local.follow()
    store = start()
    begin_run(store)
    before = engine.trips
    wrong = []

    def look():
        found = {number: payloads(on_a_loop(store, drawn(str(number)))) for number in range(20)}
        wrong.extend(number for number in found if found[number] != [b"%d" % number])

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine.trips == before
