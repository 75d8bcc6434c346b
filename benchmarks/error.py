"""Squared error of each type beside ggml's C encoder, on the same weights with the same importance.

    python benchmarks/error.py --gguf model-f16.gguf --imatrix imatrix.gguf --types Q2_K,Q4_K

Gaussian and Student-t rows always; with --gguf and --safetensors every matrix of these files, columns padded
with zeros to whole blocks. The error is Σ w (x − x̂)² over a matrix, decoded by ggml from the bytes of both;
shown is ours divided by ggml's: the median over the matrices, and the worst, with its name. Without an entry
in the imatrix, importance is drawn at random, the same for both.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peers  # noqa: F401 — makes the tests' oracles importable
import specs

from helpers import ggml  # isort: skip
from record import record

from jquant import FORMATS, Format
from jquant.checkpoints import slab_rows, transcode
from jquant.io import imatrix as imatrix_file

F32 = FORMATS["F32"]
LEAST_ERROR = 1e-9  # of Σ w x²: matrices that both encode exactly say nothing


def matrices(args: argparse.Namespace) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(family, name, float32 [rows, cols], importance [cols])"""
    for name, make in specs.DISTRIBUTIONS.items():
        yield name, name, make(512, 4096), specs.importance(4096)
    entries = imatrix_file.read(args.imatrix).entries if args.imatrix else {}
    for path, read in ((args.gguf, specs.gguf_matrices), (args.safetensors, specs.safetensors_matrices)):
        for name, x in read(path, args.weights) if path else ():
            weights = entries.get(name)
            w = specs.importance(x.shape[1]) if weights is None else weights.reshape(-1)
            yield path.stem, name, x, w


def padded(x: np.ndarray, block: int) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])


def ours(x: np.ndarray, format: Format, w: np.ndarray | None) -> np.ndarray:
    step = slab_rows(x.shape[1])
    slabs = [x[i : i + step].view(np.uint8) for i in range(0, len(x), step)]
    return np.concatenate([transcode(slab, F32, format, w).data for slab in slabs])


def ratio(x: np.ndarray, format: Format, w: np.ndarray | None) -> float | None:
    """Our error divided by ggml's; None where both have next to none."""
    assert format.ggml_type is not None
    x = padded(x, format.block_size)
    w = None if w is None else padded(w, format.block_size)
    scale = np.ones(x.shape[1]) if w is None else w.astype(np.float64)

    def error(data: np.ndarray) -> float:
        rest = x.astype(np.float64) - ggml.decode(format.ggml_type, data)
        return float((rest * rest * scale).sum())

    mine, theirs = error(ours(x, format, w)), error(ggml.encode(format.ggml_type, x, w))
    least = LEAST_ERROR * float((x.astype(np.float64) ** 2 * scale).sum())
    return None if max(mine, theirs) <= least else mine / max(theirs, least)


def main() -> None:
    encodable = [f.name for f in FORMATS.values() if f.can_encode and f.block_size > 1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--types", default=",".join(encodable))
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--safetensors", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--weights", type=int, default=1 << 62, help="of each matrix, the first so many")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("our error / ggml's\ntype     importance  matrices          median   worst")
    rows = []
    for name in args.types.split(","):
        for weighted in (True,) if FORMATS[name].needs_importance else (False, True):
            found: dict[str, list[tuple[float, str]]] = {}
            for family, tensor, x, w in matrices(args):
                value = ratio(x, FORMATS[name], w if weighted else None)
                if value is not None:
                    found.setdefault(family, []).append((value, tensor))
            for family, values in found.items():
                median, (worst, where) = statistics.median(v for v, _ in values), max(values)
                rows.append(
                    {"type": name, "importance": weighted, "family": family, "median": median,
                     "worst": worst, "worst_matrix": where, "matrices": len(values)}
                )  # fmt: skip
                kind = "yes" if weighted else "no"
                print(f"{name:8} {kind:10}  {family:16} {median:7.4f} {worst:7.4f} {where}", flush=True)
    if args.json:
        record(args, rows)


if __name__ == "__main__":
    main()
