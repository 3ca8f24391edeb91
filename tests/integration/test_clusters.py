"""A cache on a real Valkey Cluster: three primaries with a replica each."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

pytest.register_assert_rewrite("cachepipe.testing.contract")

from cachepipe import OnlineAPI, Request, open_store  # noqa: E402 - after the rewriting is asked for
from cachepipe.stores.base import Discard  # noqa: E402 - likewise
from cachepipe.stores.remote import valkey  # noqa: E402 - likewise
from cachepipe.stores.remote.verify import check  # noqa: E402 - likewise
from cachepipe.testing import ScriptedModel, StoreContract  # noqa: E402 - likewise

PAGE = (Path(__file__).parents[2] / "docs/servers.md").read_text()
ACL = re.findall(r"^ACL SETUSER .*$", PAGE, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has")
class TestClusterStore(StoreContract):
    """The store that machines share, on a cluster."""

    @pytest.fixture(autouse=True)
    def url(self, new_cluster_url):
        self.url = new_cluster_url()

    def make_store(self, tmp_path):
        return open_store(self.url)[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has")
def test_a_cluster_that_is_opened_while_a_replica_takes_over_is_waited_for(new_cluster_url, monkeypatch):
    """Until then the client takes the old primary, which comes back as a replica, for a primary."""
    told, real = [{"role": "slave", "redis_version": "9.0.0"}], valkey._info
    monkeypatch.setattr(valkey, "_info", lambda *asked: told.pop() if told else real(*asked))
    store, _ = open_store(new_cluster_url())
    assert not told
    assert store.totals()["samples"] == 0
    store.close()


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has")
async def test_c2_a_failover_with_the_replica_in_step_loses_nothing(cluster, new_cluster_url):
    url, model = new_cluster_url(), ScriptedModel(cache_scope="m")

    async def ask(pipeline, wave):
        places = [(f"q{number}", f"{wave}") for number in range(60)]
        requests = [Request(prompt, request_id=request_id) for prompt, request_id in places]
        answers = await asyncio.gather(*map(pipeline.request, requests))
        return dict(zip(places, (answer.data for answer in answers), strict=True))

    async with OnlineAPI(model, url) as pipeline:
        seen = await ask(pipeline, 1)
        epoch = pipeline.store.session.engine.changes(None).epoch
        primary = cluster.primaries()[0]
        with primary.client() as client:
            client.execute_command("WAIT", 1, 5000)
        primary.kill()
        seen |= await ask(pipeline, 2)
        noticed = pipeline.store.session.engine.changes(None).epoch
        assert noticed != epoch, "copies on this machine are not used any more"
    primary.start()
    idle = ScriptedModel(cache_scope="m")
    async with OnlineAPI(idle, url) as pipeline:
        assert await ask(pipeline, 1) | await ask(pipeline, 2) == seen
        assert pipeline.store.session.engine.changes(None).epoch == noticed
    assert not idle.calls


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:the server at .* confirms samples that no replica has")
async def test_a_user_of_a_cluster_needs_the_documented_permissions_only(cluster):
    for node in cluster.nodes:
        with node.client() as client:
            for line in ACL:
                client.execute_command(line)
            client.acl_log_reset()
    url = cluster.url("eam").replace("://", "://lab:PASSWORD@")
    async with OnlineAPI(ScriptedModel(cache_scope="m"), url) as pipeline:
        answers = [await pipeline.request(Request(f"q{number}", n=2)) for number in range(20)]
        store = pipeline.store
        await store.apply([Discard(answers[0].key, 0, "a test")])
        assert await asyncio.to_thread(store.session.local.sync)
        assert len(list(store.keys())) == 20
        assert check(store.session).whole
    for node in cluster.nodes:
        with node.client() as client:
            assert client.acl_log() == []
