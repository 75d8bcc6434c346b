"""Kernels for CUDA GPUs beside the code that all devices run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

T = TypeVar("T")


def on_cuda(kernel: Callable[..., T], otherwise: Callable[..., T], *arrays: Array) -> T:
    """kernel(*arrays) where this is compiled for a CUDA GPU, else otherwise(*arrays).

    The kernel is traced only where there is a GPU. XLA cannot split it: in a `jit` over several GPUs without
    `shard_map`, each of them computes all of it.
    """
    if jax.default_backend() != "gpu":
        return otherwise(*arrays)
    from jax.experimental.pallas import triton

    if not hasattr(triton, "elementwise_inline_asm"):  # an older JAX
        return otherwise(*arrays)
    return lax.platform_dependent(*arrays, cuda=kernel, default=otherwise)


def result_like(shape: tuple[int, ...], dtype: DTypeLike, *arrays: Array) -> jax.ShapeDtypeStruct:
    """What a kernel makes of these arrays: inside `shard_map` it varies over devices as they do."""

    # JAX's own account of it, whose name changes from version to version.
    def of_all(*arrays: Array) -> Array:
        return jnp.zeros(shape, dtype) + sum(jnp.sum(a).astype(dtype) for a in arrays)

    return jax.eval_shape(of_all, *arrays)
