"""Looking at a cache through a proxy: every page brings its reader further."""

from __future__ import annotations

from cachepipe.proxy import browse
from cachepipe.stores.base import KeyInfo


class Slow:
    """A store of many keys, each of which takes a second to come by."""

    def __init__(self, keys):
        self.names = [f"k{number}" for number in range(keys)]
        self.now = 0.0

    def keys(self, _, *, newest):
        assert newest
        for name in self.names:
            self.now += 1.0
            yield KeyInfo(name, None, 0.0, 1, 0, 1)

    def question(self, _):
        return None


def test_a_search_goes_on_however_long_it_takes_to_come_to_its_place():
    store = Slow(12)
    query, found, pages = "", [], 0
    while query is not None:
        page = browse.answer(store, "/keys", query, lambda: store.now)
        assert page["items"]
        query, pages = page["next"] and f"after={page['next']}", pages + 1
        found += [item["key"] for item in page["items"]]
    assert found == store.names
    assert pages > 1
