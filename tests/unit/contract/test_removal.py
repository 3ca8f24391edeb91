"""What goes when draws or unused samples are removed."""

from __future__ import annotations

from cachepipe.contract.draws import SHARED, Draw
from cachepipe.contract.entries import Entry, EntrySample, EntrySegment
from cachepipe.contract.removal import Selection, step


def sample(index, stamp=1, discarded=None):
    header = b'{"id":"s%d","stamp":%d}' % (index, stamp)
    return EntrySample(f"s{index}", index, header, b"12345", discarded, index)


def entry(draws, count=3, users=(), stamp=1):
    found = {
        Draw(namespace, "k", "", 0): [EntrySegment(0, tuple(f"s{index}" for index in indices), stamp)]
        for namespace, indices in draws.items()
    }
    return Entry("k", None, b"{}", [sample(index, stamp) for index in range(count)], found, list(users))


def gone(found):
    return None if found is None else (list(found.namespaces), [each.index for each in found.unused])


def test_c2_a_sample_that_a_draw_has_never_goes():
    held = entry({"=a": (0, 1), "=b": (1,)})
    assert gone(step(held, Selection(draws=False, samples=True))) == ([], [2])
    assert gone(step(held, Selection(draws=True, samples=True, namespaces=["=a"]))) == (["=a"], [0])
    assert gone(step(held, Selection(draws=True, samples=True))) == (["=a", "=b"], [0, 1, 2])


def test_what_an_overriding_segment_has_replaced_is_still_held():
    held = entry({"=a": (0,)}, count=2)
    [segments] = held.draws.values()
    segments.append(EntrySegment(0, ("s1",), 1))
    assert step(held, Selection(draws=False, samples=True)) is None


def test_only_what_is_old_enough_goes():
    held = entry({"=a": (0,)}, stamp=5)
    assert step(held, Selection(draws=True, samples=True, before=5)) is None
    assert gone(step(held, Selection(draws=True, samples=True, before=6))) == (["=a"], [0, 1, 2])


def test_the_shared_draw_goes_with_its_last_user():
    held = entry({SHARED: (0,)}, count=1, users=["=a", "=b"])
    assert gone(step(held, Selection(draws=True, samples=True, namespaces=["=a"]))) == (["=a"], [])
    both = Selection(draws=True, samples=True, namespaces=["=a", "=b"])
    assert gone(step(held, both)) == (sorted(["=a", "=b", SHARED]), [0])


def test_discarded_samples_are_left_alone_and_small_questions_too():
    held = entry({}, count=1)
    held.samples.append(sample(1, discarded="bad"))
    assert gone(step(held, Selection(draws=False, samples=True, above=4))) == ([], [0])
    assert step(held, Selection(draws=False, samples=True, above=5)) is None
