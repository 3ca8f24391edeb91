"""The layer for scripts and notebooks: completions, chats, their histories, and results as tables.

All calls go through the drop-in clients, so they are cached, replayed and counted like all others.
"""
