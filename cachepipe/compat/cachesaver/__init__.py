"""CacheSaver's import paths: change the root ``cachesaver`` to ``cachepipe.compat.cachesaver``.

A program keeps its clients, pipelines and keywords. As in CacheSaver, each new client and each new pipeline
counts equal requests from the start, as a restarted program does. See docs/cachesaver.md.
"""
