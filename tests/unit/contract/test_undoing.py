"""What of a draw is undone (C8)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.allotment import Segment
from cachepipe.contract.undoing import fallen, settled

indices = st.integers(0, 24)


def segment(number, position, indices, claim):
    return Segment(number, position, indices, 1, claim, 5)


def segments_of(claims):
    """Return the segments of a draw that claims have added one behind the other."""
    segments, position = [], 0
    for name, added in enumerate(claims):
        for indices in added:
            segments.append(segment(len(segments), position, indices, f"{name}"))
            position += len(indices)
    return segments


def nobody(_segment):
    return False


@given(
    st.lists(st.lists(st.lists(indices, max_size=3), min_size=1, max_size=3), max_size=5), st.sets(indices)
)
def test_c8_what_a_claim_added_is_settled_when_all_of_it_and_all_before_it_is_stored(claims, missing):
    """No segment of a claim stands while another segment of it is undone."""
    whole = [missing.isdisjoint(index for indices in claim for index in indices) for claim in claims]
    first = whole.index(False) if False in whole else len(claims)
    assert settled(segments_of(claims), missing.__contains__) == sum(map(len, claims[:first]))


FIRST = segment(0, 0, [0, 1], "one")
SECOND = segment(1, 2, [2], "two")


def test_c8_a_draw_whose_samples_are_all_stored_stands():
    assert fallen([FIRST], {0}, lambda _: False, nobody) == []


def test_c8_an_incomplete_draw_that_is_left_falls_with_what_counts_on_it():
    assert fallen([FIRST, SECOND], {0}, lambda index: index == 1, nobody) == [FIRST, SECOND]


def test_c8_only_the_last_holder_undoes_a_draw():
    assert fallen([FIRST], {0}, lambda index: index == 1, lambda _: True) == []


def test_c8_what_nobody_has_let_go_is_not_judged():
    assert fallen([FIRST], set(), lambda _: True, nobody) == []
    assert fallen([FIRST, SECOND], {1}, lambda index: index == 0, nobody) == []


def test_c8_what_was_delivered_is_never_undone():
    delivered = FIRST._replace(standing=2)
    assert fallen([delivered, SECOND], {0, 1}, lambda index: index == 2, nobody) == [SECOND]


def test_c8_what_a_later_segment_has_replaced_decides_nothing():
    replacement = segment(1, 0, [5, 6], "two")
    assert fallen([FIRST, replacement], {0}, lambda index: index in (0, 1), nobody) == []
