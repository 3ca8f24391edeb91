"""Programs whose concurrent tasks share state, so that what they ask depends on whose answer comes first.

Each depends on nothing but its answers: not on real time, on files or on the order of sets.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import heapq
from collections import deque

import anyio

PROGRAMS = {}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, and what is known about it.

    Attributes:
        run: the asynchronous function.
        own_ids: whether it makes request ids.
        equal_questions: whether its tasks may ask equal questions at once. Their draws differ by the order
            of the requests, so a request that fails and is repeated becomes another draw.
    """

    run: object
    own_ids: bool = False
    equal_questions: bool = False


def program(run=None, **known):
    """Register a program under its name, with what is known about it."""

    def register(run):
        PROGRAMS[run.__name__] = Program(run, **known)
        return run

    return register if run is None else register(run)


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


# A memo that tasks share.


@program(equal_questions=True)
async def tree_search_with_a_memo(ask, rng):
    """Breadth-first search in which the values of states are asked for once, by whoever comes first."""
    memo = {}

    async def value(state, who):
        if state not in memo:
            memo[state] = await ask(f"value {state}", who=who)
        return memo[state]

    async def expand(state, who):
        moves = await ask.many(f"moves of {state}", 3, who=who)
        children = [(state * 7 + move) % 40 for move in moves]
        values = await asyncio.gather(*(value(child, who) for child in children))
        return list(zip(values, children, strict=True))

    async def search(root):
        frontier = [root]
        for depth in range(3):
            found = await asyncio.gather(*(expand(state, f"{root}.{depth}") for state in frontier))
            frontier = [state for _, state in heapq.nlargest(3, {pair for pairs in found for pair in pairs})]
        return frontier

    return [await asyncio.gather(*map(search, range(4))), sorted(memo.items())]


@program
async def memo_of_futures(ask, rng):
    """Whoever comes later waits for the future of whoever came first."""
    memo = {}

    async def look_up(topic):
        if topic not in memo:
            memo[topic] = asyncio.ensure_future(ask(f"topic {topic} after {len(memo)}"))
        return await memo[topic]

    async def reader(number):
        topic, read = number % 3, []
        for _ in range(6):
            read.append(await look_up(topic))
            topic = (topic + read[-1]) % 12
        return read

    return await asyncio.gather(*map(reader, range(6)))


@program
async def memo_under_a_lock_per_topic(ask, rng):
    memo, locks = {}, {}

    async def look_up(topic, who):
        async with locks.setdefault(topic, asyncio.Lock()):
            if topic not in memo:
                memo[topic] = await ask(f"topic {topic}", who=who)
        return memo[topic]

    async def reader(number):
        total = number
        for _ in range(5):
            total += await look_up(total % 9, str(number))
        return total

    return await asyncio.gather(*map(reader, range(7)))


@program
async def notes_that_all_prompts_contain(ask, rng):
    """Each prompt contains what all agents have learnt so far."""
    notes = []

    async def agent(number):
        for step in range(4):
            notes.append(await ask(f"agent {number}, step {step}, notes {notes[-4:]}"))

    await asyncio.gather(*map(agent, range(6)))
    return notes


@program(equal_questions=True)
async def equal_questions_of_many_tasks(ask, rng):
    """All tasks ask the same questions without a memo, so their draws are told apart by their order only."""
    seen = []

    async def task(number):
        for _ in range(4):
            answer = await ask(f"question {len(seen) // 4 % 3}", who=str(number))
            seen.append([number, answer])
            await turns(answer % 4)

    await asyncio.gather(*map(task, range(5)))
    return seen


# A pool that tasks share.


@program(equal_questions=True)
async def fleet_of_agents(ask, rng):
    """Agents step from state to state, and the bad ones continue from a good state of the common pool."""
    pool = [(0, 5)]

    async def agent(number):
        state = number
        for step in range(5):
            state = await ask(f"step from {state % 50}", who=str(number)) + step
            heapq.heappush(pool, (-(await ask(f"value of {state % 50}", who=str(number))), state))
            if state % 2:
                state = rng.choice(pool[:3])[1]
        return state

    return [await asyncio.gather(*map(agent, range(6))), sorted(pool)]


@program(equal_questions=True)
async def fleet_in_rounds(ask, rng):
    """As above, in rounds: within a round, the values are a memo."""
    values, states = {}, list(range(6))

    async def step(number, state):
        state = (state + await ask(f"move in {state}", who=str(number))) % 30
        if state not in values:
            values[state] = await ask(f"value of {state}", who=str(number))
        return state

    for _ in range(4):
        states = await asyncio.gather(*(step(number, state) for number, state in enumerate(states)))
        best = max(states, key=lambda state: (values[state], state))
        states = [best if rng.random() < 0.3 else state for state in states]
    return states


@program(own_ids=True, equal_questions=True)
async def fleet_with_request_ids_of_its_own(ask, rng):
    """All agents ask the same questions; request ids tell them apart."""
    pool = [1]

    async def agent(number):
        for step in range(5):
            state = pool[-1] % 4
            identity = ask.own_id("agent", number, step)
            pool.append(await ask(f"step from {state}", who=str(number), request_id=identity))

    await asyncio.gather(*map(agent, range(6)))
    return pool


@program(equal_questions=True)
async def evolution(ask, rng):
    """Steady-state evolution: two parents from the population, whose worst member the child replaces."""
    population = [[number, number] for number in range(6)]

    async def breed(number):
        for _ in range(4):
            parents = rng.sample(population, 2)
            child = await ask(f"cross {parents}", who=str(number))
            fitness = await ask(f"fitness of {child}", who=str(number))
            population.remove(min(population))
            population.append([fitness, child])

    await asyncio.gather(*map(breed, range(4)))
    return sorted(population)


@program
async def blackboard(ask, rng):
    """Agents read and write one board; a condition announces each change."""
    board, changed = {"goal": 1}, asyncio.Condition()

    async def agent(number):
        for step in range(4):
            async with changed:
                least = number // 2 + step - 3
                await changed.wait_for(lambda least=least: len(board) > least)
                seen = sorted(board.values())[-3:]
            answer = await ask(f"agent {number} sees {seen}")
            async with changed:
                board[f"{answer % 7}"] = answer
                board[f"{number}.{step}"] = answer
                changed.notify_all()

    await asyncio.gather(*map(agent, range(5)))
    return board


# Graphs of thoughts.


@program(equal_questions=True)
async def graph_of_thoughts(ask, rng):
    """Thoughts are generated, merged in pairs as they come, and refined, with a memo of scores."""
    scores, ready = {}, asyncio.Queue()

    async def score(thought):
        if thought not in scores:
            scores[thought] = await ask(f"score {thought}")
        return scores[thought]

    async def generate(number):
        await ready.put(await ask(f"thought {number}") % 100)

    async def merge():
        left, right = await ready.get(), await ready.get()
        merged = (left * right + await ask(f"merge {left} and {right}", who="merge")) % 100
        while await score(merged) % 3 == 0:
            merged = (merged + await ask(f"refine {merged}", who="refine")) % 100
        await ready.put(merged)

    await asyncio.gather(*map(generate, range(8)), *(merge() for _ in range(7)))
    return [ready.get_nowait(), scores]


@program
async def debate(ask, rng):
    """Speakers answer the last statement, in whatever order they come to the floor; a judge interrupts."""
    said = []
    floor = asyncio.Semaphore(2)

    async def speaker(number):
        for _ in range(3):
            async with floor:
                said.append([number, await ask(f"{number} answers {said[-1:]}")])

    async def judge():
        for _ in range(5):
            verdict = await ask(f"judge after {len(said)}: {said[-2:]}")
            if verdict % 2:
                said.append(["judge", verdict])

    await asyncio.gather(judge(), *map(speaker, range(4)))
    return said


# First come wins.


async def first_of(ask, coroutines, *, awaits_the_losers):
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    winner = next(task for task in tasks if task in done)
    for task in tasks:
        task.cancel()
    if awaits_the_losers and pending:
        await asyncio.wait(pending)
    return await winner


@program
async def race_with_cancelled_losers(ask, rng):
    state, won = 0, []
    for lap in range(6):
        runners = (ask(f"lap {lap}, runner {number}, from {state}") for number in range(4))
        state = await first_of(ask, runners, awaits_the_losers=lap % 2)
        won.append(state)
    return won


@program
async def races_side_by_side(ask, rng):
    """Several races at once, each of which begins where another has just ended."""
    last = [0]

    async def races(number):
        for lap in range(4):
            names = (f"race {number}.{lap}, runner {runner}, from {last[-1]}" for runner in range(3))
            last.append(await first_of(ask, map(ask, names), awaits_the_losers=False))

    await asyncio.gather(*map(races, range(3)))
    return last


@program
async def race_of_several_steps(ask, rng):
    """A runner asks several times; the losers stop wherever they are."""
    won = []

    async def runner(lap, number):
        state = number
        for step in range(1 + number % 3):
            state = await ask(f"lap {lap}, runner {number}, step {step}, from {state}, after {won}")
            await turns(state % 3)
        return state

    for lap in range(4):
        runners = (runner(lap, number) for number in range(4))
        won.append(await first_of(ask, runners, awaits_the_losers=True))
    return won


@program
async def quorum(ask, rng):
    """The first three of five votes decide; the others go on and come too late."""
    decisions, late = [], []

    async def vote(question, number, votes):
        answer = await ask(f"{question}: vote {number} after {decisions}")
        (votes if len(votes) < 3 else late).append(answer)

    async with asyncio.TaskGroup() as group:
        for question in range(4):
            votes = []
            voters = [group.create_task(vote(question, number, votes)) for number in range(5)]
            waiting = set(voters)
            while len(votes) < 3:
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            decisions.append(sum(votes) % 100)
    return [decisions, late]


@program
async def hedged_requests(ask, rng):
    """A second request is sent while the first one waits, and the slower one is given up."""
    results = []

    async def hedged(number):
        tasks = [asyncio.ensure_future(ask(f"{number} tries {way} after {results}")) for way in "ab"]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        winner = next(task for task in tasks if task in done)
        for task in tasks:
            task.cancel()
        results.append([number, await winner])

    for start in range(0, 9, 3):
        await asyncio.gather(*map(hedged, range(start, start + 3)))
    return results


@program
async def results_as_they_come(ask, rng):
    """as_completed: what comes early shapes what is asked next."""
    total, order = 0, []
    for wave in range(3):
        tasks = [asyncio.create_task(ask(f"wave {wave}, {number}, {total}")) for number in range(5)]
        for coming in asyncio.as_completed(tasks):
            answer = await coming
            order.append(answer)
            if len(order) % 2:
                total += await ask(f"comment on {answer} after {total}")
    return [total, order]


# Queues.


@program(equal_questions=True)
async def workers_on_a_priority_queue(ask, rng):
    """Best-first search: workers take the best state and put its children back."""
    queue, taken = asyncio.PriorityQueue(), []
    for root in range(3):
        queue.put_nowait((root, root))

    async def worker(number):
        while len(taken) < 24:
            _, state = await queue.get()
            taken.append(state)
            for move in await ask.many(f"expand {state}", 2, who=str(number)):
                queue.put_nowait((move, (state + move) % 1000))

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(worker(number))
    return taken


@program
async def producers_and_consumers(ask, rng):
    """Two stages with small queues between them, so that the stages hold each other up."""
    first, second, out = asyncio.Queue(2), asyncio.Queue(1), []

    async def draft(number):
        for item in range(4):
            await first.put(await ask(f"draft {item} of {number}"))

    async def revise(number):
        while (item := await first.get()) is not None:
            await second.put(await ask(f"revise {item} after {out[-2:]}", who=str(number)))

    async def collect():
        while (item := await second.get()) is not None:
            out.append(item)

    async with asyncio.TaskGroup() as group:
        group.create_task(collect())
        revisers = [group.create_task(revise(number)) for number in range(3)]
        await asyncio.gather(*map(draft, range(3)))
        for _ in revisers:
            await first.put(None)
        await asyncio.gather(*revisers)
        await second.put(None)
    return out


@program(equal_questions=True)
async def work_stealing(ask, rng):
    own = [deque(range(number, number + 3 * number + 1)) for number in range(4)]
    log = []

    async def worker(number):
        while True:
            source = own[number] or max(own, key=len)
            if not source:
                return
            item = source.popleft() if source is own[number] else source.pop()
            answer = await ask(f"work on {item}", who=str(number))
            log.append([number, item, answer])
            if answer % 4 == 0 and len(log) < 30:
                own[number].append(item + 100)

    await asyncio.gather(*map(worker, range(4)))
    return log


# Tasks in tasks.


@program
async def nested_gathers(ask, rng):
    """Gathers of gathers of requests; each level asks with what the whole tree knows so far."""
    known = []

    async def node(path, depth):
        known.append(await ask(f"{path} knows {sum(known) % 100}"))
        if depth:
            await asyncio.gather(*(node(f"{path}.{child}", depth - 1) for child in range(2)))
            known.append(await ask(f"{path} again, {sum(known) % 100}"))

    await asyncio.gather(*(node(str(root), 2) for root in range(3)))
    return known


@program
async def agents_that_spawn_agents(ask, rng):
    """How many agents there are depends on the answers, and their numbers on the order of these."""
    made = []
    async with asyncio.TaskGroup() as group:

        async def agent(parent):
            made.append(parent)
            name = len(made)
            answer = await ask(f"agent {name} of {parent}")
            await turns(answer % 3)
            for _ in range(answer % 3 if len(made) < 25 else 0):
                group.create_task(agent(name))

        for _ in range(4):
            group.create_task(agent(0))
    return made


@program
async def tools_called_by_agents(ask, rng):
    """An agent that calls tools, which are agents that share a memory."""
    memory = []

    async def tool(name, argument):
        answer = await ask(f"tool {name} on {argument} with {memory[-1:]}")
        memory.append(answer)
        return answer

    async def agent(number):
        thought = await ask(f"agent {number} begins")
        for step in range(3):
            names = [f"t{(thought + k) % 3}" for k in range(thought % 3 + 1)]
            results = await asyncio.gather(*(tool(name, f"{number}.{step}.{name}") for name in names))
            thought = await ask(f"agent {number} thinks about {results}")
        return thought

    return [await asyncio.gather(*map(agent, range(4))), memory]


@program
async def recursion_with_pruning(ask, rng):
    """Branch and bound: the bound that others have found decides whether a branch is asked for."""
    best = [5000]

    async def branch(path, depth):
        answer = await ask(f"bound of {path}")
        if answer < best[0] and depth == 0:
            best.append(answer)
            best[0] = answer
        elif depth and answer > best[0] // 3:
            await asyncio.gather(*(branch(f"{path}{child}", depth - 1) for child in "abc"))

    await asyncio.gather(*(branch(root, 2) for root in "xyz"))
    return best


# Turns of the loop between requests.


@program
async def tasks_that_sleep_for_turns(ask, rng):
    order = []

    async def task(number):
        for step in range(4):
            await turns((number * 7 + step * 3) % 21)
            answer = await ask(f"task {number}, step {step}, after {order[-3:]}")
            await turns(answer % 21)
            order.append(answer)

    await asyncio.gather(*map(task, range(6)))
    return order


@program
async def late_starters(ask, rng):
    """The first requests are alone in flight while others still prepare theirs."""
    order = []

    async def task(number):
        await turns(number * 3)
        for step in range(3):
            order.append(await ask(f"task {number}, step {step}, {len(order)}"))

    await asyncio.gather(*map(task, range(7)))
    return order


@program
async def spinner(ask, rng):
    """A task polls in every turn until the others have ended, so the loop never rests."""
    shared, running = [], [3]

    async def spin():
        seen = []
        while running[0]:
            if len(shared) > len(seen):
                seen = list(shared)
                if len(seen) % 4 == 0:
                    seen.append(await ask(f"spinner saw {seen[-4:]}"))
                    shared.append(seen[-1])
            await asyncio.sleep(0)

    async def task(number):
        for step in range(4):
            shared.append(await ask(f"task {number}, step {step}, {shared[-2:]}"))
        running[0] -= 1

    await asyncio.gather(spin(), *map(task, range(3)))
    return shared


# Locks, events, barriers, time-outs.


@program
async def one_conversation_under_a_lock(ask, rng):
    history, lock = [], asyncio.Lock()

    async def speaker(number):
        for _ in range(3):
            thought = await ask(f"{number} thinks about {history[-1:]}")
            async with lock:
                history.append(thought)
                history.append(await ask(f"reply to {history[-2:]}", who=str(number)))

    await asyncio.gather(*map(speaker, range(4)))
    return history


@program
async def events_and_barriers(ask, rng):
    barrier, found, log = asyncio.Barrier(3), asyncio.Event(), []

    async def searcher(number):
        for depth in range(4):
            answer = await ask(f"searcher {number} at depth {depth} after {log[-1:]}")
            log.append([number, answer])
            if answer % 5 == 0:
                found.set()
            await barrier.wait()

    async def watcher():
        await found.wait()
        log.append(["watcher", await ask(f"what was found: {log[-1]}")])

    watching = asyncio.create_task(watcher())
    await asyncio.gather(*map(searcher, range(3)))
    found.set()
    await watching
    return log


@program
async def time_outs_that_never_come(ask, rng):
    order = []

    async def task(number):
        for step in range(3):
            question = ask(f"task {number}, step {step}, {order[-2:]}")
            if number % 2:
                async with asyncio.timeout(1e6):
                    order.append(await question)
            else:
                order.append(await asyncio.wait_for(question, 1e6))

    await asyncio.gather(*map(task, range(5)))
    return order


@program
async def shielded_requests(ask, rng):
    """The waiter is cancelled; the request goes on, and its answer joins the state later."""
    state = []

    async def asks(number):
        state.append(await ask(f"request {number} after {state[-2:]}"))

    requests = [asyncio.ensure_future(asks(number)) for number in range(6)]
    waiters = [asyncio.ensure_future(_waits(request)) for request in requests]
    await asyncio.wait(waiters[:2], return_when=asyncio.FIRST_COMPLETED)
    for waiter in waiters:
        waiter.cancel()
    state.append(await ask(f"after the first: {state}"))
    await asyncio.gather(*requests)
    return state


async def _waits(request):
    await asyncio.shield(request)


# Generators and callbacks.


@program
async def asynchronous_generators(ask, rng):
    """Generators that several tasks consume, each of which decides when the others go on."""
    shared = []

    async def thoughts(name):
        thought = name
        while True:
            thought = await ask(f"{name} continues {thought} with {len(shared)}")
            yield thought

    async def reader(name):
        async with contextlib.aclosing(thoughts(name)) as stream:
            async for thought in stream:
                shared.append([name, thought])
                if thought % 5 == 0 or len(shared) > 25:
                    break

    await asyncio.gather(*map(reader, "abcd"))
    return shared


@program
async def callbacks(ask, rng):
    """Callbacks of tasks start the next tasks."""
    order, done = [], asyncio.get_running_loop().create_future()

    def begin(number):
        task = asyncio.get_running_loop().create_task(ask(f"{number} after {order[-2:]}"))
        task.add_done_callback(lambda task: end(number, task.result()))

    def end(number, answer):
        order.append(answer)
        if len(order) == 20:
            done.set_result(None)
        elif len(order) < 16:
            begin(f"{number}.{answer % 10}")

    for number in range(5):
        begin(str(number))
    await done
    return order


@program
async def futures_that_pass_answers_on(ask, rng):
    """Relays: each waits for the future that another one sets."""
    loop = asyncio.get_running_loop()
    baton = [loop.create_future() for _ in range(9)]
    finished = []

    async def relay(number):
        before = await baton[number]
        answer = await ask(f"relay {number} has {before} after {finished[-2:]}")
        finished.append(answer)
        if number + 3 < len(baton):
            baton[number + 3].set_result(answer)

    for number in range(3):
        baton[number].set_result(number)
    await asyncio.gather(*map(relay, range(9)))
    return finished


# Namespaces, n, models, batches.


@program(equal_questions=True)
async def two_namespaces_that_overlap(ask, rng):
    """What one namespace draws beyond the other is generated: some requests are hits in part."""
    known = []

    async def task(namespace, number):
        for step in range(4):
            n = 1 + (number + step) % 3
            answers = await ask.many(f"question {step}", n, who=f"{namespace}{number}", namespace=namespace)
            known.append(answers)
            await ask(f"comment on {known[-1]}", who=f"{namespace}{number}", namespace=namespace)

    await asyncio.gather(*(task(namespace, number) for number in range(3) for namespace in ("a", "b")))
    return known


@program(equal_questions=True)
async def one_namespace_after_the_other(ask, rng):
    """The second half is mostly hits already in the first run."""
    shared = []

    async def task(namespace, number):
        for step in range(3):
            n = 1 + step % 2 + (namespace == "b" and number == 2)
            shared.append(await ask.many(f"{number}.{step}", n, namespace=namespace, who=namespace))
            await ask(f"on {shared[-1][0] % 20}", who=f"{namespace}{number}", namespace=namespace)

    for namespace in ("a", "b"):
        await asyncio.gather(*(task(namespace, number) for number in range(4)))
    return shared


@program
async def many_samples_at_once(ask, rng):
    """Self-consistency with a growing n, and a vote that steers the next question."""
    votes = []

    async def task(number):
        for step in range(3):
            answers = await ask.many(f"task {number} after {votes[-1:]}", 1 + (number + step) % 4)
            votes.append(sorted(answer % 3 for answer in answers))

    await asyncio.gather(*map(task, range(5)))
    return votes


@program(equal_questions=True)
async def two_models(ask, rng):
    """A writer and a critic, on one cache, each with a pipeline of its own."""
    drafts = []

    async def write(number):
        for _ in range(3):
            draft = await ask(f"{number} writes after {drafts[-2:]}")
            drafts.append(draft + await ask(f"criticise {draft % 10}", who=str(number), model=1))

    await asyncio.gather(*map(write, range(5)))
    return drafts


@program
async def one_by_one_beside_a_gather(ask, rng):
    """One task asks in sequence, and looks at what a crowd beside it has found."""
    found = []

    async def asks(number):
        found.append(await ask(f"crowd {number}"))

    async def sequence():
        for step in range(6):
            found.append(await ask(f"step {step} of the sequence after {found}"))

    await asyncio.gather(sequence(), *map(asks, range(8)))
    return found


@program
async def one_by_one(ask, rng):
    answer = 0
    for step in range(10):
        answer = await ask(f"step {step} after {answer}")
    return answer


@program
async def batches_beside_requests(ask, rng):
    """batch_request and requests at the same time, over one memo."""
    found = []

    async def batches():
        for _ in range(3):
            found.extend(await ask.batch([f"batch {number} after {found[-1:]}" for number in range(4)]))

    async def asks(number):
        for step in range(3):
            found.append(await ask(f"request {number}.{step} after {found[-1:]}"))

    await asyncio.gather(batches(), *map(asks, range(3)))
    return found


@program
async def waves_of_different_sizes(ask, rng):
    """The size of the next wave depends on the first answer of this one."""
    sizes, size = [], 5
    for wave in range(5):
        first = []

        async def asks(number, wave=wave, first=first):
            first.append(await ask(f"wave {wave}, {number}"))

        await asyncio.gather(*map(asks, range(size)))
        size = 1 + first[0] % 9
        sizes.append(size)
    return sizes


@program
async def early_exit(ask, rng):
    """The first good answer ends the search: all other tasks are cancelled in the midst of what they do."""
    tried = []

    async def search(number):
        state = number
        for step in range(6):
            state = await ask(f"searcher {number}, step {step}, from {state}")
            tried.append(state)
            if state % 6 == 0:
                return state
        return None

    tasks = [asyncio.create_task(search(number)) for number in range(6)]
    while not (done := [task for task in tasks if task.done() and task.result() is not None]):
        running = [task for task in tasks if not task.done()]
        if not running:
            break
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return [tried, [task.result() for task in done], await ask(f"summary of {tried}")]


@program
async def race_in_an_anyio_task_group(ask, rng):
    """The winner cancels the scope of the group."""
    won = []

    async def runner(lap, number, scope):
        answer = await ask(f"lap {lap}, runner {number}, after {won}")
        for _ in range(answer % 3):
            await anyio.lowlevel.checkpoint()
        won.append(answer)
        scope.cancel()

    for lap in range(5):
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(runner, lap, number, group.cancel_scope)
    return won


@program
async def anyio_streams(ask, rng):
    """Producers and consumers with a small stream between them."""
    send, receive = anyio.create_memory_object_stream(2)
    log = []

    async def produce(number, stream):
        async with stream:
            for item in range(4):
                await stream.send(await ask(f"producer {number}, item {item}, after {log[-2:]}"))

    async def consume(number, stream):
        async with stream:
            async for item in stream:
                log.append([item, await ask(f"consumer {number} on {item} after {log[-1:]}")])

    async with anyio.create_task_group() as group, send, receive:
        for number in range(3):
            group.start_soon(produce, number, send.clone())
        for number in range(2):
            group.start_soon(consume, number, receive.clone())
    return log


@program
async def groups_that_fail_together(ask, rng):
    """A bad answer ends a group: an exception of the program cancels all other tasks of it."""
    log = []

    async def agent(attempt, number):
        for step in range(4):
            log.append(await ask(f"attempt {attempt}, agent {number}, step {step}, after {log[-2:]}"))
            if log[-1] % 5 == 0:
                raise ValueError(log[-1])

    for attempt in range(4):
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(4):
                    group.create_task(agent(attempt, number))
        except* ValueError as errors:
            log.append([error.args[0] for error in errors.exceptions])
    return log


@program
async def losers_that_go_on(ask, rng):
    """Nobody cancels the losers; they end in the midst of later laps, and count there."""
    finished, tasks = [], []

    async def runner(lap, number):
        finished.append(await ask(f"lap {lap}, runner {number}, after {finished[-1:]}"))

    for lap in range(5):
        started = [asyncio.create_task(runner(lap, number)) for number in range(4)]
        await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)
        tasks += started
    await asyncio.gather(*tasks)
    return finished


@program
async def polling_without_waiting(ask, rng):
    """The loop looks again and again at what is done; a timer of zero seconds is all that it waits for."""
    log, followers = [], 0
    tasks = [asyncio.create_task(ask(f"task {number}")) for number in range(8)]
    while tasks:
        done, _ = await asyncio.wait(tasks, timeout=0)
        for task in [task for task in tasks if task in done]:
            tasks.remove(task)
            log.append(task.result())
            if followers < 12 and log[-1] % 3:
                followers += 1
                tasks.append(asyncio.create_task(ask(f"follower {followers} after {log[-2:]}")))
    return log
