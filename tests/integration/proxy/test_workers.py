"""Several worker processes on one cache and one port: they count together, and one may die at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from cachepipe.testing import MockServer

WORKERS = 3


class Served:
    """A proxy of several processes.

    Attributes:
        url: its URL.
        process: its main process.
    """

    def __init__(self, folder, *arguments):
        command = [sys.executable, "-m", "cachepipe", "serve", "--port", "0", "--json", *arguments]
        self._log = folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder
            )
        told = self.process.stdout.readline()
        assert told, self._log.read_text()
        self.url = json.loads(told)["url"]

    @property
    def workers(self):
        """The processes of the workers."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def until(self, condition):
        """Wait until the processes have done something."""
        last = time.monotonic() + 30
        while not condition():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < last
            time.sleep(0.005)

    def wait_for(self, before):
        """Wait until the workers are others than before."""
        self.until(lambda: len(self.workers) == WORKERS and not {*before} & {*self.workers})

    def logged(self, words):
        """Return how many messages of the log contain some words."""
        return sum(
            words in json.loads(line).get("message", "") for line in self._log.read_text().splitlines()
        )


@contextlib.contextmanager
def serving(folder, *arguments):
    served = Served(folder, *arguments)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()
        served.process.stdout.close()


CONFIG = """
cache = "cache"
workers = {workers}
log = "errors"
max_n = {max_n}
prices = "prices.json"

[budgets]
poor = 0.01

[upstreams.mock]
url = "{url}"

[upstreams.held]
url = "{held}"
"""


@pytest.fixture(scope="module")
def held():
    """An upstream whose calls the tests answer themselves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        yield listener


@pytest.fixture(scope="module")
def configure(tmp_path_factory, held):
    """Write the settings of the proxy; the result is their folder."""
    folder = tmp_path_factory.mktemp("workers")
    prices = {"ngram-1": {"prompt": 1, "completion": 100, "max_tokens": 50}}
    (folder / "prices.json").write_text(json.dumps(prices))
    with MockServer.in_thread() as upstream:

        def write(max_n):
            url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
            text = CONFIG.format(url=upstream.base_url, held=url, workers=WORKERS, max_n=max_n)
            (folder / "proxy.toml").write_text(text)
            return folder

        yield write


@pytest.fixture(scope="module")
def served(configure):
    """A proxy with several workers."""
    with serving(configure(100), "--config", "proxy.toml") as made:
        yield made


@pytest.fixture
def connections():
    """Clients with a connection each, so that each of them is at another worker."""
    with contextlib.ExitStack() as stack:
        headers = {"authorization": "Bearer k"}
        yield [stack.enter_context(httpx2.Client(headers=headers, timeout=20)) for _ in range(WORKERS)]


def ask(client, served, path, text="hello", **fields):
    body = {"model": "ngram-1", "messages": [{"role": "user", "content": text}], **fields}
    return client.post(f"{served.url}{path}/v1/chat/completions", json=body)


def indices(answers):
    return [answer.headers["x-cachepipe-indices"] for answer in answers]


def test_c1_equal_requests_at_several_workers_are_counted_together(served, connections):
    asked = [*connections, *connections, *connections]
    first = [ask(client, served, "/ns/a@1") for client in asked]
    assert indices(first) == [str(number) for number in range(len(asked))]
    again = [ask(client, served, "/ns/a@2") for client in reversed(asked)]
    assert [answer.content for answer in again] == [answer.content for answer in first]
    assert {answer.headers["cache-status"] for answer in again} == {"cachepipe; hit"}
    stream = ask(connections[0], served, "/ns/a@2", stream=True)
    assert stream.headers["x-cachepipe-indices"] == str(len(asked))


def test_c8_a_retry_at_another_worker_attaches_to_its_draw(served, connections):
    one, other, _ = connections
    for client in (one, other):
        client.headers["idempotency-key"] = "k-1"
    first, second = ask(one, served, "/ns/keyed"), ask(other, served, "/ns/keyed")
    assert (first.status_code, first.content) == (200, second.content)
    assert ask(other, served, "/ns/keyed", "something else").status_code == 422


def test_a_new_run_begins_at_all_workers(served, connections):
    first = [ask(client, served, "/ns/run") for client in connections]
    begun = connections[0].post(f"{served.url}/cachepipe/runs", json={"namespace": "run"})
    assert (begun.status_code, begun.json()["known"]) == (201, True)
    again = [ask(client, served, "/ns/run") for client in connections]
    assert [answer.content for answer in again] == [answer.content for answer in first]


def test_the_counts_of_all_workers_are_added_up(served, connections):
    for client in connections:
        ask(client, served, "/ns/counted", "to count")
    found = connections[1].get(f"{served.url}/cachepipe/api/counters").json()
    counts = {each["namespace"]: each for each in found["namespaces"]}["counted"]
    assert counts["requests"] == {"miss": WORKERS}
    assert counts["spent"]["samples"] == counts["misses"] == WORKERS
    metrics = connections[2].get(f"{served.url}/metrics").text
    assert f'requests_total{{namespace="counted",outcome="miss"}} {WORKERS}.0' in metrics
    seconds = re.search(r"call_seconds_count ([0-9.]+)", metrics)
    assert float(seconds[1]) >= WORKERS
    assert connections[0].get(f"{served.url}/cachepipe").json()["workers"] == WORKERS


def test_a_budget_is_that_of_all_workers(served, connections):
    answers = [
        ask(connections[number % WORKERS], served, "/ns/poor", f"{number}", max_tokens=20)
        for number in range(12)
    ]
    paid = [answer for answer in answers if answer.status_code == 200]
    assert 0 < len(paid) < len(answers)
    assert {answer.status_code for answer in answers} == {200, 402}
    found = connections[0].get(f"{served.url}/cachepipe/api/counters").json()
    spent = {each["namespace"]: each["spent"] for each in found["namespaces"]}["poor"]
    assert 0 < spent["cost"] <= 0.01


def answered(connection, text):
    """Answer a call to the upstream."""
    with connection:
        connection.settimeout(20)
        while b"}" not in connection.recv(65536):
            pass
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        content = json.dumps({"id": "1", "object": "chat.completion", "model": "m", "choices": [choice]})
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        connection.sendall(f"{head}\r\nconnection: close\r\n\r\n{content}".encode())


def answer_on(client):
    """Return the answer that comes on a connection."""
    read = b""
    while not read.endswith(b"}"):
        part = client.recv(65536)
        assert part, read
        read += part
    return read


def begun(served, path, text):
    """Send a request of which nothing is read yet; return its connection."""
    url = httpx2.URL(served.url)
    connection = socket.create_connection((url.host, url.port), timeout=20)
    body = json.dumps({"model": "ngram-1", "messages": [{"role": "user", "content": text}]})
    head = f"POST {path}/v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


def test_c8_the_draw_of_a_killed_worker_is_given_back(served, held, connections):
    """A client whose worker is killed asks again: that is the same draw, at another worker."""
    before = served.workers
    with begun(served, "/up/held/ns/killed@1", "killed") as client:
        call, _ = held.accept()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1000) == b""
        call.close()
    served.wait_for(before)
    found = []
    for text in ("first", "second"):
        with begun(served, "/up/held/ns/killed@1", "killed") as client:
            answered(held.accept()[0], text)
            found.append(answer_on(client))
    again = [ask(connections[number], served, "/up/held/ns/killed@2", "killed") for number in range(2)]
    assert [answer.headers["cache-status"] for answer in again] == ["cachepipe; hit"] * 2
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in again]
    assert texts == ["first", "second"]
    assert b"x-cachepipe-indices: 0" in found[0]
    assert served.logged("was killed by signal 9; another one replaces it") == WORKERS


def test_sighup_replaces_all_workers_by_some_with_the_settings_of_now(served, configure, connections):
    first = ask(connections[0], served, "/ns/reloaded", "to reload", n=2)
    before = served.workers
    configure(1)
    served.process.send_signal(signal.SIGHUP)
    served.wait_for(before)
    with httpx2.Client(timeout=20) as client:
        assert ask(client, served, "/ns/reloaded", "to reload", n=2).status_code == 400
        one = ask(client, served, "/ns/reloaded", "to reload")
    assert indices([first, one]) == ["0, 1", "2"]  # the run goes on
    before = served.workers
    configure('"many"')  # not valid: everything stays
    served.process.send_signal(signal.SIGHUP)
    served.until(lambda: served.logged("the settings were not loaded again"))
    configure(100)
    os.kill(before[0], signal.SIGTERM)  # a worker that is asked to end is replaced, too
    served.until(lambda: before[0] not in served.workers and len(served.workers) == WORKERS)


def test_the_end_answers_what_is_in_flight_and_a_replay_gives_no_sample_twice(configure, held, connections):
    """C1 holds within a run of workers that only replay, although their claims are written nowhere."""
    folder = configure(100)
    with serving(folder, "--config", "proxy.toml", "--cache", "another") as served:
        first = ask(connections[0], served, "/ns/from", "to replay", n=3)
        assert first.status_code == 200
        with begun(served, "/up/held/ns/from", "in flight") as client:
            call, _ = held.accept()
            served.process.send_signal(signal.SIGTERM)
            url = httpx2.URL(served.url)
            refused = 0
            while not refused:
                with socket.socket() as another:
                    refused = another.connect_ex((url.host, url.port))
            answered(call, "the last")
            assert b"the last" in answer_on(client)
        assert served.process.wait(30) == 0
    with serving(folder, "--config", "proxy.toml", "--cache", "another", "--replay") as replaying:
        answers = [ask(client, replaying, "/ns/to", "to replay") for client in connections]
        assert sorted(indices(answers)) == ["0", "1", "2"]
        assert ask(connections[1], replaying, "/ns/to", "to replay").status_code == 404


def test_workers_that_cannot_open_the_cache_say_so(tmp_path):
    (tmp_path / "cache").write_text("a file")
    command = [
        "serve",
        "--workers",
        "2",
        "--upstream",
        "http://127.0.0.1:9/v1",
        "--cache",
        "cache",
        "--port",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "cachepipe", *command],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode not in (0, None)
    assert "cache" in done.stderr
    assert "Traceback" not in done.stderr
