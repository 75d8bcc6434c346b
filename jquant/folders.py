"""From a model's folder to a folder in a scheme of its own: what vLLM and transformers load.

checkpoint = open_checkpoint(Path("SmolLM2-135M"))
plan = plan_folder(checkpoint, SCHEMES["W8A8"])
write_folder(checkpoint, plan, Path("smol-w8a8"))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant import models, transposed
from jquant.convert import Model, common_facts, digest, fingerprint, open_model, read_config
from jquant.core import (
    OutputError,
    QuantizedTensor,
    ScaledFormat,
    Source,
    TensorSpec,
    UserError,
    dequantize,
    quantize,
)
from jquant.io import FolderPart, ModelFolder, SafetensorsSource
from jquant.io.model_folder import files_beside
from jquant.models import Weight
from jquant.schemes import METHODS, Scheme, config_of, fitting
from jquant.smoothing import Smoothing
from jquant.transcode import FLOAT_DTYPES, slab_rows
from jquant.transforms.smooth import Factors

# Matrices that schemes quantize, by GGUF name: linear layers, without routers, embedding and output.
_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?)\.weight")
# What else transformers builds as a linear layer.
_OTHER_LINEAR = re.compile(r"output\.weight|blk\.\d+\.ffn_gate_inp(_shexp)?\.weight")

_INPUT_SCALE = ".input_scale"

Progress = Callable[[str, int], None]  # name of a tensor, bytes of it that are now done


class Checkpoint(NamedTuple):
    """A Hugging Face folder under its own names, and the model that it makes."""

    folder: Path
    config: Mapping[str, object]
    source: Source
    weights: Mapping[str, Weight]  # GGUF name → the tensors that it is made of
    model: Model


class FolderPlan(NamedTuple):
    scheme: Scheme
    quantized: tuple[str, ...]  # names of weights in the checkpoint
    ignore: tuple[str, ...]  # linear layers that stay as they are
    layout: tuple[TensorSpec, ...]


Sink = ModelFolder | FolderPart


class WrittenFolder(NamedTuple):
    files: list[Path]
    # Σ (x − x̂)² / Σ x² of each weight that this run quantized; of one that was fed, its own.
    errors: dict[str, float]


class FedWeight(NamedTuple):
    """A weight of the checkpoint that error feedback has made."""

    name: str
    quantized: QuantizedTensor
    error: float  # tr ΔHΔᵀ / tr WHWᵀ of the matrix, or the stack of experts, that it belongs to


def open_checkpoint(path: Path, *, name: str | None = None, pre_tokenizer: str | None = None) -> Checkpoint:
    """Reads headers only. Raises UserError where `path` is no such folder, or is quantized already."""
    if path.suffix == ".gguf" or (path.is_dir() and not any(path.glob("*.safetensors*"))):
        raise UserError(
            f"{path}: give the model's Hugging Face folder (config.json, *.safetensors): what vLLM and "
            "transformers load is made of its names and tokenizer files, which a GGUF file lacks."
        )
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)
    declared = config.get("quantization_config")
    if isinstance(declared, dict) and declared.get("quant_method") in METHODS:
        raise UserError(f"{folder}: is quantized already; start from the original.")
    model = open_model(path, name=name, pre_tokenizer=pre_tokenizer)
    architecture = models.for_config(config)
    weights = architecture.named(architecture.read_config(config))
    return Checkpoint(folder, config, SafetensorsSource(path), weights, model)


def plan_folder(checkpoint: Checkpoint, scheme: Scheme, keep: Sequence[str] = ()) -> FolderPlan:
    """What each tensor becomes. keep: regular expressions; weights whose name has a match stay as they are.

    Raises UserError for an expression that is none, or matches nothing, and where no group size fits.
    """
    patterns = [_pattern(text) for text in keep]
    specs = checkpoint.source.specs
    linear = [part for n, w in checkpoint.weights.items() if _LINEAR.fullmatch(n) for part in w.parts]
    other = [part for n, w in checkpoint.weights.items() if _OTHER_LINEAR.fullmatch(n) for part in w.parts]
    for pattern in patterns:
        if not any(pattern.search(name) for name in linear):
            raise UserError(
                f"--keep {pattern.pattern!r}: matches none of the {len(linear)} weights, such as {linear[0]}."
            )
    kept = [name for name in linear if any(pattern.search(name) for pattern in patterns)]
    stays = set(kept)
    for weight in checkpoint.weights.values():
        some = [part for part in weight.parts if part in stays]
        if some and len(some) < len(weight.parts):
            raise UserError(
                f"--keep: matches {some[0]} but not all {len(weight.parts)} experts of its stack, which "
                "runtimes hold in one type; keep all or none."
            )
    quantized = [name for name in linear if name not in stays]
    scheme = fitting(scheme, [specs[name].cols for name in quantized])
    for name in quantized:
        if specs[name].type not in ("F32", "F16", "BF16"):
            raise UserError(f"{name}: is stored as {specs[name].type}; start from weights of 16 or 32 bits.")
    chosen = set(quantized)
    layout = [made for s in specs.values() for made in (_made(s, scheme) if s.name in chosen else [s])]
    modules = {name.removesuffix(".weight") for name in (*kept, *other)}
    return FolderPlan(scheme, tuple(quantized), tuple(sorted({*modules, "lm_head"})), tuple(layout))


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"--keep {text!r}: not a regular expression ({error}).") from None


def _made(spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
    """The tensors that stand for a quantized weight."""
    if scheme.transposed is not None:
        return transposed.specs_of(scheme.transposed, spec)
    format, module = scheme.weights, spec.name.removesuffix(".weight")
    rows, cols = spec.shape
    made = [
        TensorSpec(f"{module}.{format.part}", (rows, cols // format.per_code), format.type),
        TensorSpec(f"{module}.weight_scale", (rows, format.groups(cols)), spec.type),
    ]
    if format.per_code > 1:
        made.append(TensorSpec(f"{module}.weight_shape", (2,), "I64"))
    if scheme.static:
        made.append(TensorSpec(module + _INPUT_SCALE, (1,), spec.type))
    return made


class Ingredients(NamedTuple):
    """What was measured on calibration text for the weights of a folder."""

    # What smoothing multiplies tensors by, see `smoothing.factors`.
    factors: Mapping[str, Factors] = {}
    # Per GGUF tensor float32 [matrices, cols], where a stack of experts has one row for each.
    importance: Mapping[str, np.ndarray] = {}
    # Of a scheme with static scales, by GGUF tensor, see `input_scales`.
    input_scales: Mapping[str, np.float32] = {}


NOTHING = Ingredients()


def write_folder(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    out: Path,
    made: Ingredients = NOTHING,
    *,
    fed: Iterable[FedWeight] | None = None,
    max_shard_bytes: int | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda name, done: None,
) -> WrittenFolder:
    """Write the planned folder, a slab of rows at a time; it appears when it is complete.

    fed: weights that are quantized already, see `folder_feedback`. With `resume`, tensors that a killed run
    of the same ingredients has finished are not written again, but for those that are fed.
    Raises OutputError where the folder cannot be written, UserError for weights that are no finite numbers.
    """
    known = facts(checkpoint, plan, made, fed=fed is not None)
    with open_sink(
        checkpoint,
        plan,
        out,
        max_shard_bytes=max_shard_bytes,
        resume=resume,
        fingerprint=fingerprint(checkpoint.model, known),
        force=force,
    ) as sink:
        write_input_scales(checkpoint, made.input_scales, sink)
        errors = write_fed(checkpoint, plan, fed or (), sink, progress)
        rest = left(checkpoint, plan, sink.finished(), errors)
        errors |= write_weights(checkpoint, plan, rest, sink, made, progress)
        sink.commit()
    return WrittenFolder(sorted(out.iterdir()), errors)


def facts(checkpoint: Checkpoint, plan: FolderPlan, made: Ingredients, *, fed: bool) -> dict[str, str]:
    """What the bytes depend on, by name, but for those that are fed, which are written anew by each run."""
    told = (checkpoint.config, plan.scheme.name, plan.scheme.static, plan.quantized, plan.layout, fed)
    leaves = jax.tree_util.tree_leaves_with_path(made)
    arrays = (part for path, a in leaves for part in (str(path).encode(), np.asarray(a).tobytes()))
    return {
        **common_facts(checkpoint.model),
        "plan": digest([str(told).encode()]),
        "calibration": digest(arrays),
    }


def open_sink(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    out: Path,
    *,
    max_shard_bytes: int | None,
    resume: bool,
    fingerprint: str,
    force: bool,
) -> ModelFolder:
    """The folder that the plan makes, to be written."""
    if out.exists() and out.samefile(checkpoint.folder):
        raise OutputError(f"{out}: is the model itself; give another name.")
    return ModelFolder(
        out,
        {**checkpoint.config, "quantization_config": config_of(plan.scheme, plan.ignore)},
        plan.layout,
        files_beside(checkpoint.folder),
        max_shard_bytes=max_shard_bytes,
        resume=resume,
        fingerprint=fingerprint,
        force=force,
    )


def left(
    checkpoint: Checkpoint, plan: FolderPlan, finished: Iterable[str], fed: Collection[str]
) -> list[TensorSpec]:
    """Tensors of the checkpoint that are not fed, and of which not all is finished."""
    done, chosen = set(finished), set(plan.quantized)
    return [
        spec
        for spec in checkpoint.source.specs.values()
        if spec.name not in fed
        and not done.issuperset(_names(spec, plan.scheme) if spec.name in chosen else [spec.name])
    ]


def _names(spec: TensorSpec, scheme: Scheme) -> list[str]:
    """Of the tensors that are written with a quantized weight: all that stand for it but its input scale."""
    return [made.name for made in _made(spec, scheme) if not made.name.endswith(_INPUT_SCALE)]


def write_fed(
    checkpoint: Checkpoint, plan: FolderPlan, fed: Iterable[FedWeight], sink: Sink, progress: Progress
) -> dict[str, float]:
    """Write weights that are quantized already, but for their input scales. Their errors, by name."""
    errors = {}
    for one in fed:
        spec = checkpoint.source.specs[one.name]
        _put(one.quantized, spec, plan.scheme, 0, spec.rows, sink)
        for name in _names(spec, plan.scheme):
            sink.finish(name)
        errors[one.name] = one.error
        progress(spec.name, spec.nbytes)
    return errors


def write_weights(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    specs: Iterable[TensorSpec],
    sink: Sink,
    made: Ingredients,
    progress: Progress,
) -> dict[str, float]:
    """Write these tensors of the checkpoint. Errors of the quantized ones, by name."""
    rows_of = _importance_by_part(checkpoint, made.importance)
    by_part = factors_by_part(checkpoint, made.factors)
    chosen, errors = set(plan.quantized), {}
    for spec in specs:
        factors = by_part.get(spec.name)
        if spec.name in chosen:
            w = rows_of.get(spec.name)
            errors[spec.name] = _write_quantized(
                checkpoint.source, spec, plan.scheme, w, factors, sink, progress
            )
            for name in _names(spec, plan.scheme):
                sink.finish(name)
        else:
            _write(checkpoint.source, spec, factors, sink, progress)
            sink.finish(spec.name)
    return errors


def write_input_scales(checkpoint: Checkpoint, scales: Mapping[str, np.float32], sink: Sink) -> None:
    """Write the static scales that are not yet there."""
    finished = set(sink.finished())
    for tensor, scale in scales.items():
        for part in checkpoint.weights[tensor].parts:
            name = part.removesuffix(".weight") + _INPUT_SCALE
            if name not in finished:
                stored = np.array([[scale]], FLOAT_DTYPES[checkpoint.source.specs[part].type])
                sink.write(name, 0, stored.view(np.uint8))
                sink.finish(name)


def _importance_by_part(
    checkpoint: Checkpoint, importance: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """[cols] of each weight of the checkpoint that has one."""
    return {
        part: row
        for name, rows in importance.items()
        if name in checkpoint.weights
        for part, row in zip(checkpoint.weights[name].parts, rows, strict=True)
    }


class PartFactors(NamedTuple):
    """What a tensor of the checkpoint is multiplied by."""

    rows: np.ndarray | None  # [rows], or of a vector each element
    cols: np.ndarray | None
    shift: float  # what the model adds to the tensor before it multiplies with it
    vector: bool

    def times(self, x: np.ndarray, start: int) -> np.ndarray:
        """Rows of the tensor from `start`, or the vector [1, n], float32."""
        x = x + np.float32(self.shift)
        if self.rows is not None:
            x = x * (self.rows[None] if self.vector else self.rows[start : start + len(x), None])
        if self.cols is not None:
            x = x * self.cols[None]
        return x - np.float32(self.shift)


def factors_by_part(checkpoint: Checkpoint, factors: Mapping[str, Factors]) -> dict[str, PartFactors]:
    """The factors of each tensor of the checkpoint that has any, biases included."""
    found = {}
    for name, weight in checkpoint.weights.items():
        module, _, kind = name.rpartition(".")
        given = factors.get(module)
        if given is None or (kind == "bias" and given.rows is None):
            continue
        for i, part in enumerate(weight.parts):
            rows, cols = (
                None if a is None else np.asarray(a[i] if a.ndim > 1 else a, np.float32) for a in given
            )
            vector = len(checkpoint.source.specs[part].shape) == 1
            found[part] = PartFactors(rows, None if kind == "bias" else cols, weight.shift, vector)
    return found


def as_stored(checkpoint: Checkpoint, smoothing: Smoothing) -> Smoothing:
    """The smoothing with the factors that norms have as they are stored: w / w′ for a norm w that becomes w′.
    What 16 bits round, the matrices behind them take up."""
    places = []
    for place in smoothing.places:
        weight = checkpoint.weights.get(f"blk.{place.block}.{place.name}.weight")
        if weight is not None and place.name.endswith("norm"):
            (part,) = weight.parts
            dtype = FLOAT_DTYPES[checkpoint.source.specs[part].type]
            w = checkpoint.source.read(part).view(dtype).astype(np.float32)[0]
            made = PartFactors(1 / place.scales, None, weight.shift, True).times(w[None], 0)[0]
            rounded = made.astype(dtype).astype(np.float32) + np.float32(weight.shift)
            w = w + np.float32(weight.shift)
            live = (w != 0) & (rounded != 0)
            scales = np.where(live, w / np.where(live, rounded, 1), place.scales)
            place = place._replace(scales=scales.astype(np.float32))
        places.append(place)
    return smoothing._replace(places=tuple(places))


def _write(
    source: Source, spec: TensorSpec, factors: PartFactors | None, sink: Sink, progress: Progress
) -> None:
    for start, stop in _slabs(spec):
        data = source.read(spec.name, start, stop)
        if factors is not None:
            dtype = FLOAT_DTYPES[spec.type]
            data = factors.times(data.view(dtype).astype(np.float32), start).astype(dtype).view(np.uint8)
        sink.write(spec.name, start, data)
        progress(spec.name, (stop - start) * spec.row_bytes)


def _write_quantized(
    source: Source,
    spec: TensorSpec,
    scheme: Scheme,
    importance: np.ndarray | None,
    factors: PartFactors | None,
    sink: Sink,
    progress: Progress,
) -> float:
    format, held = stored_format(scheme, spec), list[QuantizedTensor]()
    w = None if importance is None else jnp.asarray(importance, jnp.float32)
    loss = total = 0.0
    step = min(slab_rows(spec.cols), spec.rows)
    for start, stop in _slabs(spec):
        x = source.read(spec.name, start, stop).view(FLOAT_DTYPES[spec.type]).astype(np.float32)
        _check_finite(x, spec.name, start)
        x = x if factors is None else factors.times(x, start)
        padded = np.pad(x, ((0, step - len(x)), (0, 0)))  # one shape, one compilation
        q = quantize(jnp.asarray(padded), format, w)
        rest = x - np.asarray(dequantize(q))[: len(x)]
        loss += float(np.sum(np.square(rest, dtype=np.float64)))
        total += float(np.sum(np.square(x, dtype=np.float64)))
        if scheme.transposed is None:
            _put(q, spec, scheme, start, len(x), sink)
        else:  # rows become columns: none is whole before all are there
            held.append(_rows_of(q, len(x)))
        progress(spec.name, (stop - start) * spec.row_bytes)
    if held:
        parts = {name: np.concatenate([q.parts[name] for q in held]) for name in held[0].parts}
        _put(QuantizedTensor(parts, format), spec, scheme, 0, spec.rows, sink)
    return loss / total if total else 0.0


def _rows_of(q: QuantizedTensor, count: int) -> QuantizedTensor:
    """The first `count` rows, in the host's memory."""
    return QuantizedTensor({name: np.asarray(value)[:count] for name, value in q.parts.items()}, q.format)


def stored_format(scheme: Scheme, spec: TensorSpec) -> ScaledFormat:
    """The scheme's format for a weight of the checkpoint: its scales have the weight's own type, or its
    layout's."""
    return replace(scheme.weights, scale_type=spec.type if scheme.transposed is None else "F16")


def _put(q: QuantizedTensor, spec: TensorSpec, scheme: Scheme, start: int, count: int, sink: Sink) -> None:
    """The first `count` rows of q, which are the weight's from `start`; with the last ones its shape."""
    module = spec.name.removesuffix(".weight")
    if scheme.transposed is not None:
        for part, value in transposed.stored(scheme.transposed, q).items():
            rows = np.ascontiguousarray(np.atleast_2d(value))
            sink.write(f"{module}.{part}", 0, rows.view(np.uint8))
        return
    for part, value in _rows_of(q, count).parts.items():
        sink.write(f"{module}.{part}", start, value.view(np.uint8).reshape(count, -1))
    if start + count == spec.rows and isinstance(q.format, ScaledFormat) and q.format.per_code > 1:
        shape = np.array([spec.shape], np.int64)
        sink.write(f"{module}.weight_shape", 0, shape.view(np.uint8))


def _slabs(spec: TensorSpec) -> list[tuple[int, int]]:
    step = slab_rows(max(spec.cols, 1))
    return [(start, min(start + step, spec.rows)) for start in range(0, spec.rows, step)]


def _check_finite(x: np.ndarray, name: str, start: int) -> None:
    if np.isfinite(x).all():
        return
    row, col = map(int, np.argwhere(~np.isfinite(x))[0])
    raise UserError(
        f"{name}: the weight at {[start + row, col]} is {x[row, col]}; the model is damaged. "
        "Download it again, or mend this tensor."
    )
