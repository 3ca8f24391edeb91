"""Runs the tests that an SDK's authors wrote, with their clients and with ours, and compares the outcomes.

    python tests/suites.py groq
    python tests/suites.py huggingface_hub

The tests are those of the source distribution of the installed version. Of groq's, the tests of resources are
left out, which need a server made of the SDK's OpenAPI description. Of Hugging Face's, those of the inference
clients are run; without a network, many of these fail with either class.
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
from typing import NamedTuple

from cachepipe import MemoryStore, clients
from cachepipe.providers import exchange
from cachepipe.stores import open_store

OURS = "CACHEPIPE_SUITE"
"""The variable that names the SDK whose clients are replaced, in a process of its tests."""


class Suite(NamedTuple):
    """The tests of an SDK.

    Attributes:
        classes: its classes, each with the name of ours.
        tests: what is passed to pytest.
        user: a module of the tests that imports the first class.
        others: the tests that fail with our classes, because they allow no other methods than the SDK's.
    """

    classes: dict[str, str]
    tests: tuple[str, ...]
    user: str
    others: frozenset[str] = frozenset()


SUITES = {
    "groq": Suite(
        {"Groq": "Groq", "AsyncGroq": "AsyncGroq"},
        ("--ignore=tests/api_resources", "tests"),
        "tests.conftest",
    ),
    "huggingface_hub": Suite(
        {"InferenceClient": "HuggingFace", "AsyncInferenceClient": "AsyncHuggingFace"},
        tuple(f"tests/test_inference_{name}.py" for name in ("client", "async_client", "text_generation")),
        "tests.test_inference_client",
        frozenset({"tests.test_inference_async_client::test_sync_vs_async_signatures"}),  # `copy`
    ),
}


def replace(package):
    """Put our clients in the place of an SDK's; each has a cache of its own, in memory."""
    exchange.open_store = lambda cache: open_store(MemoryStore() if cache is None else cache)
    sdk = importlib.import_module(package)
    for name, ours in SUITES[package].classes.items():
        setattr(sdk, name, getattr(clients, ours))


if package := os.environ.get(OURS):  # pytest imports this file before the tests and their conftest
    replace(package)


def outcomes(folder, package, *, ours):
    """The outcome of each test of a package, with its own clients or with ours."""
    report = folder / f"{'ours' if ours else 'theirs'}.xml"
    environment = {**os.environ, OURS: package if ours else "", "PYTHONPATH": str(Path(__file__).parent)}
    words = ["-m", "pytest", "-q", "-p", "suites", "-o", "addopts=", "-o", "xfail_strict=false"]
    words += ["-p", "no:cacheprovider", f"--junit-xml={report}", *SUITES[package].tests]
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
        (name, ours), *_ = SUITES[package].classes.items()
        used = sys.modules[SUITES[package].user]
        assert vars(used)[name] is getattr(clients, ours)


def main(package):
    """Return the exit status: 1 if other outcomes differ than are known to."""
    version = importlib.metadata.version(package)
    with tempfile.TemporaryDirectory() as place:
        words = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", place]
        subprocess.run([sys.executable, *words, f"{package}=={version}"], check=True)
        with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
        folder = Path(place, f"{package}-{version}")
        (folder / "tests" / "__init__.py").touch()  # Hugging Face's distribution lacks it
        theirs, ours = (outcomes(folder, package, ours=ours) for ours in (False, True))
    told = [f"{package} {version}: {dict(Counter(theirs.values()))} with its own clients"]
    told.append(f"{package} {version}: {dict(Counter(ours.values()))} with ours")
    different = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
    told += [f"  {name}: {theirs.get(name)}, with ours {ours.get(name)}" for name in sorted(different)]
    sys.stdout.write("\n".join([*told, ""]))
    return 0 if theirs and set(different) == SUITES[package].others else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
