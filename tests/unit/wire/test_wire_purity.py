"""The wire layer stands alone: it needs no SDK, no connection and no event loop."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
import cachepipe.wire
strangers = {"openai", "together", "anthropic", "httpx", "httpx2", "asyncio", "anyio", "socket", "ssl"}
print(*sorted(strangers & set(sys.modules)))
"""


def test_importing_the_wire_layer_loads_no_sdk_no_network_and_no_event_loop():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
