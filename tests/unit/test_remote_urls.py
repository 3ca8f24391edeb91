"""Opening shared stores by their URLs: sessions, and programs whose names hide those of clients."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from cachepipe import StoreError
from cachepipe.stores.remote import urls
from cachepipe.stores.remote.session import Session
from cachepipe.testing import MemoryEngine

URL = "valkey://cache.example"


@pytest.fixture
def engines(monkeypatch):
    """The engines in memory that are opened in place of servers."""
    opened = []

    def session(*_arguments, **_options):
        opened.append(MemoryEngine())
        return Session(opened[-1], renews=False)

    monkeypatch.setattr(urls, "_session", session)
    return opened


def test_stores_on_equal_urls_share_a_session_until_all_are_closed(engines):
    first, second = urls.open_url(URL), urls.open_url(URL)
    assert first.session is second.session
    first.close()
    assert urls.open_url(URL).session is second.session
    for store in list(second.session._users):
        store.close()
    third = urls.open_url(URL)
    assert third.session is not second.session
    assert len(engines) == 2
    third.close()


def test_a_session_that_ends_while_it_is_opened_again_is_not_used(engines, monkeypatch):
    first = urls.open_url(URL)
    opened = urls.RemoteStore

    def closes_meanwhile(session, **options):
        first.close()
        return opened(session, **options)

    monkeypatch.setattr(urls, "RemoteStore", closes_meanwhile)
    second = urls.open_url(URL)
    assert not second.session.ended
    assert len(engines) == 2
    second.close()


@pytest.mark.parametrize(
    ("name", "url"), [("valkey", "valkey://127.0.0.1:1"), ("psycopg", "postgresql://127.0.0.1:1/db")]
)
def test_a_program_that_hides_the_package_of_a_client_is_told_so(tmp_path, name, url):
    program = tmp_path / f"{name}.py"
    program.write_text(f"import cachepipe\ncachepipe.open_store({url!r})\n")
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert f"{program} hides the package {name}. Give the file another name" in done.stderr


def test_a_module_that_is_loaded_in_place_of_a_client_is_named(monkeypatch, tmp_path):
    (tmp_path / "valkey.py").write_text("")
    monkeypatch.delitem(sys.modules, "valkey", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StoreError, match="hides the package valkey"):
        urls._check_not_hidden("valkey", "there")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_that_is_forked_while_a_thread_opens_a_store_can_open_one(engines, monkeypatch):
    made = urls._session
    inside, leave = threading.Event(), threading.Event()

    def slow(*arguments, **options):
        inside.set()
        leave.wait()
        return made(*arguments, **options)

    monkeypatch.setattr(urls, "_session", slow)
    stores = []
    thread = threading.Thread(target=lambda: stores.append(urls.open_url(URL)))
    thread.start()
    inside.wait()
    child = os.fork()
    if not child:
        signal.alarm(20)
        monkeypatch.setattr(urls, "_session", made)
        urls.open_url(URL)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join()
    stores[0].close()
