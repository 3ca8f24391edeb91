"""The tables of docs/scale.md follow from the bytes that it gives, and from how Valkey spreads keys."""

import hashlib
import re
from pathlib import Path

import pytest
from valkey.crc import VALKEY_CLUSTER_HASH_SLOTS, key_slot

TEXT = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
FURTHER = 4  # further samples of each question


def table(name):
    """Return the header and the rows of a marked table."""
    [found] = re.findall(rf"<!-- {name} -->\n((?:\|.*\n)+)", TEXT)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in found.splitlines()
    ]
    return header, rows


BYTES = {name: [int(cell.replace(",", "")) for cell in cells] for name, *cells in table("bytes")[1]}


def bytes_of(store, samples):
    first, further, draw = BYTES[store]
    return samples / (1 + FURTHER) * (first + FURTHER * further + draw)


def told(size):
    unit, name = next((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= unit)
    return f"{size / unit:.2g} {name}" if size < 10 * unit else f"{size / unit:,.0f} {name}"


def test_the_capacity_follows_from_the_bytes():
    header, rows = table("capacity")
    assert header[1:] == list(BYTES)
    assert [row[0] for row in rows] == ["1 million", "10 million", "100 million", "1 billion"]
    for power, row in enumerate(rows, start=6):
        assert row[1:] == [told(bytes_of(store, 10**power)) for store in BYTES], row[0]


@pytest.fixture(scope="module")
def slots():
    return [key_slot(hashlib.sha256(str(number).encode()).hexdigest().encode()) for number in range(200_000)]


@pytest.mark.parametrize("primaries", [3, 32])
def test_the_fullest_primary_is_as_full_as_it_says(slots, primaries):
    counts = [0] * primaries
    for slot in slots:
        counts[slot * primaries // VALKEY_CLUSTER_HASH_SLOTS] += 1
    more = max(counts) / (len(slots) / primaries) - 1
    [percent] = re.findall(
        {3: r"the fullest of three ([\d.]+) %", 32: r"fullest of 32 primaries holds ([\d.]+) %"}[primaries],
        TEXT,
    )
    assert f"{100 * more:.1f}" == percent


def test_a_server_holds_what_it_says():
    [room, percent, millions, servers] = re.findall(
        r"of (\d+) GiB, filled to (\d+) %, holds about (\d+) million samples, and a billion need (\d+) such",
        TEXT,
    )[0]
    usable = int(room) * 2**30 * int(percent) / 100
    per_sample = bytes_of("Valkey, memory", 1)
    assert int(millions) == round(usable / per_sample / 1e6)
    assert int(servers) == -(-(10**9 * per_sample) // usable)
