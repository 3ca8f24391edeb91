"""Cells with the extension loaded: run again, edited, in another order, in a fresh kernel."""

from __future__ import annotations

import textwrap

import pytest

FRONT_ENDS = {  # what each sends as the id of a cell, and whether it has a user
    "Jupyter": ("{}", True),
    "VS Code": ("vscode-notebook-cell:/n.ipynb#{}", True),
    "IPython": (None, True),
    "papermill": (None, False),
}
CELLS = {
    "one": "answers = [await ask('cats'), await ask('dogs'), await ask('cats')]\nprint(answers)",
    "two": "print(await ask('cats'))",
    "three": "print(await asyncio.gather(*(ask(f'q{i % 3}') for i in range(6))))",
    "four": "print('the last:', await ask('cats'))",
}
SAMPLES = 11
ASKED = """
import threading

def asked(prompt):
    made = []
    thread = threading.Thread(target=lambda: made.append(asyncio.run(ask(prompt))))
    thread.start()
    thread.join()
    return made[0]
"""
EDITED = CELLS | {"two": "print(await ask('cats'))\nprint(await ask('new'))"}


@pytest.fixture(params=FRONT_ENDS)
def front_end(request, kernel):
    """A function that returns the id that a front end sends for a cell."""
    pattern, kernel.reader = FRONT_ENDS[request.param]
    return lambda name: None if pattern is None else pattern.format(name)


@pytest.fixture
def run_all(front_end, tmp_path):
    """A function that runs a notebook from top to bottom.

    It returns what the cells print, and the number of samples that were generated.
    """

    def run(kernel, cells=CELLS):
        kernel.begin(tmp_path / "cache")
        shown = {name: kernel.run(code, front_end(name)) for name, code in cells.items()}
        return shown, kernel.paid()

    return run


@pytest.fixture(scope="module")
def other_kernel(started):
    with started() as kernel:
        yield kernel


@pytest.fixture
def restarted(other_kernel, kernel):
    """A function that ends the kernel and returns another one, which knows nothing of it."""

    def restart():
        kernel.leave()
        other_kernel.reader = kernel.reader
        return other_kernel

    yield restart
    other_kernel.leave()


def test_c2_a_notebook_run_again_in_its_kernel_and_then_in_a_fresh_one_pays_nothing(
    kernel, restarted, run_all
):
    first, paid = run_all(kernel)
    assert paid == SAMPLES
    assert run_all(kernel) == (first, 0)
    assert run_all(restarted()) == (first, 0)


def test_c4_a_cell_edited_in_the_middle_pays_only_for_its_new_question(kernel, restarted, run_all):
    first, _ = run_all(kernel)
    edited, paid = run_all(restarted(), EDITED)
    assert paid == 1
    assert edited["two"].startswith(first["two"])
    assert edited | {"two": first["two"]} == first


def test_c2_ids_that_change_when_a_notebook_is_opened_again_do_not_count(kernel, restarted, tmp_path):
    """VS Code numbers the cells from the top, so that an inserted cell changes the ids below it."""
    for fresh, shift in ((kernel, 0), (None, 1)):
        used = fresh or restarted()
        used.begin(tmp_path / "cache")
        shown = [
            used.run(code, f"vscode-notebook-cell:/n#{n + shift}") for n, code in enumerate(CELLS.values())
        ]
        if fresh is not None:
            first = shown
    assert shown == first
    assert used.paid() == 0


def test_a_batch_asks_for_its_cell(kernel):
    code = (
        "print([answer.data for answer in await api.batch_request(cachepipe.Batch([Request('cats')] * 2))])"
    )
    first = kernel.run(code, "one")
    assert kernel.run(code, "two") != first
    assert kernel.run(code, "one") == first
    assert kernel.paid() == 4


def test_a_cell_that_is_run_again_while_its_call_is_in_flight_joins_it(kernel):
    code = "model.hold = True\ntasks = [*globals().get('tasks', ()), asyncio.create_task(ask('cats'))]"
    kernel.run("tasks = []", "define")
    kernel.run(code, "one")
    kernel.run("while not model.calls: await asyncio.sleep(0)", "wait")
    kernel.run(code, "one")
    kernel.run("model.hold = False\nmodel.calls[0].release()\nprint(*await asyncio.gather(*tasks))", "finish")
    assert kernel.paid() == 1


def test_c2_cells_with_ids_of_their_own_give_the_same_in_any_order(kernel, restarted, tmp_path):
    kernel.begin(tmp_path / "cache")
    first = {name: kernel.run(code, name) for name, code in CELLS.items()}
    again = restarted()
    again.begin(tmp_path / "cache")
    for name in ("four", "two", "one", "two", "three"):
        assert again.run(CELLS[name], name) == first[name]
    assert again.paid() == 0


@pytest.mark.parametrize("front_end", ["Jupyter", "VS Code", "IPython"], indirect=True)
def test_c2_a_cell_that_is_run_again_replays_and_cells_do_not_disturb_each_other(kernel, front_end):
    first = {name: kernel.run(code, front_end(name)) for name, code in CELLS.items()}
    for name in ("two", "four", "two", "one"):
        assert kernel.run(CELLS[name], front_end(name)) == first[name]
    assert kernel.paid() == SAMPLES
    assert len({first["two"], first["four"].removeprefix("the last: ")}) == 2


@pytest.mark.parametrize("front_end", ["Jupyter", "VS Code", "papermill"], indirect=True)
def test_c1_cells_with_equal_texts_draw_samples_of_their_own(kernel, run_all):
    cells = dict.fromkeys(("one", "two", "three"), "print(await ask('cats'))")
    first, paid = run_all(kernel, cells)
    assert paid == len(set(first.values())) == 3
    assert run_all(kernel, cells) == (first, 0)


@pytest.mark.parametrize("front_end", ["Jupyter", "VS Code"], indirect=True)
def test_c2_an_edited_cell_keeps_what_it_asked(kernel, front_end):
    first = kernel.run("print(await ask('cats'), await ask('dogs'))", front_end("one"))
    assert kernel.run("print(await ask('cats'), await ask('dogs'), end='\\n')", front_end("one")) == first
    kernel.run("print(await ask('cats'), await ask('mice'), await ask('dogs'))", front_end("one"))
    assert kernel.paid() == 3
    assert kernel.run("print(await ask('cats'), await ask('dogs'))", front_end("one")) == first


def test_a_function_asks_for_the_cell_that_calls_it(kernel):
    kernel.run("async def pets():\n    return await ask('cats'), await ask('dogs')", "define")
    first = kernel.run("await pets()", "one")
    second = kernel.run("await pets()", "two")
    assert first != second
    assert (kernel.run("await pets()", "one"), kernel.run("await pets()", "two")) == (first, second)
    assert kernel.paid() == 4


def test_a_task_keeps_the_cell_in_which_it_was_started(kernel):
    late = "async def late():\n    await gate.wait()\n    return await ask('cats')\n"
    start = f"gate = asyncio.Event()\n{late}{{}}\n{{}}"
    for first_line in ("", "await asyncio.sleep(0)"):  # a synchronous and an asynchronous cell
        code = start.format(first_line, "task = asyncio.create_task(late())")
        shown = []
        for _ in range(2):
            kernel.run(code, f"start{first_line}")
            kernel.run("print(await ask('cats'))", "between")
            shown.append(kernel.run("gate.set()\nprint(await task)", "finish"))
        assert shown[0] == shown[1]
    assert kernel.paid() == 3


def test_threads_ask_for_the_cell_that_is_being_executed(kernel):
    kernel.run(
        f"from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\n{ASKED}", "define"
    )
    together = "print(sorted(pool.map(asked, ['cats', 'cats', 'dogs'])))"
    first = kernel.run(together, "one")
    assert kernel.run(together, "two") != first
    assert kernel.run(together, "one") == first
    assert kernel.run("print(asked('cats'))", "three") == kernel.run("print(asked('cats'))", "three")
    assert kernel.paid() == 7


@pytest.mark.parametrize(
    "code",
    [
        "%%time\nprint(asked('cats'))",
        "%%capture shown\nprint(asked('cats'))",
        "get_ipython().run_cell('first = asked(\"cats\")')\nprint(asked('cats'))",
        "get_ipython().run_cell(' ')\nprint(asked('cats'))",
        "await asyncio.sleep(0)\nget_ipython().run_cell('first = asked(\"cats\")')\nprint(await ask('cats'))",
        "!true\nprint(asked('cats'))",
    ],
)
def test_what_a_cell_runs_itself_is_a_part_of_it(kernel, code):
    kernel.run(ASKED, "define")
    kernel.run(code, "one")
    kernel.run("print(await ask('cats'))", "two")
    paid = kernel.paid()
    kernel.run("print(await ask('cats'))", "two")
    kernel.run(code, "one")
    assert kernel.paid() == paid == 2 + ("first" in code)


@pytest.mark.parametrize(
    "failure",
    ["1 / 0", "raise KeyboardInterrupt", "raise SystemExit", "1 +", "await asyncio.sleep(0); 1 / 0"],
)
def test_a_cell_that_fails_ends_and_its_repetition_replays_what_it_got(kernel, failure):
    kernel.run(ASKED, "define")
    first = kernel.outputs(f"print(asked('cats'))\n{failure}", "one", fails=True)
    other = kernel.run("print(await ask('cats'))", "two")
    again = kernel.run("print(asked('cats'))\nprint(asked('dogs'))", "one")
    assert other.strip() not in again
    assert first[0].get("text", "") in again
    assert kernel.paid() == 3


@pytest.mark.parametrize("front_end", ["Jupyter", "VS Code"], indirect=True)
def test_c8_a_request_that_failed_is_the_same_draw_when_it_is_repeated(kernel, front_end):
    kernel.run("print(await ask('cats'))", front_end("one"))
    failing = """
    model.hold = True
    task = asyncio.create_task(ask('cats'))
    while len(model.calls) < 2:
        await asyncio.sleep(0)
    model.hold = False
    model.calls[1].fail()
    print(isinstance((await asyncio.gather(task, return_exceptions=True))[0], Exception))
    print(await ask('cats'))
    """
    failed, answer = kernel.run(textwrap.dedent(failing), front_end("two")).split()
    assert failed == "True"
    assert kernel.run("print(await ask('cats'))\n", front_end("two")).strip() == answer
    assert kernel.paid() == 3, "one of them failed"


def test_own_ids_and_runs_and_shared_draws_stay_what_they_are(kernel, front_end, tmp_path):
    named = "print(await ask('cats', request_id='mine'), await ask('cats', request_id='mine'))"
    first = kernel.run(named, front_end("one"))
    assert len(set(first.split())) == 2
    assert kernel.run(f"{named}\n", front_end("two")) == first
    again = "print(await ask('cats'))\nwith cachepipe.run():\n    print(await ask('cats'))"
    first, second = kernel.run(again, front_end("three")).split()
    assert first == second
    assert kernel.run("print(await ask('cats'))", front_end("four")).strip() != first
    kernel.run(f"same = OnlineAPI(model, {str(tmp_path / 'same')!r}, repeat='same')", front_end("five"))
    shared = "print((await same.request(Request('cats'))).data)"
    assert kernel.run(shared, front_end("six")) == kernel.run(f"{shared}\n", front_end("seven"))
    kernel.run("await same.close()", front_end("eight"))
    assert kernel.paid() == 5


def test_a_replay_gives_what_the_cells_got(kernel, tmp_path):
    first = {name: kernel.run(code, name) for name, code in CELLS.items()}
    kernel.run(
        f"await api.close()\napi = OnlineAPI(model, {str(tmp_path / 'cache')!r}, mode='replay')", "replay"
    )
    assert {name: kernel.run(code, name) for name, code in CELLS.items()} == first
    assert kernel.paid() == SAMPLES
    missing = kernel.run(
        "try:\n    await ask('new')\nexcept cachepipe.CacheMiss as error:\n    print('missed', error)", "five"
    )
    assert missing.startswith("missed")


def test_the_same_questions_in_many_cells_are_no_reason_for_a_warning(kernel):
    for name in ("one", "two", "three"):
        kernel.run("answers = await asyncio.gather(*(ask(f'q{i}') for i in range(40)))", name)
    own = "answers = await asyncio.gather(*(ask(f'q{i}', request_id=os.urandom(4).hex()) for i in range(40)))"
    [warned] = kernel.outputs(own, "four")
    assert "FreshIds" in warned.text


def test_the_extension_is_unloaded_and_loaded_again(kernel):
    first = kernel.run("print(await ask('cats'))", "one")
    kernel.run("%unload_ext cachepipe", "unload")
    kernel.run("print(await ask('cats'))", "one")
    loading = "%load_ext cachepipe\nprint(await ask('cats'))"
    second = kernel.run(loading, "two")
    assert kernel.paid() == 3
    assert kernel.run("print(await ask('cats'))", "one") == first
    assert kernel.run("print(await ask('cats'))", "two") == second, "the cell that loads it is a cell as well"
    assert kernel.paid() == 3
