"""What Ray's workers do, as far as it needs no Ray."""

from __future__ import annotations

import json
import sys

import pytest

from cachepipe import Request, Response
from cachepipe.errors import StoreError
from cachepipe.ray import RaySettings, Rows, summary
from cachepipe.ray.rows import written
from cachepipe.ray.settings import check_nodes
from cachepipe.ray.worker import Worker, check_id
from cachepipe.testing import ScriptedModel

pytestmark = pytest.mark.anyio


def settings(tmp_path, **changes):
    return RaySettings(**{"model": ScriptedModel, "cache": tmp_path / "cache", **changes})


async def data(worker, *requests):
    return [answer.data for answer in await worker.answers(requests)]


async def test_c2_an_id_gets_the_same_samples_however_often_and_wherever_it_is_asked(tmp_path):
    mine = settings(tmp_path)
    one, two, more = (Request("q", request_id=name) for name in ("1", "2", "3"))
    first, second = Worker(mine), Worker(mine)
    [[a], [b]] = await data(first, one, two)
    assert a != b
    assert await data(first, two, one) == [[b], [a]]  # as when Ray repeats a task in the same worker
    [[b_again], [c], [a_again]] = await data(second, two, more, one)
    assert (a_again, b_again) == (a, b)
    assert await data(first, more) == [[c]]
    await first.pipeline.close()
    await second.pipeline.close()
    again = Worker(settings(tmp_path, mode="replay"))
    assert await data(again, one, one, two) == [[a], [a], [b]]
    await again.pipeline.close()


async def test_c6_equal_ids_in_a_batch_are_one_draw_that_is_bought_once(tmp_path):
    worker = Worker(settings(tmp_path))
    same = Request("q", request_id="1", n=2)
    [one, two] = await worker.answers([same, same])
    assert one.data == two.data
    assert sorted([one.cached, two.cached]) == [[False, False], [True, True]]
    await worker.pipeline.close()


async def test_c6_the_summary_is_that_of_the_run_alone(tmp_path):
    earlier, later = settings(tmp_path), settings(tmp_path)
    for mine in (earlier, later):
        worker = Worker(mine)
        await worker.answers([Request("q", request_id="1", n=3)])
        await worker.write_sums()
        await worker.pipeline.close()
    assert summary(earlier).as_dict()["spent"]["samples"] == 3
    figures = summary(later).as_dict()
    assert (figures["requests"], figures["spent"]["samples"], figures["as_asked"]["samples"]) == (1, 0, 3)
    assert str(summary(later)).startswith("requests  1\nspent     0 samples")


async def test_an_error_is_a_text_without_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-secret-key")

    class Broken:
        model = "broken"

        async def request(self, request):
            raise RuntimeError(f"{request.prompt} with sk-secret-key")

    worker = Worker(settings(tmp_path, model=Broken))
    assert await worker.answers([Request("q", request_id="1")]) == ["RuntimeError: q with ***"]
    assert await worker.answers([]) == []
    await worker.pipeline.close()


async def test_a_model_on_the_workers_hardware_gets_batches(tmp_path):
    sizes = []

    class Local:
        model = "local"

        async def batch_request(self, batch):
            sizes.append(len(batch))
            return [Response([each.prompt] * each.n) for each in batch]

    worker = Worker(settings(tmp_path, model=Local, model_batch_size=4))
    await worker.answers([Request(str(k), request_id=str(k)) for k in range(8)])
    await worker.pipeline.close()
    assert sum(sizes) == 8
    assert max(sizes) > 1


def test_what_cannot_travel_to_a_worker_is_refused(tmp_path):
    for model in (ScriptedModel(), "gpt-5-mini"):
        with pytest.raises(TypeError, match="function without parameters"):
            settings(tmp_path, model=model)
    with pytest.raises(TypeError, match="service is a function"):
        settings(tmp_path, service=object())
    with pytest.raises(TypeError, match="stays in its process"):
        settings(tmp_path, cache=object())
    for url in ("valkey://me:secret@host/0", "postgresql://host/db?password=secret"):
        with pytest.raises(StoreError, match="has a password, which Ray would store") as caught:
            settings(tmp_path, cache=url)
        assert "secret" not in str(caught.value)
    assert settings(tmp_path, cache="postgresql://lab@host/db").cache == "postgresql://lab@host/db"


def test_the_cache_has_one_name_for_all_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings(tmp_path, cache="here").cache == str(tmp_path / "here")
    monkeypatch.setenv("CACHEPIPE_DIR", "valkey://host/0")
    assert settings(tmp_path, cache=None).cache == "valkey://host/0"


def test_a_folder_is_for_one_node():
    check_nodes("/folder", 1)
    check_nodes("valkey://host/0", 2)
    with pytest.raises(StoreError, match="is a folder of one machine, and this Ray cluster has 2 nodes"):
        check_nodes("/folder", 2)


def test_only_equal_questions_that_share_a_draw_need_no_id(tmp_path):
    check_id(settings(tmp_path, repeat="same"), None, "an id")
    with pytest.raises(ValueError, match="without ids"):
        check_id(settings(tmp_path), None, "an id")


def test_a_row_is_a_request():
    rows = Rows(id="id", fields={"temperature": 0.5}, n=2, namespace="exp", replicate=1)
    request = rows.request({"id": 7, "prompt": [{"role": "user", "content": "q", "name": None}]})
    assert request.prompt == [{"role": "user", "content": "q"}]
    assert (request.request_id, request.n, request.namespace, request.replicate) == ("7", 2, "exp", 1)
    assert request.temperature == 0.5


@pytest.mark.parametrize("as_text", [False, True])
def test_a_row_may_hold_a_whole_body(as_text):
    body = {"messages": [{"role": "user", "content": "q"}], "n": 3, "stop": ["x"], "stream": True}
    written = json.dumps(body) if as_text else {**body, "seed": None}
    request = Rows(body="body").request({"body": written})
    assert (request.prompt, request.n, request.stop, request.request_id) == (body["messages"], 3, ["x"], None)
    assert not {"stream", "seed"} & set(vars(request))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": None, "body": "{}"}, "id must not be null"),
        ({"id": 1, "body": None}, "got null"),
        ({"id": 1, "body": "{"}, "."),
        ({"id": 1, "body": "[]"}, "JSON object"),
        ({"id": 1, "body": "{}"}, "one of prompt, messages, input; got none"),
        ({"id": 1, "body": '{"prompt": "a", "input": "b"}'}, "got prompt, input"),
        ({"id": 1, "body": '{"prompt": "a", "namespace": "b"}'}, "option of Rows"),
        ({"id": 1, "body": '{"prompt": "a", "n": 0}'}, "at least 1"),
        ({"id": 1, "body": '{"prompt": "a", "not a name": 0}'}, "identifiers"),
    ],
)
def test_a_bad_row_is_an_error_of_its_own(row, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Rows(id="id", body="body").request(row)


def test_rows_refuse_what_is_no_field():
    with pytest.raises(ValueError, match="'prompt'"):
        Rows(fields={"prompt": "x"})
    with pytest.raises(ValueError, match="at least 1"):
        Rows(n=0)


@pytest.mark.parametrize(
    ("sample", "cell"),
    [("a", "a"), ("\ud83d", '"\\ud83d"'), ([1, 0.5], [1.0, 0.5]), (3, "3"), ({"a": None}, '{"a":null}')],
)
def test_a_sample_is_a_text_a_vector_or_json(sample, cell):
    assert written(sample) == cell


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("cachepipe.ray.cluster", "cachepipe.ray.data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import cachepipe.ray  # noqa: PLC0415 - the import is the case

    with pytest.raises(ImportError, match=r"pip install 'cachepipe\[ray\]'"):
        cachepipe.ray.ask  # noqa: B018 - it is imported when it is named
