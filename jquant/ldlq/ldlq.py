"""Error feedback around any Format: codes that make the layer's output, not each weight, come out right.

What is minimised is tr (W − Ŵ) H (W − Ŵ)ᵀ, H = E[x xᵀ] of the layer's inputs x: the squared error of its
output. With H = U D Uᵀ, U unit upper triangular in blocks of one group of columns and D block diagonal, and
r = W − Ŵ, it is for each row

    Σ_g ρ_g D_g ρ_gᵀ,   ρ_g = r_g + Σ_{j<g} r_j U_jg

so group after group Ŵ_g is chosen next to the target W_g + Σ_{j<g} r_j U_jg, in the metric D_g, of which a
format knows the diagonal only: what was lost before is made up for. This is LDLQ (Chee et al. 2023, QuIP,
theorem 1; the same as GPTQ, Frantar et al. 2022, without its inverse), here with groups that share a code, as
in QuIP# (Tseng et al. 2024, block LDLQ).

A format's scales span many groups, so they must be known before its codes. They are searched on the target
as it stands when their block begins, then again on the targets that its groups turned out to have, and each
row keeps what left less error. Only fit, assign and reconstruct are asked: of a part of a block they are
given the scales that belong to it.

Arrays are [columns, rows]: rows do not mix, so they lie along the last axis, as blocks do in a Format.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Float, PyTree, UInt8

from jquant.core import Format, QuantizedTensor
from jquant.ldlq._cholesky import cholesky

DAMPING = 0.01  # of the mean diagonal of H, added to its diagonal
ROUNDS = 2  # searches for the scales of a block
ROWS = 256  # of a matrix at a time on a CPU: a block of them and its factor stay in a core's cache
ACCELERATOR_ROWS = 4096  # lanes to fill
STRETCH = 256  # columns, at most

PRECISION = lax.Precision.HIGHEST


class Factor(NamedTuple):
    """H = U D Uᵀ, for groups of G columns."""

    U: Float[Array, "cols cols"]  # zero but above the block diagonal
    D: Float[Array, "groups G G"]


@partial(jax.jit, static_argnames="group_size")
def factor(H: Float[Array, "cols cols"], group_size: int, damping: float | Array = DAMPING) -> Factor:
    """The block factors of a Hessian, damped.

    Columns without input keep the damping as their diagonal: whatever they are coded as costs next to
    nothing, and feeds nothing on. An H of zeros is the identity.
    """
    cols = H.shape[0]
    scale = jnp.trace(H) / cols
    H = jnp.where(scale > 0, H / jnp.where(scale > 0, scale, 1.0), jnp.eye(cols))
    H = H + damping * jnp.eye(cols)
    # H = L' L'ᵀ with L' upper triangular is the Cholesky factor of H with its order reversed.
    upper = cholesky(H[::-1, ::-1])[::-1, ::-1]
    groups = cols // group_size
    own = jnp.arange(groups)[:, None] * group_size + jnp.arange(group_size)[None]
    diagonal = upper[own[:, :, None], own[:, None, :]]  # [groups, G, G], each upper triangular
    D = jnp.einsum("gij,gkj->gik", diagonal, diagonal, precision=PRECISION)
    columns = upper.reshape(cols, groups, group_size).transpose(1, 2, 0)  # [groups, G, cols]
    normal = jax.vmap(lambda d, c: solve_triangular(d, c, trans=1))(diagonal, columns)
    U = normal.transpose(2, 0, 1).reshape(cols, cols)
    before = jnp.arange(cols)[:, None] // group_size < jnp.arange(cols)[None] // group_size
    return Factor(jnp.where(before, U, 0.0), D)


def feedback(W: Float[Array, "rows cols"], factors: Factor, format: Format) -> QuantizedTensor:
    """W in the format, with error feedback.

    factors: `factor` of the Hessian of W's inputs, for the format's `group_size`. cols is a multiple of the
    format's block.
    """
    data = [feedback_rows(tile, factors, format) for tile in tiles_of(W)]
    return QuantizedTensor({"blocks": jnp.concatenate(data)[: len(W)]}, format)


def tiles_of(W: Float[Array, "rows cols"]) -> Float[Array, "tiles tile cols"]:
    """As many as suit the device, the last ones filled up with zeros: one shape, one compilation."""
    tile = ROWS if jax.default_backend() == "cpu" else min(-(-len(W) // ROWS) * ROWS, ACCELERATOR_ROWS)
    return jnp.pad(W, ((0, -len(W) % tile), (0, 0))).reshape(-1, tile, W.shape[1])


@partial(jax.jit, static_argnames="format")
def feedback_rows(
    W: Float[Array, "rows cols"], factors: Factor, format: Format
) -> UInt8[Array, "rows bytes"]:
    """`feedback` of a few rows, compiled as one."""
    rows, cols = W.shape
    B = format.block_size
    weights = W.T

    def step(target: Array, start: Array) -> tuple[Array, Array]:
        U = lax.dynamic_slice_in_dim(factors.U, start, B)
        part = _Block(
            lax.dynamic_slice_in_dim(weights, start, B),
            lax.dynamic_slice_in_dim(U, start, B, axis=1),
            lax.dynamic_slice_in_dim(factors.D, start // format.group_size, B // format.group_size),
        )
        coded, scales = _best_block(part, lax.dynamic_slice_in_dim(target, start, B), format)
        target = target + jnp.matmul(U.T, part.weights - coded, precision=PRECISION)
        # What was coded decodes to itself: its codes are those of the nearest weights, which it is.
        codes = format.assign(coded, jnp.ones_like(coded), scales)  # pyright: ignore[reportOptionalCall]
        return target, format.pack(codes, scales)

    starts = jnp.arange(0, cols, B)
    data = lax.scan(step, weights, starts)[1]  # [blocks, bytes, rows]
    return data.transpose(2, 0, 1).reshape(rows, -1)


class _Block(NamedTuple):
    """One block of columns of all rows."""

    weights: Array  # [B, rows]
    U: Array  # [B, B]
    D: Array  # [groups, G, G]


class _Coded(NamedTuple):
    loss: Array  # [rows]: Σ_g ρ_g D_g ρ_gᵀ
    coded: Array  # [B, rows]
    targets: Array  # [B, rows]: of each group, as it was coded
    scales: PyTree


def _best_block(part: _Block, target: Array, format: Format) -> tuple[Array, PyTree]:
    """The block coded with the best scales found, and these."""
    fit = format.fit
    assert fit is not None
    importance = jnp.diagonal(part.D, axis1=1, axis2=2).reshape(-1)
    importance = jnp.broadcast_to(importance[:, None], target.shape)

    def search(_: Array, best: _Coded) -> _Coded:
        scales = lax.optimization_barrier(fit(best.targets, importance))
        new = _code(part, target, importance, scales, format)
        better = new.loss < best.loss
        return jax.tree.map(lambda a, b: jnp.where(jnp.broadcast_to(better, a.shape), a, b), new, best)

    shapes = jax.eval_shape(fit, target, importance)
    none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    nothing = _Coded(jnp.full_like(target[0], jnp.inf), target, target, none)
    best = lax.fori_loop(0, ROUNDS, search, nothing)
    return best.coded, best.scales


def _code(part: _Block, target: Array, importance: Array, scales: PyTree, format: Format) -> _Coded:
    """The codes of a block for given scales, group by group, in stretches where the block is long."""
    B, G = format.block_size, format.group_size

    def group(start: Array, own: _Block, z: Array, w: Array) -> tuple[Array, Array, Array]:
        used = _part_of(scales, start, G, B)
        q = format.reconstruct(format.assign(z, w, used), used)  # pyright: ignore[reportOptionalCall]
        off = z - q
        return jnp.sum(off * jnp.matmul(own.D[0], off, precision=PRECISION), axis=0), q, z

    def stretch(start: Array | int, own: _Block, z: Array, w: Array) -> tuple[Array, Array, Array]:
        return _in_turn(own, z, w, G, lambda at, *given: group(start + at, *given))

    size = _stretch(B, G)
    if size == B:
        return _Coded(*stretch(0, part, target, importance), scales)
    return _Coded(*_in_turn(part, target, importance, size, stretch), scales)


def _stretch(block: int, group: int) -> int:
    """How much of a block is coded before what it lost is fed on to the rest: no group is worth a pass over
    a row that is one block."""
    return max(size for size in range(group, min(block, STRETCH) + 1, group) if block % size == 0)


def _in_turn(
    part: _Block,
    target: Array,
    importance: Array,
    size: int,
    code: Callable[[Array, _Block, Array, Array], tuple[Array, Array, Array]],
) -> tuple[Array, Array, Array]:
    """(loss, coded, targets) of so many columns after the others, what each lost fed on. code: the same of
    the columns from a start, given their part, target and importance."""
    zeros, groups = jnp.zeros_like(target), size // part.D.shape[-1]

    def step(i: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        loss, coded, targets, target = carry
        start = i * size
        z, w, x, U = (
            lax.dynamic_slice_in_dim(a, start, size) for a in (target, importance, part.weights, part.U)
        )
        D = lax.dynamic_slice_in_dim(part.D, i * groups, groups)
        own = _Block(x, lax.dynamic_slice_in_dim(U, start, size, axis=1), D)
        least, q, z = code(start, own, z, w)
        return (
            loss + least,
            lax.dynamic_update_slice_in_dim(coded, q, start, 0),
            lax.dynamic_update_slice_in_dim(targets, z, start, 0),
            target + jnp.matmul(U.T, x - q, precision=PRECISION),
        )

    start = jnp.zeros_like(target[0]), zeros, zeros, target
    return lax.fori_loop(0, len(target) // size, step, start)[:3]


def _part_of(scales: PyTree, start: Array, size: int, block: int) -> PyTree:
    """The scales of weights [start, start + size) of a block: one for all, or [runs, rows]."""

    def own(a: Array) -> Array:
        if a.ndim < 2:
            return a
        run = block // len(a)  # weights that share a scale
        return lax.dynamic_slice_in_dim(a, start // run, max(size // run, 1))

    return jax.tree.map(own, scales)
