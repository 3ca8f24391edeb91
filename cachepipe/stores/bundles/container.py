"""The form of a bundle: members of gzip, so that ``gzip -dc`` prints its lines.

A bundle consists of chunks of lines, a member with the manifest, and an empty member whose header tells where
the manifest is. The manifest has the digest of each chunk, and the last member that of the manifest. So every
byte is bound by a digest, and a chunk can be read without the others.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from typing import BinaryIO, Final, NamedTuple

from cachepipe.errors import BundleError

CHUNK: Final = 64 << 10
"""Bytes of lines after which a chunk ends, once the lines of the question are complete."""

_PLAIN: Final = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # no time, no name, no system
_EXTRA: Final = b"\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff"
_FIELD: Final = struct.Struct("<H2sHQQ32s")
_EMPTY: Final = b"\x03\x00" + bytes(8)
_TRAILER: Final = len(_EXTRA) + _FIELD.size + len(_EMPTY)
_ENDS: Final = struct.Struct("<II")

_LEVEL: Final = 4  # a third of the time of level 6, for 5 % more bytes
_DENSE: Final = 100  # bytes of lines to a byte of the file; a chunk that is denser is stored as it is
_SMALL: Final = 4 << 20  # bytes of lines up to which a chunk may have any density
_MANIFEST: Final = 1 << 20  # bytes that any manifest may take


class Chunk(NamedTuple):
    """A chunk, as the manifest lists it.

    Attributes:
        first: the key of its first question.
        offset: where it begins.
        length: its bytes in the file.
        size: the bytes of its lines.
        digest: the SHA-256 of its bytes in the file, in hexadecimal.
    """

    first: str
    offset: int
    length: int
    size: int
    digest: str


def member(content: bytes) -> bytes:
    """Return a member of gzip with a content; equal contents give equal members."""
    packed = _deflated(content, _LEVEL)
    if len(content) > _SMALL and len(content) > _DENSE * len(packed):
        packed = _deflated(content, 0)
    return b"%b%b%b" % (_PLAIN, packed, _ENDS.pack(zlib.crc32(content), len(content) & 0xFFFFFFFF))


def _deflated(content: bytes, level: int) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def trailer(offset: int, manifest: bytes) -> bytes:
    """Return the last member of a bundle, whose manifest is a member at an offset."""
    rest = _FIELD.size - 2
    field = _FIELD.pack(rest, b"CP", rest - 4, offset, len(manifest), hashlib.sha256(manifest).digest())
    return b"%b%b%b" % (_EXTRA, field, _EMPTY)


def read_manifest(file: BinaryIO, where: str) -> tuple[bytes, int]:
    """Return the content of a bundle's manifest, and the offset at which the chunks end.

    Raises:
        BundleError: when the file is not a bundle, is cut off, or is damaged at its end.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size < _TRAILER or file.read(len(_PLAIN)) not in (_PLAIN, _EXTRA):
        raise BundleError(f"{where} is not a bundle of cachepipe; `cachepipe export` writes bundles")
    file.seek(size - _TRAILER)
    end = file.read(_TRAILER)
    _, _, _, offset, length, digest = _FIELD.unpack_from(end, len(_EXTRA))
    if offset + length != size - _TRAILER or end[: len(_EXTRA)] != _EXTRA:
        raise BundleError(
            f"the bundle {where} is damaged at its end, or cut off: it does not say where its manifest is. "
            "Fetch the file again"
        )
    file.seek(offset)
    packed = file.read(length)
    if hashlib.sha256(packed).digest() != digest or end != trailer(offset, packed):
        raise _damaged(where, "its manifest")
    return _content(
        packed, min(_MANIFEST + 4 * size, _DENSE * length + _SMALL), where, "its manifest"
    ), offset


def read_chunk(file: BinaryIO, chunk: Chunk, where: str) -> bytes:
    """Return the lines of a chunk.

    Raises:
        BundleError: when they are not what was written.
    """
    what = f"the chunk at byte {chunk.offset}"
    if chunk.size > max(_SMALL, _DENSE * chunk.length):
        raise BundleError(
            f"the bundle {where} cannot be used: {what} takes {chunk.length:,} bytes and claims to hold "
            f"{chunk.size:,}, which cachepipe never writes"
        )
    file.seek(chunk.offset)
    packed = file.read(chunk.length)
    if hashlib.sha256(packed).hexdigest() != chunk.digest:
        raise _damaged(where, what)
    content = _content(packed, chunk.size, where, what)
    if len(content) != chunk.size:
        raise _damaged(where, what)
    return content


def _content(packed: bytes, most: int, where: str, what: str) -> bytes:
    """Return the content of a member, which has at most some bytes."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(packed[len(_PLAIN) :], most + 1)
    except zlib.error as error:
        raise _damaged(where, what) from error
    ends = _ENDS.pack(zlib.crc32(content), len(content) & 0xFFFFFFFF)
    if len(content) > most or packed[: len(_PLAIN)] != _PLAIN or unpacker.unused_data != ends:
        raise _damaged(where, what)
    return content


def _damaged(where: str, what: str) -> BundleError:
    return BundleError(f"the bundle {where} is damaged: {what} is not what was written. Fetch the file again")


def chunk(first: str, offset: int, packed: bytes, size: int) -> Chunk:
    """Return the chunk that a member is."""
    return Chunk(first, offset, len(packed), size, hashlib.sha256(packed).hexdigest())
