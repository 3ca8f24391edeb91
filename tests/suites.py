"""Runs the tests that an SDK's authors wrote, with their clients and with ours, and compares the outcomes.

    python tests/suites.py groq

The tests are those of the source distribution of the installed version. Left out are the tests of resources,
which need a server made of the SDK's OpenAPI description.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from cachepipe import MemoryStore, clients
from cachepipe.providers import exchange
from cachepipe.stores import open_store

OURS = "CACHEPIPE_SUITE"
"""The variable that names the SDK whose clients are replaced, in a process of its tests."""


def replace(package):
    """Put our clients in the place of an SDK's; each has a cache of its own, in memory."""
    exchange.open_store = lambda cache: open_store(MemoryStore() if cache is None else cache)
    sdk = importlib.import_module(package)
    for name in (package.capitalize(), f"Async{package.capitalize()}"):
        setattr(sdk, name, getattr(clients, name))


if package := os.environ.get(OURS):  # pytest imports this file before the tests and their conftest
    replace(package)


def outcomes(folder, package):
    """The outcome of each test, with the clients of a package replaced if it is named."""
    report = folder / f"{package or 'theirs'}.xml"
    environment = {**os.environ, OURS: package, "PYTHONPATH": str(Path(__file__).parent)}
    words = ["-m", "pytest", "-q", "-p", "suites", "-o", "addopts=", "-o", "xfail_strict=false"]
    words += ["--ignore=tests/api_resources", "-p", "no:cacheprovider", f"--junit-xml={report}", "tests"]
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=False)
    if done.returncode not in (0, 1):  # all passed, or some failed
        raise RuntimeError(f"pytest ended with {done.returncode}")
    cases = ET.parse(report).iter("testcase")  # noqa: S314 - pytest has just written it
    return {
        f"{case.get('classname')}::{case.get('name')}": next(
            (kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed"
        )
        for case in cases
    }


def pytest_sessionfinish(session):
    """Fail if the tests did not get our clients."""
    if package := os.environ.get(OURS):
        used = sys.modules["tests.conftest"]
        assert vars(used)[package.capitalize()] is getattr(clients, package.capitalize())


def main(package):
    """Return the exit status: 1 if an outcome differs."""
    version = importlib.metadata.version(package)
    with tempfile.TemporaryDirectory() as place:
        words = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", place]
        subprocess.run([sys.executable, *words, f"{package}=={version}"], check=True)
        with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
        folder = Path(place, f"{package}-{version}")
        theirs, ours = outcomes(folder, ""), outcomes(folder, package)
    told = [f"{package} {version}: {dict(Counter(theirs.values()))} with its own clients"]
    told.append(f"{package} {version}: {dict(Counter(ours.values()))} with ours")
    different = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
    told += [f"  {name}: {theirs.get(name)}, with ours {ours.get(name)}" for name in sorted(different)]
    sys.stdout.write("\n".join([*told, ""]))
    return 1 if different or not theirs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
