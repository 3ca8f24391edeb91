"""What of a draw is undone (C8)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cachepipe.contract.undoing import Piece, fallen, settled

indices = st.integers(0, 24)


def pieces_of(claims):
    """Return the parts of a draw that claims have added one behind the other."""
    pieces, position = [], 0
    for name, parts in enumerate(claims):
        for part in parts:
            pieces.append(Piece(len(pieces), position, part, name, 0))
            position += len(part)
    return pieces


def nobody(_piece):
    return False


@given(
    st.lists(st.lists(st.lists(indices, max_size=3), min_size=1, max_size=3), max_size=5), st.sets(indices)
)
def test_c8_what_a_claim_added_is_settled_when_all_of_it_and_all_before_it_is_stored(claims, missing):
    """There is no part of a claim that stands while another part of it is undone."""
    whole = [missing.isdisjoint(index for part in claim for index in part) for claim in claims]
    first = whole.index(False) if False in whole else len(claims)
    assert settled(pieces_of(claims), missing.__contains__) == sum(map(len, claims[:first]))


FIRST = Piece(0, 0, [0, 1], "one", 0)
SECOND = Piece(1, 2, [2], "two", 0)


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


def test_c8_what_a_later_part_has_replaced_decides_nothing():
    replacement = Piece(1, 0, [5, 6], "two", 0)
    assert fallen([FIRST, replacement], {0}, lambda index: index in (0, 1), nobody) == []
