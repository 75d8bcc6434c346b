"""The statistics of all matrices of one block: begun, added to, and looked at for numbers that are none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jquant.calibration._calibrators import Calibrator, Stats
from jquant.core import Block, UserError


def init_all(block: Block, init: Callable[[tuple[int, ...]], Stats]) -> dict[str, Stats]:
    """Statistics of no tokens for every matrix of the block, init(shape) each; a stack has one per expert."""
    found = {}
    for parameter, shape in block.shapes:
        name, _, kind = parameter.partition(".")
        if kind == "weight" and "norm" not in name:
            one = init(shape[-2:] if len(shape) > 1 else (1, *shape))
            if len(shape) > 2:
                one = jax.tree.map(lambda a, n=shape[0]: jnp.broadcast_to(a, (n, *a.shape)), one)
            found[name] = one
    return found


def add_inputs(
    block: Block,
    calibrator: Calibrator,
    params: Mapping,
    stats: dict[str, Stats],
    x: Float[Array, "s t width"],
    angles: Float[Array, "t pairs"],
    real: Int[Array, " s"],
) -> tuple[Float[Array, "s t width"], dict[str, Stats]]:
    """The block's output, and the statistics with its inputs added."""
    y, shown = block.apply({"params": params}, x, angles, mutable="inputs")
    weight = weights_of(x, real)
    updated = {
        name: add_rows(
            calibrator.update, before, shown["inputs"][name], (shown["inputs"][name]["x"],), weight
        )
        for name, before in stats.items()
    }
    return y, updated


def weights_of(x: Float[Array, "s t width"], real: Int[Array, " s"]) -> Float[Array, " n"]:
    """1 for each real token, 0 for padding."""
    return (jnp.arange(x.shape[1])[None] < real[:, None]).astype(jnp.float32).reshape(-1)


def add_rows(
    update: Callable[..., Stats],
    stats: Stats,
    inputs: Mapping[str, Array],
    rows: tuple[Array, ...],
    weight: Float[Array, " n"],
) -> Stats:
    """The statistics of one matrix after update(statistics, *rows, weight).

    inputs: what the block shows of it. rows: arrays with a row for each of inputs["x"]. In a stack each row
    goes to its expert's statistics.
    """
    if "expert" not in inputs:
        return update(stats, *(a.reshape(weight.size, -1) for a in rows), weight)
    token = inputs["token"]
    of_row = jnp.where(token >= 0, weight[jnp.maximum(token, 0)], 0.0)

    def add_tile(stats: Stats, tile: tuple[Array, Array, tuple[Array, ...]]) -> tuple[Stats, None]:
        expert, weight, rows = tile
        one = update({name: value[expert] for name, value in stats.items()}, *rows, weight)
        return {name: value.at[expert].set(one[name]) for name, value in stats.items()}, None

    return lax.scan(add_tile, stats, (inputs["expert"], of_row, rows))[0]


@jax.jit
def finite(stats: dict[str, Stats]) -> dict[str, Array]:
    """Of each matrix whether all its statistics are finite."""

    def of(s: Stats) -> Array:
        return jnp.stack([jnp.isfinite(a).all() for a in s.values()]).all()

    return {name: of(s) for name, s in stats.items()}


def check_finite(
    flags: Mapping[str, Array],
    alone: Callable[[int], dict[str, Stats]],
    what: str,
    block: int,
    samples: range,
) -> None:
    """Raise for the first sample of a batch that makes a statistic infinite or not a number.

    flags: `finite` of the statistics with the batch. alone(k): the statistics of the batch's sample k and no
    other.
    """
    if not _not_finite(flags):
        return
    for k, sample in enumerate(samples):
        names = _not_finite(finite(alone(k)))
        if names:
            raise UserError(
                f"blk.{block}.{names[0]}.weight: its {what} is not finite in sample {sample} (from 0); the "
                "model is damaged, or float32 is too small for it. Leave that sample out to see which."
            )
    names = _not_finite(flags)
    raise UserError(
        f"blk.{block}.{names[0]}.weight: the sum over samples up to {samples[-1]} is too large for float32; "
        "calibrate on less text."
    )


def _not_finite(flags: Mapping[str, Array]) -> list[str]:
    return [name for name, flag in jax.device_get(dict(flags)).items() if not flag]
