"""One function on the parts that several devices have of its arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree


def shard_map(
    function: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree, axes: frozenset[str] | None = None
) -> Callable:
    """jax.shard_map, which JAX before 0.7 has elsewhere, without its check of what is alike on all devices:
    loops here begin with constants, and end with what differs.

    axes: that the function sees the parts of; what lies over others, the compiler splits. Default: all.
    """
    axes = frozenset(mesh.axis_names) if axes is None else axes
    if hasattr(jax, "shard_map"):
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
        )
    from jax.experimental.shard_map import shard_map as before

    rest = {"check_rep": False, "auto": frozenset(mesh.axis_names) - axes}
    return partial(before, **rest)(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
