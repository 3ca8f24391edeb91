"""What binds rows of a cache to their places: digests, without a database."""

from __future__ import annotations

import pytest

from cachepipe import DamagedCache
from cachepipe.contract.allotment import DISCARDED
from cachepipe.contract.draws import Draw
from cachepipe.stores import tables
from cachepipe.stores.base import Sample
from cachepipe.stores.tables import RAW, SegmentRow, check_interval, interval_digest, segments_of

DRAW = Draw("=exp", "k2-5f", "trial", 3, "=7")
KEY = "k2-5f"


def segment(**changes):
    digest = tables.segment_digest(DRAW, 2, 4, "5,6,9", 1_700_000, "1700001+1")
    return SegmentRow(1, 2, 4, "5,6,9", 1, None, 1_700_000, 0, digest, "1700001+1")._replace(**changes)


def test_c12_a_segment_is_read_as_the_draw_that_it_was_written_for():
    segments_of(DRAW, [segment()])


@pytest.mark.parametrize(
    "changes",
    [{"number": 3}, {"position": 5}, {"indices": "5,6,8"}, {"stamp": 1_700_001}, {"digest": b"?" * 8}],
)
def test_c12_a_segment_that_is_changed_is_refused(changes):
    with pytest.raises(DamagedCache, match="draw of key k2-5f is damaged"):
        segments_of(DRAW, [segment(), segment(**changes)])


@pytest.mark.parametrize("field", Draw._fields)
def test_c12_a_segment_is_refused_as_another_draws(field):
    other = DRAW._replace(**{field: 4 if field == "occurrence" else "=other"})
    with pytest.raises(DamagedCache, match="draw of key"):
        segments_of(other, [segment()])


def test_c12_an_interval_is_read_as_its_owners_only():
    digest = interval_digest("=exp", KEY, 3, 9)
    check_interval("=exp", KEY, 3, 9, digest)
    for other in [("=other", KEY, 3, 9), ("=exp", "k2-60", 3, 9), ("=exp", KEY, 2, 9), ("=exp", KEY, 3, 10)]:
        with pytest.raises(DamagedCache, match="the samples of key"):
            check_interval(*other, digest)


def test_c12_sums_are_read_as_those_of_their_run_and_namespace():
    digest = tables.sums_digest("run", "=exp", b"[]")
    assert tables.read_sums(bytes.decode, "run", "=exp", b"[]", digest) == "[]"
    for run, namespace, document in [("other", "=exp", b"[]"), ("run", "=b", b"[]"), ("run", "=exp", b"[1]")]:
        with pytest.raises(DamagedCache, match="sums of the run"):
            tables.read_sums(bytes.decode, run, namespace, document, digest)


SAMPLE = Sample(12, "s-1", b'{"text": "Rome"}', b'{"id":"s-1","run":"r"}')


def test_c12_a_sample_is_read_as_it_was_written():
    row = tables.sample_row(f"{KEY}/12", SAMPLE)
    assert tables.parse_sample(KEY, 12, RAW, None, row) == SAMPLE


@pytest.mark.parametrize("place", [("k2-60", 12), (KEY, 13), (KEY, 1)])
def test_c12_a_sample_is_refused_at_another_place(place):
    with pytest.raises(DamagedCache, match="is damaged"):
        tables.parse_sample(*place, RAW, None, tables.sample_row(f"{KEY}/12", SAMPLE))


def test_c12_every_changed_byte_of_a_sample_is_noticed():
    row = tables.sample_row(f"{KEY}/12", SAMPLE)
    for place in range(len(row)):
        changed = bytes([*row[:place], row[place] ^ 1, *row[place + 1 :]])
        with pytest.raises(DamagedCache, match="is damaged"):
            tables.parse_sample(KEY, 12, RAW, None, changed)


def test_c12_a_discarded_sample_is_not_a_sample_and_is_bound_to_its_place():
    row = tables.discarded_row(f"{KEY}/12", tables.sample_row(f"{KEY}/12", SAMPLE))
    assert tables.parse_sample(KEY, 12, RAW, None, row) is DISCARDED
    assert not tables.is_discarded(KEY, 13, (RAW, None, row))
    live = row.replace(row[:1], tables.sample_row(f"{KEY}/12", SAMPLE)[:1], 1)
    with pytest.raises(DamagedCache, match="is damaged"):
        tables.parse_sample(KEY, 12, RAW, None, live)
