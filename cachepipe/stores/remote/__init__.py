"""Stores that many machines share: one logic over engines, such as Valkey.

`store.py` is the store, `session.py` performs transactions, `book.py` shows the rows of a key to
``cachepipe.stores.operations``, `rows.py` writes rows, and `engine.py` says what an engine offers.
"""
