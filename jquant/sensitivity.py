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
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gguf
import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.between import Scratch
from jquant.core import Block, Format, Source, UserError
from jquant.formats import FORMATS
from jquant.models import Decoder, Parameters, matrices, run_block
from jquant.transcode import FLOAT_DTYPES, transcode

Errors = Mapping[str, Mapping[str, float]]  # tensor → type → relative error
Damages = Mapping[str, Mapping[str, float]]  # tensor → type → nats a token

# Of the size of the weights around: a relative error of 1%, as of 4 bits, where changes are still linear.
NOISE = 0.1
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
        if source.specs[name].type not in ("F32", "F16", "BF16"):
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


def gradient_weights(
    model: Decoder,
    tokens: Int[np.ndarray, "s t"],
    importance: Mapping[str, Float[np.ndarray, "matrices cols"]],
    *,
    seed: int = 0,
    progress: Progress = lambda done, count: None,
) -> dict[str, float]:
    """½ Σ F e² of each matrix for errors e whose relative error is 1, spread as a quantizer spreads them.

    e² is as in `local_squares`. F is the mean over samples of the square of the gradient for a
    whole sample, whose labels are drawn independently: the cross terms of tokens vanish in the mean. Float32.
    """
    samples, length = tokens.shape
    count = len(model.blocks)
    scratch = Scratch().activations(0, (count + 1, samples, length, model.width))
    scratch[0] = model.embed(tokens)
    steps = 2 * count + 1
    for i in range(count):
        params, angles = model.load_block(i), jnp.asarray(model.angles(i, length))
        for k in range(samples):
            scratch[i + 1, k] = run_block(
                model.blocks[i], params, jnp.asarray(scratch[i, k : k + 1]), angles
            )[0]
        progress(i + 1, steps)
    found, back = _through_output(model, scratch[count], importance, jax.random.key(seed))
    progress(count + 1, steps)
    for i in range(count - 1, -1, -1):
        params, angles = model.load_block(i), jnp.asarray(model.angles(i, length))
        squares: dict[str, Array] = {}
        for k in range(samples):
            given = jnp.asarray(scratch[i, k : k + 1]), jnp.asarray(back[k : k + 1])
            new, g = _back(model.blocks[i], params, given[0], angles, given[1])
            back[k] = g[0]
            squares = {name: new[name] + squares.get(name, 0.0) for name in new}
        for name, square in squares.items():
            full = f"blk.{i}.{name}.weight"
            x = np.asarray(params[name]["weight"])
            found[full] = _weight(np.asarray(square), x, importance.get(full)) / (samples * length)
        progress(2 * count + 1 - i, steps)
    looked_up = _of_lookups(model, tokens, back, importance) / (samples * length)
    found["token_embd.weight"] = found.get("token_embd.weight", 0.0) + looked_up
    return found


@partial(jax.jit, static_argnums=0)
def _back(block: Block, params: Mapping, x: Array, angles: Array, g: Array) -> tuple[dict[str, Array], Array]:
    """Squares of the gradients of a block's matrices, and the gradient of its input."""
    _, pull = jax.vjp(lambda p, x: run_block(block, p, x, angles), params, x)
    of_params, of_x = pull(g)
    return {name: g**2 for name, g in matrices(of_params).items()}, of_x


def _through_output(
    model: Decoder, x: np.ndarray, importance: Mapping[str, np.ndarray], key: Array
) -> tuple[dict[str, float], np.ndarray]:
    """The weight of the output matrix, and the gradients of its input [s, t, width]."""
    back = np.empty_like(x)
    name, slabs = model.output_name, model.output_slabs()
    parts = [jnp.zeros((stop - start, model.width), jnp.float32) for start, stop in slabs]
    for k in range(len(x)):
        given = jnp.asarray(x[k : k + 1])
        logits, pull = jax.vjp(model.logits, given)
        labels = jax.random.categorical(jax.random.fold_in(key, k), logits)
        g = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        back[k] = pull(g)[0][0]
        for i, (start, stop) in enumerate(slabs):
            rows = jnp.asarray(model.tensors.rows(name, start, stop))
            of_rows = jax.vjp(lambda rows, x=given: model.project(rows, x), rows)[1](g[..., start:stop])[0]
            parts[i] = parts[i] + of_rows**2
    square = np.concatenate([np.asarray(part) for part in parts])
    tensor = model.tensors.tensor(name)
    return {name: _weight(square, tensor, importance.get(name)) / (x.shape[0] * x.shape[1])}, back


def _of_lookups(
    model: Decoder, tokens: np.ndarray, back: np.ndarray, importance: Mapping[str, np.ndarray]
) -> float:
    """½ Σ F e² of the token embeddings by the inputs that they make."""
    name = "token_embd.weight"
    tensor = model.tensors.tensor(name)
    square = np.zeros_like(tensor)
    for k in range(len(tokens)):
        of_rows = np.zeros_like(tensor)
        np.add.at(of_rows, tokens[k], back[k] * np.float32(model.embedding_scale))
        square += of_rows**2
    return _weight(square, tensor, importance.get(name))


def _weight(square: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> float:
    """½ Σ F e² / (Σ w e² / Σ w x²) with e² as in `local_squares`; any scale of e."""
    e2 = local_squares(x)
    damage = float((square * e2).sum(dtype=np.float64)) / 2
    error = relative_error(e2, x, importance)
    return damage / error if error > 0 else 0.0


def local_squares(x: Float[np.ndarray, "*n cols"]) -> Float[np.ndarray, "*n cols"]:
    """The mean square of the 32 weights around each: quantizers err in proportion to it."""
    *rows, cols = x.shape
    width = math.gcd(cols, 32)
    local = np.square(x, dtype=np.float32).reshape(*rows, cols // width, width).mean(-1, keepdims=True)
    return np.broadcast_to(local, (*rows, cols // width, width)).reshape(x.shape)


def relative_error(e2: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> float:
    """Σ w e² / Σ w x² of a matrix or stack, where it has squared errors e2."""
    w = np.ones((1, x.shape[-1]), np.float32) if importance is None else importance
    w = w[:, None] if x.ndim > 2 else w
    total = float((w * x * x).sum(dtype=np.float64))
    return float((w * e2).sum(dtype=np.float64)) / max(total, 1e-30)


def disturbed(
    params: Parameters,
    block: int,
    importance: Mapping[str, Float[np.ndarray, "matrices cols"]],
    *,
    known: Collection[str] = (),
    seed: int = 0,
) -> Iterator[tuple[str, Parameters, float]]:
    """A block with one of its matrices changed as a quantizer would change it, by NOISE, for each of them.

    Gives the matrix's GGUF name, the parameters, and the relative error. known: matrices to leave out.
    """
    for number, (name, values) in enumerate(matrices(params).items()):
        full = f"blk.{block}.{name}.weight"
        if full in known:
            continue
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), block), number)
        weight = np.asarray(values)
        squares = local_squares(weight)
        noise = NOISE * jax.random.normal(key, weight.shape) * np.sqrt(squares)
        noisy = {**params, name: {**params[name], "weight": values + noise}}
        yield full, noisy, NOISE**2 * relative_error(squares, weight, importance.get(full))


def damages(errors: Errors, weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {name: {t: weights[name] * error for t, error in of.items()} for name, of in errors.items()}


class Record:
    """Errors and weights in a file of one JSON object a line, so that an interrupted run goes on.

    The first line says what they were measured on; a file that says otherwise is refused.
    """

    def __init__(self, path: Path | None, run: Mapping[str, object]):
        """Reads the file where it is there. Raises UserError where it is of another run or damaged."""
        self.path = path
        self.errors: dict[str, dict[str, float]] = {}
        self.weights: dict[str, float] = {}
        if path is None:
            return
        lines = _lines(path)
        about = next(lines, None)
        if about is None:
            path.write_text(json.dumps(run) + "\n", encoding="utf-8")
        elif about != json.loads(json.dumps(run)):
            differ = sorted(key for key in run if about.get(key) != json.loads(json.dumps(run[key])))
            raise UserError(
                f"{path}: was measured with another {', '.join(differ) or 'version'}; "
                "name another file, or remove this one."
            )
        for line in lines:
            if "weights" in line:
                self.weights |= line["weights"]
            else:
                self.errors.setdefault(line["tensor"], {}).update(line["errors"])

    def add_errors(self, name: str, errors: Mapping[str, float]) -> None:
        self.errors.setdefault(name, {}).update(errors)
        self._write({"tensor": name, "errors": dict(errors)})

    def add_weights(self, weights: Mapping[str, float]) -> None:
        self.weights |= weights
        self._write({"weights": dict(weights)})

    def _write(self, line: Mapping[str, object]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> Iterator[dict]:
    """The objects of a file, none where there is no file; a last line that was cut off is left out."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        lines = lines[:-1]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: no JSON object; it is not what jquant wrote. Remove it.")
        yield value
