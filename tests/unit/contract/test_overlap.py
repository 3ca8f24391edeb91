"""When namespaces look like replicates: digits, equal draws of three, and few others."""

from __future__ import annotations

import itertools
import random

import pytest

from cachepipe.contract import overlap
from cachepipe.contract.draws import Draw, label
from cachepipe.contract.overlap import ENOUGH, NamespaceOverlap


def noticed(draws, **options):
    """The overlaps that show while draws are counted: namespace, question, indices and replicate."""
    counted, found = NamespaceOverlap(**options), []
    for namespace, question, *others in draws:
        indices, replicate = [*others, *[[0], None][len(others) :]]
        draw = Draw(label(namespace), f"k{question}", "", 0, label(replicate))
        if (one := counted.add(draw, indices)) is not None:
            found.append(one)
    return found


def runs(names, questions=range(100), **how):
    """The draws of namespaces one after another, each with the same questions."""
    return [(name, question) for name in names for question in questions]


SEEDS = [f"seed{number}" for number in range(10)]


def test_namespaces_that_differ_only_in_digits_and_draw_the_same_are_noticed_once():
    (one,) = noticed(runs(SEEDS))
    assert one.namespaces == ("seed0", "seed1", "seed2")
    assert one.samples == 90


def test_draws_with_other_ids_or_occurrences_are_others_although_they_reuse_samples():
    for ids in ((f"{place}", 0) for place in range(9)), (("", place) for place in range(9)):
        counted = NamespaceOverlap()
        draws = [Draw(f"=run-{place}", f"k{q}", *who) for place, who in enumerate(ids) for q in range(100)]
        assert not any(counted.add(draw, [0]) for draw in draws)


def test_the_order_of_the_draws_does_not_matter():
    draws = runs(SEEDS)
    for seed in range(20):
        random.Random(seed).shuffle(draws)
        assert len(noticed(draws)) == 1
    assert len(noticed(sorted(draws, key=lambda draw: draw[1]))) == 1


def test_the_samples_are_counted_and_not_the_draws():
    draws = [(name, question, [4, 7, 9]) for name in SEEDS for question in range(10)]
    assert [one.samples for one in noticed(draws)] == [30]


@pytest.mark.parametrize(
    "draws",
    [
        pytest.param(runs(SEEDS[:2]), id="two namespaces"),
        pytest.param(runs(SEEDS, range(ENOUGH - 1)), id="few draws"),
        pytest.param(runs(["gpt", "claude", "llama"]), id="names without digits"),
        pytest.param(runs(["a1", "b1", "c1"]), id="names that differ in letters"),
        pytest.param(runs([None, "", "1"]), id="no name"),
        pytest.param(runs(SEEDS[:1]) * 9, id="one namespace that draws again"),
        pytest.param([(name, (name, q)) for name in SEEDS for q in range(100)], id="other questions"),
        pytest.param(
            [(name, q, [place]) for place, name in enumerate(SEEDS) for q in range(100)], id="refresh"
        ),
        pytest.param([(f"n{n}", q, [*range(n)]) for n in (1, 5, 9) for q in range(100)], id="other n"),
        pytest.param([(name, q, [0], 3) for name in SEEDS for q in range(100)], id="replicates"),
        pytest.param(
            [(f"k{k}", (q, step)) for k in (1, 2, 3) for q in range(100) for step in ("plan", f"answer {k}")],
            id="an ablation of the last of two steps",
        ),
        pytest.param(
            [(f"k{k}", (q, s if s < 4 else (k, s))) for k in (1, 2, 3) for q in range(100) for s in range(5)],
            id="an ablation of the last of five steps",
        ),
        pytest.param(
            [(f"budget-{most}", question) for most in (25, 50, 100) for question in range(most)], id="budgets"
        ),
        pytest.param(
            [(f"budget-{most}", question) for most in (100, 50, 25) for question in range(most)],
            id="budgets in falling order",
        ),
    ],
)
def test_what_looks_otherwise_is_not_noticed(draws):
    assert noticed(draws) == []


def test_an_ablation_of_steps_that_are_asked_item_by_item_at_once_is_not_noticed():
    """Three namespaces side by side, whose items ask one shared question and three of their own."""
    steps = itertools.product(range(100), range(4), (1, 2, 3))
    assert noticed([(f"k{k}", (item, step and (k, step))) for item, step, k in steps]) == []


def test_a_run_with_very_many_draws_is_not_judged(monkeypatch):
    assert overlap.MOST >= 10_000
    assert len(noticed(runs(SEEDS), most=200)) == 1
    assert noticed(runs(SEEDS), most=100) == []
    assert noticed(runs([f"user-{number}" for number in range(99)], [0]) + runs(SEEDS), most=100) == []


def test_nothing_is_kept_after_it_has_stopped():
    counted = NamespaceOverlap()
    for name, question in runs(SEEDS):
        counted.add(Draw(label(name), f"k{question}", "", 0), [0])
    assert not counted._families
    assert not counted._places
