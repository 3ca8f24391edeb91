"""Runs programs in forks of an interpreter that has imported what takes them long to import."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys

SERVER = """
import importlib, json, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
code, sys.argv[1:], output, errors = json.loads(line)
for path, number in ((os.devnull, 0), (output, 1), (errors, 2)):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
del importlib, json, os, name, line, child, output, errors, path, number
exec(code)
"""
"""It ends with the interpreter that runs the program, as if the program had been started by itself."""


class Interpreter:
    """A process that has imported modules, with warnings as errors.

    Args:
        folder: where what programs print is kept.
        modules: the names of the modules.
    """

    def __init__(self, folder, *modules):
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SERVER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, code, *arguments, seconds):
        """Run a program with arguments; return its exit code, its output and its errors."""
        texts = [self._folder / name for name in ("output", "errors")]
        for text in texts:
            text.write_text("")
        print(json.dumps([code, arguments, *map(str, texts)]), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        assert ready, f"the program has not ended within {seconds} s"
        return int(self._process.stdout.readline()), *(text.read_text() for text in texts)

    def close(self):
        """End the process, and a program that has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
