"""What every store promises, as tests: subclass ``StoreContract``, say how the store is made, and run pytest.

    class TestMyStore(StoreContract):
        def make_store(self, tmp_path):
            return MyStore(tmp_path)

A new store is finished when it passes. The names of the tests are the promises; C1 to C9 are the
clauses of the sampling contract.
"""
# ruff: noqa: D102, S101, S106 - the names of tests are their sentences, asserting is what they do, tokens are no secrets

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import pytest
except ImportError as error:
    raise ImportError("StoreContract needs pytest: pip install pytest") from error

from cachepipe.accounting import Delivered, RunSums, Usage
from cachepipe.contract.draws import SHARED, Draw, label
from cachepipe.contract.entries import Entry
from cachepipe.contract.intervals import IntervalSet
from cachepipe.contract.keys import Question
from cachepipe.errors import StoreError
from cachepipe.stores.base import (
    Adopt,
    AdoptSums,
    Ahead,
    BeginSum,
    Claim,
    Commit,
    Committed,
    Discard,
    EndSum,
    Erase,
    Grant,
    Note,
    Operation,
    ReleaseHold,
    ReleaseLease,
    Reserve,
    Result,
    RowSum,
    Sample,
    Settle,
    Store,
    Withdraw,
)
from cachepipe.stores.memory import MemoryStore
from cachepipe.wire.usage import COUNTS

KEY = "k2-" + "a" * 64
OTHER = "k2-" + "b" * 64


def asked(key: str = KEY) -> Question:
    """Return a question that has this key."""
    return Question(key, "https://api.example/v1", b'{"fields":{"prompt":"why?"}}')


def drawn(request_id: str = "", *, namespace: str | None = None, key: str = KEY, occurrence: int = 0) -> Draw:
    """Return the identity of a draw."""
    return Draw(label(namespace), key, request_id, occurrence)


class StoreContract:
    """The semantics of the verbs of ``cachepipe.stores.base``, for any store."""

    def make_store(self, tmp_path: Path) -> Store:
        """Return a new and empty store; ``tmp_path`` is a folder of the test's own."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        """Give each test a store of its own."""
        store = self.make_store(tmp_path)
        yield store
        store.close()

    # Shorthands. Override ``apply`` for a store that must stay on one event loop.

    def apply(self, store: Store, *operations: Operation) -> list[Any]:
        """Apply operations in one transaction and return their results."""
        results: list[Result] | None = store.apply_now(operations)
        if results is None:
            results = asyncio.run(_applied(store, operations))
        return list(results)

    def claim(self, store: Store, draw: Draw, n: int = 1, **more: Any) -> Grant:
        """Claim samples for a draw."""
        more.setdefault("token", "one")
        grant: Grant = self.apply(store, Claim(draw, n, asked(draw.key), **more))[0]
        return grant

    def commit(self, store: Store, index: int | None, text: str = "", key: str = KEY) -> Committed:
        """Commit one sample whose payload tells which it is."""
        payload = (text or f"sample {index}").encode()
        result: Committed = self.apply(store, Commit(key, index, payload, {"call": "c"}))[0]
        return result

    def leave(
        self,
        store: Store,
        draw: Draw,
        grant: Grant,
        *,
        complete: bool,
        token: str = "one",  # noqa: S107 - names a holder
        n: int = 0,
    ) -> None:
        """End a hold; ``n`` samples were received."""
        self.apply(store, ReleaseHold(draw, token, grant.held, complete, n))

    def fill(self, store: Store, draw: Draw, n: int = 1, token: str = "one") -> Grant:  # noqa: S107 - names a holder
        """Claim, generate what is the claimant's to generate, and leave the draw complete."""
        grant = self.claim(store, draw, n, token=token)
        for index in grant.mine:
            self.commit(store, index, key=draw.key)
        self.leave(store, draw, grant, complete=True, token=token, n=n)
        return grant

    # Budgets.

    def test_what_is_reserved_and_spent_never_exceeds_a_budget(self, store: Store) -> None:
        first = self.apply(store, Reserve("=x", "one", 60, 100))[0]
        assert (first.granted, first.spent, first.reserved, first.lost) == (True, 0, 60, False)
        second = self.apply(store, Reserve("=x", "two", 60, 100))[0]
        assert (second.granted, second.reserved) == (False, 60)
        assert self.apply(store, Reserve("=y", "three", 100, 100))[0].granted
        self.apply(store, Settle("=x", "one", 30))
        third = self.apply(store, Reserve("=x", "two", 60, 100))[0]
        assert (third.granted, third.spent, third.reserved) == (True, 30, 60)

    def test_a_sum_of_the_rows_counts_each_call_once_that_goes_on_meanwhile(self, store: Store) -> None:
        self.apply(store, *(Reserve("=x", call, 10, 100) for call in ("before", "during", "later")))
        self.apply(store, Settle("=x", "before", 5))
        begun = self.apply(store, BeginSum("=x", "a sum"))[0]
        assert ({*begun.calls}, [*begun.ended]) == ({"during", "later"}, [])
        self.apply(store, Settle("=x", "during", 6))
        apart = [(("during",), 6), (("later",), 7)]  # both have stored their samples
        self.apply(store, EndSum("=x", "a sum", RowSum(5, apart)))
        state = self.apply(store, Reserve("=x", "", 0, 100))[0]
        assert (state.spent, state.reserved) == (11, 10)
        self.apply(store, Settle("=x", "later", 7))
        state = self.apply(store, Reserve("=x", "", 0, 100))[0]
        assert (state.spent, state.reserved, state.lost) == (18, 0, False)

    def test_a_call_that_was_taken_for_lost_counts_once_when_it_ends_after_all(self, store: Store) -> None:
        self.apply(store, Settle("=x", "unknown", 7), Settle("=x", "released", 0))
        lost = self.apply(store, Reserve("=x", "new", 10, 100))[0]
        assert (lost.granted, lost.lost, lost.reserved) == (False, True, 7)
        begun = self.apply(store, BeginSum("=x", "a sum"))[0]
        assert [*begun.ended] == ["unknown"]
        self.apply(store, EndSum("=x", "a sum", RowSum(3, [(("unknown",), 7)]), begun.ended))
        state = self.apply(store, Reserve("=x", "new", 10, 100))[0]
        assert (state.granted, state.spent, state.reserved) == (True, 10, 10)

    # Claims.

    def test_a_first_claim_is_to_generate_all_its_samples_from_the_front(self, store: Store) -> None:
        grant = self.claim(store, drawn(), 3)
        assert grant.indices == grant.mine == [0, 1, 2]
        assert grant.samples == [None, None, None]
        assert grant.added
        assert grant.held
        assert not grant.shared
        assert not grant.fresh_id

    def test_two_draws_of_a_namespace_never_get_the_same_index(self, store: Store) -> None:
        """C1, also while nothing is generated yet."""
        first, second = self.claim(store, drawn("a"), 2), self.claim(store, drawn("b"), 2)
        again = self.claim(store, drawn("a", occurrence=1), 1)
        assert [*first.indices, *second.indices, *again.indices] == [0, 1, 2, 3, 4]

    def test_a_claim_gives_the_samples_that_exist(self, store: Store) -> None:
        self.fill(store, drawn("a"), 2)
        grant = self.claim(store, drawn("a"), 2)
        assert [sample and sample.payload for sample in grant.samples] == [b"sample 0", b"sample 1"]
        assert (grant.mine, grant.added, grant.held) == ([], 0, ())

    def test_a_larger_claim_gets_the_same_samples_then_more(self, store: Store) -> None:
        """C2 and C4: with n wanted and k at hand, n - k are to be generated."""
        self.fill(store, drawn("a"), 2)
        self.fill(store, drawn("b"), 1)
        grant = self.claim(store, drawn("a"), 4)
        assert grant.indices == [0, 1, 3, 4]
        assert grant.mine == [3, 4]
        assert grant.added

    def test_a_smaller_claim_gets_the_first_samples(self, store: Store) -> None:
        """C2."""
        self.fill(store, drawn("a"), 3)
        assert self.claim(store, drawn("a"), 2).indices == [0, 1]
        assert self.claim(store, drawn("a"), 3).indices == [0, 1, 2]

    def test_another_namespace_reuses_from_the_front(self, store: Store) -> None:
        """C3 and C4: nothing is generated while the list has samples that the namespace has not drawn."""
        self.fill(store, drawn("a", namespace="first"), 3)
        grant = self.claim(store, drawn("z", namespace="second"), 4)
        assert grant.indices == [0, 1, 2, 3]
        assert grant.mine == [3]

    def test_a_second_namespace_repeats_the_first_in_any_order(self, store: Store) -> None:
        """C3."""
        for name in "abc":
            self.fill(store, drawn(name, namespace="first"), 2)
        got = {name: self.claim(store, drawn(name, namespace="second"), 2).indices for name in "cab"}
        assert got == {"a": [0, 1], "b": [2, 3], "c": [4, 5]}

    def test_the_earliest_other_namespace_is_the_one_that_is_repeated(self, store: Store) -> None:
        """C3: the second's own draws do not count, nor a later namespace's."""
        self.fill(store, drawn("a", namespace="first"), 1)
        self.fill(store, drawn("b", namespace="first"), 1)
        self.fill(store, drawn("x", namespace="second"), 1)  # takes 0
        assert self.claim(store, drawn("a", namespace="second"), 1).indices == [1]
        assert self.claim(store, drawn("a", namespace="third"), 1).indices == [0]

    def test_namespaces_none_and_empty_are_two(self, store: Store) -> None:
        self.fill(store, drawn("a", namespace=None))
        self.fill(store, drawn("b", namespace=None))
        assert self.claim(store, drawn("b", namespace="")).indices == [1]
        assert self.claim(store, drawn("c", namespace="")).indices == [0]

    def test_a_sample_that_is_being_generated_is_awaited_not_generated_again(self, store: Store) -> None:
        """C4."""
        self.claim(store, drawn("a", namespace="first"), 2)
        grant = self.claim(store, drawn("a", namespace="second"), 2, token="two")
        assert (grant.indices, grant.mine, grant.samples) == ([0, 1], [], [None, None])
        assert grant.held

    def test_keys_have_lists_of_their_own(self, store: Store) -> None:
        self.fill(store, drawn("a"), 2)
        assert self.claim(store, drawn("a", key=OTHER), 1).mine == [0]

    def test_a_new_id_on_a_key_that_its_namespace_has_drawn_is_told(self, store: Store) -> None:
        self.fill(store, drawn("a", namespace="first"))
        assert self.claim(store, drawn("b", namespace="first")).fresh_id
        assert not self.claim(store, drawn("a", namespace="first")).fresh_id
        assert not self.claim(store, drawn("a", namespace="second")).fresh_id
        assert not self.claim(store, drawn("", namespace="first")).fresh_id

    def test_a_refresh_gets_new_indices_and_the_old_stay_taken(self, store: Store) -> None:
        self.fill(store, drawn("a"), 2)
        grant = self.claim(store, drawn("a"), 2, refresh=True)
        assert grant.indices == grant.mine == [2, 3]
        for index in grant.mine:
            self.commit(store, index)
        self.leave(store, drawn("a"), grant, complete=True)
        assert self.claim(store, drawn("a"), 2).indices == [2, 3]
        assert self.claim(store, drawn("b"), 1).indices == [4]

    def test_a_refresh_with_fewer_samples_replaces_the_whole_draw(self, store: Store) -> None:
        """Modes: later runs replay the new samples, and then get others than the old."""
        self.fill(store, drawn("a"), 3)
        grant = self.claim(store, drawn("a"), 2, refresh=True)
        for index in grant.mine:
            self.commit(store, index)
        self.leave(store, drawn("a"), grant, complete=True)
        [info] = store.draws(KEY)
        assert list(info.indices) == grant.indices == [3, 4]
        assert store.recall(drawn("a"), 3) is None
        assert self.claim(store, drawn("a"), 3).indices == [3, 4, 5]
        assert self.claim(store, drawn("a", namespace="another"), 3).indices == [3, 4, 5]

    @pytest.mark.parametrize("n", [1, 2])
    def test_a_refresh_that_fails_leaves_the_old_samples(self, store: Store, n: int) -> None:
        """C8: what it had added is free again."""
        self.fill(store, drawn("a"), 2)
        grant = self.claim(store, drawn("a"), n, refresh=True)
        self.apply(
            store, ReleaseLease(KEY, grant.mine), ReleaseHold(drawn("a"), "one", grant.held, complete=False)
        )
        assert self.claim(store, drawn("a"), 2).indices == [0, 1]
        assert self.claim(store, drawn("b"), 1).indices == [2]

    def test_the_shared_draw_lies_outside_the_namespaces(self, store: Store) -> None:
        """C1: it takes nothing from those who use it."""
        shared = Draw(SHARED, KEY, "", 0)
        self.fill(store, shared, 2)
        for user in ("first", "second"):
            assert self.claim(store, shared, 2, user=label(user)).indices == [0, 1]
            assert self.claim(store, drawn("a", namespace=user), 1).indices == [0]

    def test_the_shared_draw_follows_no_namespace(self, store: Store) -> None:
        """C3 couples namespaces; the shared draw takes the lowest that is there."""
        self.fill(store, drawn("a"))
        assert self.fill(store, drawn("")).indices == [1]
        assert self.claim(store, Draw(SHARED, KEY, "", 0)).indices == [0]

    def test_a_question_is_stored_once_with_its_scope(self, store: Store) -> None:
        self.claim(store, drawn("a"))
        first = store.question(KEY)
        self.claim(store, drawn("b"))
        assert first is not None
        assert store.question(KEY) == first
        assert (first.key, first.scope, first.document) == (KEY, asked().scope, asked().document)
        assert store.question(OTHER) is None

    # Commits.

    def test_a_committed_sample_comes_back_byte_for_byte(self, store: Store) -> None:
        """C7, with its permanent id and what is recorded of it."""
        payload = bytes(range(256)) * 3 + b'\n{"id":"x"}\n'
        [grant] = self.apply(store, Claim(drawn(), 1, asked(), "one"))
        [committed] = self.apply(store, Commit(KEY, 0, payload, {"call": "abc"}, id="me"))
        assert committed.kept
        recalled = store.recall(drawn(), 1)
        assert recalled is not None
        [sample] = recalled.samples
        assert sample == committed.sample
        assert isinstance(sample, Sample)
        assert (sample.index, sample.id, sample.payload) == (grant.indices[0], "me", payload)
        assert sample.meta == {"id": "me", "stamp": sample.meta["stamp"], "call": "abc"}
        assert abs(sample.at - time.time()) < 600  # seconds: a server has a clock of its own

    def test_an_empty_payload_is_a_sample(self, store: Store) -> None:
        self.claim(store, drawn())
        self.apply(store, Commit(KEY, 0, b"", {}))
        [sample] = store.samples(KEY)
        assert sample.payload == b""

    def test_an_extra_sample_is_stored_behind_the_list_and_used_first(self, store: Store) -> None:
        """C8: extra samples are stored and reused; C4: samples left over are used first."""
        self.claim(store, drawn("a"), 2)
        extra = self.commit(store, None, "extra")
        assert (extra.sample.index, extra.kept) == (2, False)
        grant = self.claim(store, drawn("b"), 1)
        assert (grant.indices, grant.mine) == ([2], [])

    def test_a_commit_after_the_lease_was_lost_is_kept_as_an_extra(self, store: Store) -> None:
        """C6 and C7: what was bought twice is kept, at another index."""
        self.claim(store, drawn("a"))
        self.apply(store, ReleaseLease(KEY, [0]))
        assert self.claim(store, drawn("a"), token="two").mine == [0]
        self.commit(store, 0, "on time")
        late = self.commit(store, 0, "late")
        assert not late.kept
        assert late.sample.index == 1
        assert [sample.payload for sample in store.samples(KEY)] == [b"on time", b"late"]

    def test_a_commit_after_the_lease_was_given_up_keeps_its_place_when_nobody_took_it(
        self, store: Store
    ) -> None:
        self.claim(store, drawn("a"))
        self.apply(store, ReleaseLease(KEY, [0]))
        assert self.commit(store, 0).kept
        assert [sample.index for sample in store.samples(KEY)] == [0]
        assert self.claim(store, drawn("b")).indices == [1]

    def test_committing_a_sample_twice_stores_it_once(self, store: Store) -> None:
        """A transaction that was cut short may be applied again."""
        self.claim(store, drawn("a"))
        commit = Commit(KEY, 0, b"x", {}, id="same")
        assert self.apply(store, commit)[0].kept
        assert self.apply(store, commit)[0].kept
        assert len(list(store.samples(KEY))) == 1

    def test_a_commit_to_a_key_that_nobody_claimed_is_refused(self, store: Store) -> None:
        with pytest.raises(StoreError, match="knows no key"):
            self.commit(store, 0)
        assert list(store.keys()) == []

    def test_one_refused_operation_takes_its_whole_transaction_back(self, store: Store) -> None:
        """Except that a sample may be down already: applied again, it is kept, and once only."""
        self.claim(store, drawn("a"), 1)
        commit = Commit(KEY, 0, b"x", {}, id="same")
        with pytest.raises(StoreError):
            self.apply(store, Claim(drawn("b"), 2, asked(), "two"), commit, Commit(OTHER, 0, b"y", {}))
        assert [info.draw.request_id for info in store.draws()] == ["a"]
        assert self.apply(store, commit)[0].kept
        assert [sample.id for sample in store.samples(KEY)] == ["same"]
        assert self.claim(store, drawn("b"), 1).indices == [1]

    def test_operations_of_a_transaction_see_one_another(self, store: Store) -> None:
        """A thousand misses of one turn of the loop are one transaction."""
        results = self.apply(store, *(Claim(drawn(str(i)), 1, asked(), "one") for i in range(1000)))
        assert [grant.indices for grant in results] == [[i] for i in range(1000)]
        committed = self.apply(store, *(Commit(KEY, i, b"%d" % i, {}) for i in range(1000)))
        assert all(one.kept for one in committed)
        grants = self.apply(
            store,
            Claim(drawn("0", namespace="second"), 1, asked(), "two"),
            Commit(KEY, None, b"extra", {}),
            Claim(drawn("new"), 1, asked(), "two"),
        )
        assert grants[2].indices == [1000]
        assert grants[2].samples[0].payload == b"extra"

    # Giving up.

    def test_a_forgone_index_is_free_and_the_next_who_needs_one_generates_it(self, store: Store) -> None:
        grant = self.claim(store, drawn("a"), 2)
        self.apply(store, ReleaseLease(KEY, [0]), ReleaseHold(drawn("a"), "one", grant.held, complete=False))
        assert store.status([(KEY, 0), (KEY, 1)]) == ["free", "ours"]
        grant = self.claim(store, drawn("b"), 2)
        assert sorted(grant.indices) == [0, 1]
        assert grant.mine == [0]

    def test_forgoing_a_stored_sample_changes_nothing(self, store: Store) -> None:
        self.fill(store, drawn("a"), 1)
        self.apply(store, ReleaseLease(KEY, [0, 7]))
        assert store.status([(KEY, 0)]) == ["stored"]
        assert self.claim(store, drawn("a"), 1).mine == []

    def test_an_incomplete_draw_that_is_left_is_undone(self, store: Store) -> None:
        """C8: its indices are free again, and what was stored of it serves others."""
        grant = self.claim(store, drawn("a"), 3)
        self.commit(store, 1)
        self.apply(
            store, ReleaseLease(KEY, [0, 2]), ReleaseHold(drawn("a"), "one", grant.held, complete=False)
        )
        assert list(store.draws()) == []
        again = self.claim(store, drawn("b"), 2)
        assert (again.indices, again.mine) == ([1, 0], [0])

    def test_a_draw_whose_samples_are_all_stored_stands_whoever_leaves_it(self, store: Store) -> None:
        """C8: delivered or not."""
        grant = self.claim(store, drawn("a"), 2)
        self.commit(store, 0)
        self.commit(store, 1)
        self.leave(store, drawn("a"), grant, complete=False)
        assert store.recall(drawn("a"), 2) is not None
        assert self.claim(store, drawn("b")).indices == [2]

    def test_only_the_last_holder_undoes_a_draw(self, store: Store) -> None:
        """C8."""
        first = self.claim(store, drawn("a"), 2)
        second = self.claim(store, drawn("a"), 2, token="two")
        assert second.indices == first.indices
        self.leave(store, drawn("a"), first, complete=False)
        assert self.claim(store, drawn("b"), 1).indices == [2]
        self.leave(store, drawn("a"), second, complete=False, token="two")
        assert self.claim(store, drawn("c"), 1).indices == [0]

    def test_undoing_an_extension_leaves_the_positions_before_it(self, store: Store) -> None:
        self.fill(store, drawn("a"), 2)
        grant = self.claim(store, drawn("a"), 4)
        self.apply(
            store, ReleaseLease(KEY, grant.mine), ReleaseHold(drawn("a"), "one", grant.held, complete=False)
        )
        assert [info.indices for info in store.draws()] == [(0, 1)]
        assert self.claim(store, drawn("b"), 1).indices == [2]

    def test_a_joiner_that_wanted_more_and_fails_first_takes_its_own_part_back(self, store: Store) -> None:
        """C8 and C2: no gap is left in a draw, however its holders end."""
        first = self.claim(store, drawn("a"), 1)
        second = self.claim(store, drawn("a"), 2, token="two")
        self.commit(store, 1)
        self.leave(store, drawn("a"), second, complete=False, token="two")
        self.apply(store, ReleaseLease(KEY, [0]), ReleaseHold(drawn("a"), "one", first.held, complete=False))
        grant = self.fill(store, drawn("a"), 2)
        recalled = store.recall(drawn("a"), 2)
        assert recalled is not None
        assert recalled.indices == grant.indices

    def test_what_a_joiner_was_granted_stays_its_own_when_the_others_fail(self, store: Store) -> None:
        """C1 and C2: the ledger holds what a request received."""
        self.claim(store, drawn("a"), 1)
        second = self.claim(store, drawn("a"), 2, token="two")
        self.commit(store, 1)
        third = self.claim(store, drawn("a"), 2, token="three")
        self.leave(store, drawn("a"), second, complete=False, token="two")
        self.commit(store, 0)
        self.leave(store, drawn("a"), third, complete=True, token="three")
        recalled = store.recall(drawn("a"), 2)
        assert recalled is not None
        assert recalled.indices == third.indices
        assert self.claim(store, drawn("b"), 1).indices == [2]

    # A claim that replaces a discarded sample and asks for more adds two things, which stand or fall as one.

    def replace(self, store: Store, position: int, *, spare: bool) -> Grant:
        """Let "one" claim three samples of a draw that has two, one of them discarded."""
        self.fill(store, drawn("a"), 2)
        if spare:
            self.commit(store, None, "spare")
        self.apply(store, Discard(KEY, position, "a refusal"))
        grant = self.claim(store, drawn("a"), 3)
        assert grant.indices == [2 if place == position else place for place in range(2)] + [3]
        assert grant.mine == ([3] if spare else [2, 3])
        return grant

    def give_up(self, store: Store, grant: Grant, token: str = "one") -> tuple[int, ...]:  # noqa: S107 - names a holder
        """Fail for want of sample 3; return what the ledger holds then."""
        self.apply(store, ReleaseLease(KEY, [3]), ReleaseHold(drawn("a"), token, grant.held, complete=False))
        [info] = store.draws(KEY, label(None))
        return info.indices

    @pytest.mark.parametrize("position", [0, 1])
    @pytest.mark.parametrize("spare", [True, False])
    def test_a_replacement_that_is_stored_is_undone_with_the_draw_that_failed(
        self, store: Store, position: int, spare: bool
    ) -> None:
        """C8: the draw is what it was before, and the sample serves another."""
        grant = self.replace(store, position, spare=spare)
        if not spare:
            self.commit(store, 2)
        assert self.give_up(store, grant) == (0, 1)
        assert self.claim(store, drawn("b")).indices == [2]

    def test_the_earlier_of_two_replacements_is_undone_with_the_later(self, store: Store) -> None:
        """C8, whichever of them is stored."""
        self.fill(store, drawn("a"), 3)
        self.apply(store, Discard(KEY, 0, "a refusal"), Discard(KEY, 2, "a refusal"))
        grant = self.claim(store, drawn("a"), 3)
        assert grant.mine == [3, 4]
        self.commit(store, 3)
        self.apply(store, ReleaseLease(KEY, [4]), ReleaseHold(drawn("a"), "one", grant.held, complete=False))
        assert [info.indices for info in store.draws()] == [(0, 1, 2)]
        assert self.claim(store, drawn("b")).indices == [3]

    @pytest.mark.parametrize(("position", "n", "left"), [(0, 1, (2, 1)), (1, 2, (0, 2)), (1, 1, (0, 1))])
    def test_a_replacement_that_was_delivered_stands_when_the_draw_fails(
        self, store: Store, position: int, n: int, left: tuple[int, int]
    ) -> None:
        """C1 and C2: a shorter claim got it meanwhile; one that did not reach so far lets nothing stand."""
        grant = self.replace(store, position, spare=True)
        short = self.claim(store, drawn("a"), n, token="two")
        assert (short.indices, short.mine, short.held) == (grant.indices[:n], [], ())
        assert self.give_up(store, grant) == left
        assert self.claim(store, drawn("b")).indices == [3 if 2 in left else 2]
        assert self.claim(store, drawn("a"), n).indices == list(left[:n])

    def test_no_replacement_is_recalled_while_the_rest_of_its_draw_is_missing(self, store: Store) -> None:
        """It may yet be undone, so it is got by a claim, which lets it stand."""
        grant = self.replace(store, 0, spare=True)
        for n in (1, 2):
            assert store.recall(drawn("a"), n) is None
        self.commit(store, 3)
        recalled = store.recall(drawn("a"), 1)
        assert recalled is not None
        assert recalled.indices == [2]
        assert self.give_up(store, grant) == (2, 1, 3), "once all its samples are stored a draw stands"

    @pytest.mark.parametrize("spare", [True, False])
    def test_the_last_holder_undoes_a_replacement_that_is_stored(self, store: Store, spare: bool) -> None:
        """C8: one that joined and left has received nothing."""
        first = self.replace(store, 0, spare=spare)
        second = self.claim(store, drawn("a"), 3 if spare else 1, token="two")
        assert (second.indices, second.mine) == (first.indices[: len(second.indices)], [])
        if not spare:
            self.commit(store, 2)
        assert self.give_up(store, first) == ((2, 1, 3))
        assert self.give_up(store, second, "two") == (0, 1)
        assert self.claim(store, drawn("b")).indices == [2]

    def test_a_replacement_that_a_joiner_waited_for_and_received_stands(self, store: Store) -> None:
        """C8 and C2: and what it did not ask for does not."""
        first = self.replace(store, 0, spare=False)
        second = self.claim(store, drawn("a"), 1, token="two")
        assert (second.indices, second.samples) == ([2], [None])
        self.commit(store, 2)
        self.apply(store, ReleaseHold(drawn("a"), "two", second.held, complete=True, n=1))
        assert self.give_up(store, first) == (2, 1)
        assert self.claim(store, drawn("b")).indices == [3]

    def test_a_claim_that_was_answered_with_a_replacement_stands_on_its_own(self, store: Store) -> None:
        """C1 and C2: whoever held the rest of the draw, before it or after."""
        first = self.claim(store, drawn("a"), 3)
        self.commit(store, 0)
        self.commit(store, None, "spare")
        self.apply(store, Discard(KEY, 0, "a refusal"))
        short = self.claim(store, drawn("a"), 1, token="two")
        assert (short.indices, short.mine, short.held) == ([3], [], ())
        third = self.claim(store, drawn("a"), 3, token="three")
        self.apply(
            store, ReleaseLease(KEY, [1, 2]), ReleaseHold(drawn("a"), "one", first.held, complete=False)
        )
        self.leave(store, drawn("a"), third, complete=False, token="three")
        assert [info.indices for info in store.draws()] == [(3,)]
        assert self.claim(store, drawn("b")).indices == [1]

    def test_leaving_twice_changes_nothing(self, store: Store) -> None:
        grant = self.claim(store, drawn("a"), 1)
        self.claim(store, drawn("a"), 1, token="two")
        for _ in range(2):
            self.leave(store, drawn("a"), grant, complete=False)
        assert [info.indices for info in store.draws()] == [(0,)]

    # Reading.

    def test_recall_knows_complete_draws_only(self, store: Store) -> None:
        """A draw that is incomplete may yet be undone; a claim of its first samples lets them stand."""
        assert store.recall(drawn("a"), 1) is None
        grant = self.claim(store, drawn("a"), 2)
        assert store.recall(drawn("a"), 1) is None
        self.commit(store, 0)
        assert store.recall(drawn("a"), 2) is None
        assert store.recall(drawn("a"), 1) is None
        self.commit(store, 1)
        for n in (1, 2):
            recalled = store.recall(drawn("a"), n)
            assert recalled is not None
            assert (recalled.indices, recalled.mine) == (grant.indices[:n], [])
            assert not recalled.added
        assert store.recall(drawn("a"), 3) is None
        assert store.recall(drawn("a", namespace="other"), 1) is None
        assert store.recall(drawn("a", occurrence=1), 1) is None
        assert store.recall(drawn("a", key=OTHER), 1) is None

    def test_what_was_delivered_of_a_draw_stands_when_the_rest_of_it_fails(self, store: Store) -> None:
        """C1 and C2: a shorter claim that was answered in the meantime keeps its samples."""
        first = self.claim(store, drawn("a"), 3)
        self.commit(store, 0)
        short = self.claim(store, drawn("a"), 1, token="two")
        assert (short.indices, short.mine, short.held) == ([0], [], ())
        self.apply(
            store, ReleaseLease(KEY, [1, 2]), ReleaseHold(drawn("a"), "one", first.held, complete=False)
        )
        assert [info.indices for info in store.draws()] == [(0,)]
        assert self.claim(store, drawn("b"), 1).indices == [1]
        assert self.claim(store, drawn("a"), 1).indices == [0]

    def test_what_was_delivered_of_an_extension_stands_and_no_more_of_it(self, store: Store) -> None:
        """C8: the positions that nobody was given are free again."""
        self.fill(store, drawn("a"), 1)
        longer = self.claim(store, drawn("a"), 4, token="two")
        self.commit(store, 1)
        short = self.claim(store, drawn("a"), 2, token="three")
        assert (short.indices, short.mine, short.held) == ([0, 1], [], ())
        self.apply(
            store, ReleaseLease(KEY, [2, 3]), ReleaseHold(drawn("a"), "two", longer.held, complete=False)
        )
        assert [info.indices for info in store.draws()] == [(0, 1)]
        assert self.claim(store, drawn("b"), 1).indices == [2]

    def test_what_a_joiner_of_an_extension_received_stands_and_no_more_of_it(self, store: Store) -> None:
        """C8, likewise for one that had to wait for its sample."""
        self.fill(store, drawn("a"), 1)
        longer = self.claim(store, drawn("a"), 4, token="two")
        short = self.claim(store, drawn("a"), 2, token="three")
        assert short.held
        self.commit(store, 1)
        self.apply(store, ReleaseHold(drawn("a"), "three", short.held, complete=True, n=2))
        self.apply(
            store, ReleaseLease(KEY, [2, 3]), ReleaseHold(drawn("a"), "two", longer.held, complete=False)
        )
        assert [info.indices for info in store.draws()] == [(0, 1)]
        assert self.claim(store, drawn("b"), 1).indices == [2]

    def test_a_replay_gets_what_a_claim_would_and_takes_it_in_memory_only(self, store: Store) -> None:
        for name in "abc":
            self.fill(store, drawn(name, namespace="first"), 1)
        before = [info.draw for info in store.draws()]
        taken = IntervalSet()
        got = []
        for name in ("b", "x", "y"):
            grant = store.replay(drawn(name, namespace="second"), 1, taken)
            assert grant is not None
            got += grant.indices
        assert got == [1, 0, 2]
        assert store.replay(drawn("z", namespace="second"), 1, taken) is None
        assert [info.draw for info in store.draws()] == before
        assert self.claim(store, drawn("z", namespace="second"), 1).indices == [0]

    def test_what_is_foreseen_is_what_successive_claims_get_and_nothing_is_written(
        self, store: Store
    ) -> None:
        """C4: earlier claims of a plan count, as they would when made."""
        self.fill(store, drawn("a"), 2)
        self.claim(store, drawn("c"), 1)
        before = [info.pending for info in store.keys(KEY[:3])]
        shared = Draw(SHARED, OTHER, "", 0)
        wanted = [
            (drawn("a"), 3),
            (drawn("b"), 1),
            (drawn("x", namespace="second"), 4),
            (drawn("y", namespace="second"), 2),
            (drawn("z", key=OTHER), 2),
            (drawn("z", key=OTHER, occurrence=1), 1),
            (shared, 2),
            (shared, 3),
        ]
        ahead: dict[tuple[str, str], Ahead] = {}
        asked = [(draw, n, ahead.setdefault((draw.namespace, draw.key), Ahead())) for draw, n in wanted]
        found = store.foresee(asked)
        figures = [(len(each.samples), each.generated, each.awaited, each.known) for each in found]
        assert figures == [
            (2, 1, [], True),
            (0, 1, [], True),
            (2, 1, [2], True),
            (0, 2, [], True),
            (0, 2, [], False),
            (0, 1, [], False),
            (0, 2, [], False),
            (0, 1, [], False),
        ]
        assert [info.pending for info in store.keys(KEY[:3])] == before
        [refreshed] = store.foresee([(drawn("a"), 2, Ahead())], refresh=True)
        assert (refreshed.samples, refreshed.generated) == ([], 2)

    def test_a_replay_gives_a_draw_what_the_ledger_holds_for_it(self, store: Store) -> None:
        """C2."""
        self.fill(store, drawn("a"), 1)
        self.fill(store, drawn("b"), 2)
        grant = store.replay(drawn("b"), 2, IntervalSet())
        assert grant is not None
        assert grant.indices == [1, 2]

    def test_a_replay_of_a_pending_or_partial_draw_is_a_miss_and_claims_nothing(self, store: Store) -> None:
        self.fill(store, drawn("a", namespace="first"), 2)
        self.claim(store, drawn("b", namespace="first"), 1)
        taken = IntervalSet()
        assert store.replay(drawn("x", namespace="second"), 3, taken) is None
        assert taken.interval_at(0) is None
        assert store.replay(drawn("x", namespace="second"), 2, taken) is not None
        assert store.replay(drawn("x", key=OTHER), 1, IntervalSet()) is None

    def test_a_status_is_stored_ours_or_free(self, store: Store) -> None:
        self.claim(store, drawn("a"), 2)
        self.commit(store, 0)
        assert store.status([(KEY, 1), (KEY, 0), (KEY, 2), (OTHER, 0)]) == ["ours", "stored", "free", "free"]
        assert store.status([]) == []

    # Discards.

    def test_a_discarded_sample_is_replaced_at_its_position(self, store: Store) -> None:
        """C2: on record, the draw gets another at the same position."""
        self.fill(store, drawn("a"), 3)
        self.apply(store, Discard(KEY, 1, "a refusal"))
        assert store.recall(drawn("a"), 3) is None
        assert [sample.index for sample in store.samples(KEY)] == [0, 2]
        grant = self.claim(store, drawn("a"), 3)
        assert grant.indices == [0, 3, 2]
        assert grant.mine == [3]
        self.commit(store, 3)
        self.leave(store, drawn("a"), grant, complete=True)
        recalled = store.recall(drawn("a"), 3)
        assert recalled is not None
        assert recalled.indices == [0, 3, 2]

    def test_a_discarded_sample_is_never_given_out_again(self, store: Store) -> None:
        self.fill(store, drawn("a", namespace="first"), 2)
        self.apply(store, Discard(KEY, 0, "malformed"))
        assert self.claim(store, drawn("a", namespace="second"), 1).indices == [1]
        grant = store.replay(drawn("a", namespace="third"), 1, IntervalSet())
        assert grant is not None
        assert grant.indices == [1]
        assert store.status([(KEY, 0)]) != ["stored"]
        self.apply(store, Discard(KEY, 0, "twice changes nothing"))

    def test_discarding_what_is_not_there_is_refused(self, store: Store) -> None:
        self.claim(store, drawn("a"), 1)
        with pytest.raises(StoreError, match="no sample 0"):
            self.apply(store, Discard(KEY, 0, "why not"))

    # Removals.

    def test_a_namespace_whose_draws_were_removed_draws_anew(self, store: Store) -> None:
        """C1 and C2: the draws of others stay as they are, and are coupled to those that are left (C3)."""
        for namespace in ("first", "second"):
            self.fill(store, drawn("a", namespace=namespace), 2)
        self.fill(store, drawn("b", namespace="first"), 2)
        self.apply(store, Withdraw(KEY, [label("first")]))
        assert store.recall(drawn("a", namespace="first"), 2) is None
        recalled = store.recall(drawn("a", namespace="second"), 2)
        assert recalled is not None
        assert recalled.indices == [0, 1]
        assert [info.draw.namespace for info in store.draws()] == [label("second")]
        assert self.claim(store, drawn("b", namespace="first"), 1).indices == [0]
        assert self.claim(store, drawn("a", namespace="third"), 2).indices == [0, 1]

    def test_draws_that_are_under_way_are_not_removed(self, store: Store) -> None:
        grant = self.claim(store, drawn("a", namespace="first"))
        with pytest.raises(StoreError, match="end it"):
            self.apply(store, Withdraw(KEY, [label("first")]))
        self.commit(store, 0)
        self.leave(store, drawn("a", namespace="first"), grant, complete=True)
        assert store.recall(drawn("a", namespace="first"), 1) is not None

    def test_a_sample_is_deleted_unless_a_draw_has_it_or_somebody_generates_it(self, store: Store) -> None:
        """C1: no other sample gets its index."""
        self.fill(store, drawn("a", namespace="first"), 2)
        self.fill(store, drawn("a", namespace="second"), 1)
        self.apply(store, Withdraw(KEY, [label("first")]))
        self.claim(store, drawn("b", namespace="second"), 2)
        self.commit(store, None, "an extra")
        [erased] = self.apply(store, Erase(KEY, [0, 1, 2, 3, 4], "test"))
        assert [*erased.indices] == [3]
        assert [sample.index for sample in store.samples(KEY)] == [0, 1]
        assert self.claim(store, drawn("c", namespace="second")).indices == [4]

    # Looking at a cache.

    def test_keys_are_listed_in_order_of_their_first_request(self, store: Store) -> None:
        self.fill(store, drawn("a", key=OTHER, namespace="first"), 2)
        self.fill(store, drawn("a", namespace="first"), 1)
        self.claim(store, drawn("b", namespace="second"), 2)
        infos = list(store.keys())
        assert [(info.key, info.samples, info.pending, info.namespaces) for info in infos] == [
            (OTHER, 2, 0, 1),
            (KEY, 1, 1, 2),
        ]
        assert {info.scope for info in infos} == {asked().scope}
        assert [info.key for info in store.keys(newest=True)] == [info.key for info in reversed(infos)]
        assert [info.key for info in store.keys("k2-b")] == [OTHER]
        assert list(store.keys("k2-%")) == []

    def test_samples_are_listed_by_index(self, store: Store) -> None:
        self.claim(store, drawn("a"), 3)
        for index in (2, 0):
            self.commit(store, index)
        assert [(sample.index, sample.payload) for sample in store.samples(KEY)] == [
            (0, b"sample 0"),
            (2, b"sample 2"),
        ]
        assert list(store.samples(OTHER)) == []

    def test_one_sample_is_found_by_its_index(self, store: Store) -> None:
        self.fill(store, drawn("a"), 3)
        self.apply(store, Discard(KEY, 2, "a refusal"))
        assert store.sample(KEY, 1) == list(store.samples(KEY))[1]
        assert [store.sample(KEY, 2), store.sample(KEY, 3), store.sample(OTHER, 0)] == [None] * 3

    def test_draws_are_listed_by_key_and_namespace(self, store: Store) -> None:
        self.fill(store, drawn("a", namespace="first"), 2)
        self.fill(store, drawn("a", namespace="second"), 3)
        self.fill(store, drawn("b", namespace="second", key=OTHER), 1)
        everything = {info.draw: (info.indices, info.generated) for info in store.draws()}
        assert everything == {
            drawn("a", namespace="first"): ((0, 1), 2),
            drawn("a", namespace="second"): ((0, 1, 2), 1),
            drawn("b", namespace="second", key=OTHER): ((0,), 1),
        }
        assert [info.draw for info in store.draws(key=OTHER)] == [drawn("b", namespace="second", key=OTHER)]
        assert len(list(store.draws(namespace=label("second")))) == 2
        assert list(store.draws(KEY, label("none"))) == []

    def test_namespaces_are_listed_in_order_of_their_first_draw(self, store: Store) -> None:
        self.fill(store, drawn("a", namespace="first"), 2)
        self.fill(store, drawn("a", namespace=None), 3)
        self.fill(store, drawn("b", namespace="first", key=OTHER), 1)
        self.fill(store, Draw(SHARED, KEY, "", 0), 1)
        assert [(one.namespace, one.draws, one.samples, one.generated) for one in store.namespaces()] == [
            ("first", 2, 3, 3),
            (None, 1, 3, 1),
        ]

    # Many at once.

    def test_apply_works_beside_apply_now(self, store: Store) -> None:
        async def crowd() -> list[list[Result]]:
            return await asyncio.gather(
                *(store.apply([Claim(drawn(str(i)), 1, asked(), "one")]) for i in range(50))
            )

        grants = [results[0] for results in asyncio.run(crowd())]
        indices = {grant.indices[0] for grant in grants if isinstance(grant, Grant)}
        assert indices == set(range(50))
        assert self.claim(store, drawn("last")).indices == [50]

    def test_an_error_of_apply_reaches_only_its_own_caller(self, store: Store) -> None:
        async def crowd() -> Sequence[Any]:
            return await asyncio.gather(
                store.apply([Claim(drawn("a"), 1, asked(), "one")]),
                store.apply([Commit(OTHER, 0, b"x", {})]),
                store.apply([Claim(drawn("b"), 1, asked(), "one")]),
                return_exceptions=True,
            )

        first, second, third = asyncio.run(crowd())
        assert isinstance(second, StoreError)
        assert sorted([*first[0].indices, *third[0].indices]) == [0, 1]

    def test_threads_claim_at_once_and_share_nothing(self, store: Store) -> None:
        """C1."""
        got: list[int] = []
        start = threading.Barrier(8)

        def work(name: int) -> None:
            start.wait()
            for occurrence in range(10):
                grant = self.fill(store, drawn(str(name), occurrence=occurrence), 1, token=str(name))
                got.extend(grant.indices)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == list(range(80))
        assert [sample.index for sample in store.samples(KEY)] == list(range(80))

    # Sums.

    def test_c6_notes_of_a_run_and_namespace_add_up(self, store: Store) -> None:
        first, second = _delivered("m", 5), _delivered("other", 7)
        self.apply(store, Note("run", label("a"), first), Note("run", label("b"), first))
        self.apply(store, Note("run", label("a"), second), Note("another", label("a"), second))
        found = {(noted.run, noted.namespace): noted.sums.delivered for noted in store.sums()}
        assert {place: _tokens(sums) for place, sums in found.items()} == {
            ("run", label("a")): {"m": 5, "other": 7},
            ("run", label("b")): {"m": 5},
            ("another", label("a")): {"other": 7},
        }
        assert found["run", label("a")].requests == 2

    def test_c6_what_is_taken_back_is_in_no_sum(self, store: Store) -> None:
        self.apply(store, Note("run", label(None), _delivered("m", 5)))
        self.apply(store, Note("run", label(None), _delivered("m", 5, times=-1)))
        [noted] = store.sums()
        assert noted.sums.delivered.requests == 0
        assert _tokens(noted.sums.delivered) == {"m": 0}

    def test_c6_unreported_calls_add_up_beside_what_was_delivered(self, store: Store) -> None:
        lost = _delivered("m", 5).as_asked
        for _ in range(2):
            self.apply(store, Note("run", label(None), unreported=lost))
        self.apply(store, Note("run", label(None), _delivered("m", 3)))
        [noted] = store.sums()
        assert noted.sums.unreported.counts()["prompt_tokens"] == 10
        assert (_tokens(noted.sums.delivered), noted.sums.notes) == ({"m": 3}, 3)

    def test_c6_of_two_copies_of_what_a_run_has_noted_the_later_one_counts(self, store: Store) -> None:
        early, late = (RunSums(_delivered("m", 5 * notes), notes=notes) for notes in (1, 2))
        for sums in (early, late, late, early):
            self.apply(store, AdoptSums("theirs", label("a"), sums))
        self.apply(store, Note("ours", label("a"), _delivered("m", 1)))
        found = {noted.run: _tokens(noted.sums.delivered) for noted in store.sums()}
        assert found == {"theirs": {"m": 10}, "ours": {"m": 1}}

    def test_c6_every_sample_counts_as_bought_and_says_whether_a_namespace_holds_it(
        self, store: Store
    ) -> None:
        self.fill(store, drawn("a", namespace="one"), 2)
        self.fill(store, drawn("a", namespace="two"), 3)
        self.commit(store, None, "extra")
        self.fill(store, drawn("a", key=OTHER))
        self.apply(store, Discard(KEY, 1, "bad"))
        bought = list(store.bought())
        assert {each.scope for each in bought} == {asked().scope}
        assert sorted(each.held for each in bought) == [False, False, True, True, True]
        headers = {sample.header for key in (KEY, OTHER) for sample in store.samples(key)}
        assert headers < {each.header for each in bought}, "the discarded one is there too"

    def test_a_note_makes_no_namespace(self, store: Store) -> None:
        self.apply(store, Note("run", label("a"), _delivered("m", 5)))
        assert list(store.namespaces()) == []

    # The end.

    def test_listing_is_not_disturbed_by_writers(self, store: Store) -> None:
        written = threading.Event()

        def write() -> None:
            for number in range(40):
                self.fill(store, drawn(key=f"k2-{number}"))
            written.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not written.is_set():
            for info in list(store.keys()):
                assert store.question(info.key) is not None
                assert len(list(store.samples(info.key))) <= 1
            assert len(list(store.draws())) <= 40
            assert len(list(store.namespaces())) <= 1
        writer.join()
        assert len(list(store.keys())) == 40

    # Entries of other caches.

    def held_elsewhere(self, *draws: tuple[Draw, int]) -> Entry:
        """Return the entry of a question in another cache, where these draws were made."""
        other = MemoryStore()
        for draw, n in draws:
            self.fill(other, draw, n)
        entry = other.entry(KEY)
        other.close()
        assert entry is not None
        found = entry.sliced()
        assert found is not None
        return found

    def handed_on(self, store: Store) -> Any:
        """Return what another cache gets of the question, without where it is in this one."""
        entry = store.entry(KEY)
        found = None if entry is None else entry.sliced()
        if found is None:
            return None
        samples = [sample._replace(index=-1) for sample in found.samples]
        draws = {draw: [each._replace(number=-1) for each in parts] for draw, parts in found.draws.items()}
        return found.scope, found.document, samples, draws, found.users

    def test_c2_what_another_cache_holds_replays_here(self, store: Store) -> None:
        entry = self.held_elsewhere((drawn("a"), 2), (drawn("b"), 1))
        [adopted] = self.apply(store, Adopt(entry))
        assert (adopted.samples, adopted.draws, adopted.new) == (3, 2, True)
        for draw, n in ((drawn("a"), 2), (drawn("b"), 1)):
            grant = self.claim(store, draw, n)
            assert (grant.mine, grant.shared) == ([], False)
            names = [sample.id for sample in grant.samples if sample]
            assert names == [name for segment in entry.draws[draw] for name in segment.samples]
        assert self.claim(store, drawn("c")).mine == [3]

    def test_what_is_handed_on_comes_back_unchanged(self, store: Store) -> None:
        """Also the discarded samples, the users of shared draws, and the stamps."""
        shared = Draw(SHARED, KEY, "", 0)
        other = MemoryStore()
        self.fill(other, drawn("a"), 2)
        self.claim(other, shared, 1, user="=u")
        self.apply(other, Discard(KEY, 1, "it is wrong"))
        self.fill(other, drawn("a"), 2)
        entry = other.entry(KEY)
        assert entry is not None
        part = entry.sliced()
        assert part is not None
        self.apply(store, Adopt(part))
        assert self.handed_on(store) == self.handed_on(other)
        [again] = self.apply(store, Adopt(part))
        assert not again.changed
        assert self.handed_on(store) == self.handed_on(other)
        other.close()

    def test_c1_samples_of_two_caches_keep_apart(self, store: Store) -> None:
        self.fill(store, drawn("a", namespace="here"), 2)
        before = [(sample.index, sample.id) for sample in store.samples(KEY)]
        entry = self.held_elsewhere((drawn("a", namespace="there"), 2))
        self.apply(store, Adopt(entry))
        assert [(sample.index, sample.id) for sample in store.samples(KEY)][:2] == before
        grant = self.claim(store, drawn("b", namespace="here"), 3)
        assert (grant.indices, grant.mine) == ([2, 3, 4], [4])

    def test_c2_a_draw_that_got_other_samples_changes_nothing(self, store: Store) -> None:
        self.fill(store, drawn("a"), 1)
        before = self.handed_on(store)
        entry = self.held_elsewhere((drawn("a"), 1), (drawn("b"), 1))
        [adopted] = self.apply(store, Adopt(entry))
        assert (adopted.different, adopted.changed) == ([drawn("a")], False)
        assert self.handed_on(store) == before

    def test_c2_a_draw_becomes_as_long_as_in_the_other_cache(self, store: Store) -> None:
        short = self.held_elsewhere((drawn("a"), 1))
        other = MemoryStore()
        self.apply(other, Adopt(short))
        self.fill(other, drawn("a"), 3)
        long = other.entry(KEY)
        assert long is not None
        other.close()
        self.apply(store, Adopt(short))
        [adopted] = self.apply(store, Adopt(long))
        assert (adopted.samples, adopted.draws) == (2, 1)
        assert self.claim(store, drawn("a"), 3).mine == []

    def test_c3_an_earlier_namespace_of_another_cache_is_the_earliest(self, store: Store) -> None:
        entry = self.held_elsewhere((drawn("x", namespace="early"), 1), (drawn("a", namespace="early"), 1))
        for number in range(12):  # more than are remembered as the earliest
            self.fill(store, drawn("a", namespace=f"late {number}"), 1)
        self.apply(store, Adopt(entry))
        wanted = entry.draws[drawn("a", namespace="early")][0].samples[0]
        grant = self.claim(store, drawn("a", namespace="new"))
        assert grant.samples[0] is not None
        assert grant.samples[0].id == wanted

    def test_entries_come_in_the_order_of_their_keys(self, store: Store) -> None:
        self.fill(store, drawn("a", key=OTHER, namespace="two"))
        self.fill(store, drawn("a", namespace="one"))
        assert [entry.key for entry in store.entries()] == [KEY, OTHER]
        assert [entry.key for entry in store.entries(after=KEY)] == [OTHER]
        assert [entry.key for entry in store.entries(["=one"])] == [KEY]
        assert store.entry("k2-" + "0" * 64) is None
        wanted = [OTHER, "k2-" + "0" * 64, KEY]
        assert [entry.key for entry in store.entries_of(wanted)] == [KEY, OTHER]
        [found] = store.entries_of([OTHER])
        assert [draw.namespace for draw in found.draws] == ["=two"]

    def test_what_is_applied_soon_is_applied_before_the_store_is_closed(self, store: Store) -> None:
        store.apply_soon([Claim(drawn("a"), 1, asked(), "one"), Commit(KEY, 0, b"x", {})])
        [grant] = asyncio.run(_applied(store, [Claim(drawn("a"), 1, asked(), "two")]))
        assert isinstance(grant, Grant)
        assert grant.samples[0] is not None
        assert grant.samples[0].payload == b"x"

    def test_a_closed_store_says_so(self, store: Store) -> None:
        self.claim(store, drawn("a"))
        store.close()
        store.close()
        with pytest.raises(StoreError, match="closed"):
            self.claim(store, drawn("b"))
        with pytest.raises(StoreError, match="closed"):
            store.recall(drawn("a"), 1)
        store.apply_soon([Claim(drawn("c"), 1, asked(), "one")])

    def test_a_store_can_be_written(self, store: Store) -> None:
        assert not store.read_only
        assert store.why_read_only == ""
        assert isinstance(store.identity, str)
        assert store.identity


def _delivered(model: str, tokens: int, *, times: int = 1) -> Delivered:
    counts = {**dict.fromkeys(COUNTS, 0), "prompt_tokens": tokens, "total_tokens": tokens}
    delivered = Delivered()
    delivered.add([Usage(model, counts, first=True)], [False], "https://api.example/v1", times=times)
    return delivered


def _tokens(delivered: Delivered) -> dict[str | None, int]:
    return {model: sums["total_tokens"] for (model, _), sums in delivered.billed.sold.items()}


async def _applied(store: Store, operations: Sequence[Operation]) -> list[Result]:
    return await store.apply(operations)
