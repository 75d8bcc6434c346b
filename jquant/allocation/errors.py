"""How much a model suffers from each type in each tensor: what an allocation of bits minimises.

    damage(tensor, type) = weight(tensor) · error(tensor, type)

error is Σ w (x − x̂)² / Σ w x² of the tensor's own encoder on a sample of its blocks, w the importance.
weight says what an error of 1 would do to the model: nats of KL divergence a token, to second order. There
are four sources for it, all one number a tensor, since errors of different types differ by little more than
their size (on SmolLM2-135M the logarithm of error(tensor, type) is a sum of one term for each, up to 0.1).

- `usual`: what was measured on one model, by role and depth. Costs nothing.
- `gradient_weights`: of this model. To second order KL = ½ Σ F (x − x̂)² with F the diagonal of the Fisher
  information: the mean square of the gradient of −log p(label), where labels are drawn from the model itself.
  Costs some three forward passes over the calibration samples.
- `output_weights`: of this model, by how much a tensor's own block changes its output. Forward passes only.
- `measured_weights`: of this model, the divergence with this tensor alone changed. Many forward passes.

All assume that damages add up. Below three bits they do so only roughly: see `search`.
Source: Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning (the estimate).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import gguf
import gguf.quants
import numpy as np
from jaxtyping import Float, UInt8

from jquant.checkpoints import transcode
from jquant.core import FLOAT_DTYPES, TRAINED, Format, Source, UserError
from jquant.formats import FORMATS

Errors = Mapping[str, Mapping[str, float]]  # tensor → type → relative error
Damages = Mapping[str, Mapping[str, float]]  # tensor → type → nats a token

SAMPLE = 4096  # weights of a tensor that are encoded: 16 superblocks
_ROW = 256  # sampled weights are encoded in rows of this length, which all blocks divide
_SLAB = 1024  # such rows at a time
# Of 32 weights on a grid of 2^bits steps at most so many differ; of normal ones 19.4 with 5 bits.
_DIFFERENT = {4: 16, 5: 22, 6: 27}

Progress = Callable[[int, int], None]  # done, of how many


def relative_errors(
    source: Source,
    types: Mapping[str, Sequence[str]],
    importance: Mapping[str, Float[np.ndarray, "matrices cols"]],
    *,
    known: Errors | None = None,
    found: Callable[[str, Mapping[str, float]], None] = lambda name, errors: None,
    threads: int = 2,
    progress: Progress = lambda done, count: None,
) -> dict[str, dict[str, float]]:
    """The relative error of each tensor in each of its types, on the same SAMPLE of its weights for all.

    types: of each tensor; those of the source cost nothing. known: errors measured before, which are not
    measured again. found is called with each tensor's new errors. Raises UserError for weights that are no
    finite numbers.
    """
    known = known or {}
    out = {name: dict(known.get(name, {})) for name in types}
    missing = {
        name: [t for t in wanted if t not in out[name] and t != source.specs[name].type]
        for name, wanted in types.items()
    }
    todo = sorted((n for n, wanted in missing.items() if wanted), key=lambda n: source.specs[n].type)
    done = 0
    for stored, same in itertools.groupby(todo, key=lambda n: source.specs[n].type):
        for names in _batches(list(same)):
            samples = {name: _sample(source, name, importance.get(name)) for name in names}
            needed = {t: [n for n in names if t in missing[n]] for name in names for t in missing[name]}

            def measure(type: str, of=samples, needed=needed, stored=stored) -> list[float]:
                wanted = [of[name] for name in needed[type]]
                return _errors(FORMATS[stored], FORMATS[type], wanted, weighted=bool(importance))

            with ThreadPoolExecutor(threads, thread_name_prefix="jquant") as pool:  # compiles side by side
                for type, errors in zip(needed, pool.map(measure, needed), strict=True):
                    for name, error in zip(needed[type], errors, strict=True):
                        out[name][type] = error
            for name in names:
                found(name, {t: out[name][t] for t in missing[name]})
            done += len(names)
            progress(done, len(todo))
    for name, wanted in types.items():
        out[name] |= dict.fromkeys((t for t in wanted if t == source.specs[name].type), 0.0)
    return out


def grid_bits(source: Source, names: Iterable[str]) -> dict[str, int]:
    """Of tensors whose weights seem to come from a quantized file: the bits of its codes, 4 for fewer.

    32 trained weights are 32 different numbers, a few less in bfloat16; 4-bit codes of one scale, at most 16.
    """
    found = {}
    for name in names:
        if source.specs[name].type not in TRAINED:
            continue
        x = np.sort(_sample(source, name, None).x.reshape(-1, 32), axis=-1)
        different = 1 + (np.diff(x) != 0).sum(-1)
        different = different[different > 1]  # padding aside
        mean = different.mean() if len(different) else 32.0
        bits = next((bits for bits, most in _DIFFERENT.items() if mean <= most), None)
        if bits is not None:
            found[name] = bits
    return found


def _batches(names: list[str]) -> Iterator[list[str]]:
    size = _SLAB * _ROW // SAMPLE
    return (names[start : start + size] for start in range(0, len(names), size))


class _Sample(NamedTuple):
    data: UInt8[np.ndarray, "n bytes"]  # as stored
    x: Float[np.ndarray, "n 256"]
    w: Float[np.ndarray, "n 256"]  # importance; 1 where none is known


def _sample(source: Source, name: str, importance: np.ndarray | None) -> _Sample:
    """Whole blocks from rows and columns all over the tensor."""
    spec = source.specs[name]
    piece = math.gcd(spec.cols, _ROW)
    count = min(SAMPLE, spec.size // _ROW * _ROW) // piece
    piece_bytes = spec.row_bytes * piece // spec.cols
    rows = np.linspace(0, spec.rows - 1, count).astype(int)
    columns = np.random.default_rng(0).integers(0, spec.cols // piece, count)
    data, w = np.empty((count, piece_bytes), np.uint8), np.ones((count, piece), np.float32)
    previous, row = -1, data
    for k in range(count):
        if rows[k] != previous:
            previous, row = rows[k], source.read(name, int(rows[k]), int(rows[k]) + 1)
        data[k] = row[0, columns[k] * piece_bytes :][:piece_bytes]
        if importance is not None:
            matrix = int(rows[k]) * len(importance) // spec.rows
            w[k] = importance[matrix, columns[k] * piece :][:piece]
    data = data.reshape(count * piece // _ROW, -1)
    x = _decoded(data, FORMATS[spec.type])
    if not np.isfinite(x).all():
        raise UserError(f"{name}: has weights that are no finite numbers; the model is damaged.")
    return _Sample(data, x, w.reshape(-1, _ROW))


def _decoded(data: np.ndarray, format: Format) -> Float[np.ndarray, "n 256"]:
    if format.name in FLOAT_DTYPES:
        return data.view(FLOAT_DTYPES[format.name]).astype(np.float32)
    try:  # in NumPy, since samples are decoded sooner than code for it is compiled
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(format.ggml_type))
    except (ValueError, NotImplementedError):  # of a type that this gguf does not know
        return transcode(data, format, FORMATS["F32"]).data.view(np.float32)


def _errors(stored: Format, target: Format, samples: Sequence[_Sample], *, weighted: bool) -> list[float]:
    """Σ w (x − x̂)² / Σ w x² of each sample. Encodes as the pipeline does, with the same compiled code."""
    data, x, w = (np.concatenate(parts) for parts in zip(*samples, strict=True))
    encoded = transcode(data, stored, target, w if weighted else None).data
    loss = (w * (_decoded(encoded, target) - x).astype(np.float64) ** 2).sum(-1)
    total = (w * x.astype(np.float64) ** 2).sum(-1)
    starts = np.cumsum([0, *(len(sample.x) for sample in samples[:-1])])
    of, whole = np.add.reduceat(loss, starts), np.add.reduceat(total, starts)
    return [float(a / b) if b > 0 else 0.0 for a, b in zip(of, whole, strict=True)]


def damages(errors: Errors, weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {name: {t: weights[name] * error for t, error in of.items()} for name, of in errors.items()}
