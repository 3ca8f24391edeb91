"""Where a cache may be written: not on a network file system."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cachepipe import DiskStore, OnlineAPI, ReadOnlyStore, Request, StoreError, open_store
from cachepipe.chat.history import FolderKeeper
from cachepipe.flow.shared import SharedQuotas
from cachepipe.flow.windows import Quota
from cachepipe.stores import mounts
from cachepipe.stores.mounts import (
    Mount,
    check_local,
    mounted,
    network_mount,
    parse_mount_output,
    parse_mountinfo,
)
from cachepipe.stores.repair import repair
from cachepipe.stores.verify import verify
from cachepipe.testing import ScriptedModel

LINUX = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 27 0:40 / /home rw shared:2 master:1 - nfs4 filer:/home rw,vers=4.2
41 40 8:1 / /home/lab/local\040disk rw - xfs /dev/sdb1 rw
42 27 0:42 / /scratch rw - lustre mds@tcp:/fs rw
43 27 0:43 / /local rw - tmpfs tmpfs rw
44 27 0:44 / /mnt/ssh rw - fuse.sshfs lab@filer:/data rw
45 27 0:45 / /mnt/odd rw - fuse bucket:/data rw
46 27 0:46 / /mnt/ntfs rw - fuseblk /dev/sdc1 rw
47 27 0:47 / /mnt/enc rw - fuse.gocryptfs /home/enc rw
48 27 0:48 / /auto rw - autofs map rw
49 48 0:49 / /auto rw - nfs filer:/auto rw
50 27 0:50 / /mnt/was rw - nfs filer:/was rw
51 50 0:51 / /mnt/was rw - tmpfs tmpfs rw
a line that is none
"""


@pytest.mark.parametrize(
    ("folder", "point"),
    [
        ("/home/lab/caches", "/home"),
        ("/home", "/home"),
        ("/homes/lab", None),
        ("/home/lab/local disk/caches", None),  # a local disk below a network one
        ("/scratch/lab/not/there/yet", "/scratch"),
        ("/local/cache", None),
        ("/var/cache", None),
        ("/mnt/ssh/cache", "/mnt/ssh"),
        ("/mnt/odd/cache", "/mnt/odd"),
        ("/mnt/ntfs/cache", None),
        ("/mnt/enc/cache", None),
        ("/auto/lab", "/auto"),
        ("/mnt/was/cache", None),  # another file system is mounted over it
    ],
)
def test_the_innermost_mount_decides(folder, point):
    found = network_mount(Path(folder), parse_mountinfo(LINUX))
    assert (found and found.point) == point


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "beegfs", "ceph", "afs", "9p", "fuse.glusterfs"]
)
def test_network_and_parallel_file_systems_are_recognised(kind):
    assert network_mount(Path("/data/cache"), [Mount("/", "ext4", "/dev/vda"), Mount("/data", kind, "x")])


@pytest.mark.parametrize(
    "kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs", "virtiofs", "fuse.overlayfs"]
)
def test_local_file_systems_are_accepted(kind):
    assert network_mount(Path("/data/cache"), [Mount("/data", kind, "x")]) is None


def test_the_root_of_a_sandbox_is_its_own():
    assert network_mount(Path("/data/cache"), [Mount("/", "9p", "none")]) is None


MACOS = """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
//lab@filer/home on /Volumes/home (smbfs, nodev, nosuid, mounted by lab)
filer:/data on /data (nfs, asynchronous)
lab@filer: on /Users/lab/far (macfuse, nodev, synchronous)
filer:/bsd on /bsd type nfs (v3, udp)
"""


@pytest.mark.parametrize(
    ("folder", "point"),
    [
        ("/Users/lab/caches", None),
        ("/Volumes/home/lab", "/Volumes/home"),
        ("/data/lab", "/data"),
        ("/Users/lab/far/x", "/Users/lab/far"),
        ("/bsd", "/bsd"),
    ],
)
def test_mounts_of_macos_and_the_bsds_are_read(folder, point):
    found = network_mount(Path(folder), parse_mount_output(MACOS))
    assert (found and found.point) == point


def test_this_machine_tells_its_mounts():
    assert "/" in {mount.point for mount in mounted()}


def test_a_refusal_names_the_mount_and_what_to_do():
    with pytest.raises(StoreError) as refused:
        check_local("the cache", Path("/scratch/lab"), mounts.REMEDIES, parse_mountinfo(LINUX))
    told = str(refused.value)
    assert "the cache /scratch/lab cannot be written" in told
    assert "(lustre, mounted at /scratch)" in told
    for command in ("CACHEPIPE_DIR=", "cachepipe serve", "cachepipe valkey start", "--replay"):
        assert command in told


# Real mounts: a network file system whose server has gone, in a namespace of mounts of its own.

_MOUNT = """
import ctypes, os, sys
def mount(source, point, kind, flags=0, data=""):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), point.encode(), kind.encode(), flags, data.encode()):
        sys.exit(77)
fuse = os.open("/dev/fuse", os.O_RDWR)
mount("lab@filer:", sys.argv[1] + "/far", "fuse.sshfs", 0, f"fd={fuse},rootmode=40000,user_id=0,group_id=0")
os.close(fuse)
"""


def in_a_namespace(folder, program):
    """Run a program with ``folder/far`` on sshfs; skip where nothing can be mounted."""
    (folder / "far").mkdir()
    command = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", _MOUNT + program, folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode == 77 or "unshare" in done.stderr or "/dev/fuse" in done.stderr:
        pytest.skip("nothing can be mounted here")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_cache_is_not_written_on_a_real_network_mount_also_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to("far/inner")
    told = in_a_namespace(
        tmp_path,
        """
from cachepipe import DiskStore, StoreError
for name in ("far", "far/new/cache", "link"):
    try:
        DiskStore(sys.argv[1] + "/" + name, read_only=False)
    except StoreError as error:
        print(str(error).splitlines()[0])
DiskStore(sys.argv[1] + "/near").close()
""",
    )
    assert told.count("it is on a network file system (fuse.sshfs") == 3
    assert f"{tmp_path}/far/inner" in told
    assert (tmp_path / "near").is_dir()


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A folder with a cache, which lies on a network file system from now on."""
    folder = tmp_path / "far"
    asyncio.run(asked(folder, "a"))
    monkeypatch.setattr(mounts, "mounted", lambda: [Mount(str(folder), "nfs4", "filer:/")])
    return folder


async def asked(folder, prompt, **options):
    model = ScriptedModel(cache_scope="m")
    async with OnlineAPI(model, folder, **options) as pipeline:
        return await pipeline.request(Request(prompt))


def test_a_cache_on_a_network_file_system_is_read_without_a_trace(far):
    before = {each.name: each.stat().st_mtime_ns for each in far.iterdir()}
    assert asyncio.run(asked(far, "a", mode="replay")).cached == [True]
    with contextlib.closing(DiskStore(far, read_only=True)) as store:
        assert len(list(store.keys())) == 1
        assert {each.name: each.stat().st_mtime_ns for each in far.iterdir()} == before
    assert verify(far).whole


def test_a_cache_on_a_network_file_system_is_neither_written_nor_repaired(far):
    for write in (lambda: DiskStore(far), lambda: DiskStore(far / "new"), lambda: repair(far)):
        with pytest.raises(StoreError, match=r"cannot be written: it is on a network file system \(nfs4"):
            write()
    assert not (far / "new").exists()


def test_a_folder_that_may_not_be_written_is_read_only_also_on_a_network_file_system(far, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.warns(ReadOnlyStore), contextlib.closing(DiskStore(far)) as store:
        assert store.read_only


def test_rows_that_a_writer_left_in_a_log_are_not_missed_on_a_network_file_system(far):
    (far / "cache.db-wal").write_bytes(b"x" * 40)
    with pytest.raises(StoreError, match=r"cache\.db-wal holds rows"):
        DiskStore(far, read_only=True)


def test_histories_and_shared_quotas_are_not_kept_on_a_network_file_system(far):
    with pytest.raises(StoreError, match=r"the histories .* network file system"):
        FolderKeeper(far)
    with pytest.raises(StoreError, match=r"the quotas .* network file system"):
        SharedQuotas(far, "endpoint").take([Quota()], None, 0, lambda _: 0, 0)


@pytest.mark.parametrize("name", ["redis://:secret@host", "foo://:secret@host/x", "http://:secret@host"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_never_made_into_a_folder(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = kind(name)
    openers = (
        [DiskStore, FolderKeeper] if name.startswith("redis") and kind is str else [DiskStore, open_store]
    )
    for opener in openers:
        with pytest.raises(StoreError, match="host") as refused:
            opener(cache)
        assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_have_a_colon_in_its_name(tmp_path):
    DiskStore(tmp_path / "redis:").close()
    assert (tmp_path / "redis:" / "cache.db").exists()
