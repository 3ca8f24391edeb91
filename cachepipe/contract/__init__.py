"""The rules of the sampling contract, without asyncio, threads, SQL, sockets or a clock.

Each clause has one module that decides it; stores, stages, clients and the proxy perform what it decides.
"""
