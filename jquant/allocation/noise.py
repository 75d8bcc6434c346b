"""Noise like a quantizer's: in proportion to the weights around, for what an error of a matrix changes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Float

from jquant.models import Parameters, matrices

# Of the size of the weights around: a relative error of 1%, as of 4 bits, where changes are still linear.
NOISE = 0.1


def local_squares(x: Float[np.ndarray, "*n cols"]) -> Float[np.ndarray, "*n cols"]:
    """The mean square of the 32 weights around each: quantizers err in proportion to it."""
    *rows, cols = x.shape
    width = math.gcd(cols, 32)
    local = np.square(x, dtype=np.float32).reshape(*rows, cols // width, width).mean(-1, keepdims=True)
    return np.broadcast_to(local, (*rows, cols // width, width)).reshape(x.shape)


def relative_error(e2: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> float:
    """Σ w e² / Σ w x² of a matrix or stack, where it has squared errors e2."""
    w = np.ones((1, x.shape[-1]), np.float32) if importance is None else importance
    w = w[:, None] if x.ndim > 2 else w
    total = float((w * x * x).sum(dtype=np.float64))
    return float((w * e2).sum(dtype=np.float64)) / max(total, 1e-30)


def disturbed(
    params: Parameters,
    block: int,
    importance: Mapping[str, Float[np.ndarray, "matrices cols"]],
    *,
    known: Collection[str] = (),
    seed: int = 0,
) -> Iterator[tuple[str, Parameters, float]]:
    """A block with one of its matrices changed as a quantizer would change it, by NOISE, for each of them.

    Gives the matrix's GGUF name, the parameters, and the relative error. known: matrices to leave out.
    """
    for number, (name, values) in enumerate(matrices(params).items()):
        full = f"blk.{block}.{name}.weight"
        if full in known:
            continue
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), block), number)
        weight = np.asarray(values)
        squares = local_squares(weight)
        noise = NOISE * jax.random.normal(key, weight.shape) * np.sqrt(squares)
        noisy = {**params, name: {**params[name], "weight": values + noise}}
        yield full, noisy, NOISE**2 * relative_error(squares, weight, importance.get(full))
