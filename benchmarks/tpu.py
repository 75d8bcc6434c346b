"""What a TPU would need, from code compiled for its topology without one: memory, operations, bytes a chip.

python benchmarks/tpu.py --topology v5e:4x4 --model Llama-3-8B --types Q4_K,IQ2_XXS [--json FILE]

Needs `pip install libtpu`. Memory is what the compiler allocates: arguments, results and temporary buffers.
Operations and bytes are the compiler's own count, which takes the body of a loop once: for encoders they are
of one step of ACCELERATOR_GRAIN.chunk weights, for feedback of one block of columns. Products count once,
though those of float32 take six passes of the matrix unit. "least" is the time that the peak rates imply for
the count; it was not measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from record import record
from shapes import MODELS, Headers

from jquant import models, parallel, transcode
from jquant.calibrate import HESSIAN, SECOND_MOMENTS, init_all
from jquant.core import ACCELERATOR_GRAIN
from jquant.formats import FORMATS
from jquant.mesh import make_mesh
from jquant.transforms import feedback

PASSES = 6  # of bfloat16 products for one of float32 with Precision.HIGHEST


class Chip(NamedTuple):
    memory: float  # bytes
    flops: float  # bfloat16, a second
    bandwidth: float  # bytes a second


# Google's figures for one chip: cloud.google.com/tpu/docs/v5e, v5p, v6e.
CHIPS = {
    "v5e": Chip(16e9, 197e12, 819e9),
    "v5p": Chip(95e9, 459e12, 2765e9),
    "v6e": Chip(32e9, 918e12, 1640e9),
}
TOKENS, BATCH = 512, 4  # of a sample, and samples on a device, as `jquant analyze` has them by default


class Compiled(NamedTuple):
    what: str
    memory: int  # bytes a chip
    flops: float
    bytes: float

    def least(self, chip: Chip) -> float:
        """Seconds."""
        return max(PASSES * self.flops / chip.flops, self.bytes / chip.bandwidth)


def compiled(what: str, function: Callable, *arguments: object) -> Compiled:
    made = function.lower(*arguments).compile()  # pyright: ignore[reportFunctionMemberAccess]
    memory, cost = made.memory_analysis(), made.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(what, held + memory.temp_size_in_bytes, cost["flops"], cost["bytes accessed"])


def encoders(device: jax.Device, types: list[str]) -> Iterator[Compiled]:
    """A slab of rows to each type, on one chip."""
    rows = Mesh(np.array([device]), ("rows",), axis_types=(AxisType.Auto,))
    slab = (transcode.slab_steps(ACCELERATOR_GRAIN), ACCELERATOR_GRAIN.chunk)
    for name in types:
        encode = transcode._over(rows, FORMATS["BF16"], FORMATS[name], True, ACCELERATOR_GRAIN)
        given = Shape(slab, jnp.bfloat16), Shape(slab, jnp.float32), Shape((1,), jnp.int32)
        yield compiled(f"encode {name}", encode, *given)


def hessians(device: jax.Device, widths: list[int]) -> Iterator[Compiled]:
    """The products of the inputs of a matrix, of one batch, on one chip."""
    shape = partial(Shape, sharding=SingleDeviceSharding(device))
    update = jax.jit(HESSIAN.update, donate_argnums=0)
    for width in widths:
        empty = jax.eval_shape(lambda width=width: HESSIAN.init(width))
        stats = jax.tree.map(lambda a: shape(a.shape, a.dtype), empty)
        x, weight = (shape((TOKENS * BATCH, *more), jnp.float32) for more in ((width,), ()))
        yield compiled(f"Hessian of {width} inputs", update, stats, x, weight)


def feedbacks(device: jax.Device, widths: list[int], types: list[str]) -> Iterator[Compiled]:
    """Error feedback of one tile of rows, and the factor of its Hessian, on one chip."""
    shape = partial(Shape, dtype=jnp.float32, sharding=SingleDeviceSharding(device))
    for width in widths:
        for name in types:
            G = FORMATS[name].group_size
            factor = jax.jit(partial(feedback.factor, group_size=G))
            yield compiled(f"factor of {width}, groups of {G}", factor, shape((width, width)))
            factors = feedback.Factor(shape((width, width)), shape((width // G, G, G)))
            code = jax.jit(partial(feedback.feedback_rows, format=FORMATS[name]))
            rows = shape((feedback.ACCELERATOR_ROWS, width))
            yield compiled(f"feedback of {width}, {name}", code, rows, factors)


def blocks(devices: list[jax.Device], headers: Headers) -> Iterator[Compiled]:
    """A block's forward pass with its statistics: weights over the chips of a host, samples over hosts."""
    block = models.decoder(headers, headers.metadata).blocks[0]
    chips = sum(device.process_index == devices[0].process_index for device in devices)
    mesh = make_mesh({"model": chips}, devices)
    hosts = mesh.shape["data"]

    def shape(sizes: tuple[int, ...], spec: PartitionSpec, dtype: object = jnp.float32) -> Shape:
        return Shape(sizes, dtype, sharding=NamedSharding(mesh, spec))

    data, whole = PartitionSpec("data"), PartitionSpec()
    params: dict[str, dict[str, Shape]] = {}
    for name, sizes in block.shapes:
        module, _, kind = name.partition(".")
        params.setdefault(module, {})[kind] = shape(sizes, parallel.partition(name, sizes, chips))
    width = headers.specs["token_embd.weight"].cols
    x = shape((BATCH * hosts, TOKENS, width), data)
    angles, real = shape((TOKENS, block.rotary_dims // 2), whole), shape((BATCH * hosts,), data, jnp.int32)
    distinct = ("attn_k", "attn_output", "ffn_down", "ffn_gate")
    made = jax.eval_shape(lambda: init_all(block, lambda sizes: SECOND_MOMENTS.init(sizes[-1])))

    def of_each(a: Shape) -> Shape:
        return shape((hosts, *a.shape), data, a.dtype)

    stats = {name: jax.tree.map(of_each, made[name]) for name in distinct}
    step = parallel._step_over(block, SECOND_MOMENTS, mesh)
    yield compiled(f"block over {chips} chips, imatrix", step, params, stats, x, angles, real)


def measure(topology: str, model: str, types: list[str]) -> Iterator[Compiled]:
    """Everything for one topology; raises what libtpu raises where it is missing."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = MODELS[model]
    widths = [config["hidden_size"], config["intermediate_size"]]
    yield from hessians(devices[0], widths)
    yield from encoders(devices[0], types)
    yield from feedbacks(devices[0], widths, types)
    yield from blocks(devices, Headers(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:4x4", help="v5e:4x4, v5e:16x16, v5p:2x2x1, v6e:4x4, …")
    parser.add_argument("--model", choices=MODELS, default="Llama-3-8B")
    parser.add_argument("--types", default="Q4_K,IQ2_XXS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chip, found = CHIPS[args.topology.partition(":")[0]], []
    print("| compiled | a chip | fits | operations | bytes | least |\n|-|-|-|-|-|-|")
    for one in measure(args.topology, args.model, args.types.split(",")):
        found.append(one)
        fits, least = one.memory <= chip.memory, 1e3 * one.least(chip)
        counts = f"{one.memory / 1e9:.3f} GB | {fits} | {one.flops:.2e} | {one.bytes:.2e} | {least:.3f} ms"
        print(f"| {one.what} | {counts} |", flush=True)  # one by one: each may take minutes to compile
    if args.json:
        record(args, [one._asdict() for one in found])
    if any(one.memory > chip.memory for one in found):
        sys.exit(f"not everything fits {chip.memory / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
