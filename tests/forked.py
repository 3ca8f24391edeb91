"""Starts Python programs as forks of a process that has imported what takes them long to import.

A fork has memory and files of its own, as a new process has, and begins after a few milliseconds instead of a
second. In full, and wherever a test asks what a process imports, programs run in new processes.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from profiles import FULL

from cachepipe.replaying import VARIABLE

MODULES = [
    "cachepipe.chat",
    "cachepipe.cli.run",
    "cachepipe.clients",
    "cachepipe.importers.cachesaver",
    "cachepipe.importers.openai_batch",
    "cachepipe.models.openai",
    "cachepipe.proxy.server",
    "cachepipe.sdk.openai",
    "cachepipe.stores.remote.postgres",
    "cachepipe.stores.remote.valkey",
    "cachepipe.testing",
    "openai.resources.chat",
]
"""What the process imports before it forks."""

SERVER = """
import ast, gc, importlib, os, runpy, select, signal, socket, sys, warnings
for name in sys.argv[2:]:
    importlib.import_module(name)
gc.collect()
gc.freeze()
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(64)
print(flush=True)
awake = os.pipe()
for end in awake:
    os.set_blocking(end, False)
signal.set_wakeup_fd(awake[1])
signal.signal(signal.SIGCHLD, lambda *_: None)
started = {}  # the connections of those who have started programs, by process
while True:
    ready, _, _ = select.select([0, awake[0], listener, *started.values()], [], [])
    if 0 in ready:  # closed: the tests are over
        for child in started:
            os.kill(child, signal.SIGKILL)
        sys.exit()
    for child, connection in started.items():
        if connection in ready:  # closed: who started the program was killed
            os.kill(child, signal.SIGKILL)
    if awake[0] in ready:
        os.read(awake[0], 4096)
    while started:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if not ended:
            break
        with started.pop(ended) as connection:
            try:
                connection.sendall(b"%d\\n" % status)
            except OSError:
                pass
    if listener not in ready:
        continue
    connection, _ = listener.accept()
    try:
        asked = b""
        _, given, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("rb") as lines:
            asked = lines.readline()
    except OSError:
        pass
    if not asked:  # who asked was killed
        connection.close()
        continue
    child = os.fork()
    if not child:
        break
    started[child] = connection
    connection.sendall(b"%d\\n" % child)
    for number in given:
        os.close(number)
signal.set_wakeup_fd(-1)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
for each in (listener, connection, *started.values()):
    each.close()
for number in awake:
    os.close(number)
for number in range(3):
    os.dup2(given[number], number)
    os.close(given[number])
asked = ast.literal_eval(asked.decode())
os.environb.clear()
os.environb.update(asked["environment"])
os.chdir(asked["folder"])
if asked["session"]:
    os.setsid()
sys.stdin = open(0, closefd=False)
for number, name in enumerate(("stdout", "stderr"), 1):
    at_once = number == 2 or os.isatty(number)
    errors = "backslashreplace" if number == 2 else None
    made = open(number, "w", buffering=1 if at_once else -1, errors=errors, closefd=False)
    setattr(sys, name, made)
    setattr(sys, f"__{name}__", made)
sys.warnoptions[:] = asked["warnings"]
warnings._processoptions(sys.warnoptions)
sys.argv[:] = asked["arguments"]
how, what = asked["how"], asked["what"]
sys.path[0] = os.path.dirname(os.path.abspath(what)) if how == "file" else ""
if asked["paths"]:
    sys.path[1:1] = asked["paths"].split(os.pathsep)
    importlib.import_module("sitecustomize")
del ast, at_once, awake, child, connection, each, end, errors, gc, given, importlib, lines, listener, made
del name, number, os, ready, select, signal, socket, started, warnings
if how == "-c":
    del asked, how, runpy, sys
    exec(compile(what, "<string>", "exec"))
elif how == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
else:
    runpy.run_path(what, run_name="__main__")
"""
"""It ends with the interpreter that runs the program, as if the program had been started by itself."""

PROGRAM = """\
#!{python} -IS
import _signal, _socket, posix, sys
words, program = sys.argv[1:], {program!r}
marked = {{name: value for name, value in posix.environ.items() if name.startswith({marks!r})}}
new = {{name for name, value in marked.items() if {own!r}.get(name) != value}}
known = program or words[:1] in (["-c"], ["-m"]) or words[:1] and words[0].endswith(".py")
if not known or new - {{b"PYTHONPATH"}}:
    posix.execv({python!r}, [{python!r}, *(program or ()), *words])
how, what = program or (words[:2] if words[0] in ("-c", "-m") else ("file", words[0]))
rest = words if program else words[2:] if how != "file" else words[1:]
channel = _socket.socket(_socket.AF_UNIX)
channel.connect({path!r})
rights = b"".join(number.to_bytes(4, sys.byteorder) for number in range(3))
channel.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
asked = dict(how=how, what=what, warnings=[], session=False, folder=posix.getcwd(), environment=posix.environ)
asked["paths"] = posix.environ[b"PYTHONPATH"].decode() if new else ""
asked["arguments"] = [what if how == "file" else sys.argv[0] if program else how, *rest]
channel.sendall(repr(asked).encode() + b"\\n")
def number():
    told = b""
    while not told.endswith(b"\\n"):
        told += channel.recv(1) or posix._exit(1)
    return int(told)
child = number()
for each in _signal.SIGHUP, _signal.SIGINT, _signal.SIGTERM:
    if _signal.getsignal(each) != _signal.SIG_IGN:
        _signal.signal(each, lambda sent, _: posix.kill(child, sent))
status = number()
if posix.WIFSIGNALED(status):
    _signal.signal(posix.WTERMSIG(status), _signal.SIG_DFL)
    posix.kill(posix.getpid(), posix.WTERMSIG(status))
posix._exit(posix.WEXITSTATUS(status))
"""
"""A program on the PATH: starts a fork on its own files, passes signals on, and ends as the fork does."""


class _Forked(subprocess.Popen):
    """A process that runs a Python program, with all that `subprocess.Popen` offers."""

    OPTIONS = frozenset(["stdin", "stdout", "stderr", "cwd", "env", "text", "start_new_session"])

    def __init__(self, args, **options):
        assert options.keys() <= self.OPTIONS, f"a fork cannot have {options.keys() - self.OPTIONS}"
        self._options = options
        super().__init__(args, **options)

    def _execute_child(self, args, *how):
        """Have the program started; called with what the constructor has made of the options."""
        pipes = stdin, _, _, stdout, _, stderr = how[9:15]
        warned, words = [], [os.fspath(each) for each in args[1:]]
        while words[0] == "-W":
            warned.append(words[1])
            del words[:2]
        how, what = words[:2] if words[0] in {"-c", "-m"} else ("file", words[0])
        del words[: 1 if how == "file" else 2]
        environment = os.environ if self._options.get("env") is None else self._options["env"]
        new = _differing(environment)
        asked = {
            "how": how,
            "what": what,
            "arguments": [what if how == "file" else how, *words],
            "warnings": warned,
            "paths": environment["PYTHONPATH"] if new else "",
            "session": bool(self._options.get("start_new_session")),
            "folder": str(Path(self._options.get("cwd") or ".").absolute()),
            "environment": {os.fsencode(name): os.fsencode(value) for name, value in environment.items()},
        }
        files = array.array(
            "i", [n if pipe == -1 else pipe for n, pipe in enumerate((stdin, stdout, stderr))]
        )
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(_server().path)
            connection.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            connection.sendall(repr(asked).encode() + b"\n")
            self._told = connection.makefile()
        self.pid = int(self._told.readline())
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _try_wait(self, wait_flags):
        """Return the process's number and status once it has ended; called with the lock."""
        if wait_flags & os.WNOHANG and not select.select([self._told], [], [], 0)[0]:
            return 0, 0
        status = self._told.readline()
        self._told.close()
        return self.pid, int(status)

    def _internal_poll(self, _deadstate=None):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode


_MARKS = ("PYTHON", VARIABLE)
_OWN = {name: value for name, value in os.environ.items() if name.startswith(_MARKS)}
"""What an interpreter, or the package, reads when it starts."""


def _differing(environment):
    """Return the names of variables that differ from this process's, and are read when a process starts."""
    theirs = {name: value for name, value in environment.items() if name.startswith(_MARKS)}
    return {name for name, _ in _OWN.items() ^ theirs.items()}


def Popen(args, **options):  # noqa: N802 - its name
    """Start ``[sys.executable, …]`` as `subprocess.Popen` does, with options that `_Forked.OPTIONS` names."""
    differing = _differing(os.environ if options.get("env") is None else options["env"])
    kind = subprocess.Popen if FULL or differing - {"PYTHONPATH"} else _Forked
    return kind(args, **options)


def run(args, *, input=None, timeout=100, check=False, capture_output=False, **options):  # noqa: A002 - its name
    """Run ``[sys.executable, …]`` as `subprocess.run` does."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(args, **options) as process:
        try:
            told = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, *told)
    if check:
        done.check_returncode()
    return done


def programs():
    """Return the folder of this environment's programs, to be put on a PATH."""
    return Path(sys.executable).parent if FULL else _server().programs


class _Server:
    """The process that has imported modules, and forks.

    Attributes:
        path: the socket that it listens on.
        programs: a folder with programs that start forks.
    """

    def __init__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="forked-"))
        self.path = str(self._folder / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, self.path, *MODULES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.programs = self._folder / "programs"
        self.programs.mkdir()
        main = "import sys; from cachepipe.cli import main; sys.exit(main())"
        for name, program in ("python", None), ("python3", None), ("cachepipe", ("-c", main)):
            text = PROGRAM.format(
                python=sys.executable,
                program=program,
                path=self.path,
                marks=tuple(map(os.fsencode, _MARKS)),
                own={os.fsencode(name): os.fsencode(value) for name, value in _OWN.items()},
            )
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o700)
        assert self._process.stdout.readline(), "it has not begun"

    def close(self):
        """End the process, and the programs that have not ended."""
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


@functools.cache
def _server():
    made = _Server()
    atexit.register(made.close)
    return made
