"""What is imported when, and what is public."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import cachepipe
import cachepipe.testing

HEAVY = [
    "openai",
    "together",
    "anthropic",
    "diskcache",
    "pydantic",
    "anyio",
    "asyncio",
    "rich",
    "click",
    "h11",
]


def loaded_by(code):
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-I", "-c", script], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def test_importing_cachepipe_imports_nothing_heavy():
    new = loaded_by("import cachepipe") - loaded_by("")
    assert new.isdisjoint(HEAVY)
    assert not any(module.startswith("cachepipe.") for module in new)


def test_importing_the_test_doubles_imports_nothing_heavy_either():
    new = loaded_by("import cachepipe.testing") - loaded_by("")
    assert new.isdisjoint([*HEAVY, "pytest", "hypothesis"])


def test_the_mock_server_imports_nothing_of_what_it_judges():
    loaded = loaded_by("from cachepipe.testing.server import MockServer; MockServer()")
    ours = {name for name in loaded if name.startswith("cachepipe.")}
    assert {name for name in ours if not name.startswith("cachepipe.testing.server")} == {
        "cachepipe.testing",
        "cachepipe.testing.ngram",
    }


def test_the_extension_for_notebooks_needs_no_import_of_ipython():
    loaded = loaded_by(
        "import cachepipe; cachepipe.load_ipython_extension, cachepipe.unload_ipython_extension"
    )
    assert "cachepipe.notebook" in loaded
    assert loaded.isdisjoint([*(set(HEAVY) - {"asyncio"}), "IPython"])


def test_a_pipeline_needs_no_client_library():
    loaded = loaded_by("from cachepipe import OnlineAPI, Request")
    assert loaded.isdisjoint(
        ["openai", "together", "anthropic", "pydantic", "rich", "click", "h11", "pytest"]
    )


def test_each_public_name_is_there_and_listed():
    for name in cachepipe.__all__:
        assert getattr(cachepipe, name).__name__ == name
    assert set(cachepipe.__all__) <= set(dir(cachepipe))
    assert cachepipe.__version__.count(".") == 2


@pytest.mark.parametrize("name", ["FaultyStore", "StoreContract", "MockServer", "NGramModel"])
def test_each_test_double_is_there(name):
    assert getattr(cachepipe.testing, name).__name__ == name
    assert name in dir(cachepipe.testing)


@pytest.mark.parametrize("module", [cachepipe, cachepipe.testing])
def test_a_name_that_is_not_there_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="Nonsense"):
        module.Nonsense  # noqa: B018 - the look-up is the case
    assert not hasattr(module, "__wrapped__")


@pytest.mark.parametrize("name", ["AsyncOpenAI", "OpenAI", "Together", "AzureOpenAI", "AnthropicModel"])
def test_importing_a_client_or_adapter_from_the_top_says_where_it_is(name):
    home = "cachepipe.models" if name.endswith("Model") else "cachepipe.clients"
    with pytest.raises(ImportError, match=f"^{name} is in {home}: from {home} import {name}$"):
        exec(f"from cachepipe import {name}")  # noqa: S102 - the statement is the case


@pytest.mark.parametrize(("name", "instead"), [("cachedir", "use cache="), ("batch_size", "OnlineAPI")])
def test_cachesavers_parameters_of_clients_say_what_to_write_instead(name, instead, tmp_path):
    from cachepipe.clients import AsyncOpenAI, OpenAI  # noqa: PLC0415 - it takes its time

    for kind in (AsyncOpenAI, OpenAI):
        with pytest.raises(TypeError, match=f"{kind.__name__} takes no {name}=; .*{instead}"):
            kind(api_key="k", **{name: tmp_path})


@pytest.mark.parametrize("module", ["httptools", "httpx2", "prometheus_client", "uvicorn"])
def test_a_missing_extra_is_said_once(module, tmp_path):
    code = f"import sys; sys.modules['{module}'] = None; from cachepipe.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--upstream", "http://127.0.0.1:9/v1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("pip install") == 1
    assert f"needs {module}: pip install 'cachepipe[proxy]'" in done.stderr


def test_every_module_of_the_package_can_be_imported():
    names = [info.name for info in pkgutil.walk_packages(cachepipe.__path__, "cachepipe.")]
    assert len(names) > 20
    heavy = {"cachepipe.models.transformers", "cachepipe.models.hf_transformers"}
    heavy |= {f"cachepipe.ray.{name}" for name in ("cluster", "data", "pool")}
    for name in names:
        if not name.endswith("__main__") and name not in heavy:
            importlib.import_module(name)


def test_the_adapter_of_transformers_says_what_it_needs(monkeypatch):
    for missing in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, missing, None)
    for name in ("cachepipe.models", "cachepipe.models.transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    models = importlib.import_module("cachepipe.models")
    with pytest.raises(ImportError, match=r"pip install 'cachepipe\[transformers\]'"):
        models.TransformersModel  # noqa: B018 - it is imported when it is named
