"""The choice of least total cost within a budget: one option for each item, a multiple-choice knapsack.

Items are tensors and options their types; sizes are bytes and costs damage, or the other way round. Pure.

1. Lagrangian: for a price λ each item takes the option of least cost + λ size, which lies on the lower convex
   hull of its (size, cost). The least λ whose choice fits gives a choice that fits and a bound below which no
   choice can cost.
2. What is left of the budget goes to single changes, best first.
3. An option whose cost + λ size exceeds its item's least by more than the gap between 1 and 2 is in no better
   choice. The few that remain are combined exactly: partial choices in order of size, each cheaper than all
   smaller ones. Only where more than STATES of these remain are the least promising dropped.

Source: Sinha & Zoltners 1979, The Multiple-Choice Knapsack Problem; for 3, Dyer, Kayal & Walker 1984.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STATES = 1 << 14
_HALVINGS = 200


class Option(NamedTuple):
    type: str
    size: float
    cost: float


def smallest(items: Sequence[Sequence[Option]]) -> float:
    """The size of the smallest choice."""
    return sum(min(option.size for option in options) for options in items)


def price_of(items: Sequence[Sequence[Option]], budget: float) -> float:
    """The least price of size at which the best options fit; infinite where only the smallest do, or none."""
    sizes = [np.array([option.size for option in options], np.float64) for options in items]
    costs = [np.array([option.cost for option in options], np.float64) for options in items]
    return _price(sizes, costs, budget)


def choose(items: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """For each item the number of its option, so that sizes add up to at most `budget` at least total cost.

    Raises ValueError where nothing fits.
    """
    if smallest(items) > budget:
        raise ValueError(f"the smallest choice has {smallest(items)}, more than {budget}.")
    sizes = [np.array([option.size for option in options], np.float64) for options in items]
    costs = [np.array([option.cost for option in options], np.float64) for options in items]
    price = _price(sizes, costs, budget)
    chosen = _filled(sizes, costs, _at_price(sizes, costs, price), budget)
    return _exact(sizes, costs, price, chosen, budget)


def _at_price(sizes: list[np.ndarray], costs: list[np.ndarray], price: float) -> list[int]:
    """The best option of each item at a price for size; of equal ones the smallest."""
    if price == np.inf:
        return [int(np.lexsort((cost, size))[0]) for size, cost in zip(sizes, costs, strict=True)]
    return [int(np.lexsort((size, cost + price * size))[0]) for size, cost in zip(sizes, costs, strict=True)]


def _total(values: list[np.ndarray], chosen: Sequence[int]) -> float:
    return float(sum(value[i] for value, i in zip(values, chosen, strict=True)))


def _price(sizes: list[np.ndarray], costs: list[np.ndarray], budget: float) -> float:
    """The least price at which the best options fit, to the precision of float64."""

    def fits(price: float) -> bool:
        return _total(sizes, _at_price(sizes, costs, price)) <= budget

    if fits(0.0):
        return 0.0
    high = 1.0
    while not fits(high):
        high *= 16
        if high > 1e300:
            return np.inf
    low = 0.0
    for _ in range(_HALVINGS):
        middle = np.sqrt(low * high) if low > 0 else high / 16
        if not low < middle < high or middle < 1e-300:
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
        if high < low * (1 + 1e-12):
            break
    return float(high)


def _filled(sizes: list[np.ndarray], costs: list[np.ndarray], chosen: list[int], budget: float) -> list[int]:
    """The choice with every single change that still fits, the one that saves most for its size first."""
    chosen, left = list(chosen), budget - _total(sizes, chosen)
    while True:
        best, change = 0.0, None
        for k, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
            more, saved = size - size[chosen[k]], cost[chosen[k]] - cost
            worth = np.where((more <= left) & (saved > 0), saved / np.maximum(more, 1e-12), 0.0)
            i = int(worth.argmax())
            if worth[i] > best:
                best, change = worth[i], (k, i)
        if change is None:
            return chosen
        k, i = change
        left -= sizes[k][i] - sizes[k][chosen[k]]
        chosen[k] = i


def _exact(
    sizes: list[np.ndarray], costs: list[np.ndarray], price: float, known: list[int], budget: float
) -> list[int]:
    """A choice that costs less than the known one, or that one."""
    if price == np.inf:
        return known
    reduced = [cost + price * size for size, cost in zip(sizes, costs, strict=True)]
    least = [float(r.min()) for r in reduced]
    gap = _total(costs, known) - (sum(least) - price * budget)
    if gap <= 0:
        return known
    slack = gap * (1 + 1e-9) + 1e-12 * abs(_total(costs, known))
    kept = [np.flatnonzero(r - low <= slack) for r, low in zip(reduced, least, strict=True)]
    if any(len(options) == 0 for options in kept):
        return known
    order = sorted(range(len(sizes)), key=lambda k: len(kept[k]))
    rest = np.cumsum([float(sizes[k][kept[k]].min()) for k in order[::-1]])[::-1]  # of this and later items
    size, cost, above = np.zeros(1), np.zeros(1), np.zeros(1)  # of partial choices; above: their bound
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # (partial choice before, option) of each
    for n, k in enumerate(order):
        options, later = kept[k], rest[n + 1] if n + 1 < len(order) else 0.0
        grid = np.meshgrid(np.arange(len(size)), options, indexing="ij")
        before, option = grid[0].ravel(), grid[1].ravel()
        size, cost = size[before] + sizes[k][option], cost[before] + costs[k][option]
        above = above[before] + reduced[k][option] - least[k]
        good = np.flatnonzero((size + later <= budget) & (above <= slack))
        by_size = good[np.lexsort((cost[good], size[good]))]
        cheapest = np.minimum.accumulate(cost[by_size])
        new = np.concatenate([[True], cheapest[1:] < cheapest[:-1]]) if len(by_size) else by_size > 0
        left = by_size[new]
        if len(left) > STATES:
            left = np.sort(left[np.argsort(above[left], kind="stable")[:STATES]])
        if len(left) == 0:
            return known
        size, cost, above = size[left], cost[left], above[left]
        steps.append((before[left], option[left]))
    state = int(cost.argmin())
    if cost[state] >= _total(costs, known):
        return known
    chosen = list(known)
    for k, (before, option) in zip(order[::-1], steps[::-1], strict=True):
        chosen[k], state = int(option[state]), int(before[state])
    return chosen
