"""A block's calibration over a mesh: samples over `data`, the block's weights over `model`.

Each process has samples of its own, which go through its own devices; a device along `data` has statistics
of its own, and while a block runs no two of them talk. Of a Hessian, which may outgrow a device, each along
`model` has some rows: its part of the sum needs all inputs, but none of the others' rows. When all samples
are through, the calibrator's merge is run as a tree over the whole mesh, and every process has the statistics
of all samples, whole, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jquant.calibration._calibrators import Calibrator, Stats
from jquant.calibration._collect import Through, shared_inputs, within_block
from jquant.calibration._statistics import add_inputs, check_finite, finite, init_all
from jquant.calibration._walk import batches, pad
from jquant.calibration.activations import Activations
from jquant.core import Block, BlockwiseModel
from jquant.distributed.mesh import exchange
from jquant.distributed.shard_map import shard_map
from jquant.models import matrix


def partition(parameter: str, shape: tuple[int, ...], size: int) -> PartitionSpec:
    """How a block's parameter, such as "attn_q.weight", lies over a model axis of `size` devices: by the
    table of its kind where the axis is a multiple of the size, else whole on each."""
    name, _, part = parameter.rpartition(".")
    row = matrix(name)
    if row is None or row.over_model is None:
        return PartitionSpec()
    axis = (row.over_model == "columns") + (row.form == "stack")  # [out, in]; [experts, out, in]; bias [out]
    is_split = part == "weight" or (part == "bias" and axis == 0)
    if is_split and axis < len(shape) and shape[axis] % size == 0:
        return PartitionSpec(*(None,) * axis, "model")
    return PartitionSpec()


def over(mesh: Mesh, first: int = 0) -> Through:
    """`calibrate.through_block` over a mesh with the axes (data, model) of all processes.

    batch is that of each device along data. first: the number of this process's first sample, for messages.
    """
    rows = [row for row in mesh.devices if row[0].process_index == jax.process_index()]
    local = Mesh(np.asarray(rows), mesh.axis_names, axis_types=(AxisType.Auto,) * 2)

    def through(
        model: BlockwiseModel,
        i: int,
        calibrator: Calibrator,
        x: Activations,
        y: Activations | None,
        lengths: np.ndarray,
        batch: int,
    ) -> dict[str, Stats]:
        block, ways = model.blocks[i], local.shape["data"]
        params = _placed(model, i, local)
        angles = jax.device_put(model.angles(i, x.shape[1]), NamedSharding(local, PartitionSpec()))
        names = frozenset(within_block(name) for name in shared_inputs(model, i).values())
        by_sample = NamedSharding(local, PartitionSpec("data"))
        step = _step_over(block, calibrator, names, local)
        stats = _nothing(block, calibrator, names, local)
        for part in batches(len(x), batch * ways):
            inputs, real = (jax.device_put(pad(a[part], batch * ways), by_sample) for a in (x, lengths))
            out, stats = step(params, stats, inputs, angles, real)

            def alone(k: int, inputs: Array = inputs, real: Array = real) -> dict[str, Stats]:
                one = jnp.arange(len(inputs)) == k  # an infinity times a weight of 0 is no number
                x, count = jnp.where(one[:, None, None], inputs, 0.0), jnp.where(one, real, 0)
                return step(params, _nothing(block, calibrator, names, local), x, angles, count)[1]

            check_finite(finite(stats), alone, "input", i, range(first + part.start, first + part.stop))
            if y is not None:
                y[part] = np.asarray(out)[: part.stop - part.start]
        exchange()  # who failed says so here, before the others wait for its statistics
        merged = _merge_over(block, calibrator, names, mesh)(jax.tree.map(partial(_global, mesh), stats))
        return {f"blk.{i}.{name}.weight": jax.tree.map(_on_host, s) for name, s in merged.items()}

    return through


def _placed(model: BlockwiseModel, i: int, local: Mesh) -> dict[str, dict[str, Array]]:
    """The block's parameters, each part on its devices; the whole is on the host only."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = model.load_block(i)

    def put(module: str, kind: str, value: Array) -> Array:
        spec = partition(f"{module}.{kind}", value.shape, local.shape["model"])
        return jax.device_put(value, NamedSharding(local, spec))

    return {m: {k: put(m, k, value) for k, value in kinds.items()} for m, kinds in params.items()}


def _nothing(block: Block, calibrator: Calibrator, names: frozenset[str], local: Mesh) -> dict[str, Stats]:
    """Statistics of no tokens for each device along data: [data, …]."""
    made, ways = init_all(block, lambda shape: calibrator.init(shape[-1])), local.shape["data"]

    def of_each(a: Array, spec: PartitionSpec) -> Array:
        return jax.device_put(np.broadcast_to(np.asarray(a), (ways, *a.shape)), NamedSharding(local, spec))

    return jax.tree.map(
        of_each, {name: made[name] for name in names}, _layout(block, calibrator, names, local)
    )


def _layout(
    block: Block, calibrator: Calibrator, names: frozenset[str], mesh: Mesh
) -> dict[str, dict[str, PartitionSpec]]:
    """How statistics [data, …] lie over the mesh: rows of squares over `model`, where it divides them."""
    made = jax.eval_shape(lambda: init_all(block, lambda shape: calibrator.init(shape[-1])))

    def spec(key: str, shape: tuple[int, ...]) -> PartitionSpec:
        if key not in calibrator.squares or shape[-2] % mesh.shape["model"]:
            return PartitionSpec("data")
        return PartitionSpec("data", *(None,) * (len(shape) - 2), "model")

    return {name: {key: spec(key, a.shape) for key, a in made[name].items()} for name in names}


@cache
def _step_over(block: Block, calibrator: Calibrator, names: frozenset[str], local: Mesh) -> Callable:
    """f(params, stats [data, …], x [data · batch, t, width], angles, real) → the block's output, and the
    statistics with its inputs added."""

    def on_one(
        params: Mapping, stats: dict[str, Stats], x: Array, angles: Array, real: Array
    ) -> tuple[Array, dict[str, Stats]]:
        mine = jax.tree.map(lambda a: a[0], stats)
        y, mine = add_inputs(block, calibrator, params, mine, x, angles, real)
        return y, jax.tree.map(lambda a: a[None], mine)

    data, whole = PartitionSpec("data"), PartitionSpec()
    specs = (whole, data, data, whole, data)
    mapped = shard_map(on_one, local, specs, (data, data), axes=frozenset({"data"}))
    # Or the compiler might split others over `model`.
    kept = jax.tree.map(partial(NamedSharding, local), _layout(block, calibrator, names, local))
    return jax.jit(mapped, out_shardings=(NamedSharding(local, data), kept))


def _global(mesh: Mesh, a: Array) -> Array:
    """An array [data of this process, …] as this process's part of [data, …]; nothing is copied."""
    assert isinstance(a.sharding, NamedSharding)
    shape = (mesh.shape["data"], *a.shape[1:])
    parts = [shard.data for shard in a.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, a.sharding.spec), parts)


def _on_host(a: Array) -> Array:
    """The whole of it, which the devices of this process have between them."""
    if not a.sharding.is_fully_replicated:
        whole = np.empty(a.shape, a.dtype)
        for shard in a.addressable_shards:
            whole[shard.index] = shard.data
    else:
        whole = a.addressable_data(0)
    return jax.device_put(whole, jax.local_devices(backend="cpu")[0])


@cache
def _merge_over(block: Block, calibrator: Calibrator, names: frozenset[str], mesh: Mesh) -> Callable:
    """f(statistics [data, …]) → those of all devices along data, on each of them, as they lay over `model`.

    A tree: in round k the device at each multiple of 2ᵏ⁺¹ takes the one 2ᵏ further in. So each merge is of
    two, whatever the calibrator's merge is, and the order depends on the mesh only.
    """
    size = mesh.shape["data"]

    def on_one(stats: dict[str, Stats]) -> dict[str, Stats]:
        mine, index = jax.tree.map(lambda a: a[0], stats), lax.axis_index("data")
        step = 1
        while step < size:
            pairs = [(i + step, i) for i in range(0, size - step, 2 * step)]
            arrived = jax.tree.map(lambda a, pairs=pairs: lax.ppermute(a, "data", pairs), mine)
            takes = (index % (2 * step) == 0) & (index + step < size)
            both = {name: calibrator.merge(mine[name], arrived[name]) for name in mine}
            mine = jax.tree.map(lambda new, old, takes=takes: jnp.where(takes, new, old), both, mine)
            step *= 2
        return jax.tree.map(lambda a: lax.psum(jnp.where(index == 0, a, jnp.zeros_like(a)), "data"), mine)

    layout = _layout(block, calibrator, names, mesh)
    merged = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), layout)
    return jax.jit(shard_map(on_one, mesh, (layout,), merged))
