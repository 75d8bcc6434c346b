"""A block applied to samples: each function is compiled once for all blocks of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
from jax import Array
from jaxtyping import Float

from jquant.core import Block

Shown = Mapping[str, Mapping[str, Array]]


@partial(jax.jit, static_argnames="block")
def run_block(
    block: Block,
    params: Mapping,
    x: Float[Array, "s t width"],
    angles: Float[Array, "t pairs"],
    given: Shown | None = None,
) -> Float[Array, "s t width"]:
    """The output of a block.

    given: inputs of matrices that are known, {"attn_q": {"x": …}}; what leads to them alone is not computed.
    """
    return block.apply(_variables(params, given), x, angles, mutable="inputs")[0]


@partial(jax.jit, static_argnames=("block", "names"))
def inputs_of(
    block: Block,
    params: Mapping,
    x: Float[Array, "s t width"],
    angles: Float[Array, "t pairs"],
    names: tuple[str, ...],
    given: Shown | None = None,
) -> dict[str, dict[str, Array]]:
    """What these matrices of a block are given, see `Block`. What lies behind them is not computed."""
    return _shown(block.apply(_variables(params, given), x, angles, mutable="inputs")[1], names)


@partial(jax.jit, static_argnames=("block", "names"))
def run_and_show(
    block: Block,
    params: Mapping,
    x: Float[Array, "s t width"],
    angles: Float[Array, "t pairs"],
    names: tuple[str, ...],
) -> tuple[Float[Array, "s t width"], dict[str, dict[str, Array]]]:
    """The output of a block, and what these of its matrices are given, see `Block`."""
    y, shown = block.apply(_variables(params, None), x, angles, mutable="inputs")
    return y, _shown(shown, names)


def _variables(params: Mapping, given: Shown | None) -> dict[str, Mapping]:
    return {"params": params} if given is None else {"params": params, "given": given}


def _shown(collections: Mapping, names: tuple[str, ...]) -> dict[str, dict[str, Array]]:
    return {name: dict(collections["inputs"][name]) for name in names}
