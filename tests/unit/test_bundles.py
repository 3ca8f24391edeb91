"""Bundles: what is read is what was written, or an error (C12)."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import zlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.draws import SHARED, Draw
from cachepipe.contract.entries import Entry, EntrySample, EntrySegment
from cachepipe.contract.keys import digest
from cachepipe.contract.schedule import Place
from cachepipe.errors import BundleError, FormatError, StoreError
from cachepipe.stores import MemoryStore
from cachepipe.stores.base import Adopt
from cachepipe.stores.bundles import container
from cachepipe.stores.bundles.manifest import Manifest
from cachepipe.stores.bundles.reader import Bundle
from cachepipe.stores.bundles.secrets import Findings, kinds_in
from cachepipe.stores.bundles.writer import Writer

STAMP = 1_796_000_000_000_000


def sample(name="a1", origin=0, payload=b'"an answer"', why=None):
    header = orjson.dumps({"id": name, "stamp": STAMP + origin, "call": "c1", "model": "m-1"})
    return EntrySample(name, origin, header, b"" if why else payload, why)


def entry(prompt="why?", samples=(), namespace="=run", place=None):
    document = orjson.dumps({"fields": {"prompt": prompt, "model": "m"}})
    key = digest("scope", document)
    samples = list(samples or [sample()])
    segment = EntrySegment(0, tuple(each.id for each in samples), STAMP, len(samples), place)
    return Entry(key, "scope", document, samples, {Draw(namespace, key, "", 0): [segment]})


def written(*entries, **options):
    file = io.BytesIO()
    Writer(file, "1.0", **options).write(sorted(entries, key=lambda each: each.key))
    return file.getvalue()


def read(tmp_path, content):
    path = tmp_path / "x.cachepipe"
    path.write_bytes(content)
    bundle = Bundle(path)
    try:
        return list(bundle.entries())
    finally:
        bundle.close()


def plain(entries):
    return [
        (
            each.key,
            each.scope,
            each.document,
            [(one.id, one.origin, one.header, one.payload, one.discarded) for one in each.samples],
            {draw: [segment._replace(number=0) for segment in parts] for draw, parts in each.draws.items()},
            each.users,
        )
        for each in entries
    ]


PAYLOADS = [
    b'{"text":"x","n":[1,2.5,null]}',
    b'"a string"',
    b'{"a": 1}',  # not as it would be written
    b"12345678901234567890123456789",
    b"NaN",
    b'"\\ud800"',
    b"\xff\xfe",
    b"",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_byte_of_an_answer_comes_back(tmp_path, payload):
    entries = [entry(samples=[sample(payload=payload)], place=Place(STAMP, 2))]
    assert plain(read(tmp_path, written(*entries))) == plain(entries)


def test_shared_draws_their_users_and_discarded_samples_come_back(tmp_path):
    one = entry(samples=[sample(), sample("a2", 1, why="it is private")])
    one.draws[Draw(SHARED, one.key, "", 0)] = [EntrySegment(0, ("a1",), STAMP, 1)]
    one.draws = dict(sorted(one.draws.items()))
    one.users = ["-", "=run"]
    assert plain(read(tmp_path, written(one))) == plain([one])


def test_equal_content_gives_equal_bytes_which_gzip_reads():
    entries = [entry(f"q{number}", [sample(f"s{number}")]) for number in range(2000)]
    content = written(*entries)
    assert content == written(*reversed(entries))
    lines = gzip.decompress(content).splitlines()
    assert len(lines) == 3 * 2000 + 1
    assert json.loads(lines[-1])["questions"] == 2000


def test_one_question_is_read_by_its_key(tmp_path):
    entries = [entry(f"q{number}", [sample(f"s{number}")]) for number in range(2000)]
    path = tmp_path / "x.cachepipe"
    path.write_bytes(written(*entries))
    bundle = Bundle(path)
    assert len(bundle.manifest.chunks) > 3
    assert [bundle.entry(each.key).samples[0].id for each in entries[::37]] == [
        f"s{number}" for number in range(0, 2000, 37)
    ]
    assert bundle.entry("k2-0") is None
    assert bundle.entry("k2-" + "f" * 64) is None
    bundle.close()


def test_c12_a_bundle_that_is_changed_at_any_byte_is_refused(tmp_path):
    content = written(entry(), entry("other", [sample("b1")]))
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        with pytest.raises((BundleError, FormatError)):
            read(tmp_path, bytes(changed))


def test_c12_a_bundle_that_changes_after_it_was_checked_is_refused(tmp_path):
    path = tmp_path / "x.cachepipe"
    path.write_bytes(written(*(entry(f"q{number}", [sample(f"s{number}")]) for number in range(600))))
    with contextlib.closing(Bundle(path)) as bundle:
        assert plain(bundle.entries()) == plain(bundle.entries())
        with path.open("r+b") as file:
            file.seek(30)
            byte = file.read(1)
            file.seek(30)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(BundleError, match="is damaged: the chunk at byte 0"):
            list(bundle.entries())


def test_c12_a_bundle_that_is_cut_off_anywhere_is_refused(tmp_path):
    content = written(entry(), entry("other", [sample("b1")]))
    for length in range(len(content)):
        with pytest.raises(BundleError):
            read(tmp_path, content[:length])
    with pytest.raises(BundleError):
        read(tmp_path, content + b"x")


@given(content=st.binary(max_size=300))
def test_c12_other_files_are_refused(tmp_path_factory, content):
    with pytest.raises(BundleError):
        read(tmp_path_factory.mktemp("other"), content)


# Bundles that somebody has made by hand, with digests that fit.


def forged(lines, **manifest):
    """A bundle with these lines whose digests are right."""
    content = b"".join(
        json.dumps(line).encode() + b"\n" if isinstance(line, dict) else line for line in lines
    )
    packed = container.member(content)
    first = lines[0].get("question", "k2-")
    chunk = container.chunk(first, 0, packed, len(content))
    made = Manifest("9.9", None, chunks=[manifest.pop("chunk", chunk)])
    line = {**orjson.loads(made.dumps()), **manifest}
    end = container.member(orjson.dumps(line) + b"\n")
    return packed + end + container.trailer(len(packed), end)


def question(**fields):
    found = entry()
    return {
        "question": found.key,
        "scope": found.scope,
        "document": orjson.loads(found.document),
        **fields,
    }


def answer(**fields):
    header = {"id": "a1", "stamp": STAMP, "call": "c"}
    return {"sample": "a1", "index": 0, "header": header, "value": "x", **fields}


def drawn(**fields):
    segments = [[0, ["a1"], STAMP, 1, None]]
    line = {"draw": "", "namespace": None, "replicate": None, "occurrence": 0, "segments": segments}
    return {**line, **fields}


BAD = {
    "another key": [question(question="k2-" + "0" * 64)],
    "a key that is a path": [question(question="../../etc/passwd")],
    "a scope of another type": [question(scope=3)],
    "an answer before its question": [answer()],
    "an index that is negative": [question(), answer(index=-1)],
    "an index that is too large": [question(), answer(index=1 << 60)],
    "an index that is a bool": [question(), answer(index=True)],
    "an index that is a fraction": [question(), answer(index=0.5)],
    "an id that is a path": [question(), answer(sample='a"/../b')],
    "the header of another sample": [question(), answer(header={"id": "b", "stamp": STAMP})],
    "a header without a stamp": [question(), answer(header={"id": "a1"})],
    "a stamp that is too large": [question(), answer(header={"id": "a1", "stamp": 1 << 62})],
    "a header with an origin": [question(), answer(header={"id": "a1", "stamp": 1, "origin": 4})],
    "two samples with one id": [question(), answer(), answer(index=1)],
    "no value": [question(), {k: v for k, v in answer().items() if k != "value"}],
    "NaN": [question(), b'{"sample":"a1","index":NaN}\n'],
    "a lone surrogate": [question(), b'{"sample":"\\ud800"}\n'],
    "a draw of a sample that is not there": [question(), drawn()],
    "a draw without segments": [question(), answer(), drawn(segments=[])],
    "a segment with a gap before it": [question(), answer(), drawn(segments=[[1, ["a1"], STAMP, 1, None]])],
    "a sample twice in a draw": [question(), answer(), drawn(segments=[[0, ["a1", "a1"], STAMP, 1, None]])],
    "a sample in two draws of a namespace": [question(), answer(), drawn(), drawn(draw="2")],
    "more generated than drawn": [question(), answer(), drawn(segments=[[0, ["a1"], STAMP, 2, None]])],
    "an occurrence that is huge": [question(), answer(), drawn(occurrence=1 << 70)],
    "a draw twice": [question(), answer(), drawn(), drawn(segments=[[0, [None], STAMP, 0, None]])],
    "a deep nesting": [question(), b"[" * 100_000 + b"\n"],
    "a list instead of a line": [question(), b"[1]\n"],
    "a manifest that counts other things": [question(), answer(), drawn()],
}


@pytest.mark.parametrize("lines", BAD.values(), ids=BAD)
def test_c12_a_forged_line_is_refused(tmp_path, lines):
    with pytest.raises(BundleError, match="cachepipe never writes"):
        read(tmp_path, forged(lines))


def test_a_forged_bundle_that_is_right_is_read(tmp_path):
    lines = [question(), answer(), drawn()]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    counts = {"questions": 1, "samples": 1, "discarded": 0, "draws": 1}
    [found] = read(tmp_path, forged(lines, content=hashlib.sha256(content).hexdigest(), **counts))
    assert found.samples[0].payload == b'"x"'


def test_c12_a_bundle_of_a_later_version_is_refused_with_its_version(tmp_path):
    with pytest.raises(FormatError, match=r"has format 2; .* reads format 1. Install cachepipe 9.9"):
        read(tmp_path, forged([question()], format=2))


def test_c12_a_chunk_that_claims_to_be_huge_is_not_unpacked(tmp_path):
    chunk = container.Chunk("k2-", 0, 1000, 1 << 40, "0" * 64)
    with pytest.raises(BundleError):
        read(tmp_path, forged([question()], chunk=chunk))


def test_c12_a_chunk_that_is_larger_than_it_claims_is_refused(tmp_path, monkeypatch):
    bomb = b"0" * (32 << 20)
    monkeypatch.setattr(container, "_DENSE", 10_000)
    packed = container.member(bomb)
    monkeypatch.undo()
    made = Manifest("1", None, chunks=[container.chunk("k2-", 0, packed, 100)])
    end = container.member(made.dumps())
    unpacked = []
    real = zlib.decompressobj

    class Watched:
        def __init__(self, *args):
            self._unpacker = real(*args)

        def decompress(self, content, most):
            found = self._unpacker.decompress(content, most)
            unpacked.append(len(found))
            return found

        unused_data = b""

    monkeypatch.setattr(container.zlib, "decompressobj", Watched)
    with pytest.raises(BundleError):
        read(tmp_path, packed + end + container.trailer(len(packed), end))
    assert max(unpacked) <= 1000


def test_an_answer_that_repeats_itself_can_be_exported(tmp_path):
    entries = [entry(samples=[sample(payload=orjson.dumps("x" * (8 << 20)))])]
    assert plain(read(tmp_path, written(*entries))) == plain(entries)


def test_half_a_character_in_a_name_cannot_be_exported():
    with pytest.raises(StoreError, match="half of a character"):
        written(entry(namespace="=\ud800"))


# Secrets.

SECRETS = {
    "an API key": ["sk-proj-abcDEF0123456789abcDEF", "gsk_" + "a1" * 25, "AIza" + "b" * 35],
    "an AWS key": ["AKIAABCDEFGHIJKLMNOP"],
    "a GitHub token": ["ghp_" + "a" * 36],
    "a bearer token": ["Authorization: Bearer abcdefghijklmnopqrstuvwxyz"],
    "a private key": ["-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----"],
    "a password in a URL": ["postgres://user:hunter2@db.example/x"],
    "a private address": ["10.1.2.3", "192.168.1.20", "172.16.0.9"],
    "a private host": ["https://models.corp/v1", "http://gpu7.cluster.internal:8000/v1"],
    "a JSON web token": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijkl"],
}


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in SECRETS.items() for text in texts]
)
def test_what_looks_like_a_secret_is_found_in_every_place(kind, text):
    for lines in (entry(f"say {text}"), entry(samples=[sample(payload=orjson.dumps(f"line\n{text}"))])):
        findings = Findings()
        written(lines, findings=findings)
        assert [finding.kind for finding in findings.found] == [kind]
        assert text not in str(findings.found)


@pytest.mark.parametrize(
    "text",
    [
        "a risk-assessment-of-2024-with-many-words",
        "version 10.1.2",
        "110.1.2.3 and 10.1.2.3.4.5",
        "172.32.0.1",
        "http://localhost:8000/v1",
        "https://user@example.com/path",
        "ratio://a:b",
        "the bearer of bad news came to the castle",
    ],
)
def test_harmless_texts_are_no_secrets(text):
    assert kinds_in(orjson.dumps(text)) == []


def test_entries_that_are_read_together_are_those_that_are_read_alone(monkeypatch):
    monkeypatch.setattr("cachepipe.stores.entries._TOGETHER", 3)
    wanted = [
        entry(
            f"question {number}",
            [sample(f"{number}-{index}", index, why="bad" if index == 1 else None) for index in range(count)],
        )
        for number, count in enumerate([1, 3, 2, 1, 4, 1, 2])
    ]
    for each in wanted[::2]:
        each.draws[Draw(SHARED, each.key, "", 0)] = [EntrySegment(0, (each.samples[0].id,), STAMP, 1)]
        each.users.append("=run")
    wanted.sort(key=lambda each: each.key)
    with contextlib.closing(MemoryStore()) as store:
        store.write([Adopt(each) for each in wanted])
        keys = [each.key for each in wanted]
        assert plain(store.entries()) == plain(wanted)
        assert plain(store.entries_of(keys[::-1])) == plain(map(store.entry, keys))
        assert plain(store.entries_of([keys[4], "k2-0", keys[1]])) == plain([wanted[1], wanted[4]])
        assert not list(store.entries_of([]))
        again = store.write([Adopt(each) for each in wanted])
        assert not any(result.changed for result in again)
