"""Requests to providers: how they are answered from the cache, recorded and accounted for."""
