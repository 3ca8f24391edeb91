"""Ray on a cluster of two local nodes, in an environment of its own: `nox -s ray`."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import json
import os
import signal
import threading

import pytest

HAS_RAY = importlib.util.find_spec("ray") is not None
collect_ignore_glob = [] if HAS_RAY else ["test_*.py"]

KEY = "sk-in-the-environment-of-the-workers"


def _added(cluster):
    """Add a node. On a busy machine Ray may give up: its agents have 15 seconds to start."""
    for attempt in range(4):
        try:
            return cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == 3:
                raise
    return None


@pytest.fixture(scope="session")
def cluster():
    """A cluster of two nodes with a core each; its workers have a key in their environment."""
    import ray  # noqa: PLC0415 - an extra
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    os.environ["OPENAI_API_KEY"] = KEY
    made = Cluster()
    for _ in range(2):
        _added(made)
    ray.init(address=made.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield made
    ray.shutdown()
    made.shutdown()
    del os.environ["OPENAI_API_KEY"]


class Server:
    """A server of OpenAI's chat, each of whose samples is another text.

    Attributes:
        url: its base URL.
        samples: the number of samples that were asked for.
        kill_at: the number of the call whose process is killed.
        killed: the killed processes.
        asked: the bodies of the calls.
    """

    def __init__(self):
        self.url = ""
        self.samples = self.calls = 0
        self.kill_at = None
        self.killed = []
        self.asked = []
        self.lock = threading.Lock()

    def begun(self, pid, body):
        """Count a call, and kill its process if it is its turn; return the number of its first sample."""
        with self.lock:
            self.calls += 1
            self.asked.append(body)
            first = self.samples
            self.samples += body.get("n", 1)
            if self.calls == self.kill_at:
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)
            return first


@pytest.fixture
def server(answering_with):
    """A model server."""
    made = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            first = made.begun(int(self.headers["x-pid"]), body)
            status, answer = 200, _answer(first, body)
            if "refuse" in str(body["messages"]):
                status, answer = 400, {"error": {"message": f"refused for {KEY}", "code": "refused"}}
            content = json.dumps(answer).encode()
            self.send_response_only(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def handle(self):
            with contextlib.suppress(OSError, ValueError):  # its process was killed
                super().handle()

    with answering_with(Handler) as url:
        made.url = f"{url}/v1"
        yield made


def _answer(first, body):
    n = body.get("n", 1)
    choices = [
        {
            "index": place,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": f"sample {first + place}"},
        }
        for place in range(n)
    ]
    usage = {"prompt_tokens": 10, "completion_tokens": 5 * n, "total_tokens": 10 + 5 * n}
    head = {"id": f"c{first}", "object": "chat.completion", "created": 1, "model": "m"}
    return {**head, "choices": choices, "usage": usage}


@pytest.fixture
def model(server):
    """A function that makes the adapter of the server in a worker; calls name the worker's process."""
    url = server.url

    def make():
        import os  # noqa: PLC0415 - it runs in the worker

        import openai  # noqa: PLC0415

        from cachepipe.models import OpenAIModel  # noqa: PLC0415

        headers = {"x-pid": str(os.getpid())}
        client = openai.AsyncOpenAI(base_url=url, default_headers=headers, max_retries=0)
        return OpenAIModel("m", client=client)

    return make


@pytest.fixture
def settings(cluster, model, new_valkey_url):
    """A function that returns settings with a run of its own; all share a new cache on a server."""
    from cachepipe.ray import RaySettings  # noqa: PLC0415

    url = new_valkey_url()
    return lambda **changes: RaySettings(**{"model": model, "cache": url, **changes})
