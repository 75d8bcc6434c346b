"""The allocation beside brute force over every choice."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.allocation.knapsack import Option, choose, smallest

# Sizes with common divisors as tensors have them, and without; costs over many decades.
options = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0, 1e3) | st.floats(0, 1e-6)), min_size=1, max_size=4
)
instances = st.lists(options, min_size=1, max_size=6)


def items(raw: list[list[tuple[int, float]]]) -> list[list[Option]]:
    return [[Option(f"T{i}", float(size), cost) for i, (size, cost) in enumerate(item)] for item in raw]


def totals(found: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[float, float]:
    picked = [item[i] for item, i in zip(found, chosen, strict=True)]
    return sum(o.size for o in picked), sum(o.cost for o in picked)


@settings(max_examples=400, deadline=None)
@given(instances, st.floats(0, 1))
def test_no_choice_that_fits_costs_less(raw, share):
    found = items(raw)
    low = smallest(found)
    high = sum(max(o.size for o in item) for item in found)
    budget = low + share * (high - low)
    size, cost = totals(found, choose(found, budget))
    assert size <= budget
    every = (totals(found, c) for c in itertools.product(*(range(len(item)) for item in found)))
    best = min(c for s, c in every if s <= budget)
    assert cost <= best * (1 + 1e-9) + 1e-12


@settings(max_examples=100, deadline=None)
@given(instances)
def test_a_budget_that_holds_everything_takes_the_least_cost_of_each(raw):
    found = items(raw)
    _, cost = totals(found, choose(found, 1e6))
    assert cost == pytest.approx(sum(min(o.cost for o in item) for item in found))


def test_a_budget_below_the_smallest_choice_is_refused():
    with pytest.raises(ValueError, match="more than 3"):
        choose(items([[(2, 1.0), (5, 0.0)], [(2, 1.0)]]), 3.0)


def model_like(rng: np.random.Generator, tensors: int) -> list[list[Option]]:
    """Costs that halve or so with each half bit, on tensors of few sizes, as in a model."""
    found = []
    for _ in range(tensors):
        weights, alpha = int(rng.choice([1, 3, 6])) * 98304, float(np.exp(rng.normal()))
        bits = [1.5625, 2.0625, 2.5625, 3.0625, 3.4375, 4.25, 5.5, 6.5625, 8.5]
        found.append(
            [
                Option(f"{b}", weights * b / 8, alpha * 4.0**-b * float(np.exp(0.1 * rng.normal())))
                for b in bits
            ]
        )
    return found


def test_two_hundred_tensors_use_the_budget_to_a_thousandth_in_seconds():
    found = model_like(np.random.default_rng(0), 211)
    budget = 3.1 / 8 * sum(o[-1].size / 8.5 * 8 for o in found)
    start = time.process_time()
    size, _ = totals(found, choose(found, budget))
    assert time.process_time() - start < 20
    assert 0.999 * budget < size <= budget


def test_the_choice_is_within_a_thousandth_of_the_bound_on_all_choices():
    found = model_like(np.random.default_rng(1), 200)
    budget = 2.7 / 8 * sum(o[-1].size / 8.5 * 8 for o in found)
    _, cost = totals(found, choose(found, budget))
    # Weak duality: for any price, Σ min(cost + price · size) − price · budget bounds every choice from below.
    prices = np.exp(np.linspace(-30, 0, 4000))
    bound = max(sum(min(o.cost + p * o.size for o in item) for item in found) - p * budget for p in prices)
    assert bound <= cost <= bound * 1.001
