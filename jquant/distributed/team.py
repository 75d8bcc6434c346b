"""Processes of a run that compute one thing together: sums of what each has, and lists that each makes a part
of. Alone, a process has all of it, and none of this costs anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, UInt8

from jquant.core import UserError
from jquant.distributed.mesh import collective, exchange


@dataclass(frozen=True)
class Team:
    count: int = 1
    me: int = 0

    def told(self, text: str) -> str:
        """What the first process says."""
        return text if self.count == 1 else exchange(text)[0]

    def sum(self, tree: PyTree) -> PyTree:
        """The sum of each array over all processes, the same bits in all of them.

        All have to call it, with the same shapes. Raises SharedError where another has failed, LostError
        where it is gone.
        """
        if self.count == 1:
            return tree
        exchange()  # who failed says so here, before the others wait for its part
        mesh = _one_device_each()
        own = mesh.local_devices[0]

        def put(a: Array | np.ndarray) -> Array:
            part = jax.device_put(a[None], own)
            sharding = NamedSharding(mesh, PartitionSpec("process"))
            return jax.make_array_from_single_device_arrays((self.count, *a.shape), sharding, [part])

        with collective():
            out = _sum(mesh)(jax.tree.map(put, tree))
            return jax.block_until_ready(jax.tree.map(lambda a: a.addressable_data(0), out))

    def first(self, tree: PyTree) -> PyTree:
        """The arrays of the first process, float32, in all of them; shapes are the same. As `sum`."""
        if self.count == 1:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        if not leaves:
            return tree
        flat = np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in leaves])
        flat = np.asarray(self.sum(flat if self.me == 0 else np.zeros_like(flat)))
        ends = np.cumsum([np.size(leaf) for leaf in leaves])
        parts = [a.reshape(np.shape(leaf)) for a, leaf in zip(np.split(flat, ends[:-1]), leaves, strict=True)]
        return jax.tree.unflatten(structure, parts)

    @property
    def part(self) -> slice:
        """Of a list of tasks, this process's."""
        return slice(self.me, None, self.count)

    def gathered(
        self, made: Sequence[UInt8[np.ndarray, "..."]], total: int, shape: tuple[int, ...]
    ) -> list[UInt8[np.ndarray, "..."]]:
        """What all have made of `total` tasks, in their order: bytes of this shape each. made: of `part`."""
        if self.count == 1:
            return list(made)
        mine = np.zeros((-(-total // self.count), *shape), np.uint8)
        for i, one in enumerate(made):
            mine[i] = one
        exchange()  # see `sum`
        with collective():
            everything = multihost_utils.process_allgather(mine)
        return [everything[i % self.count, i // self.count] for i in range(total)]


ALONE = Team()


def everyone() -> Team:
    """All processes of this run."""
    return Team(jax.process_count(), jax.process_index())


@cache
def _one_device_each() -> Mesh:
    of = {device.process_index: device for device in reversed(jax.devices())}
    return Mesh(np.asarray([of[i] for i in sorted(of)]), ("process",), axis_types=(AxisType.Auto,))


@cache
def _sum(mesh: Mesh) -> Callable:
    def total(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jnp.sum(a, axis=0, dtype=a.dtype), tree)

    return jax.jit(total, out_shardings=NamedSharding(mesh, PartitionSpec()))


def shares(samples: int, process: int, processes: int) -> slice:
    """The samples of one process: parts in order, as even as can be. UserError where one would have none."""
    if samples < processes:
        raise UserError(f"{samples} samples for {processes} processes: give at least one for each.")
    ends = [samples * i // processes for i in (process, process + 1)]
    return slice(*ends)
