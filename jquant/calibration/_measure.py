"""What `jquant analyze --method` measures beside the mean squares of inputs, and the files it writes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jquant.calibration._calibrators import HESSIAN
from jquant.calibration._collect import shared_inputs, stream
from jquant.calibration._forward_back import Tape
from jquant.calibration._importance import (
    agree_on,
    decoder_for,
    imatrix_of,
    importance,
    open_checkpoint,
    run_of,
    share_of,
)
from jquant.calibration._statistics import init_all
from jquant.calibration._walk import Progress
from jquant.calibration.activations import Store
from jquant.calibration.gradients import FISHER_COLUMNS, collect_gradients, sampled_labels
from jquant.calibration.ranges import RANGES
from jquant.checkpoints.model import Model
from jquant.core import VERSION, TensorSpec, UserError
from jquant.distributed.mesh import is_first
from jquant.io.imatrix import Imatrix
from jquant.io.resume_backward import GradientCheckpoint
from jquant.io.statistics import TYPES, StatisticsSink
from jquant.models import Decoder, Precision
from jquant.text.samples import Samples

STATISTICS = {"hessian": HESSIAN, "ranges": RANGES}  # methods that write io.statistics


def measure(
    method: str,
    model: Model,
    samples: Samples,
    *,
    output: Path | None = None,
    seed: int = 0,
    batch: int = 4,
    checkpoint: Path | None = None,
    resume: bool = False,
    force: bool = False,
    mesh: Mesh | None = None,
    precision: Precision | None = None,
    progress: Progress = lambda done, count: None,
) -> Imatrix:
    """What a method finds out of each input column; those of STATISTICS write `output` on the way.

    checkpoint: the folder of one, which `resume` continues. mesh: see `analyze.importance`; fisher runs in
    one process, on one device and in float32. Errors are those of the functions below.
    """
    if method == "fisher" and mesh is not None and jax.process_count() > 1:
        raise UserError("--method fisher: runs in one process only; leave out --coordinator.")
    if mesh is not None:  # before anything is made that a refused run would leave
        kept = "" if checkpoint is None else checkpoint.name
        agree_on(
            model,
            samples,
            batch=batch,
            method=method,
            precision=precision,
            checkpoint=kept,
            resume=str(resume),
        )
    if method == "fisher":
        tape = None
        if checkpoint is not None:
            tape = open_tape(checkpoint, model, samples, seed=seed, batch=batch, resume=resume)
        return fisher(model, samples, seed=seed, batch=batch, tape=tape, progress=progress)
    store = None
    if checkpoint is not None:
        store = open_checkpoint(
            checkpoint,
            model,
            samples,
            batch=batch,
            resume=resume,
            method=method,
            mesh=mesh,
            precision=precision,
        )
    if method == "imatrix":
        return importance(
            model, samples, batch=batch, store=store, mesh=mesh, precision=precision, progress=progress
        )
    assert output is not None
    return write_statistics(
        output,
        model,
        samples,
        method,
        batch=batch,
        store=store,
        force=force,
        mesh=mesh,
        precision=precision,
        progress=progress,
    )


def fisher(
    model: Model,
    samples: Samples,
    *,
    seed: int = 0,
    batch: int = 4,
    tape: Tape | None = None,
    progress: Progress = lambda done, count: None,
) -> Imatrix:
    """How much the loss depends on the weights of every input column: the mean over tokens and rows of δ² x².

    F_j is the mean of the Fisher diagonal over the rows of column j: Σ_ij F_j Δ_ij² estimates twice the KL
    divergence a token that a change Δ of the weights makes; see `gradients`. Unlike mean squares of inputs,
    these values compare across tensors. The labels are drawn from the model's prediction, by `seed`: with
    those of the text, what the model finds unlikely would count most, and quantization shall keep the model,
    not better it.
    """
    stats = collect_gradients(
        decoder_for(model, "float32"),
        samples.tokens,
        FISHER_COLUMNS,
        sampled_labels(seed),
        lengths=samples.lengths,
        batch=batch,
        tape=tape,
        progress=progress,
    )
    rows = {name: model.source.specs[name].shape[-2:-1] or (1,) for name in stats}
    columns = {
        name: {"sum2": s["fisher_columns"] / rows[name][0], "count": s["count"]} for name, s in stats.items()
    }
    return replace(imatrix_of(columns, samples), method="fisher")


def open_tape(
    folder: Path, model: Model, samples: Samples, *, seed: int = 0, batch: int, resume: bool
) -> GradientCheckpoint:
    """A tape in `folder` for `fisher` of the same arguments. Errors: as `analyze.open_checkpoint`."""
    run = {
        **run_of(model, samples, batch=batch, method="fisher", precision="float32"),
        "labels": f"sampled, seed {seed}",
    }
    return GradientCheckpoint(folder, run, len(decoder_for(model, "float32").blocks), resume=resume)


def write_statistics(
    path: Path,
    model: Model,
    samples: Samples,
    method: str,
    *,
    batch: int = 4,
    store: Store | None = None,
    force: bool = False,
    mesh: Mesh | None = None,
    precision: Precision | None = None,
    progress: Progress = lambda done, count: None,
) -> Imatrix:
    """Write the statistics of STATISTICS[method] of every distinct input, block by block; returns its mean
    squares.

    A Hessian of an input of width w costs 2 · tokens · w² operations and 4 · w² bytes on the disk (22 GB for
    a Llama of 7 B); in memory are those of one block. A store that remembers holds them a second time.
    Of several processes that the mesh spans, and that have agreed on the arguments, each runs its share of
    the samples, and the first writes.
    Raises OutputError where the file cannot be written, and what `calibrate.stream` raises.
    """
    calibrator, decoder = STATISTICS[method], decoder_for(model, precision)
    shared: dict[str, str] = {}
    for i in range(len(decoder.blocks)):
        shared |= shared_inputs(decoder, i)
    about = {
        "method": method,
        "model": model.path.resolve().name,
        "dataset": samples.dataset,
        "sha256": samples.digest,
        "samples": str(len(samples.tokens)),
        "sequence_length": str(samples.tokens.shape[1]),
        "jquant": VERSION,
    }
    others = {name: first for name, first in shared.items() if name != first}
    squares: dict[str, dict[str, jax.Array]] = {}
    mine, through = share_of(samples, mesh)
    with contextlib.ExitStack() as opened:
        sink = None
        if is_first():
            layout = _layout(decoder, method, others)
            sink = opened.enter_context(StatisticsSink(path, about, layout, others, force=force))
        blocks = stream(
            decoder,
            samples.tokens[mine],
            calibrator,
            lengths=samples.lengths[mine],
            batch=batch,
            store=store,
            through=through,
            progress=progress,
        )
        for block in blocks:
            for name, stats in block.items():
                for key, value in stats.items():
                    if sink is not None:
                        sink.write(f"{name}.{key}", jax.device_get(value))
                sum2 = stats["sum2"] if "sum2" in stats else jnp.diagonal(stats["xtx"], axis1=-2, axis2=-1)
                squares[name] = {"sum2": sum2, "count": stats["count"]}
        if sink is not None:
            sink.commit()
    return imatrix_of({name: squares[first] for name, first in shared.items()}, samples)


def _layout(decoder: Decoder, method: str, others: dict[str, str]) -> list[TensorSpec]:
    """What is stored of each block, in the order in which it becomes known."""
    calibrator, layout = STATISTICS[method], []
    for i, block in enumerate(decoder.blocks):
        shapes = jax.eval_shape(lambda block=block: init_all(block, lambda shape: calibrator.init(shape[-1])))
        layout += [
            TensorSpec(f"blk.{i}.{name}.weight.{key}", value.shape, TYPES[value.dtype])
            for name, stats in shapes.items()
            if f"blk.{i}.{name}.weight" not in others
            for key, value in stats.items()
        ]
    return layout
