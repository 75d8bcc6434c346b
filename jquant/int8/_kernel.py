"""`activations.int8` in one pass on a CUDA GPU, the same bits.

Each row is read once, where XLA reads it for its maximum and again for its codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float

from jquant.core import on_cuda, result_like
from jquant.int8.rounding import LARGEST, Quantized, divided_once, int8

WEIGHTS_PER_WARP = 512
# Triton's own division is off by up to two units in the last place, and it rounds to no whole numbers.
DIVIDE = "div.rn.f32 $0, $1, $2;"
ROUND = "cvt.rni.f32.f32 $0, $1;"

Elementwise = Callable[..., Array]


def int8_rows(x: Float[Array, "n width"]) -> Quantized:
    """`activations.int8`, by the kernel where this is compiled for a CUDA GPU."""
    return Quantized(*on_cuda(by_kernel, int8, x))


def by_kernel(x: Float[Array, "n width"], *, interpret: bool = False) -> Quantized:
    """interpret: run it as plain JAX, on any device."""
    n, width = x.shape
    block = pl.next_power_of_2(width)
    warps = min(16, max(1, block // WEIGHTS_PER_WARP))
    divide, to_whole = (divided_once, jnp.round) if interpret else (_assembled(DIVIDE), _assembled(ROUND))
    codes, scale = pl.pallas_call(
        partial(_kernel, block=block, divide=divide, to_whole=to_whole),
        out_shape=(result_like((n, width), jnp.int8, x), result_like((n, 1), jnp.float32, x)),
        grid=(n,),
        in_specs=[pl.BlockSpec((1, width), lambda i: (i, 0))],
        out_specs=(pl.BlockSpec((1, width), lambda i: (i, 0)), pl.BlockSpec((1, 1), lambda i: (i, 0))),
        compiler_params=None if interpret else triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )(x)
    return Quantized(codes, scale)


def _kernel(x_row, codes, scale, *, block: int, divide: Elementwise, to_whole: Elementwise) -> None:
    """A row: references to it, to its codes and to its scale."""
    columns, inside = pl.ds(0, block), (jnp.arange(block) < x_row.shape[1])[None]
    x = triton.load(x_row.at[:, columns], mask=inside, other=0.0).astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    s = jnp.where(absmax > 0, divide(absmax, jnp.full_like(absmax, LARGEST["int8"])), 1.0)
    whole = jnp.clip(to_whole(divide(x, jnp.broadcast_to(s, x.shape))), -128.0, 127.0)
    q = whole.astype(jnp.int32).astype(jnp.int8)
    triton.store(codes.at[:, columns], q, mask=inside)
    scale[...] = s


def _assembled(instruction: str) -> Elementwise:
    """Of arrays of float32 of one shape, to one."""

    def apply(*args: Array) -> Array:
        (made,) = triton.elementwise_inline_asm(
            instruction,
            args=args,
            constraints=",".join(["=f", *("f" for _ in args)]),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
        )
        return made

    return apply
