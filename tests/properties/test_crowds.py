"""Random crowds: draws that begin, wait, fail, are cancelled and retried at once, in several runs.

What callers received is held against the contract, and so is what the ledger holds when all is over.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import random

import inside
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from profiles import sized

import cachepipe
from cachepipe import Batch, DiskStore, MemoryStore, OnlineAPI, Request, ShortAnswer, open_store
from cachepipe.stores.base import Discard
from cachepipe.stores.remote.copies import Copies
from cachepipe.stores.remote.session import Session
from cachepipe.stores.remote.store import RemoteStore
from cachepipe.testing import FaultyStore, MemoryEngine
from cachepipe.testing.models import ScriptedError, ScriptedModel

NAMESPACES = [None, "a", "b"]


def opener(kind, request):
    """Return a function that opens a new, empty store of a kind."""
    match kind:
        case "memory":
            return MemoryStore
        case "disk":
            folders = request.getfixturevalue("tmp_path_factory")
            return lambda: DiskStore(folders.mktemp("cache"))
        case "remote":
            return lambda: RemoteStore(Session(MemoryEngine()))
        case "copied":
            folders = request.getfixturevalue("tmp_path_factory")
            return lambda: copied(folders.mktemp("local"))
        case _:
            new_url = request.getfixturevalue(f"new_{kind}_url")
            return lambda: open_store(new_url())[0]


def copied(folder):
    engine = MemoryEngine()
    return RemoteStore(Session(engine, copies=Copies(folder, engine.identity, 10)))


STORES = ["memory", "disk", "remote", "copied", "valkey", "postgres"]


@pytest.fixture(scope="session", params=sized(["memory", "disk", "valkey"], STORES))
def new_store(request):
    """A function that opens a new, empty store; where time is short, on one of the servers."""
    return opener(request.param, request)


@pytest.fixture(scope="session", params=STORES)
def new_store_of_each_kind(request):
    """The same for each kind of store in every profile."""
    return opener(request.param, request)


def label(namespace):
    return "-" if namespace is None else f"={namespace}"


class Person:
    """Somebody who makes a request, in one of the runs and through one of the pipelines."""

    def __init__(self, request, run, pipeline):
        self.request = request
        self.run = run
        self.pipeline = pipeline
        self.task = None
        self.responses = []
        self.errors = []
        self.short = 0
        self.tries = 0


class Crowd:
    """A store, pipelines with a model each, runs, and people; a schedule says what happens when."""

    def __init__(self, store, *, pipelines=1, runs=1, max_n=None, locked=False, same=()):
        self.store = store
        faulty = FaultyStore(store)
        faulty.locked = locked
        self.models = [
            ScriptedModel(hold=True, max_n=max_n, cache_scope="m", name=f"{number}:")
            for number in range(pipelines)
        ]
        self.pipelines = [
            OnlineAPI(model, faulty if locked else store, repeat="same" if number in same else "fresh")
            for number, model in enumerate(self.models)
        ]
        self.same = same  # the numbers of the pipelines whose requests share one draw per key
        self.discarded = {}  # (key, index) -> what the sample was
        self.runs = [contextvars.copy_context() for _ in range(runs)]
        self.begun = [cachepipe.run() for _ in self.runs]  # each lasts as long as it is referred to
        for run, begun in zip(self.runs, self.begun, strict=True):
            run.run(begun.__enter__)
        self.people = []
        self.ordered = []  # the errors that were ordered

    @property
    def held(self):
        return [call for model in self.models for call in model.held]

    @property
    def responses(self):
        return [(person, response) for person in self.people for response in person.responses]

    def admit(self, wishes):
        for namespace, question, request_id, n, run, pipeline in wishes:
            request = Request(question, n=n, request_id=request_id, namespace=namespace)
            self.people.append(Person(request, run % len(self.runs), pipeline % len(self.pipelines)))

    def start(self, person):
        async def live():
            try:
                person.responses.append(await self.pipelines[person.pipeline].request(person.request))
            except ScriptedError as error:
                person.errors.append(error)
            except ShortAnswer:  # three empty answers in a row, as "short" may have ordered them
                person.short += 1

        self.let_live([person], live())

    def start_batch(self, people, *, return_exceptions):
        """Let people make their requests as one batch, in the run and through the pipeline of the first."""

        async def live():
            batch = Batch([person.request for person in people])
            pipeline = self.pipelines[people[0].pipeline]
            try:
                answers = await pipeline.batch_request(batch, return_exceptions=return_exceptions)
            except (ScriptedError, ShortAnswer) as error:
                answers = [error]
            for person, answer in zip(people, answers, strict=False):
                match answer:
                    case ScriptedError():
                        person.errors.append(answer)
                    case ShortAnswer():
                        person.short += 1
                    case cachepipe.Response():
                        person.responses.append(answer)

        for person in people:
            person.run, person.pipeline = people[0].run, people[0].pipeline
        self.let_live(people, live())

    def let_live(self, people, life):
        task = asyncio.get_running_loop().create_task(life, context=self.runs[people[0].run].copy())
        for person in people:
            person.task = task
            person.tries += 1

    async def play(self, schedule):
        waiting = collections.deque(self.people)
        for act, number in schedule:
            await self.step(act, number, waiting)
        while waiting:
            self.start(waiting.popleft())
        for model in self.models:
            model.open()
        await asyncio.wait({person.task for person in self.people if person.task})
        for pipeline in self.pipelines:
            await pipeline.close()
        for run, begun in zip(self.runs, self.begun, strict=True):
            run.run(begun.__exit__, None, None, None)

    async def step(self, act, number, waiting):
        begun = [person for person in self.people if person.task]
        running = [person for person in begun if not person.task.done()]
        unserved = [person for person in begun if person.task.done() and not person.responses]
        if act == "turn":
            for _ in range(number % 5):
                await asyncio.sleep(0)
        elif act == "start" and waiting:
            self.start(waiting.popleft())
        elif act == "batch" and waiting:
            people = [waiting.popleft() for _ in range(min(1 + number % 4, len(waiting)))]
            self.start_batch(people, return_exceptions=number % 2 == 0)
        elif act == "cancel" and running:
            running[number % len(running)].task.cancel()
        elif act == "retry" and unserved:
            self.start(unserved[number % len(unserved)])
        elif act == "discard":
            await self.discard(number)
        elif self.held:
            self.end(self.held[number % len(self.held)], act)

    def end(self, call, act):
        match act:
            case "fail" | "refuse" | "late":
                error = ScriptedError(act, status_code=400 if act == "refuse" else None)
                if act == "late":
                    error = SlowError()
                self.ordered.append(error)
                call.fail(error)
            case "short":
                call.release(call.n - 1)
            case "generous":
                call.release(call.n + 2)
            case _:
                call.release()

    def stored(self):
        """Return what is stored by key and index, without what was discarded."""
        return {
            (info.key, sample.index): orjson.loads(sample.payload)
            for info in self.store.keys()  # noqa: SIM118 - a store's method
            for sample in self.store.samples(info.key)
        }

    async def discard(self, number):
        stored = self.stored()
        if stored:
            place = sorted(stored)[number % len(stored)]
            self.discarded[place] = stored[place]
            await self.store.apply([Discard(*place, "the schedule says so")])

    # What must be true.

    def asked(self, person):
        """Return whose draw a person's is: the namespace's label, the key and the request id."""
        pipeline, request = self.pipelines[person.pipeline], person.request
        if person.pipeline in self.same:
            return ("*", pipeline.key(request), "")
        return (label(request.namespace), pipeline.key(request), request.request_id or "")

    def ledger(self):
        return {info.draw: info.indices for info in self.store.draws()}

    def check_independence(self):
        """C1, on what callers received and on the ledger; C2: what was received is on record."""
        owners = {}
        ledger = self.ledger()
        for draw, indices in ledger.items():
            for index in indices:
                assert owners.setdefault((draw.namespace, draw.key, index), draw) == draw
        seen = collections.defaultdict(set)
        for person, response in self.responses:
            request, asked = person.request, self.asked(person)
            assert len(response.data) == len(response.cached) == len(response.indices) == request.n
            for position, index in enumerate(response.indices):
                if (response.key, index) not in self.discarded:
                    draw = owners.get((asked[0], response.key, index))
                    assert draw is not None, "a sample was delivered, and the ledger does not know"
                    assert (draw.namespace, draw.key, draw.request_id) == asked
                    assert ledger[draw][position] == index
            if asked[0] != "*":
                given = seen[person.run, request.namespace, response.key]
                assert given.isdisjoint(response.data), "a sample went to two draws of a namespace"
                given.update(response.data)

    def check_ledger(self):
        """What stands is taken, and nothing else; nothing is pending or held, and all of it is stored."""
        union = collections.defaultdict(set)
        for draw, indices in self.ledger().items():
            union[draw.namespace, draw.key].update(indices)
        gone = collections.defaultdict(set)
        for key, index in self.discarded:
            gone[key].add(index)
        taken = inside.taken(self.store)
        assert all(taken.get(place, set()) >= indices for place, indices in union.items())
        assert all(indices <= union[place] | gone[place[1]] for place, indices in taken.items())
        assert inside.unfinished(self.store) == (0, 0)
        stored = self.stored() | self.discarded
        for (_, key), indices in union.items():
            assert all((key, index) in stored for index in indices), "a draw stands with a sample missing"
        for _, response in self.responses:
            assert response.data == [stored[response.key, index] for index in response.indices]
        returned = [sample for model in self.models for call in model.calls for sample in call.samples]
        assert sorted(stored.values()) == sorted(returned), "C7: what the model returned is stored"

    def check_marks(self):
        """C8: what is in the ledger was delivered, or is all that somebody wanted who has gone."""
        given, gone = collections.defaultdict(set), collections.defaultdict(set)
        for person in self.people:
            for response in person.responses:
                given[self.asked(person)].update(enumerate(response.indices))
            if person.tries > len(person.responses):
                gone[self.asked(person)].add(person.request.n)
        for draw, indices in self.ledger().items():
            for place in enumerate(indices):
                wanted = [n for n in gone[draw[:3]] if place[0] < n <= len(indices)]
                assert place in given[draw[:3]] or wanted, "a draw that failed has left a mark"

    def check_accounting(self):
        """C6: falses and unreported samples number the generated ones; no sample is reported twice."""
        falses = [
            (response.key, index)
            for _, response in self.responses
            for index, cached in zip(response.indices, response.cached, strict=True)
            if not cached
        ]
        assert len(falses) == len(set(falses)), "a sample was reported false twice"
        stats = [pipeline.stats() for pipeline in self.pipelines]
        assert sum(s.generated for s in stats) == sum(model.generated for model in self.models)
        assert len(falses) + sum(s.unreported for s in stats) == sum(s.generated for s in stats)
        assert sum(s.misses for s in stats) == len(falses)
        assert all(s.in_flight == 0 for s in stats)

    def check_errors(self):
        """C8: people see the errors that the model raised, as the same objects."""
        for person in self.people:
            assert all(any(error is ordered for ordered in self.ordered) for error in person.errors)

    def check_all(self):
        self.check_independence()
        self.check_ledger()
        self.check_marks()
        self.check_accounting()
        self.check_errors()


class SlowError(ScriptedError, TimeoutError):
    """The model did not answer in time."""


wishes = st.lists(
    st.tuples(
        st.sampled_from(NAMESPACES),
        st.sampled_from("pppq"),
        st.sampled_from([None, None, "x"]),
        st.integers(1, 3),
        st.integers(0, 1),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=9,
)


def schedules(*acts):
    return st.lists(
        st.tuples(st.sampled_from(["start", "start", "batch", "turn", "turn", *acts]), st.integers(0, 11)),
        max_size=40,
    )


def run_crowd(new_store, wish, schedule, **options):
    store = new_store()

    async def main():
        crowd = Crowd(store, **options)
        crowd.admit(wish)
        async with asyncio.timeout(5):
            await crowd.play(schedule)
        return crowd

    try:
        crowd = asyncio.run(main())
        crowd.check_all()
        yield crowd
    finally:
        store.close()


@given(wish=wishes, schedule=schedules("end", "end"), max_n=st.sampled_from([None, 1, 2]))
def test_c4_a_crowd_buys_what_its_largest_namespace_draws(new_store, wish, schedule, max_n):
    """C1, C4, C6: whatever the order of requests and answers, when nothing fails."""
    for crowd in run_crowd(new_store, wish, schedule, max_n=max_n):
        drawn = collections.Counter()
        for person in crowd.people:
            drawn[person.request.prompt, person.request.namespace] += person.request.n
        largest = collections.Counter()
        for (question, _), count in drawn.items():
            largest[question] = max(largest[question], count)
        assert crowd.models[0].generated == largest.total()
        assert len(crowd.responses) == len(crowd.people)


@given(
    wish=wishes,
    schedule=schedules("end", "end"),
    again=schedules("end"),
    seed=st.integers(0, 1000),
    mode=st.sampled_from(["read-write", "replay"]),
)
def test_c2_a_rerun_in_any_order_repeats_the_crowd(new_store, wish, schedule, again, seed, mode):
    """C2: another run, another pipeline, another order: the same data, and no call."""
    wish = [(namespace, question, request_id, n, 0, 0) for namespace, question, request_id, n, _, _ in wish]
    for crowd in run_crowd(new_store, wish, schedule):
        first = collections.defaultdict(list)
        for person, response in crowd.responses:
            first[person.request.namespace, person.request.prompt, person.request.request_id or ""].append(
                (person.request, response.data)
            )
        # The order among requests of one identity is what tells their draws apart; all else is shuffled.
        order = [identity for identity, answers in first.items() for _ in answers]
        random.Random(seed).shuffle(order)
        queues = {identity: iter(answers) for identity, answers in first.items()}
        script = [next(queues[identity]) for identity in order]
        store = crowd.store

        async def rerun(store=store, script=script):
            model = ScriptedModel(fail=lambda _: ScriptedError("a rerun asks nothing"), cache_scope="m")
            pipeline = OnlineAPI(model, store, mode=mode)
            with cachepipe.run():
                tasks = []
                for (request, _), (act, number) in zip(script, again + [("turn", 0)] * 99, strict=False):
                    tasks.append(asyncio.create_task(pipeline.request(request)))
                    if act == "turn":
                        for _ in range(number % 3):
                            await asyncio.sleep(0)
                responses = await asyncio.gather(*tasks)
            await pipeline.close()
            assert [response.data for response in responses] == [data for _, data in script]
            assert all(all(response.cached) for response in responses)
            assert not model.calls

        asyncio.run(rerun())


FAULTS = ["end", "end", "fail", "refuse", "late", "short", "generous", "cancel", "retry"]


@given(wish=wishes, schedule=schedules(*FAULTS), max_n=st.sampled_from([None, 1, 2]))
def test_c8_failures_and_cancellations_leave_every_promise_whole(new_store, wish, schedule, max_n):
    """C1, C6, C7, C8 in one run, with everything that can go wrong."""
    for crowd in run_crowd(new_store, wish, schedule, max_n=max_n):
        assert len(crowd.people) == len(wish)


@given(
    wish=wishes,
    schedule=schedules(*FAULTS),
    max_n=st.sampled_from([None, 1]),
    pipelines=st.integers(1, 2),
)
def test_c1_runs_that_share_draws_join_extend_and_take_over(new_store, wish, schedule, max_n, pipelines):
    """C1, C8: two runs make the same draws at once, of several lengths; undo, extension, join, takeover."""
    for crowd in run_crowd(new_store, wish, schedule, max_n=max_n, runs=2, pipelines=pipelines):
        assert len(crowd.people) == len(wish)


one_question = st.lists(
    st.tuples(
        st.sampled_from([None, "a"]),
        st.just("p"),
        st.none(),
        st.integers(1, 3),
        st.integers(0, 1),
        st.integers(0, 1),
    ),
    min_size=2,
    max_size=6,
)


@given(
    wish=one_question,
    schedule=schedules("end", "generous", "generous", "fail", "cancel", "retry", "discard", "discard"),
    max_n=st.sampled_from([None, 1]),
    same=st.sampled_from([(), (1,), (0, 1)]),
)
@example(
    wish=[(None, "p", None, 1, 0, 0), (None, "p", None, 4, 1, 0)],
    schedule=[
        *[("start", 0), ("turn", 4), ("generous", 0), ("turn", 4), ("discard", 0)],
        *[("start", 0), ("turn", 4), ("fail", 0)],
    ],
    max_n=None,
    same=(),
)
def test_c8_draws_that_have_lost_samples_fail_and_leave_no_mark(new_store, wish, schedule, max_n, same):
    """C1, C2, C8: samples are discarded meanwhile, and some of the draws are shared by all namespaces."""
    for crowd in run_crowd(new_store, wish, schedule, max_n=max_n, runs=2, pipelines=2, same=same):
        assert len(crowd.people) == len(wish)


@settings(max_examples=sized(10, 40))
@given(wish=wishes, schedule=schedules(*FAULTS), max_n=st.sampled_from([None, 1]))
def test_c8_the_same_where_every_write_has_to_wait(new_store, wish, schedule, max_n):
    """C1, C6, C7, C8: the store is locked by others, so each write takes a while in a thread."""
    for crowd in run_crowd(new_store, wish, schedule, max_n=max_n, runs=2, locked=True):
        assert len(crowd.people) == len(wish)


@pytest.mark.parametrize("seed", range(sized(1, 4)))
def test_c1_a_large_crowd(new_store_of_each_kind, seed):
    """The same at the size of an experiment: several hundred requests, the writer's thread at work."""
    dice = random.Random(seed)
    wish = [
        (
            dice.choice(NAMESPACES),
            dice.choice("pqrs"),
            dice.choice([None, "x", "y"]),
            dice.randint(1, 4),
            i,
            i,
        )
        for i in range(300)
    ]
    acts = ["start"] * 8 + ["batch"] * 2 + ["turn"] * 4 + FAULTS
    schedule = [(dice.choice(acts), dice.randrange(1000)) for _ in range(900)]
    for crowd in run_crowd(new_store_of_each_kind, wish, schedule, runs=2, pipelines=2):
        assert len(crowd.people) == 300
