"""Environments that the tests need beside the main one, each with other versions of what stands around us.

    nox                        everything below
    nox -s sdks                the clients' tests on each set of SDKs
    nox -s "frameworks(dspy)"  the tests of one framework on our clients; `nox -l` lists them all
    nox -s ray                 the tests of Ray's workers, on a cluster of two local nodes
    nox -s "suites(groq)"      the tests that an SDK's authors wrote, with its clients and with ours
    nox -s genai               google-genai's own tests, with its client and with ours
    nox -s types               what pyright makes of code on our clients (mypy reads it with the package)

Each has an environment of its own because they do not go together: litellm, under DSPy, wants openai 2.
uv makes the environments, a few seconds each; its index and certificates are those that pip was told.
"""

from __future__ import annotations

import os

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True
for _pips, _uvs in (("PIP_INDEX_URL", "UV_DEFAULT_INDEX"), ("PIP_CERT", "SSL_CERT_FILE")):
    if _pips in os.environ:
        os.environ.setdefault(_uvs, os.environ[_pips])

ON_THE_SDKS = (
    "tests/integration/clients",
    "tests/integration/test_openai_model.py",
    "--ignore=tests/integration/clients/test_crowd.py",  # it is about processes, and takes its time
)

SDKS = {
    "oldest": ("--resolution=lowest-direct",),  # the lower bounds of pyproject.toml, of all dependencies
    "openai-1": ("openai<2", "together<2.1", "anthropic<1"),
    "openai-2": ("openai<3", "together<3", "anthropic<2"),
    "openai-3.0": ("openai==3.0.0", "together==3.0.0", "anthropic==2.0.0"),
}
"""What the installed SDKs are; the newest ones are in the main environment."""

FRAMEWORKS = {
    "agents": "openai-agents",
    "dspy": "dspy",
    "inspect_ai": "inspect-ai",
    "instructor": "instructor",
    "langchain_openai": "langchain-openai",
    "pydantic_ai": "pydantic-ai-slim[openai]",
    "transformers": "transformers[torch]",  # 3 GB, where no index has a torch without CUDA
}
"""What is imported, and what is installed for it: the newest release, with the SDKs that it takes."""


@nox.session
@nox.parametrize("sdks", [nox.param(what, id=name) for name, what in SDKS.items()])
def sdks(session: nox.Session, sdks: tuple[str, ...]) -> None:
    """Run the clients' tests on other versions of the SDKs."""
    # Compiled now, because some SDK's source warns when it is compiled, and the tests take that for an error.
    session.install("--compile-bytecode", "-e", ".[anthropic,gemini,groq,huggingface,test]", *sdks)
    session.run("pytest", "-q", *ON_THE_SDKS, *session.posargs, env={"TOGETHER_NO_BANNER": "1"})


@nox.session
@nox.parametrize("framework", [nox.param(name, id=name) for name in FRAMEWORKS])
def frameworks(session: nox.Session, framework: str) -> None:
    """Run the tests of one framework on our clients; what it warns of is its own business."""
    session.install("-e", ".[test]", FRAMEWORKS[framework])
    tests = f"tests/integration/frameworks/test_{framework}.py"
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "true"}
    session.run("pytest", "-q", "-W", "default", tests, *session.posargs, env=offline)


@nox.session
def ray(session: nox.Session) -> None:
    """Run the tests on a cluster of Ray; what Ray warns of is its own business."""
    session.install("-e", ".[ray,test]")
    # By default, workers run at the lowest priority, and would starve beside other tests.
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    session.run("pytest", "-q", "-W", "default", "tests/integration/ray", *session.posargs, env=environment)


SUITES = {
    "groq": (
        "dirty-equals",
        "groq[aiohttp]",
        "importlib-metadata",
        "nest-asyncio",
        "respx",
        "rich",
        "time-machine",
    ),
    "huggingface_hub": ("pillow", "pytest-mock"),
}
"""The SDKs whose own tests are run, and what these need besides."""


@nox.session
@nox.parametrize("sdk", [nox.param(name, id=name) for name in SUITES])
def suites(session: nox.Session, sdk: str) -> None:
    """Run the tests that an SDK's authors wrote with its clients and with ours, and compare the outcomes."""
    plugins = ("pip", "pytest", "pytest-asyncio", "pytest-xdist")
    session.install("-e", ".[groq,huggingface]", *plugins, *SUITES[sdk])
    # Where Hugging Face's tests would call its servers, they fail at once.
    nowhere = dict.fromkeys(("HF_ENDPOINT", "HF_INFERENCE_ENDPOINT"), "http://127.0.0.1:9")
    session.run("python", "tests/suites.py", sdk, env=nowhere)


@nox.session
def genai(session: nox.Session) -> None:
    """Run google-genai's own tests, or some of its files, with its client and with ours.

    The outcomes must be the same.
    """
    session.install("-e", ".[gemini]", "aiohttp", "httpx", "mcp", "pillow", "pytest", "pytest-asyncio")
    find = "import google.genai.tests as tests; print(list(tests.__path__)[0])"
    place = str(session.run("python", "-c", find, silent=True)).strip()
    folder = session.create_tmp()
    tests = [f"{place}/{name}" for name in session.posargs or (".",)]
    options = [
        "-q",
        "-c",
        os.devnull,
        "-p",
        "google_genai_suite",
        "--mode=replay",
        "--continue-on-collection-errors",
    ]
    options += ["--tb=no", "-oconsider_namespace_packages=true", "-oasyncio_mode=auto", "--rootdir", place]
    reports = []
    for plain in ("1", ""):
        reports.append(f"{folder}/{'theirs' if plain else 'ours'}.xml")
        environment = {
            "GOOGLE_GENAI_SUITE_PLAIN": plain,
            "GOOGLE_GENAI_REPLAYS_DIRECTORY": folder,
            "GOOGLE_API_KEY": "k",
            "GOOGLE_CLOUD_PROJECT": "p",
            "GOOGLE_CLOUD_LOCATION": "us-central1",
            "PYTHONPATH": "tests",
        }
        session.run(
            "pytest", *options, f"--junitxml={reports[-1]}", *tests, env=environment, success_codes=[0, 1]
        )
    session.run("python", "tests/google_genai_suite.py", *reports)


@nox.session
def types(session: nox.Session) -> None:
    """Let pyright read code that uses the clients in place of the SDKs'."""
    session.install("-e", ".[anthropic,gemini,groq,huggingface]", "pyright")
    session.run("pyright", "tests/typing")
