"""An engine on a Valkey or Redis server.

The rows of a key are in three hashes of one slot: samples, pending indices, and the others. Two functions of
the server, `functions.lua`, compare and set them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from itertools import islice
from typing import Any, Final

from cachepipe.errors import FormatError, StoreError
from cachepipe.loops import PerLoop
from cachepipe.stores import tables
from cachepipe.stores.remote.checks import SETTINGS, Unfit, faults, tls_fault, warn_once
from cachepipe.stores.remote.connections import LISTENS, Connections, keep_open, listen
from cachepipe.stores.remote.engine import (
    CHANGES,
    RECEIPT,
    RECENT,
    TURN,
    Changes,
    Conflict,
    Read,
    Rows,
    Server,
    Swap,
    Unreachable,
    no_cache,
)
from cachepipe.stores.remote.on_loop import LoopConnection
from cachepipe.stores.remote.rows import decoded, encoded

try:
    from libvalkey import Reader, pack_command
    from valkey import Valkey, exceptions
    from valkey.backoff import NoBackoff
    from valkey.cluster import ClusterNode, ClusterPipeline, ValkeyCluster
    from valkey.retry import Retry
except ImportError as error:  # pragma: no cover - the tests have it
    raise ImportError("a cache on a server needs valkey: pip install 'cachepipe[valkey]'") from error

FORMAT: Final = 1
"""The version of the rows and keys on the server."""

_READ: Final = "cachepipe1_read"
_SOME: Final = "cachepipe1_some"
_SWAP: Final = "cachepipe1_swap"
_AT_ONCE: Final = 1000  # commands that travel together
_PAGE: Final = 100  # keys whose rows are read in one round trip
_SCANNED: Final = 1000  # keys that the server looks at in one step of a scan
_BYTES: Final = 1 << 16  # the most bytes that are received at once
_LATE: Final = 5.0  # seconds after which a server is late that may take as long as it wants
_HISTORY: Final = "replication"
"""What a server says of its history of writes: one that was started, restored or took over has another."""
_GLOB: Final = re.compile(rb"([*?\[\]\\])")

_LATER: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.ClusterError,
    exceptions.TryAgainError,
    exceptions.AskError,
    exceptions.ValkeyClusterException,
    OSError,
)
"""What may pass: the server is away, starts, is full, or is being replaced by another one."""
_LATER_CODES: Final = (
    "LOADING",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "BUSY",
    "OOM",
    "READONLY",
    "TRYAGAIN",
)
_NEVER: Final = (exceptions.AuthenticationError, exceptions.AuthorizationError)

Client = Any
"""A client of a server or of a cluster; both have the same methods."""
Command = tuple[bytes | str | int, ...]
"""The name of a command, and its arguments."""


def client_of(options: dict[str, Any], cluster: Sequence[tuple[str, int]] | None = None) -> Client:
    """Return a client that tries nothing twice by itself: the session does so.

    Args:
        options: options of the client.
        cluster: hosts and ports of servers of a cluster, if it is one; any of them tells the others.
    """
    if cluster is not None:
        first = {"host": None, "port": None}
        return _Cluster(**{**options, **first}, startup_nodes=[ClusterNode(*each) for each in cluster])  # type: ignore[no-untyped-call]
    return Valkey(**options, retry=Retry(NoBackoff(), 0))


class ValkeyEngine:
    """Rows on a server or a cluster.

    Args:
        client: the client.
        where: says where the server is, without credentials.
        prefix: the beginning of all keys.
        create: whether to begin a cache where there is none.
        full: whether samples must survive a crash of the server's machine.

    Raises:
        StoreError: when the server cannot be used, or has no such cache.
    """

    def __init__(
        self, client: Client, where: str, prefix: str, *, create: bool = True, full: bool = False
    ) -> None:
        self._client = client
        self._wires = None if isinstance(client, ValkeyCluster) else Connections(partial(_Wire, client))
        self._begin_loops()
        self.where = where
        self._prefix = encoded(prefix)
        self._meta = self._prefix + b":meta"
        self._channel = self._prefix + b":changed"
        self._changes = self._prefix + b":changes"
        self._check(full=full)
        self._load()
        self.identity = self._signed(create=create)

    def __repr__(self) -> str:
        return f"<ValkeyEngine {self.where}>"

    def _begin_loops(self) -> None:
        self._on_loops = PerLoop(self._on_loop, LoopConnection.close)

    def _on_loop(self, loop: asyncio.AbstractEventLoop) -> LoopConnection:
        options = self._client.connection_pool.connection_kwargs
        return LoopConnection(loop, partial(_Wire, self._client), options.get("socket_timeout") or _LATE)

    # Opening.

    def _check(self, *, full: bool) -> None:
        """Refuse a server that would lose samples in silence; warn of one that may lose some."""
        try:
            for server in self._ask(_servers):
                info = self._ask(partial(_info, server))
                if info.get("role") == "slave" and isinstance(self._client, ValkeyCluster):
                    raise self._replaced()
                for told in faults(info, self._settings(server), full=full):
                    warn_once(self.where, told)
        except Unfit as error:
            raise StoreError(f"the server at {self.where} {error}") from None

    def _settings(self, server: Client) -> dict[str, str]:
        """Return the settings of a server; none if it does not tell them."""
        try:
            found: dict[str, str] = self._ask(lambda _: server.config_get(*SETTINGS))
        except _Refused:
            return {}
        return found

    def _load(self) -> None:
        """Load the functions into the server, unless it has them."""
        code = resources.files(__package__).joinpath("functions.lua").read_text("utf-8")
        try:
            self._ask(lambda client: client.function_load(code, replace=True))
        except _Refused as refused:
            if "has no permissions" not in refused.code:
                raise StoreError(
                    f"the server at {self.where} cannot load functions: {refused}. A cache needs Valkey, or "
                    "Redis 7.0 or later"
                ) from refused
            # Somebody else may have loaded them; if not, the first call says so.

    def _signed(self, *, create: bool) -> str:
        """Return the identity of the cache; make one if it is new."""
        [meta] = self._told([("HGETALL", self._meta)])
        if not meta and not create:
            raise no_cache(self.where)
        if not meta:
            commands: list[Command] = [
                ("HSETNX", self._meta, "format", FORMAT),
                ("HSETNX", self._meta, "identity", secrets.token_hex(8)),
                ("HGETALL", self._meta),
            ]
            meta = self._told(commands)[-1]
        if int(meta[b"format"]) > FORMAT:
            raise FormatError(
                f"the cache {self.where} has format {int(meta[b'format'])}, and this version of cachepipe "
                f"knows formats up to {FORMAT}. Update cachepipe"
            )
        return f"valkey:{meta[b'identity'].decode()}"

    # Asking.

    def _ask(self, ask: Callable[[Client], Any]) -> Any:
        try:
            return ask(self._client)
        except (exceptions.ValkeyError, exceptions.ValkeyClusterException, OSError) as error:
            raise self._ours(error) from None  # the client's error may quote what was sent

    def _ours(self, error: Exception) -> Exception:
        """Return our error for one of the client's."""
        told = str(error).rpartition("of pipeline caused error: ")[2]
        if isinstance(error, _NEVER) or told.startswith(("NOAUTH", "WRONGPASS")):
            return StoreError(
                f"the server at {self.where} refuses the credentials: {told}. Give them in the URL, in "
                "CACHEPIPE_VALKEY_USERNAME and CACHEPIPE_VALKEY_PASSWORD, or with ?password_file=PATH"
            )
        if isinstance(error, exceptions.ConnectionError) and (fault := tls_fault(told, "?ca")):
            return StoreError(f"the server at {self.where} {fault}")
        if isinstance(error, _LATER) or told.startswith(_LATER_CODES):
            there = isinstance(error, exceptions.ResponseError | exceptions.BusyLoadingError)
            return Unreachable(
                f"{type(error).__name__}: {told}" if told else type(error).__name__, there=there
            )
        return _Refused(self.where, told)

    def _told(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to commands that travel together.

        Raises:
            Unreachable: when the server does not answer now, or has not answered one of them.
        """
        if len(commands) == 1:
            try:
                return [self._ask(lambda client: client.execute_command(*commands[0]))]
            except _Refused as error:
                raise self._retold(error) from None
        answers: list[Any] = []
        for start in range(0, len(commands), _AT_ONCE):
            answers += self._ask(partial(_pipelined, commands[start : start + _AT_ONCE]))
        return self._checked(answers)

    def _called(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers of functions, as `_told` does.

        A single server is asked on a connection of our own: the client's way takes several times as long.
        """
        if self._wires is None:
            return self._told(commands)
        answers: list[Any] = []
        try:
            wire = self._wires.take()
            try:
                for start in range(0, len(commands), _AT_ONCE):
                    answers += wire.told(commands[start : start + _AT_ONCE])
            except BaseException:
                self._wires.drop(wire)
                raise
        except (exceptions.ValkeyError, OSError) as error:
            raise self._ours(error) from None
        self._wires.give_back(wire)
        return self._checked(answers)

    def _checked(self, answers: list[Any]) -> list[Any]:
        """Return answers; raise the error if one of them is an error."""
        errors = [self._ours(answer) for answer in answers if isinstance(answer, Exception)]
        if not errors:
            return answers
        refused = next((error for error in errors if isinstance(error, _Refused)), None)
        raise self._retold(refused) if refused is not None else errors[0]

    def _retold(self, refused: _Refused) -> Exception:
        """Return the error for a refused command; if the server lacks the functions, load them."""
        if not refused.code.endswith("Function not found"):
            return refused
        self._load()  # a server that was emptied, or took over, does not have them
        return Unreachable("the server had lost the functions", there=True)

    # Names.

    def _names(self, key: str) -> tuple[bytes, bytes, bytes]:
        """Return the names of the hashes of a key."""
        base = b"%b:{%b}:" % (self._prefix, encoded(key))
        return base + b"b", base + b"s", base + b"p"

    def _lease(self, lease: int) -> bytes:
        return b"%b:lease:%d" % (self._prefix, lease)

    # Rows.

    def read(self, reads: Sequence[Read]) -> list[Rows]:
        """Return the rows of each key, as of one moment per key."""
        return _pages(reads, self._called(self._reading(reads)))

    def read_soon(self, reads: Sequence[Read], then: Callable[[list[Rows] | None], object]) -> bool:
        """Read on the running event loop, as `read` does; see ``Engine.read_soon``."""
        return self._called_soon(
            self._reading(reads), lambda answers: then(answers and _pages(reads, answers))
        )

    def _called_soon(self, commands: Sequence[Command], then: Callable[[list[Any] | None], object]) -> bool:
        """Call functions on the running event loop; return False if that is not possible now."""
        if self._wires is None or len(commands) > _AT_ONCE:
            return False
        on_loop = self._on_loops.of(asyncio.get_running_loop())
        if not on_loop.ready:
            return False
        on_loop.ask(_packed(commands), len(commands), then)
        return True

    def _reading(self, reads: Sequence[Read]) -> list[Command]:
        return [
            (
                *("FCALL", _READ, 3, *self._names(read.key), int(read.pending), len(read.follow)),
                *read.follow,
                *read.fields,
            )
            for read in reads
        ]

    def read_in_turn(self, read: Read, who: int) -> Rows | None:
        """Reserve a key for a process, and read; return None while it is reserved for another process."""
        turn = self._names(read.key)[0][:-1] + b"t"
        reserve: Command = ("SET", turn, who, "NX", "GET", "PX", int(TURN * 1000))
        holder, *answers = self._called([reserve, *self._reading([read])])
        return _pages([read], answers)[0] if holder is None or int(holder) == who else None

    def swap(self, swaps: Sequence[Swap], who: int) -> list[Conflict | Rows | None]:
        """Perform each swap as a whole if its expected rows are current; see ``Engine.swap``."""
        return [*map(_swapped, swaps, self._called(self._swapping(swaps, who, RECEIPT)))]

    def swap_soon(
        self,
        swaps: Sequence[Swap],
        who: int,
        then: Callable[[Sequence[Conflict | Rows | None] | None], object],
    ) -> bool:
        """Swap on the running event loop, as `swap` does; see ``Engine.swap_soon``."""
        return self._called_soon(
            self._swapping(swaps, who, 0), lambda answers: then(answers and [*map(_swapped, swaps, answers)])
        )

    def _swapping(self, swaps: Sequence[Swap], who: int, receipt: float) -> list[Command]:
        commands: list[Command] = []
        for swap in swaps:
            names = self._names(swap.key)
            base = names[0][:-1]
            keys = (*names, b"%br:%d" % (base, who), base + b"t")
            commands.append(("FCALL", _SWAP, len(keys), *keys, *self._arguments(swap, who, receipt)))
        return commands

    def _arguments(self, swap: Swap, who: int, receipt: float) -> list[bytes | int]:
        found: list[bytes | int] = [swap.nonce, who, int(swap.fair), int(TURN * 1000), int(receipt * 1000)]
        found += [self._channel if swap.wakes else b"", encoded(swap.key)]
        found += [-1 if swap.whole is None else swap.whole, len(swap.expected)]
        for name, digest in swap.expected.items():
            found += (name, digest or b"")
        found += (len(swap.wants), tables.GONE, *swap.wants, len(swap.puts))
        for name, row in swap.puts.items():
            found += (name, row)
        return found + swap.deletes

    def rows_of(self, keys: Sequence[str]) -> list[Rows]:
        """Return all rows of each key but the samples."""
        return self._all([self._names(key)[0] for key in keys])

    def samples_of(self, key: str) -> list[bytes]:
        """Return the fields of all samples of a key, in any order."""
        [found] = self._told([("HKEYS", self._names(key)[1])])
        return list(found)

    def scan(self, prefix: str, fields: Sequence[bytes] = ()) -> Iterator[tuple[str, Rows]]:
        """Iterate over the keys with a prefix, in any order, with some rows, or all but the samples."""
        before = b"%b:{" % self._prefix
        pattern = _GLOB.sub(rb"\\\1", before + encoded(prefix)) + b"*}:b"
        names = self._scanned(pattern)
        while page := list(islice(names, _PAGE)):
            for name, rows in zip(page, self._some(page, fields), strict=True):
                yield decoded(name[len(before) : -len(b"}:b")]), rows

    def _scanned(self, pattern: bytes) -> Iterator[bytes]:
        names = self._ask(lambda client: client.scan_iter(match=pattern, count=_SCANNED))
        while True:
            name = self._ask(lambda _: next(names, None))
            if name is None:
                return
            yield name

    def _some(self, names: Sequence[bytes], fields: Sequence[bytes]) -> list[Rows]:
        """Return the rows of fields in hashes; all rows if there are no fields."""
        if not fields:
            return self._all(names)
        if any(name.endswith(b"/") for name in fields):
            keys = [(name, name[:-1] + b"s", name[:-1] + b"p") for name in names]
            # By the client, which notices a broken connection before it asks: a scan is not tried again.
            return [*map(_paired, self._told([("FCALL", _SOME, 3, *each, *fields) for each in keys]))]
        found = self._told([("HGET", name, field) for name in names for field in fields])
        width = len(fields)
        return [_rows(fields, found[at : at + width]) for at in range(0, len(found), width)]

    def _all(self, names: Sequence[bytes]) -> list[Rows]:
        """Return the rows in hashes, with the pending indices beside them."""
        hashes = [each for name in names for each in (name, name[:-1] + b"p")]
        found = self._told([("HGETALL", each) for each in hashes])
        return [one | other for one, other in zip(found[::2], found[1::2], strict=True)]

    def strays(self) -> Iterator[str]:
        """Iterate over the keys that have samples or pending indices and no other row."""
        before = b"%b:{" % self._prefix
        names = self._scanned(_GLOB.sub(rb"\\\1", before) + b"*}:[sp]")
        seen: set[bytes] = set()
        while page := list(islice(names, _PAGE)):
            bases = [*dict.fromkeys(name[:-1] for name in page)]
            there = self._told([("HLEN", base + b"b") for base in bases])
            for base, count in zip(bases, there, strict=True):
                if not count and base not in seen:
                    seen.add(base)
                    yield decoded(base[len(before) : -len(b"}:")])

    def compact(self) -> None:
        """Do nothing: the server frees what is deleted, and rewrites its append-only file as it grows."""

    # Changes.

    def announce(self, keys: Sequence[str]) -> list[int]:
        """Announce a change of each key; return their numbers."""
        add = ("XADD", self._changes, "MAXLEN", CHANGES, "0-*", b"")
        return [_numbered(name) for name in self._told([(*add, encoded(key)) for key in keys])]

    def changes(self, since: int | None) -> Changes:
        """Return the changes from a number on; without a number the recent ones.

        The epoch is which cache it is, and which histories of writes its servers have.
        """
        if since is None:
            command: Command = ("XREVRANGE", self._changes, "+", "-", "COUNT", RECENT)
        else:
            command = ("XRANGE", self._changes, f"0-{since}", "+")
        commands: list[Command] = [command, ("HGET", self._meta, "identity")]
        if isinstance(self._client, ValkeyCluster):
            info = [*self._ask(_infos).values()]
            found, identity = self._told(commands)
        else:
            found, identity, *info = self._told([*commands, ("INFO", _HISTORY)])
        histories = sorted(str(each["master_replid"]) for each in info)
        keys = [(_numbered(name), decoded(row[b""])) for name, row in found]
        return Changes(" ".join([str(identity), *histories]), sorted(keys))

    # Leases.

    def open_lease(self, name: str, seconds: float) -> int:
        """Return the number of a new lease. It is random: a server that lost writes may count again."""
        lease = secrets.randbits(62)
        found = self._ask(lambda client: client.hget(self._meta, "identity"))
        if found is None or f"valkey:{found.decode()}" != self.identity:
            raise StoreError(
                f"the cache {self.where} was emptied or replaced while it was open: its samples are gone. "
                "Restore the server's data, or open the cache again to begin anew"
            )
        self._ask(lambda client: client.set(self._lease(lease), name, px=int(seconds * 1000), nx=True))
        return lease

    def renew_lease(self, lease: int, seconds: float) -> bool:
        """Renew a lease on the server's clock; return False if it has ended."""
        return bool(self._ask(lambda client: client.pexpire(self._lease(lease), int(seconds * 1000))))

    def close_lease(self, lease: int) -> None:
        """End a lease."""
        self._ask(lambda client: client.delete(self._lease(lease)))

    def holders(self, leases: Sequence[int]) -> list[str | None]:
        """Return the name of the process that holds each lease, or None if the lease has ended."""
        found = self._told([("GET", self._lease(lease)) for lease in leases])
        return [None if name is None else name.decode() for name in found]

    def now(self) -> int:
        """Return the server's time in microseconds since 1970."""
        seconds, microseconds = self._ask(lambda client: client.time())
        return int(seconds) * 1_000_000 + int(microseconds)

    def servers(self) -> list[Server]:
        """Return the servers that are written to; the history of each is its replication id.

        A client of a cluster that asks a server which is away, or a replica now, asks for the new ones.
        """
        if not isinstance(self._client, ValkeyCluster):
            return [_server(self.where, self._ask(lambda client: client.info(_HISTORY)))]
        found = self._ask(_infos)
        if any(info["role"] == "slave" for info in found.values()):
            raise self._replaced()
        return [_server(name, info) for name, info in found.items()]

    def _replaced(self) -> Unreachable:
        """Learn which servers are primaries now; return the error that makes callers ask again."""

        def learn(client: Client) -> None:
            nodes: Any = client
            nodes.nodes_manager.initialize()

        self._ask(learn)
        return Unreachable("a server has become a replica", there=True)

    # Notifications.

    def listen(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Call a function, in another thread, with each key that a swap wakes; return what ends this."""

        def hear(ended: threading.Event) -> None:
            with self._client.pubsub(ignore_subscribe_messages=True) as subscription:
                subscription.subscribe(self._channel)
                while not ended.is_set():
                    message = subscription.get_message(timeout=LISTENS)
                    if message is not None:
                        changed(decoded(message["data"]))

        # A ValueError says that it was closed while it reads.
        return listen(hear, *_LATER, exceptions.ValkeyError, ValueError)

    # The end.

    def inherit(self) -> None:
        """Begin again in a forked child; the client itself makes new connections there."""
        if self._wires is not None:
            self._wires.inherit()
            keep_open(self._on_loops.all())
            self._begin_loops()

    def close(self) -> None:
        """Close the connections."""
        if self._wires is not None:
            self._wires.close()
            for on_loop in self._on_loops.all():
                on_loop.close()
        with contextlib.suppress(exceptions.ValkeyError, OSError):
            self._client.close()


_RESERVED: Final = 2
"""What the server says of a swap while the key is reserved for another process."""


class _Refused(StoreError):  # noqa: N818 - says what the server did
    """The server refuses a command, and would refuse it again."""

    def __init__(self, where: str, told: str) -> None:
        self.code = told
        super().__init__(f"the server at {where} refuses: {told}")


class _Wire:
    """A connection to a server, for commands that travel together.

    Args:
        client: a client of the server.
    """

    def __init__(self, client: Client) -> None:
        self._connection = client.connection_pool.make_connection()
        self._connection.connect()
        self.socket = self._connection._sock  # noqa: SLF001 - the client's own way to it takes several times as long
        self._reader = Reader(replyError=self._connection._parser.parse_error)  # noqa: SLF001 - the client's errors

    def told(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answer to each command, or the error that the server answers."""
        self.socket.sendall(_packed(commands))
        gets = self._reader.gets
        answers: list[Any] = []
        while len(answers) < len(commands):
            answer = gets()
            if answer is not False:
                answers.append(answer)
            elif received := self.socket.recv(_BYTES):
                self._reader.feed(received)
            else:
                raise exceptions.ConnectionError("the server has closed the connection")
        return answers

    @staticmethod
    def reader() -> Any:
        """Return a parser of answers."""
        return Reader()

    def _answer(self) -> Any:
        try:
            return self._connection.read_response()
        except exceptions.ResponseError as error:
            return error

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()


def _packed(commands: Sequence[Command]) -> bytes:
    return b"".join(map(pack_command, commands))


def _pages(reads: Sequence[Read], answers: Sequence[Any]) -> list[Rows]:
    return [
        _rows(read.fields, rows) | _paired(more) for read, (rows, more) in zip(reads, answers, strict=True)
    ]


def _pipelined(commands: Sequence[Command], client: Client) -> list[Any]:
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers


def _servers(client: Client) -> list[Client]:
    """Return the clients of the servers that are written to."""
    if isinstance(client, ValkeyCluster):
        each: Any = client
        return [each.get_valkey_connection(node) for node in each.get_primaries()]
    return [client]


def _infos(client: Client) -> dict[str, dict[str, Any]]:
    """Return what the primaries of a cluster say of themselves, by their names."""
    nodes = client.get_primaries()
    found: dict[str, Any] = client.info(_HISTORY, target_nodes=nodes)
    return {nodes[0].name: found} if "master_replid" in found else found  # one answers for itself


def _info(server: Client, _client: Client) -> dict[str, Any]:
    found: dict[str, Any] = server.info()
    return found


def _server(where: str, info: Mapping[str, Any]) -> Server:
    return Server(where, str(info["master_replid"]), str(info["master_replid2"]))


def _rows(fields: Sequence[bytes], rows: Sequence[bytes | None]) -> Rows:
    return {name: row for name, row in zip(fields, rows, strict=True) if row is not None}


def _swapped(swap: Swap, answer: Sequence[Any]) -> Conflict | Rows | None:
    """Return what became of a swap, as the server says it: a state, and the rows of some fields."""
    state, rows = answer
    if state:
        return Conflict(_rows([*swap.expected], rows), state == _RESERVED)
    return _rows(swap.wants, rows) if swap.wants else None


def _numbered(name: bytes) -> int:
    """Return the number in the name of an entry of a stream."""
    return int(name.partition(b"-")[2])


def _paired(flat: Sequence[bytes]) -> Rows:
    return dict(zip(flat[::2], flat[1::2], strict=True))


class _Routing:
    """Finds the slot of a function's call without asking the server which of its arguments are keys."""

    def determine_slot(self, *arguments: Any) -> int:
        if str(arguments[0]).upper() == "FCALL":
            return int(self.keyslot(arguments[3]))  # type: ignore[attr-defined]
        return int(super().determine_slot(*arguments))  # type: ignore[misc]


class _ClusterPipeline(_Routing, ClusterPipeline):
    """Commands for several nodes of a cluster."""


class _Cluster(_Routing, ValkeyCluster):
    """A client of a cluster."""

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> _ClusterPipeline:  # noqa: ARG002
        return _ClusterPipeline(
            nodes_manager=self.nodes_manager,
            commands_parser=self.commands_parser,
            startup_nodes=self.nodes_manager.startup_nodes,  # type: ignore[arg-type]  # as the client does
            result_callbacks=self.result_callbacks,
            cluster_response_callbacks=self.cluster_response_callbacks,
            cluster_error_retry_attempts=self.cluster_error_retry_attempts,
            read_from_replicas=self.read_from_replicas,
            reinitialize_steps=self.reinitialize_steps,
            lock=self._lock,
        )
