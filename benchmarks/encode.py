"""Weights per second of each type that we can encode, beside ggml's C encoder in the same run.

    python benchmarks/encode.py --types Q4_0,Q4_K --json encode.json

Both encode the same matrix with the same number of threads, each thread its own range of rows, in turn; the
ratio is the median over the turns. `× copy` is our time over that of copying the same bytes in and out: 1 is
memory speed. `lower` and `compile` are what the first tensor of a type waits for, once per machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import peers  # noqa: F401 — makes the tests' oracles importable
import specs
from record import record

from helpers import ggml  # isort: skip
from jquant import FORMATS, Format, quantize
from jquant.checkpoints import slab_rows, transcode

COLS = 4096
Encoder = Callable[[np.ndarray], object]


def encoders(format: Format, importance: np.ndarray | None) -> tuple[Encoder, Encoder]:
    """(ours, ggml's) of rows [k, COLS] float32."""
    f32 = FORMATS["F32"]

    def ours(rows: np.ndarray) -> object:
        return transcode(rows.view(np.uint8), f32, format, importance)

    def theirs(rows: np.ndarray) -> object:
        assert format.ggml_type is not None
        return ggml.encode(format.ggml_type, rows, importance)

    return ours, theirs


def copy(rows: np.ndarray) -> object:
    return rows.copy()


def seconds(encode: Encoder, x: np.ndarray, pool: ThreadPoolExecutor) -> float:
    """Wall time of encoding x, slab by slab on the threads of the pool."""
    step = slab_rows(COLS)
    slabs = [x[start : start + step] for start in range(0, len(x), step)]
    start = time.perf_counter()
    for _ in pool.map(encode, slabs):
        pass
    return time.perf_counter() - start


def compilation(format: Format, importance: np.ndarray | None) -> tuple[float, float]:
    """Seconds to trace and lower, and to compile, the encoder for one slab."""
    shape = jax.ShapeDtypeStruct((slab_rows(COLS), COLS), jnp.float32)
    w = None if importance is None else jnp.asarray(importance)
    encode = jax.jit(lambda x, w: quantize(x, format, w).parts["blocks"])
    start = time.perf_counter()
    lowered = encode.lower(shape, w)
    between = time.perf_counter()
    lowered.compile()
    return between - start, time.perf_counter() - between


def measure(
    format: Format, weighted: bool, x: np.ndarray, repeats: int, pool: ThreadPoolExecutor
) -> dict[str, object]:
    importance = specs.importance(COLS) if weighted else None
    ours, theirs = encoders(format, importance)
    lower_s, compile_s = compilation(format, importance)
    ours(x[: slab_rows(COLS)])  # compiles
    times = [
        (seconds(ours, x, pool), seconds(theirs, x, pool), seconds(copy, x, pool)) for _ in range(repeats)
    ]
    return {
        "type": format.name,
        "importance": weighted,
        "lower_s": lower_s,
        "compile_s": compile_s,
        "seconds_ours_ggml_copy": times,
    }


def line(result: dict, weights: int) -> str:
    times = result["seconds_ours_ggml_copy"]
    ours, theirs, copied = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(t / o for o, t, _ in times)
    bpw = FORMATS[result["type"]].bpw
    floor = copied * (32 + bpw) / 64  # the copy reads and writes 32 bits a weight
    return (
        f"{result['type']:8} {'imatrix' if result['importance'] else '':8}"
        f"{weights / ours / 1e6:9.1f} {weights / theirs / 1e6:9.1f} {ratio:8.2f} {ours / floor:8.1f}"
        f"{result['lower_s']:9.2f} {result['compile_s']:8.2f}"
    )


def main() -> None:
    encodable = [f for f in FORMATS.values() if f.can_encode and f.ggml_type is not None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--types", default=",".join(f.name for f in encodable))
    parser.add_argument("--rows", type=int, default=4096, help=f"of {COLS} columns")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--distribution", choices=specs.DISTRIBUTIONS, default="student_t")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    x = specs.DISTRIBUTIONS[args.distribution](args.rows, COLS)
    print(f"{args.rows} × {COLS} {args.distribution}, {args.threads} threads, median of {args.repeats}")
    print("                  million weights/s                      seconds")
    print("type     with         ours      ggml    ratio   × copy    lower  compile")
    results = []
    with ThreadPoolExecutor(args.threads) as pool:
        for name in args.types.split(","):
            format = FORMATS[name]
            kinds = [True] if format.needs_importance else [False]
            if format.block_size > 1 and not format.needs_importance:
                kinds = [False, True]
            for weighted in kinds:
                results.append(measure(format, weighted, x, args.repeats, pool))
                print(line(results[-1], x.size), flush=True)
    if args.json:
        record(args, results)


if __name__ == "__main__":
    main()
