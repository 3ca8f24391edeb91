"""The guard that closes the network of tested programs lets nothing out, and this machine in."""

from __future__ import annotations

import os
import subprocess
import sys

from offline import close_network

PROGRAM = """
import socket

with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
    socket.create_connection(("localhost", server.getsockname()[1])).close()
here, there = socket.socketpair()
here.sendall(b"x")


def tries(act):
    try:
        act()
    except ConnectionRefusedError as error:
        print(error)


tcp, udp, six = (
    socket.socket(family, kind)
    for family, kind in (
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET, socket.SOCK_DGRAM),
        (socket.AF_INET6, socket.SOCK_STREAM),
    )
)
tries(lambda: tcp.connect(("192.0.2.1", 80)))
tries(lambda: tcp.connect_ex(("192.0.2.2", 80)))
tries(lambda: six.connect(("2001:db8::1", 80)))
tries(lambda: udp.sendto(b"x", ("192.0.2.3", 53)))
tries(lambda: socket.getaddrinfo("example.com", 80))
tries(lambda: socket.gethostbyname("example.com"))
"""


def test_only_this_machine_can_be_reached(tmp_path):
    closed, tried = close_network(tmp_path / "guard")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | closed, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    noted = [f"the network is closed: {line}" for line in tried.read_text().splitlines()]
    assert (len(noted), done.stdout.splitlines()) == (6, noted)
