"""The pleasant layer for scripts and notebooks: completions, chats, their histories, results as tables.

Everything here goes through the drop-in clients, so it is cached, replayed and counted as their calls are.
"""
