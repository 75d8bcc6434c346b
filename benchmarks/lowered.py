"""Code compiled for devices that need not be there: what each has in memory, computes, moves and sends."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from shapes import Headers

from jquant import models
from jquant.calibration import Calibrator, init_all
from jquant.calibration import sharded as parallel

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Compiled(NamedTuple):
    """Of one device; operations and bytes are the compiler's count, which takes the body of a loop once."""

    what: str
    memory: int  # bytes: arguments, results and temporary buffers
    flops: float
    bytes: float
    passes: float = 1  # of the matrix unit for a product of bfloat16
    collectives: int = 0
    sent: int = 0  # bytes of their results


def compiled(
    what: str, function: Callable, *arguments: object, passes: float = 1, collectives: bool = False
) -> Compiled:
    """collectives: whether to count them, in the text of the code; of some for TPUs XLA cannot print it."""
    made = function.lower(*arguments).compile()  # pyright: ignore[reportFunctionMemberAccess]
    memory, cost = made.memory_analysis(), made.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = made.as_text() if collectives else ""
    results = [found["result"] for found in _COLLECTIVE.finditer(text)]
    flops, moved = cost.get("flops", 0.0), cost.get("bytes accessed", 0.0)
    sent = sum(map(_size, results))
    return Compiled(what, held + memory.temp_size_in_bytes, flops, moved, passes, len(results), sent)


def _size(result: str) -> int:
    """Bytes of the arrays in the type of an HLO instruction."""
    arrays = ((_BYTES[kind], sizes) for kind, sizes in _ARRAY.findall(result))
    return sum(each * math.prod(map(int, filter(None, sizes.split(",")))) for each, sizes in arrays)


def block_step(
    headers: Headers, mesh: Mesh, calibrator: Calibrator, samples: int, tokens: int
) -> tuple[Callable, Callable, tuple]:
    """A block's forward pass with statistics over the mesh, bfloat16, the merge after all samples, and the
    arguments of the first, whose second is that of the other. samples: of a batch, over all devices."""
    block = models.decoder(headers, headers.metadata).at("bfloat16").blocks[0]
    ways, split = mesh.shape["data"], mesh.shape["model"]

    def shape(sizes: tuple[int, ...], spec: PartitionSpec, dtype: object = jnp.float32) -> Shape:
        return Shape(sizes, dtype, sharding=NamedSharding(mesh, spec))

    data, whole = PartitionSpec("data"), PartitionSpec()
    params: dict[str, dict[str, Shape]] = {}
    for name, sizes in block.shapes:
        module, _, kind = name.partition(".")
        dtype = jnp.bfloat16 if len(sizes) > 1 else jnp.float32
        params.setdefault(module, {})[kind] = shape(sizes, parallel.partition(name, sizes, split), dtype)
    width = headers.specs["token_embd.weight"].cols
    x = shape((samples, tokens, width), data)
    angles, real = shape((tokens, block.rotary_dims // 2), whole), shape((samples,), data, jnp.int32)
    first = {
        "attn_k",
        "attn_output",
        "ffn_down",
        "ffn_gate",
        "ffn_down_exps",
        "ffn_gate_exps",
        "ffn_gate_inp",
    }
    names = frozenset(first & {name.partition(".")[0] for name, _ in block.shapes})
    made = jax.eval_shape(lambda: init_all(block, lambda sizes: calibrator.init(sizes[-1])))
    layout = parallel._layout(block, calibrator, names, mesh)

    def of_each(a: Shape, spec: PartitionSpec) -> Shape:
        return shape((ways, *a.shape), spec, a.dtype)

    stats = jax.tree.map(of_each, {name: made[name] for name in names}, layout)
    step = parallel._step_over(block, calibrator, names, mesh)
    merge = parallel._merge_over(block, calibrator, names, mesh)
    return step, merge, (params, stats, x, angles, real)
