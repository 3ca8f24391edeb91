"""Which samples are duplicated (C6)."""

from __future__ import annotations

from cachepipe.contract.flags import Asker, Groups, lone

GROUP = ("key", "=namespace")
ONE, OTHER, BATCH = object(), object(), object()


def test_c6_a_lone_request_is_a_group():
    assert lone(2) == [False, True]
    assert Groups().duplicated(GROUP, Asker(ONE), 3) == [False, True, True]


def test_c6_requests_of_two_askers_that_are_served_together_are_merged_into_the_first():
    groups = Groups()
    assert groups.duplicated(GROUP, Asker(ONE), 1) == [False]
    assert groups.duplicated(GROUP, Asker(OTHER), 2) == [True, True]
    assert groups.duplicated(("key", "-"), Asker(OTHER), 1) == [False]
    assert groups.duplicated(("another", "=namespace"), Asker(OTHER), 1) == [False]


def test_c6_one_asker_is_not_served_together_with_itself_but_in_a_batch():
    groups = Groups()
    assert groups.duplicated(GROUP, Asker(ONE), 1) == [False]
    assert groups.duplicated(GROUP, Asker(ONE), 1) == [False]
    assert groups.duplicated(GROUP, Asker(ONE, BATCH), 1) == [False]
    assert groups.duplicated(GROUP, Asker(ONE, BATCH), 1) == [True]


def test_c6_what_comes_after_a_group_was_served_opens_another():
    groups = Groups()
    for end in (groups.clear, lambda: groups.close(GROUP)):
        assert not groups
        assert groups.duplicated(GROUP, Asker(ONE), 1) == [False]
        assert groups
        end()
    assert groups.duplicated(GROUP, Asker(OTHER), 1) == [False]
