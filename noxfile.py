"""Environments that the tests need beside the main one, each with other versions of what stands around us.

    nox                        everything below
    nox -s "sdks(openai-1)"    the clients' tests on one set of SDKs; `nox -l` lists the sets

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

ON_THE_SDKS = ("tests/integration/clients", "tests/integration/test_openai_model.py")

SDKS = {
    "oldest": ("--resolution=lowest-direct",),  # the lower bounds of pyproject.toml, of all dependencies
    "openai-1": ("openai<2", "together<2.1", "anthropic<1"),
    "openai-2": ("openai<3", "together<3", "anthropic<2"),
    "openai-3.0": ("openai==3.0.0", "together==3.0.0", "anthropic==2.0.0"),
}
"""What the installed SDKs are; the newest ones are in the main environment."""


@nox.session
@nox.parametrize("sdks", [nox.param(what, id=name) for name, what in SDKS.items()])
def sdks(session: nox.Session, sdks: tuple[str, ...]) -> None:
    """Run the clients' tests on other versions of the SDKs."""
    _run(session, sdks, ON_THE_SDKS)


def _run(session: nox.Session, what: tuple[str, ...], tests: tuple[str, ...]) -> None:
    session.install("-e", ".[anthropic,test]", *what)
    session.run("pytest", "-q", *tests, *session.posargs, env={"TOGETHER_NO_BANNER": "1"})
