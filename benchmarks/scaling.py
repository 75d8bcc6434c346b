"""How work divides over devices, counted in compiled code: operations, memory and what is sent, a device.

    python benchmarks/scaling.py --model Llama-3-8B --devices 1 2 4 8

The same work over more and more devices, which are this machine's CPU cut in parts, so that nothing is timed:
a block's forward pass with the statistics of 8 samples of 512 tokens, these over `data` or the weights over
`model`; the merge of the statistics, once a block; and for each device a step of the encoder's loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape
from jax.sharding import AxisType, Mesh
from lowered import Compiled, block_step, compiled
from record import record
from shapes import MODELS, Headers

from jquant.calibration import HESSIAN, SECOND_MOMENTS
from jquant.checkpoints import loop_over, slab_steps
from jquant.core import ACCELERATOR_GRAIN
from jquant.distributed.mesh import make_mesh
from jquant.formats import FORMATS

SAMPLES, TOKENS = 8, 512


def blocks(devices: list[jax.Device], headers: Headers) -> Iterator[Compiled]:
    for axis in ("data", "model"):
        mesh = make_mesh({"data": 1, "model": 1} | {axis: len(devices)}, devices)
        for what, calibrator in (("imatrix", SECOND_MOMENTS), ("Hessians", HESSIAN)):
            step, merge, given = block_step(headers, mesh, calibrator, SAMPLES, TOKENS)
            yield compiled(f"block, {what}, {axis}", step, *given, collectives=True)
            if axis == "data":
                yield compiled(f"merge, {what}, {axis}", merge, given[1], collectives=True)


def encoders(devices: list[jax.Device], types: list[str]) -> Iterator[Compiled]:
    """A slab of rows for each device, of whose steps the compiler counts one."""
    rows = Mesh(np.array(devices), ("rows",), axis_types=(AxisType.Auto,))
    slab = (slab_steps(ACCELERATOR_GRAIN) * len(devices), ACCELERATOR_GRAIN.chunk)
    for name in types:
        encode = loop_over(rows, FORMATS["BF16"], FORMATS[name], True, ACCELERATOR_GRAIN)
        given = Shape(slab, jnp.bfloat16), Shape(slab, jnp.float32), Shape((len(devices),), jnp.int32)
        yield compiled(f"encode {name}, a step each", encode, *given, collectives=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Llama-3-8B")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--types", default="Q4_K,IQ2_XXS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    found = []
    print("| compiled | devices | operations | memory | collectives | sent |\n|-|-|-|-|-|-|")
    for count in args.devices:
        devices = jax.devices()[:count]
        for part in (blocks(devices, Headers(MODELS[args.model])), encoders(devices, args.types.split(","))):
            for one in part:
                found.append({"devices": count, **one._asdict()})
                sent = f"{one.collectives} | {one.sent / 1e6:.1f} MB"
                print(f"| {one.what} | {count} | {one.flops:.3g} | {one.memory / 1e9:.3f} GB | {sent} |")
    if args.json:
        record(args, found)


if __name__ == "__main__":
    main()
