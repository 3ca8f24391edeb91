"""A pool of actors on two nodes."""

from __future__ import annotations

import pytest
import ray

from cachepipe import Request
from cachepipe.ray import Pool, RequestError


def test_a_pool_repeats_the_requests_of_an_actor_that_dies(settings, server):
    requests = [Request(f"question {k % 10}", request_id=str(k), namespace="exp", n=2) for k in range(40)]
    server.kill_at = 15
    with Pool(settings(), num_cpus=0, concurrency=4) as pool:
        given = [answer.data for answer in pool.map(requests)]
        assert len({sample for samples in given for sample in samples}) == 80
        assert len(server.killed) == 1
        assert 80 <= server.samples <= 80 + 2 * 4  # which the actor may have in flight
        server.kill_at, before = None, server.calls

        @ray.remote(num_cpus=0)
        def from_a_task(pool, request):
            return pool.request(request)

        one = ray.get(from_a_task.remote(pool, requests[7]))
        assert (one.data, one.cached, len(one.indices)) == (given[7], [True, True], 2)
        assert [answer.data for answer in pool.map(requests[::-1])] == given[::-1]
        assert server.calls == before

        refused = Request("refuse", request_id="x")
        with pytest.raises(RequestError, match=r"^refused: ") as caught:
            pool.request(refused)
        assert "sk-" not in str(caught.value)
        [error, fine] = pool.map([refused, requests[0]], return_exceptions=True)
        assert isinstance(error, RequestError)
        assert fine.data == given[0]
        with pytest.raises(ValueError, match="request_id="):
            pool.request(Request("no id"))
        assert pool.summary().as_dict()["billed"]["samples"] >= 60
