"""Items that are made while those before them are used."""

import threading

import pytest

from cachepipe.prefetch import prefetched


def test_the_next_item_is_made_while_the_current_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    with prefetched(items()) as found:
        assert next(found) == 0
        assert made[1].wait(10)
        assert list(found) == [1, 2]


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise KeyError("two")

    with prefetched(items()) as found:
        assert next(found) == 1
        with pytest.raises(KeyError, match="two"):
            next(found)


def test_one_thread_makes_all_items_and_ends_with_the_iteration():
    with prefetched(threading.current_thread() for _ in range(3)) as found:
        maker = next(found)
        assert {*found} == {maker}
    assert maker is not threading.current_thread()
    assert not maker.is_alive()
