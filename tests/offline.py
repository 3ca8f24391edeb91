"""Python processes whose network is closed: a connection to anything but this machine fails, and is noted."""

from __future__ import annotations

_GUARD = """
import ipaddress, os, sys

_NOTES = os.environ["OFFLINE_NOTES"]


def _is_here(host):
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def _guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # else of a Unix socket, or connected
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    if not _is_here(host):
        with open(_NOTES, "a") as notes:
            notes.write(f"{event} {host}\\n")
        raise ConnectionRefusedError(f"the network is closed: {event} {host}")


sys.addaudithook(_guard)
"""


def close_network(folder):
    """Return environment variables for Python processes, and the file that notes what they have tried.

    Args:
        folder: a new folder for the guard.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_GUARD)
    notes = folder / "notes"
    notes.write_text("")
    return {"PYTHONPATH": str(folder), "OFFLINE_NOTES": str(notes)}, notes
