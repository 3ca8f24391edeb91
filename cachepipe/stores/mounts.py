"""Network file systems: how they are recognised, and that no cache is written on one.

SQLite's files need locks and shared memory that all of their users see. Machines that mount one file system
do not share memory, and many such file systems do not share locks either.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from cachepipe.errors import StoreError

_NETWORK: Final = frozenset(
    {
        "9p",
        "acfs",
        "afpfs",
        "afs",
        "auristorfs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "cvfs",
        "dvs",
        "fhgfs",
        "gfs2",
        "gpfs",
        "lustre",
        "mmfs",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "p9fs",
        "panfs",
        "pvfs2",
        "smb2",
        "smb3",
        "smbfs",
        "webdav",
        "wekafs",
        "yfs",
    }
)
"""The types of file systems that several machines mount, as the kernel calls them."""
_FUSE: Final = frozenset(
    {
        "beegfs",
        "blobfuse",
        "blobfuse2",
        "ceph",
        "ceph-fuse",
        "curlftpfs",
        "cvmfs2",
        "daos",
        "davfs",
        "dfuse",
        "gcsfuse",
        "glusterfs",
        "goofys",
        "gvfsd-fuse",
        "hdfs",
        "hdfs_fuse",
        "juicefs",
        "lizardfs",
        "mfs",
        "moosefs",
        "mount-s3",
        "mountpoint-s3",
        "objectivefs",
        "orangefs",
        "quobyte",
        "rclone",
        "s3fs",
        "seaweedfs",
        "smbnetfs",
        "sshfs",
        "vmhgfs-fuse",
        "weed",
        "xtreemfs",
    }
)
"""The names of network file systems that a program serves."""

_ESCAPED: Final = re.compile(r"\\([0-7]{3})")
_MOUNTED: Final = re.compile(r"(.*?) on (.*?) (?:type (\S+) )?\(([^,)]*).*\)")


class Mount(NamedTuple):
    """A mounted file system.

    Attributes:
        point: the folder where it is mounted.
        kind: its type, such as ``ext4``, ``nfs4`` or ``fuse.sshfs``.
        source: what is mounted: a device, a name, or a place on another machine.
    """

    point: str
    kind: str
    source: str

    @property
    def network(self) -> bool:
        """Whether other machines may use the same files."""
        if self.kind == "9p" and self.point == "/":  # the own root of a sandbox, such as gVisor's
            return False
        kind, _, program = self.kind.lower().partition(".")
        if "fuse" in kind:
            return program in _FUSE or ":" in self.source or self.source.startswith("//")
        return kind in _NETWORK


def parse_mountinfo(text: str) -> list[Mount]:
    """Return the mounts in the text of Linux's ``/proc/self/mountinfo``."""
    found = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        names, kinds = before.split(" "), after.split(" ")
        if separator and len(names) >= 5 and len(kinds) >= 2:
            found.append(Mount(_plain(names[4]), kinds[0], _plain(kinds[1])))
    return found


def parse_mount_output(text: str) -> list[Mount]:
    """Return the mounts in the output of the command ``mount`` of macOS and the BSDs."""
    matches = filter(None, map(_MOUNTED.fullmatch, text.splitlines()))
    return [Mount(match[2], match[3] or match[4], match[1]) for match in matches]


def _plain(name: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), name)


def mounted() -> list[Mount]:
    """Return the mounts of this machine; none if the system does not tell them."""
    with contextlib.suppress(OSError):
        return parse_mountinfo(Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape"))
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        told = subprocess.run(["/sbin/mount"], capture_output=True, text=True, timeout=10, check=False)
        return parse_mount_output(told.stdout)
    return []


def network_mount(folder: Path, mounts: Sequence[Mount] | None = None) -> Mount | None:
    """Return the network file system that a folder is on, or would be created on; None for a local one.

    Args:
        folder: the absolute path of the folder, without symbolic links.
        mounts: the mounts, a later one over an earlier one; those of this machine by default.
    """
    if mounts is None:
        with contextlib.suppress(OSError):
            os.stat(os.path.join(folder, "."))  # noqa: PTH116, PTH118 - "/." makes an automounter mount it
        mounts = mounted()
    around = {str(each) for each in (folder, *folder.parents)}
    inner: Mount | None = None
    for mount in mounts:
        if mount.point in around and (inner is None or len(mount.point) >= len(inner.point)):
            inner = mount
    return inner if inner is not None and inner.network else None


def check_local(what: str, folder: Path, remedy: str, mounts: Sequence[Mount] | None = None) -> None:
    """Refuse a folder on a network file system.

    Args:
        what: the folder's purpose, which begins the message.
        folder: see `network_mount`.
        remedy: what to do instead, in a sentence or more.
        mounts: see `network_mount`.

    Raises:
        StoreError: when it is on a network file system.
    """
    if (mount := network_mount(folder, mounts)) is not None:
        raise StoreError(
            f"{what} {folder} cannot be written: it is on a network file system ({mount.kind}, mounted at "
            f"{mount.point}), where the locks of several machines do not protect its files. {remedy}"
        )


REMEDIES: Final = """\
Use one of these, with DIR on a local disk, such as /tmp/cachepipe:
  one machine works alone:        export CACHEPIPE_DIR=DIR (or --cache DIR, or cache="DIR" in Python)
  one machine owns the cache:     cachepipe serve --cache DIR --upstream URL --host 0.0.0.0 --token-env NAME
                                  (the other machines use the base URL that it prints)
  all machines share a server:    cachepipe valkey start --dir DIR --bind 0.0.0.0
                                  (its URL takes the place of the cache's folder)
  nobody writes, all only read:   cachepipe run --replay (mode="replay" in Python)"""
"""What to do where a cache would be written on a network file system."""
