"""A folder written as it is planned, by one process or by several that share it.

As `gguf_writer` for GGUF: weights are spread by what they cost, each process writes its own into the files
that process 0 has made, and process 0 checks that nothing is missing and commits. The bytes are those of one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jquant.checkpoints import FLOAT_DTYPES, slab_rows
from jquant.checkpoints import gptq_awq as transposed
from jquant.checkpoints.fingerprint import common_facts, digest, digest_of_arrays, fingerprint
from jquant.checkpoints.rescaled import Factors, RowFactors
from jquant.checkpoints.schemes import Scheme, config_of
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
from jquant.distributed.mesh import agree, exchange, is_first
from jquant.distributed.team import everyone
from jquant.io import FolderPart, ModelFolder
from jquant.io.model_folder import files_beside
from jquant.writers._spread import COPIED, SEARCHED, spread
from jquant.writers.folder_plan import (
    INPUT_SCALE,
    Checkpoint,
    FedWeight,
    FolderPlan,
    factors_by_part,
    names_of,
    stored_format,
)

Progress = Callable[[str, int], None]  # name of a tensor, bytes of it that are now done
Sink = ModelFolder | FolderPart


class WrittenFolder(NamedTuple):
    files: list[Path]
    # Σ (x − x̂)² / Σ x² of each weight that this run quantized; of one that was fed, its own.
    errors: dict[str, float]


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

    fed: weights that are quantized already, see `folder_feedback`; the same in all processes. With `resume`,
    tensors that a killed run of the same ingredients has finished are not written again, but for those that
    are fed. progress: of this process's share. Several processes call it with the same arguments.

    Raises OutputError where the folder cannot be written, UserError for weights that are no finite numbers,
    and in all processes where they differ in anything that the bytes depend on, or one fails.
    """
    known = _facts(checkpoint, plan, made, fed=fed is not None)
    agree(known | {"output": out.name, "shards": str(max_shard_bytes), "resume": str(resume)})
    name, team, begun = fingerprint(checkpoint.model, known), everyone(), ""
    with contextlib.ExitStack() as opened:
        sink = None
        if is_first():
            sink = _open_sink(
                checkpoint,
                plan,
                out,
                max_shard_bytes=max_shard_bytes,
                resume=resume,
                fingerprint=name,
                force=force,
            )
            # What ends one process may be a mistake in the model; what ends several is to be gone on with.
            opened.enter_context(sink) if team.count == 1 else opened.callback(sink.close)
            _write_input_scales(checkpoint, made.input_scales, sink)
            errors = _write_fed(checkpoint, plan, fed or (), sink, progress)
            rest = _left(checkpoint, plan, sink.finished(), errors)
            begun = json.dumps([name, [spec.name for spec in rest]])
        else:
            errors = {one.name: one.error for one in fed or ()}  # computed by all, written by the first
        name, rest = json.loads(team.told(begun))
        specs, chosen = [checkpoint.source.specs[one] for one in rest], set(plan.quantized)
        # In numbers that are merely copied.
        costs = [spec.size * (SEARCHED if spec.name in chosen else COPIED) for spec in specs]
        mine = [specs[i] for i in spread(costs, team.count)[team.me]]
        if sink is not None:
            errors |= _write_weights(checkpoint, plan, mine, sink, made, progress)
        elif mine:
            part = FolderPart(
                out,
                plan.layout,
                team.me,
                max_shard_bytes=max_shard_bytes,
                fingerprint=name,
            )
            with part:
                errors |= _write_weights(checkpoint, plan, mine, part, made, progress)
        told = exchange(json.dumps(errors))
        if sink is not None:
            sink.adopt_parts()
            sink.commit()
    exchange()
    return WrittenFolder(sorted(out.iterdir()), {k: v for text in told for k, v in json.loads(text).items()})


def plan_facts(checkpoint: Checkpoint, plan: FolderPlan) -> dict[str, str]:
    """What any folder of this plan depends on, by name."""
    told = (checkpoint.config, plan.scheme.name, plan.scheme.static, plan.quantized, plan.layout)
    return common_facts(checkpoint.model) | {"plan": digest([str(told).encode()])}


def _facts(checkpoint: Checkpoint, plan: FolderPlan, made: Ingredients, *, fed: bool) -> dict[str, str]:
    """What the bytes depend on, by name, but for those that are fed, which are written anew by each run."""
    known = plan_facts(checkpoint, plan)
    return known | {"fed": str(fed), "calibration": digest_of_arrays(made)}


def _open_sink(
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


def _left(
    checkpoint: Checkpoint, plan: FolderPlan, finished: Iterable[str], fed: Collection[str]
) -> list[TensorSpec]:
    """Tensors of the checkpoint that are not fed, and of which not all is finished."""
    done, chosen = set(finished), set(plan.quantized)
    return [
        spec
        for spec in checkpoint.source.specs.values()
        if spec.name not in fed
        and not done.issuperset(names_of(spec, plan.scheme) if spec.name in chosen else [spec.name])
    ]


def _write_fed(
    checkpoint: Checkpoint, plan: FolderPlan, fed: Iterable[FedWeight], sink: Sink, progress: Progress
) -> dict[str, float]:
    """Write weights that are quantized already, but for their input scales. Their errors, by name."""
    errors = {}
    for one in fed:
        spec = checkpoint.source.specs[one.name]
        _put(one.quantized, spec, plan.scheme, 0, spec.rows, sink)
        for name in names_of(spec, plan.scheme):
            sink.finish(name)
        errors[one.name] = one.error
        progress(spec.name, spec.nbytes)
    return errors


def _write_weights(
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
            for name in names_of(spec, plan.scheme):
                sink.finish(name)
        else:
            _write(checkpoint.source, spec, factors, sink, progress)
            sink.finish(spec.name)
    return errors


def _write_input_scales(checkpoint: Checkpoint, scales: Mapping[str, np.float32], sink: ModelFolder) -> None:
    """Write the static scales that are not yet there."""
    finished = set(sink.finished())
    for tensor, scale in scales.items():
        for part in checkpoint.weights[tensor].parts:
            name = part.removesuffix(".weight") + INPUT_SCALE
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


def _write(
    source: Source, spec: TensorSpec, factors: RowFactors | None, sink: Sink, progress: Progress
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
    factors: RowFactors | None,
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
