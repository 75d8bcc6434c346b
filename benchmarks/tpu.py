"""What a TPU would need, from code compiled for its topology without one: memory, operations, bytes a chip.

python benchmarks/tpu.py --topology v5e:4x4 --model Llama-3-8B --types Q4_K,IQ2_XXS [--json FILE]

Needs `pip install libtpu`. Memory is what the compiler allocates: arguments, results and temporary buffers.
Products of a block and of Hessians are bfloat16, those of feedback float32, which take six passes of the
matrix unit and count once. Operations and bytes are the compiler's own count, which takes the body of a loop
once: for encoders they are of one step of ACCELERATOR_GRAIN.chunk weights, for feedback of one block of
columns. "least" is the time that the peak rates imply for the count; it was not measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator
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
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from lowered import Compiled, block_step, compiled
from record import record
from shapes import MODELS, Headers

from jquant.calibration import HESSIAN, SECOND_MOMENTS
from jquant.checkpoints import loop_over, slab_steps
from jquant.core import ACCELERATOR_GRAIN
from jquant.distributed.mesh import make_mesh
from jquant.formats import FORMATS
from jquant.int8 import pallas_dot, xla_dot
from jquant.ldlq import ldlq as feedback

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


def least(one: Compiled, chip: Chip) -> float:
    """Seconds."""
    return max(one.passes * one.flops / chip.flops, one.bytes / chip.bandwidth)


def encoders(device: jax.Device, types: list[str]) -> Iterator[Compiled]:
    """A slab of rows to each type, on one chip."""
    rows = Mesh(np.array([device]), ("rows",), axis_types=(AxisType.Auto,))
    slab = (slab_steps(ACCELERATOR_GRAIN), ACCELERATOR_GRAIN.chunk)
    for name in types:
        encode = loop_over(rows, FORMATS["BF16"], FORMATS[name], True, ACCELERATOR_GRAIN)
        given = Shape(slab, jnp.bfloat16), Shape(slab, jnp.float32), Shape((1,), jnp.int32)
        yield compiled(f"encode {name}", encode, *given)


def hessians(device: jax.Device, widths: list[int]) -> Iterator[Compiled]:
    """The products of the inputs of a matrix, of one batch, on one chip."""
    shape = partial(Shape, sharding=SingleDeviceSharding(device))
    update = jax.jit(HESSIAN.update, donate_argnums=0)
    for width in widths:
        empty = jax.eval_shape(lambda width=width: HESSIAN.init(width))
        stats = jax.tree.map(lambda a: shape(a.shape, a.dtype), empty)
        x, weight = shape((TOKENS * BATCH, width), jnp.bfloat16), shape((TOKENS * BATCH,), jnp.float32)
        yield compiled(f"Hessian of {width} inputs", update, stats, x, weight)


def feedbacks(device: jax.Device, widths: list[int], types: list[str]) -> Iterator[Compiled]:
    """Error feedback of one tile of rows, and the factor of its Hessian, on one chip."""
    shape = partial(Shape, dtype=jnp.float32, sharding=SingleDeviceSharding(device))
    for width in widths:
        for name in types:
            G = FORMATS[name].group_size
            factor = jax.jit(partial(feedback.factor, group_size=G))
            given = shape((width, width))
            yield compiled(f"factor of {width}, groups of {G}", factor, given, passes=PASSES)
            factors = feedback.Factor(shape((width, width)), shape((width // G, G, G)))
            code = jax.jit(partial(feedback.feedback_rows, format=FORMATS[name]))
            rows = shape((feedback.ACCELERATOR_ROWS, width))
            yield compiled(f"feedback of {width}, {name}", code, rows, factors, passes=PASSES)


def int8(device: jax.Device, width: int) -> Iterator[Compiled]:
    """A product of W8A8 on one chip, by XLA and by the kernel, of which the compiler counts nothing. Its peak
    is twice that of bfloat16."""
    place = SingleDeviceSharding(device)
    sizes = TOKENS * BATCH, width
    qx, qw = (Shape((size, width), jnp.int8, sharding=place) for size in sizes)
    sx, sw = (Shape((size, 1), jnp.float32, sharding=place) for size in sizes)
    given = qx, sx, qw, sw
    by_xla = compiled(f"INT8 product of {width}, XLA", jax.jit(xla_dot), *given, passes=0.5)
    yield by_xla
    by_kernel = compiled(f"INT8 product of {width}, Pallas", jax.jit(pallas_dot), *given)
    yield by_kernel._replace(flops=by_xla.flops, bytes=by_xla.bytes, passes=by_xla.passes)


def blocks(devices: list[jax.Device], headers: Headers) -> Iterator[Compiled]:
    """A block's forward pass with its statistics: weights, and rows of Hessians, over the chips of a host,
    samples over hosts."""
    chips = sum(device.process_index == devices[0].process_index for device in devices)
    mesh = make_mesh({"model": chips}, devices)
    for what, calibrator in (("imatrix", SECOND_MOMENTS), ("Hessians", HESSIAN)):
        step, _, given = block_step(headers, mesh, calibrator, BATCH * mesh.shape["data"], TOKENS)
        yield compiled(f"block over {chips} chips, {what}", step, *given)


PARTS = ("hessians", "encoders", "int8", "blocks", "feedback")


def measure(
    topology: str, model: str, types: list[str], parts: Collection[str] = PARTS
) -> Iterator[Compiled]:
    """For one topology; raises what libtpu raises where it is missing."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = MODELS[model]
    widths = [config["hidden_size"], config.get("moe_intermediate_size", config["intermediate_size"])]
    made = {
        "hessians": lambda: hessians(devices[0], widths),
        "encoders": lambda: encoders(devices[0], types),
        "int8": lambda: int8(devices[0], widths[0]),
        "blocks": lambda: blocks(devices, Headers(config)),
        "feedback": lambda: feedbacks(devices[0], widths, types),
    }
    for part in parts:
        yield from made[part]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:4x4", help="v5e:4x4, v5e:16x16, v5p:2x2x1, v6e:4x4, …")
    parser.add_argument("--model", choices=MODELS, default="Llama-3-8B")
    parser.add_argument("--types", default="Q4_K,IQ2_XXS")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chip, found = CHIPS[args.topology.partition(":")[0]], []
    print("| compiled | a chip | fits | operations | bytes | least |\n|-|-|-|-|-|-|")
    for one in measure(args.topology, args.model, args.types.split(","), args.parts):
        found.append(one)
        fits, ms = one.memory <= chip.memory, 1e3 * least(one, chip)
        counts = f"{one.memory / 1e9:.3f} GB | {fits} | {one.flops:.2e} | {one.bytes:.2e} | {ms:.3f} ms"
        print(f"| {one.what} | {counts} |", flush=True)  # one by one: each may take minutes to compile
    if args.json:
        record(args, [one._asdict() for one in found])
    if any(one.memory > chip.memory for one in found):
        sys.exit(f"not everything fits {chip.memory / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
