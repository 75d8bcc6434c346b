"""The search of the types with a codebook: exact nearest codewords, and the scales around them.

Terms, beside those of `_grids`
    run         the consecutive groups that share a scale: 32 or 16 weights
    t           the scale of a run: x̂ = t v, where v is a codeword with its signs or shift
    k           the odd integer that the file stores for t: t = d unit k
    S1, S2      of given codewords: Σ w x v and Σ w v²
    gain        what codewords save of Σ w x²: t (2 S1 − t S2); at the best t = S1 / S2 that is S1² / S2
    lanes       groups and blocks in one axis: weights are [group, lanes], so that every step is elementwise

**Nearest codeword.** The gain of a codeword is a sum over its weights, hence over its two halves (a, b):

    max over the grid of A[a] + B[b]  =  max over a of (A[a] + max over b in row a of B[b])

There are at most 81 (or 64) halves, whose gains are tabulated once per group and scale. The inner maxima run
over subsets of one table, and these overlap: `_shared_maxima` finds the pairs that many rows need, so that
all 2048 codewords of IQ1 cost 661 maxima and 81 sums instead of 2048 sums of 8 products. The result is exact.

**Signs of even parity.** Where the signs of x are odd, one sign must be wrong; it costs 4 t w |x| v of the
weight it is given to. The best pair of codeword and sign is again a maximum over halves: the wrong sign is in
one of them, so each half needs two tables, without and with its cheapest wrong sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jquant.formats._grids import grid

Table = list[Array]  # one array [lanes] per level, or per half codeword
Rows = Array | Sequence[Array]  # [weights, lanes], or as many arrays [lanes]

# Thousands of steps: a fit and an assign that share lanes need to trace them only once.
_traced_once = partial(jax.jit, static_argnames="book")


class Codebook(NamedTuple):
    """A grid, prepared for the search.

    shared: pairs of nodes whose maximum is a new node; nodes 0 … halves − 1 are the entries of table B.
    rows: (a, nodes): the maximum of these nodes is the best second half for the first half a.
    """

    levels: tuple[int, ...]
    group: int
    shared: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def half(self) -> int:
        return self.group // 2

    @property
    def bits(self) -> int:
        """Bits that hold a level's number."""
        return (len(self.levels) - 1).bit_length()


@cache
def codebook(name: str) -> Codebook:
    """The codebook of a type: codebook("IQ2_S")."""
    values = grid(name)
    levels = np.unique(values)
    numbers = np.searchsorted(levels, values)  # [codewords, group]
    half, size = values.shape[1] // 2, len(levels)
    powers = size ** np.arange(half - 1, -1, -1)
    halves = size**half
    member = np.zeros((halves, halves), np.int32)
    member[numbers[:, :half] @ powers, numbers[:, half:] @ powers] = 1
    shared, member = _shared_maxima(member)
    rows = tuple((a, tuple(np.flatnonzero(row).tolist())) for a, row in enumerate(member) if row.any())
    return Codebook(tuple(levels.tolist()), values.shape[1], shared, rows)


def _shared_maxima(member: np.ndarray) -> tuple[tuple[tuple[int, int], ...], np.ndarray]:
    """The pair of nodes that most rows contain becomes a node of its own, until no two rows share a pair.

    member: [rows, nodes], 1 where a row's maximum runs over a node. Returns the pairs, and member with
    their nodes appended. This is Paar's greedy sharing of common terms, for maxima instead of sums.
    """
    pairs = []
    common = member.T @ member
    np.fill_diagonal(common, 0)
    while True:
        i, j = np.unravel_index(common.argmax(), common.shape)
        if common[i, j] < 2:
            return tuple(pairs), member
        both = member[:, i] & member[:, j]
        member[:, [i, j]] -= both[:, None]
        member = np.concatenate([member, both[:, None]], axis=1)
        common = np.pad(common, (0, 1))
        for node in (i, j, -1):
            common[node] = common[:, node] = member.T @ member[:, node]
            common[node, node] = 0
        pairs.append((int(i), int(j)))


@cache
def _index_of_code(name: str) -> np.ndarray:
    """Grid index by code, the numbers of a codeword's levels side by side: int32 [2 ** (group · bits)]."""
    book, values = codebook(name), grid(name)
    numbers = np.searchsorted(book.levels, values)
    codes = (numbers << book.bits * np.arange(book.group)).sum(axis=1)
    index = np.zeros(1 << book.group * book.bits, np.int32)
    index[codes] = np.arange(len(values))
    return index


def grid_index(name: str, code: Array, count: int) -> Array:
    """The file's indices of the `count` codewords in a code [lanes]: int32 [count, lanes]."""
    book = codebook(name)
    size = book.bits * book.group
    codes = jnp.stack([code >> size * k & (1 << size) - 1 for k in range(count)])
    return jnp.asarray(_index_of_code(name)).at[codes].get(mode="promise_in_bounds")


def gains(wx: Rows, w: Rows, t: Array, levels: Sequence[int | float | Array]) -> list[Table]:
    """What each weight saves at each level v: v (2 t w x − t² w v). w x and w: of each weight, [lanes]."""
    pairs = zip(wx, w, strict=True)
    return [[v * (2 * t * wx - v * (t * t * w)) for v in levels] for wx, w in pairs]


def _larger(a: Array, b: Array) -> Array:
    # Unlike jnp.maximum this needs not ask for NaN: one instruction.
    return jnp.where(a > b, a, b)


def _smaller(a: Array, b: Array) -> Array:
    return jnp.where(a < b, a, b)


def _over_halves(combine: Callable[[Array, Array], Array], columns: Sequence[Table]) -> Table:
    """One entry per half codeword, from those of its weights' levels."""
    return reduce(lambda table, column: [combine(x, y) for x in table for y in column], columns)


def _half_codes(book: Codebook) -> list[int]:
    """The level numbers of each half, as bits: the first weight lowest."""
    columns = [[n << book.bits * j for n in range(len(book.levels))] for j in range(book.half)]
    return reduce(lambda codes, column: [x | y for x in codes for y in column], columns)


def _tagged(table: Table, book: Codebook) -> Table:
    """Each entry with its half's code in the lowest 8 bits of its 24-bit mantissa.

    So a maximum brings along which entry it is; two gains within 2⁻¹⁶ of each other may change places.
    """
    mask = (1 << book.bits * book.half) - 1
    return [
        lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & ~mask | code, jnp.float32)
        for x, code in zip(table, _half_codes(book), strict=True)
    ]


def _row_maxima(table: Table, book: Codebook) -> Table:
    nodes = _tagged(table, book)
    for i, j in book.shared:
        nodes.append(_larger(nodes[i], nodes[j]))
    return [reduce(_larger, [nodes[i] for i in row]) for _, row in book.rows]


def _best_of_rows(book: Codebook, rows: Sequence[tuple[int, Array, Array]]) -> Array:
    """The code of the best of (first half, its gain, the tagged gain of the best second half), int32."""
    size = book.bits * book.half
    codes = _half_codes(book)
    number, gain, second = rows[0]
    best = gain + second, second, jnp.full(gain.shape, codes[number], jnp.int32)
    for number, gain, second in rows[1:]:
        total = gain + second
        better = total > best[0]
        new = total, second, jnp.int32(codes[number])
        best = tuple(jnp.where(better, a, b) for a, b in zip(new, best, strict=True))
    _, second, first = best
    return first | (lax.bitcast_convert_type(second, jnp.int32) & (1 << size) - 1) << size


@_traced_once
def nearest(book: Codebook, gains: Sequence[Table]) -> Array:
    """The codeword of largest gain. gains[j][l]: that of weight j at level l."""
    first = _over_halves(jnp.add, gains[: book.half])
    seconds = _row_maxima(_over_halves(jnp.add, gains[book.half :]), book)
    return _best_of_rows(book, [(a, first[a], m) for (a, _), m in zip(book.rows, seconds, strict=True)])


@_traced_once
def nearest_with_wrong_sign(book: Codebook, gains: Sequence[Table], losses: Sequence[Table]) -> Array:
    """The codeword of largest gain after the loss of one weight, the cheapest. losses[j][l] ≥ 0, as gains."""
    return _with_and_without_wrong_sign(book, gains, losses)[0]


@_traced_once
def nearest_right_and_wrong(book: Codebook, gains: Sequence[Table], losses: Sequence[Table]) -> Array:
    """`nearest`, and above its bits `nearest_with_wrong_sign`."""
    wrong, right = _with_and_without_wrong_sign(book, gains, losses)
    return right | wrong << book.bits * book.group


def _with_and_without_wrong_sign(
    book: Codebook, gains: Sequence[Table], losses: Sequence[Table]
) -> tuple[Array, Array]:
    right, wrong = [], []
    for part in (slice(book.half), slice(book.half, None)):
        right.append(_over_halves(jnp.add, gains[part]))
        cheapest = _over_halves(_smaller, losses[part])
        wrong.append([gain - loss for gain, loss in zip(right[-1], cheapest, strict=True)])
    after_right, after_wrong = _row_maxima(right[1], book), _row_maxima(wrong[1], book)
    rows = []
    for (a, _), r, w in zip(book.rows, after_right, after_wrong, strict=True):
        in_first = wrong[0][a] + r > right[0][a] + w
        rows.append((a, jnp.where(in_first, wrong[0][a], right[0][a]), jnp.where(in_first, r, w)))
    plain = [(a, right[0][a], r) for (a, _), r in zip(book.rows, after_right, strict=True)]
    return _best_of_rows(book, rows), _best_of_rows(book, plain)


def values(book: Codebook, code: Array, count: int) -> Table:
    """The levels of a code's `count` weights, float32, one array for each weight."""
    mask = (1 << book.bits) - 1
    return [_level(book.levels, code >> book.bits * j & mask) for j in range(count)]


def _level(levels: tuple[int, ...], number: Array) -> Array:
    """levels[number], without a table to gather from: a straight line and what departs from it."""
    rise = levels[1] - levels[0]
    value = levels[0] + rise * number.astype(jnp.float32)
    for k, (below, above) in enumerate(pairwise(levels)):
        if above - below != rise:
            value = value + jnp.where(number > k, float(above - below - rise), 0.0)
    return value


def total(terms: Sequence[Array]) -> Array:
    return reduce(jnp.add, terms)


def least(terms: Sequence[Array]) -> Array:
    return reduce(_smaller, terms)


def largest(terms: Sequence[Array]) -> Array:
    return reduce(_larger, terms)
