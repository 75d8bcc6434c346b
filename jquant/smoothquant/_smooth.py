"""Smoothing: outliers of a matrix's inputs moved into its weights, where 8 bits hold them better.

    y = W x = (W diag(s)) (diag(s)⁻¹ x),   s_j = max|x_j|^α / max|W_·j|^(1−α)

Nothing is left to compute for diag(s)⁻¹: what makes x is divided by s instead, so that the model computes the
same. A block's kind says which of its places allow it; those of attention and an MLP are

    norm → q, k, v      norm → gate, up, experts, router      v → output      up → down

Source: Xiao et al. 2023, SmoothQuant, equation 4.

Tensors have GGUF names without "blk.N." and ".weight". Channels are those of what makes the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.checkpoints.rescaled import Factors
from jquant.models import Block, Coupling, kind_of, matrix

SPAN = 1e4  # no factor is farther from 1: float16 has to hold what is divided by it


def couplings(block: Block) -> tuple[Coupling, ...]:
    """All of a block. Raises ValueError for one with none: smoothing does not know its form."""
    kind = kind_of(block.shapes)
    found = () if kind is None else kind.couplings(block)
    if not found:
        raise ValueError(f"no place to smooth among {', '.join(name for name, _ in block.shapes)}.")
    return found


def of_channels(coupling: Coupling, inputs: Float[Array, "*stack width"]) -> Float[Array, "*stack channels"]:
    """The largest of each channel, of what is known of each input of the consumers."""
    if coupling.heads is None:
        return inputs
    gives, takes = coupling.heads
    return jnp.max(inputs.reshape(gives, takes, -1), axis=1).reshape(-1)


def of_inputs(coupling: Coupling, factors: Float[Array, "*stack channels"]) -> Float[Array, "*stack width"]:
    """The factor of each input of the consumers."""
    if coupling.heads is None:
        return factors
    gives, takes = coupling.heads
    by_head = factors.reshape(gives, 1, -1)
    return jnp.broadcast_to(by_head, (gives, takes, by_head.shape[-1])).reshape(-1)


def without_routers(consumers: Sequence[str]) -> tuple[str, ...]:
    """Those that are quantized."""
    return tuple(name for name in consumers if (row := matrix(name)) is None or row.is_quantized)


def weight_maxima(
    coupling: Coupling, params: Mapping[str, Mapping[str, Array]]
) -> Float[Array, "*stack channels"]:
    """max|W_·j| over the rows of the consumers that are quantized: routers are not."""
    found = jnp.zeros(coupling.shape, jnp.float32)
    for name in without_routers(coupling.consumers):
        largest = jnp.max(jnp.abs(params[name]["weight"]), axis=-2)  # [*stack, width]
        if coupling.experts is None and largest.ndim > 1:
            largest = jnp.max(largest, axis=0)
        found = jnp.maximum(found, of_channels(coupling, largest))
    return found


def smooth(
    inputs: Float[Array, "*stack channels"], weights: Float[Array, "*stack channels"], alpha: Array | float
) -> Float[Array, "*stack channels"]:
    """log s of equation 4 for max|x| and max|W|, of mean 0; 0 where either is 0: such a channel stays.

    A common factor of all channels changes nothing: the scales of weights and inputs take it up.
    """
    known = (inputs > 0) & (weights > 0)

    def log(x: Array) -> Array:
        return jnp.log(jnp.where(known, x, 1.0))

    logs = alpha * log(inputs) - (1 - alpha) * log(weights)
    count = jnp.maximum(jnp.sum(known.astype(jnp.float32), axis=-1, keepdims=True), 1.0)
    logs = jnp.where(known, logs - jnp.sum(logs, axis=-1, keepdims=True) / count, 0.0)
    return jnp.clip(logs, -jnp.log(SPAN), jnp.log(SPAN))


def factors_of(block: Block, scales: Mapping[str, Array]) -> dict[str, Factors]:
    """What each tensor of the block is multiplied by. scales: s by the name of its coupling; others stay."""
    rows_of = dict(block.shapes)
    found: dict[str, Factors] = {}
    for coupling in couplings(block):
        if coupling.name not in scales:
            continue
        s = scales[coupling.name]
        shape = rows_of[f"{coupling.producer}.weight"]
        rows = jnp.ones(shape if len(shape) == 1 else shape[:-1], jnp.float32)
        stop = coupling.start + coupling.channels
        before = found.get(coupling.producer, Factors())
        found[coupling.producer] = before._replace(rows=rows.at[..., coupling.start : stop].set(1 / s))
        for name in coupling.consumers:
            found[name] = found.get(name, Factors())._replace(cols=of_inputs(coupling, s))
    return found


def multiplied(tensor: Float[Array, "..."], factors: Factors, *, vector: bool) -> Float[Array, "..."]:
    """The tensor with its factors. vector: it has rows only, as norms and biases do."""
    if vector:
        return tensor if factors.rows is None else tensor * factors.rows
    if factors.rows is not None:
        tensor = tensor * jnp.broadcast_to(factors.rows[..., None], tensor.shape)
    if factors.cols is not None:
        tensor = tensor * jnp.broadcast_to(factors.cols[..., None, :], tensor.shape)
    return tensor


def smoothed(
    block: Block, params: Mapping[str, Mapping[str, Array]], scales: Mapping[str, Array]
) -> dict[str, dict[str, Array]]:
    """Parameters of a block that computes the same with other weights."""
    return with_factors(params, factors_of(block, scales))


def with_factors(
    params: Mapping[str, Mapping[str, Array]], factors: Mapping[str, Factors]
) -> dict[str, dict[str, Array]]:
    """Parameters of a block, multiplied. factors: by the name of the tensor."""
    return {
        module: {
            kind: multiplied(value, factors.get(module, Factors()), vector="norm" in module or kind == "bias")
            for kind, value in values.items()
        }
        for module, values in params.items()
    }
