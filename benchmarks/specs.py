"""Arguments that tests and benchmarks share: weights of several distributions, real tensors, importance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

from jquant.io import GgufSource


def gaussian(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """float32 [rows, cols], the spread of a trained layer."""
    return (0.02 * np.random.default_rng(seed).standard_normal((rows, cols))).astype(np.float32)


def student_t(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """float32 [rows, cols] with the outliers of a heavy tail, 5 degrees of freedom."""
    return (0.02 * np.random.default_rng(seed).standard_t(5, (rows, cols))).astype(np.float32)


DISTRIBUTIONS: dict[str, Callable[..., np.ndarray]] = {"gaussian": gaussian, "student_t": student_t}


def importance(cols: int, seed: int = 0) -> np.ndarray:
    """float32 [cols], as uneven as an imatrix: mean squares of activations over three decades."""
    return np.exp(1.5 * np.random.default_rng(seed).standard_normal(cols)).astype(np.float32)


def gguf_matrices(path: Path, weights: int = 1 << 62) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 [rows, cols]) of a GGUF file's matrices, each cut to `weights` weights."""
    source = GgufSource(path)
    for name, spec in source.specs.items():
        if len(spec.shape) >= 2:
            type = gguf.GGMLQuantizationType[spec.type]
            stored = source.read(name, 0, max(weights // spec.cols, 1))
            x = gguf.quants.dequantize(stored, type)
            yield name, np.asarray(x, np.float32).reshape(-1, spec.cols)


def safetensors_matrices(path: Path, weights: int = 1 << 62) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 [rows, cols]) of a safetensors file's matrices, each cut to `weights` weights."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 — a safetensors handle is no mapping
            x = file.get_tensor(name)
            if x.ndim == 2:
                yield name, x[: max(weights // x.shape[1], 1)].astype(np.float32)


def edge_blocks() -> dict[str, np.ndarray]:
    """Blocks of 32 finite weights, float32 [n, 32], at the edges of float32, float16 and of rounding."""
    rng = np.random.default_rng(0)

    def normal(n: int) -> np.ndarray:
        return rng.standard_normal((n, 32))

    exponents = np.repeat(np.arange(-150, 127), 16)[:, None]
    with np.errstate(over="ignore", under="ignore"):
        any_scale = np.clip(normal(len(exponents)) * 2.0**exponents, -3.4e38, 3.4e38)
        any_weight = normal(2000) * 2.0 ** rng.integers(-149, 100, (2000, 32))
        constant = np.repeat(normal(200)[:, :1] * 10.0 ** rng.integers(-40, 38, (200, 1)), 32, axis=1)
        constant = constant.astype(np.float32)
    small = rng.integers(-8, 9, (1000, 32))
    one_outlier = normal(200) * 1e-6
    one_outlier[:, 5] = 65504 * 8
    zeros = np.where(rng.random((64, 32)) < 0.5, -0.0, 0.0)
    zeros[0], zeros[1] = 0.0, -0.0
    not_negative = np.where(small == 0, zeros[rng.integers(0, 64, 1000)], np.abs(small))
    least_is_subnormal = np.where(rng.random((1000, 32)) < 0.1, -1e-40, not_negative)
    # Every number of bits of a mantissa below the smallest normal number, both signs.
    bits = rng.integers(0, 1 << 23, (2000, 32), dtype=np.uint32) >> rng.integers(0, 24, (2000, 1), np.uint32)
    subnormal = (bits | rng.integers(0, 2, (2000, 32), dtype=np.uint32) << 31).view(np.float32)
    return {
        name: np.ascontiguousarray(x, np.float32)
        for name, x in {
            "zeros": zeros,
            "subnormal": subnormal,
            "every scale": any_scale,
            "every weight of its own scale": any_weight,
            "constant": constant,
            "one outlier": one_outlier,
            "around one": 1 + 1e-3 * normal(1000),
            "small integers, so ties in magnitude": small,
            "integers, so codes at halves": rng.integers(-300, 300, (2000, 32)),
            "not negative": not_negative,
            "the least is a negative subnormal": least_is_subnormal,
            "bfloat16": (normal(4000).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
            "largest float32": rng.choice([-3.3e38, 3.3e38], (64, 32)),
            "largest float16": rng.choice([-65504.0, 65504.0], (64, 32)) * rng.integers(1, 17, (64, 1)),
            "gaussian": normal(20000),
        }.items()
    }
