"""TLS in front of servers of tests, as a load balancer offers it: the servers of the packages know no TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading


class TlsRelay:
    """Passes on to a server what comes over TLS.

    Args:
        server: the server.
        certificate: a certificate of ``trustme``.
        postgres: whether clients ask for TLS first, as those of PostgreSQL do.
    """

    host = "localhost"

    def __init__(self, server, certificate, *, postgres=False):
        self._server = server
        self._postgres = postgres
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(self._context)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # of clients that refuse the certificate
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[started])
        self._thread.start()
        started.wait(10)

    def _run(self, started):
        async def serve():
            self._ended = asyncio.Event()
            more = {} if self._postgres else {"ssl": self._context}
            async with await asyncio.start_server(self._relay, self._server.host, 0, **more) as listener:
                self.port = listener.sockets[0].getsockname()[1]
                started.set()
                await self._ended.wait()

        self._loop.run_until_complete(serve())
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _relay(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            if self._postgres:
                await reader.readexactly(8)
                writer.write(b"S")
                await writer.start_tls(self._context)
            inner = await asyncio.open_connection(self._server.host, self._server.port)
            await asyncio.gather(self._pass(reader, inner[1]), self._pass(inner[0], writer))

    async def _pass(self, reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    def close(self):
        """Stop."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
