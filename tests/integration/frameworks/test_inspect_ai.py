"""inspect_ai by way of the proxy: an evaluation with epochs, nothing changed but the base URL."""

from __future__ import annotations

import inspect_ai
import pytest
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

from cachepipe.proxy.server import running
from cachepipe.proxy.settings import ProxySettings, Upstream

EPOCHS = 3
CITIES = ("Paris", "Rome", "Oslo", "Bern")


@pytest.fixture
def base_url(server, tmp_path):
    """The address of a proxy in front of the mock server, without the namespace."""
    upstream = Upstream.of("mock", server.base_url)
    with running(ProxySettings(upstreams=(upstream,), cache=str(tmp_path / "cache"), port=0)) as proxy:
        yield proxy.url


def evaluate(base_url, folder, **options):
    """Run an evaluation; return the answers by sample, in the order of the epochs."""
    task = inspect_ai.Task(
        dataset=[Sample(id=city, input=f"Tell me of {city}.", target=city[0]) for city in CITIES],
        solver=generate(),
        scorer=includes(),
    )
    (log,) = inspect_ai.eval(
        task,
        model="openai/m",
        model_base_url=base_url,
        model_args={"api_key": "k", "responses_api": False},
        epochs=EPOCHS,
        log_dir=str(folder),
        display="none",
        **options,
    )
    assert log.status == "success", log.error
    answers = {city: [None] * EPOCHS for city in CITIES}
    for sample in log.samples:
        answers[sample.id][sample.epoch - 1] = sample.output.completion
    return answers


def test_epochs_are_samples_and_a_rerun_makes_none(base_url, server, tmp_path):
    first = evaluate(f"{base_url}/ns/suite@1/v1", tmp_path)
    made = server.stats.samples_generated
    assert made == EPOCHS * len(CITIES)
    assert len({text for texts in first.values() for text in texts}) > len(CITIES)
    again = evaluate(f"{base_url}/ns/suite@2/v1", tmp_path)
    # Equal requests in flight together are interchangeable: the set is the same.
    assert {city: sorted(texts) for city, texts in again.items()} == {
        city: sorted(texts) for city, texts in first.items()
    }
    assert server.stats.samples_generated == made


def test_one_connection_fixes_the_order_too(base_url, server, tmp_path):
    first = evaluate(f"{base_url}/ns/suite@1/v1", tmp_path, max_connections=1, max_samples=1)
    assert evaluate(f"{base_url}/ns/suite@2/v1", tmp_path, max_connections=1, max_samples=1) == first
    assert server.stats.samples_generated == EPOCHS * len(CITIES)
