"""Fewer types to choose from. Each type costs seconds of compiling, and the last few save next to nothing.

At the price λ of a size, tensor n costs its damage + λ bytes in the best of its types; the sum over tensors
bounds the damage of any plan of that size. Types are given up one by one, that whose loss raises the bound
least first, until it has risen by LOSS. Of the types left, a tensor keeps those that are its best at some
damage within REACH of what is expected. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jquant.allocation.candidates import Candidates, padded_bytes
from jquant.core import TensorSpec, bits_per_weight

LOSS = 0.002  # of the whole damage
REACH = 8.0  # times: more than a search multiplies weights by, and measured errors are off
_SPREAD = (0.4, 0.6, 1.0, 1.6, 2.5)  # what is measured of tensors lies around what is expected
_FACTORS = np.geomspace(1 / REACH, REACH, 13)
_DEAR = 1.0  # nats a byte: more than any damage is worth, where only the smallest types fit


def shortlist(
    specs: Mapping[str, TensorSpec],
    found: Candidates,
    damages: Mapping[str, Mapping[str, float]],
    price: float,
) -> Candidates:
    """The candidates without types that can be missed. Each tensor keeps at least one.

    damages: expected, nats a token. price: nats a byte at the size that is aimed at, see `allocate.price_of`.
    """
    price = min(price, _DEAR)
    types = sorted({type for of in found.within.values() for type in of}, key=bits_per_weight)
    damage = np.full((len(found.within), len(types)), np.inf)
    cost = np.zeros_like(damage)  # [tensor, type]
    for row, (name, of) in enumerate(found.within.items()):
        for type in of:
            column = types.index(type)
            damage[row, column] = damages[name][type]
            cost[row, column] = price * padded_bytes(specs[name], type)
    expected = damage
    damage = np.concatenate([expected * factor for factor in _SPREAD])
    total = damage + np.concatenate([cost] * len(_SPREAD))
    best = total.argmin(1)
    allowed = LOSS * damage[np.arange(len(best)), best].sum() + total.min(1).sum()
    left = list(range(len(types)))
    while len(left) > 1:
        rise = {gone: total[:, [i for i in left if i != gone]].min(1).sum() for gone in left}
        gone = min(left, key=lambda i: rise[i])
        if not rise[gone] <= allowed:
            break
        left.remove(gone)
    reached = np.zeros(expected.shape, bool)
    for factor in _FACTORS:
        best = (expected[:, left] * factor + cost[:, left]).argmin(1)
        reached[np.arange(len(best)), np.take(left, best)] = True
    within = {
        name: tuple(type for type in of if reached[row, types.index(type)])
        for row, (name, of) in enumerate(found.within.items())
    }
    return Candidates(within, found.without)
