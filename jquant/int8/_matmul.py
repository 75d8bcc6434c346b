"""x Wᵀ in 8-bit integers: inputs rounded token by token, products summed in int32, then scaled.

    y = s_x s_w Σ_k q_x q_w,   x ≈ s_x q_x (`activations.int8`),   W ≈ s_w q_w (the format INT8)

    w = jquant.quantize(W, jquant.SCALED_FORMATS["INT8"])
    y = matmul(x, w)

The sums are exact: every device and both kernels give the same integers. XLA's dot is the default. The Pallas
kernel scales its tile before it is written, so that the int32 sums never leave the chip; choose it with
`dot=pallas_dot` where it is faster. On GPU it is not; there a kernel rounds the inputs (`rounding_kernel`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int8

from jquant.core import QuantizedTensor, on_cuda
from jquant.int8._kernel import int8_rows

TILE = 128  # rows and columns of y that a kernel makes at once
LANES = 128  # columns of codes are filled up to a multiple of it

# codes [n, in], scales [n, 1], codes [out, in], scales [out, 1] → float32 [n, out]
Dot = Callable[[Array, Array, Array, Array], Array]


def xla_dot(
    qx: Int8[Array, "n in"], sx: Float[Array, "n 1"], qw: Int8[Array, "out in"], sw: Float[Array, "out 1"]
) -> Float[Array, "n out"]:
    sums = lax.dot_general(qx, qw, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    # Without the barrier XLA converts the sums to float32 in a pass of its own, before it scales them.
    return _scaled(on_cuda(lax.optimization_barrier, lambda sums: sums, sums), sx, sw)


def _scaled(sums: Array, sx: Array, sw: Array) -> Array:
    """int32 [n, out] → float32. The order of the two products decides on the last bit."""
    by_token = sums.astype(jnp.float32) * jnp.broadcast_to(sx, sums.shape)
    return by_token * jnp.broadcast_to(sw.T, sums.shape)


def pallas_dot(
    qx: Int8[Array, "n in"],
    sx: Float[Array, "n 1"],
    qw: Int8[Array, "out in"],
    sw: Float[Array, "out 1"],
    *,
    interpret: bool = False,
) -> Float[Array, "n out"]:
    """The same by a kernel for TPU. interpret: run it as plain JAX, on any device."""
    n, out = qx.shape[0], qw.shape[0]
    qx, qw = (_padded(q, TILE, LANES) for q in (qx, qw))
    sx, sw = _padded(sx, TILE, 1), _padded(sw, TILE, 1).T
    depth = qx.shape[1]
    made = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((qx.shape[0], qw.shape[0]), jnp.float32),
        grid=(qx.shape[0] // TILE, qw.shape[0] // TILE),
        in_specs=[
            pl.BlockSpec((TILE, depth), lambda i, j: (i, 0)),
            pl.BlockSpec((TILE, 1), lambda i, j: (i, 0)),
            pl.BlockSpec((TILE, depth), lambda i, j: (j, 0)),
            pl.BlockSpec((1, TILE), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((TILE, TILE), lambda i, j: (i, j)),
        interpret=interpret,
    )(qx, sx, qw, sw)
    return made[:n, :out]


def _kernel(qx, sx, qw, sw, y) -> None:
    """A tile of y: references to whole rows of both codes and to their scales."""
    sums = lax.dot_general(qx[...], qw[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    by_token = sums.astype(jnp.float32) * jnp.broadcast_to(sx[...], sums.shape)
    y[...] = by_token * jnp.broadcast_to(sw[...], sums.shape)


def _padded(a: Array, rows: int, cols: int) -> Array:
    return jnp.pad(a, [(0, -a.shape[0] % rows), (0, -a.shape[1] % cols)])


def matmul(x: Float[Array, "*n in"], w: QuantizedTensor, *, dot: Dot = xla_dot) -> Float[Array, "*n out"]:
    """x Wᵀ for W in the format INT8, [out, in]; float32.

    Its gradients are those of the product with the decoded weights, by x as if it were not rounded
    (straight-through), and by the scales of W; codes have none.
    Raises ValueError for another format, or shapes that do not fit.

    >>> w = jquant.quantize(jnp.eye(3, 8), "INT8")
    >>> jquant.int8.matmul(jnp.ones((2, 8)), w).shape
    (2, 3)
    """
    if w.format.name != "INT8":
        raise ValueError(
            f"int8_matmul needs weights of the format INT8; got {w.format}. Quantize them to it."
        )
    if len(w.shape) != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x {x.shape} does not fit weights {w.shape}: their last axes are multiplied.")
    rows = x.reshape(-1, x.shape[-1])
    scale = w.parts["weight_scale"].astype(jnp.float32)
    y = cast(Array, _matmul(dot, rows, w.parts["weight"], scale))
    return y.reshape(*x.shape[:-1], w.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(dot: Dot, x: Array, codes: Array, scale: Array) -> Array:
    qx, sx = int8_rows(x)
    return dot(qx, sx, codes, scale)


def _forward(dot: Dot, x: Array, codes: Array, scale: Array) -> tuple[Array, tuple[Array, ...]]:
    y = cast(Array, _matmul(dot, x, codes, scale))
    return y, (y, codes, scale, jnp.zeros(0, x.dtype))


def _backward(dot: Dot, kept: tuple[Array, ...], g: Float[Array, "n out"]) -> tuple[Array, np.ndarray, Array]:
    y, codes, scale, like_x = kept
    weights = codes.astype(jnp.float32) * jnp.broadcast_to(scale, codes.shape)
    by_x = jnp.matmul(g, weights, precision=lax.Precision.HIGHEST)
    # y is the scale of a row of W times what does not depend on it.
    safe = jnp.where(scale != 0, scale, 1.0)
    by_scale = jnp.sum(g * y, axis=0)[:, None] / safe
    return by_x.astype(like_x.dtype), np.zeros(codes.shape, jax.dtypes.float0), by_scale


_matmul.defvjp(_forward, _backward)
