"""The runs that the workers of a proxy share: the main process counts, whichever worker asks."""

from __future__ import annotations

import pytest

from cachepipe.contract.draws import Claimant, Identity
from cachepipe.proxy.frames import FrameReader, frame
from cachepipe.proxy.http_exchange import NEVER_AGAIN, Refusal
from cachepipe.proxy.shared_runs import RunServer, SharedRuns, answer_or_refusal

ONE = Identity("=a", "k", "")
ME = Claimant("a")


class Link:
    """A worker's connection to the main process, without sockets."""

    def __init__(self, server, answers, worker):
        self.server, self.answers, self.worker = server, answers, worker

    def tell(self, *message):
        [received] = FrameReader().feed(frame(message))
        self.server.take(self.worker, received)

    def ask(self, *message):
        self.tell(*message)
        worker, answer = self.answers.pop()
        assert worker == self.worker
        return answer_or_refusal(answer)


@pytest.fixture
def server():
    """The main process; ``answers`` has what it has sent that nobody has read."""
    answers = []
    made = RunServer(lambda worker, answer: answers.append((worker, answer)))
    made.answers = answers
    return made


@pytest.fixture
def workers(server):
    """Two workers."""
    return [SharedRuns(Link(server, server.answers, number)) for number in range(2)]


def taken(runs, label=None, **options):
    counter = runs.run("a", label).request(ME, ["k"], **options)
    return counter, counter.take(ONE)


def test_c1_requests_of_one_run_at_two_workers_get_different_numbers(workers):
    one, other = workers
    assert [taken(runs)[1] for runs in (one, other, other, one)] == [0, 1, 2, 3]
    assert one.run("a", None).counted.take(ONE) == 4  # of a known draw
    assert taken(other, "label")[1] == 0
    assert one.run("a", None).counted.name == other.run("a", None).counted.name


def test_c8_a_retry_at_another_worker_attaches_to_the_draw_that_was_not_delivered(workers):
    one, other = workers
    first, number = taken(one)
    assert taken(other, retry=True)[1] == number
    first.delivered()
    assert taken(other)[1] == 1


def test_c8_the_draws_of_a_worker_that_has_ended_are_given_back(server, workers):
    one, other = workers
    delivered, _ = taken(one)
    taken(one)
    taken(other)
    delivered.delivered()
    server.gone(0)
    assert [taken(other)[1] for _ in range(2)] == [1, 3]


def test_what_a_request_says_after_its_end_changes_nothing(workers):
    one, other = workers
    counter, number = taken(one)
    counter.unanswered()
    counter.ended()
    counter.give_back(ONE.draw(number))
    counter.left()
    assert [taken(other)[1] for _ in range(2)] == [0, 1]


def test_a_new_run_counts_from_the_start_and_the_old_one_goes_on_for_those_who_have_it(server, workers):
    one, _ = workers
    old = one.run("a", None)
    assert old.counted.take(ONE) == 0
    server.begin("a")
    one.forget()
    assert taken(one)[1] == 0
    assert old.counted.take(ONE) == 1
    server.begin()
    with pytest.raises(Refusal, match="try again"):
        old.counted.take(ONE)


def test_a_refusal_of_the_main_process_is_raised_in_the_worker(workers):
    one, other = workers
    one.run("a", None).request(ME, ["k"], key="x")
    with pytest.raises(Refusal) as refused:
        other.run("a", None).request(ME, ["another"], key="x")
    assert (refused.value.status, refused.value.pairs) == (422, [NEVER_AGAIN])


def test_c1_claims_in_memory_are_those_of_all_workers(server, workers):
    one, other = (runs.run("a", None).counted for runs in workers)
    number = workers[1].run("a", None).number
    with one.replaying:
        one.taken("=a", "k").add(0)
        server.take(1, ["borrow", number, "=a", "k"])
        assert not server.answers  # the other worker waits
        assert list(one.taken("=a", "k")) == [(0, 1)]
    assert server.answers.pop() == (1, [(0, 1)])
    server.gone(1)
    with other.replaying:
        other.taken("=a", "k").add(1)
    assert list(one.taken("=a", "k")) == [(0, 2)]
    one.take(ONE)
    assert one.replays
    assert not workers[0].run("b", None).counted.replays


def test_messages_are_cut_wherever_bytes_end():
    reader = FrameReader()
    sent = b"".join(map(frame, ([1, "é"], {"a": None}, [])))
    assert [value for byte in sent for value in reader.feed(bytes([byte]))] == [[1, "é"], {"a": None}, []]
