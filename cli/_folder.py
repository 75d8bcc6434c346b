"""`jquant quantize MODEL OUTDIR --type W8A8`: a folder in a scheme of compressed-tensors, GPTQ or AWQ."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import _calibration, _errors, _runtime, _show
from ._folder_request import Request
from ._progress import ProgressBar

if TYPE_CHECKING:
    from jquant.io.findings import Findings
    from jquant.io.imatrix import Imatrix
    from jquant.smoothquant.smoothing import Smoothing
    from jquant.text.samples import Samples
    from jquant.writers.folder import Ingredients, WrittenFolder
    from jquant.writers.folder_plan import Checkpoint, FedWeight, FolderPlan
    from jquant.writers.w8a8 import Calibrated


def quantize(asked: Request, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """What `jquant quantize` does for these types, in one process or as one of several."""
    start = time.monotonic()
    _runtime.start_jax()
    reports = _runtime.join(coordinator, processes, process)

    from dataclasses import replace

    asked = replace(asked, quiet=asked.quiet or not reports)
    checkpoint, plan, importance = _opened(asked)
    if not asked.quiet:
        _remark_groups(plan)
    if asked.out is None:
        if asked.keeps_outstanding and not asked.quiet:
            _show.remark("note: weights that stand out, once they are measured, will stay as they are.")
        if reports and asked.json:
            _show.result_json(_plan_report(checkpoint, plan))
        elif reports:
            _show.result(_plan_table(plan))
        return
    data = _calibration.read(checkpoint.model, asked.texts, quiet=asked.quiet) if asked.needs_text else None
    with _findings(asked, asked.out, checkpoint, plan, data) as findings:
        calibrated = _calibrated(asked, checkpoint, plan, data, findings) if data is not None else None
        plan = calibrated.plan if calibrated else plan
        made = _ingredients(asked, checkpoint, data, calibrated, importance)
        fed = _fed(asked, checkpoint, plan, data, made, findings) if data is not None else None
        written = _write(asked, asked.out, checkpoint, plan, made, fed)
    missed = _missed(asked.out, calibrated and calibrated.smoothing, asked.target_error)
    if reports:
        _report(asked, asked.out, checkpoint, plan, calibrated, written, missed, start)
    if missed:
        raise typer.Exit(_errors.UNREACHED)


def _opened(asked: Request) -> tuple[Checkpoint, FolderPlan, Imatrix | None]:
    """The model, its plan, and importance that is read; slips of the command line show before a download."""
    from dataclasses import replace

    from jquant.checkpoints.schemes import SCHEMES, asymmetric
    from jquant.io import check_folder, check_target, hub
    from jquant.io import imatrix as imatrix_file
    from jquant.io.paths import local
    from jquant.writers.folder_plan import open_checkpoint, plan_folder

    if asked.out is not None:
        check_folder(asked.out, force=asked.force)
        if asked.export_scales is not None:
            check_target(asked.export_scales, force=asked.force)
    importance = imatrix_file.read(asked.imatrix) if asked.imatrix else None
    path = local(hub.resolve(asked.model, revision=asked.revision), f"--type {asked.type}")
    checkpoint = open_checkpoint(path, name=hub.name_of(asked.model), pre_tokenizer=asked.pre_tokenizer)
    scheme = replace(SCHEMES[asked.type], static=asked.static)
    plan = plan_folder(checkpoint, asymmetric(scheme) if asked.asymmetric else scheme, asked.patterns)
    return checkpoint, plan, importance


def _findings(
    asked: Request, out: Path, checkpoint: Checkpoint, plan: FolderPlan, data: Samples | None
) -> AbstractContextManager[Findings | None]:
    """What a run of one process keeps for the one that resumes it."""
    from jquant.checkpoints.fingerprint import digest_of_arrays, fingerprint
    from jquant.distributed.team import everyone
    from jquant.io.findings import Findings
    from jquant.writers.folder import plan_facts

    if data is None or everyone().count > 1:
        return nullcontext()
    options = (
        *(asked.asymmetric, asked.alpha, asked.no_smooth, asked.keep, asked.target_error),
        *(asked.feedback, asked.batch),
    )
    known = plan_facts(checkpoint, plan) | {
        "text": digest_of_arrays((data.tokens, data.lengths)),
        "options": str(options),
    }
    return Findings(out, fingerprint(checkpoint.model, known), resume=asked.resume)


def _calibrated(
    asked: Request, checkpoint: Checkpoint, plan: FolderPlan, data: Samples, findings: Findings | None
) -> Calibrated | None:
    """Smoothing and what comes with it, or static scales alone; None where neither is asked for."""
    from jquant.distributed.team import everyone
    from jquant.writers.w8a8 import measure_model, smooth_model

    shown = _calibration.progress(data, quiet=asked.quiet)
    if not asked.smooths:
        if not asked.static:
            return None
        return measure_model(checkpoint, plan, data, batch=asked.batch, progress=shown, findings=findings)
    found = smooth_model(
        checkpoint,
        plan,
        data,
        asked.alpha,
        judge=asked.target_error is not None,
        keep=asked.keeps_outstanding,
        batch=asked.batch,
        progress=shown,
        searching=_calibration.by_block("searched", quiet=asked.quiet),
        team=everyone(),
        findings=findings,
    )
    kept = [name for name in plan.quantized if name not in found.plan.quantized]
    if kept and not asked.quiet:
        names = ", ".join(name.removesuffix(".weight") for name in kept)
        _show.remark(f"note: {names} stand out and stay as they are; --keep none rounds them too.")
    return found


def _ingredients(
    asked: Request,
    checkpoint: Checkpoint,
    data: Samples | None,
    calibrated: Calibrated | None,
    importance: Imatrix | None,
) -> Ingredients:
    """What weights are made with, the same in all processes."""
    from jquant.core import UserError
    from jquant.distributed.team import everyone
    from jquant.writers.folder import Ingredients

    if asked.analyze and data is not None:
        importance = _calibration.importance(checkpoint.model, data, batch=asked.batch, quiet=asked.quiet)
    weights = importance.by_tensor(checkpoint.model.source.specs.values()) if importance else {}
    if importance and not weights:
        raise UserError(
            f"{asked.imatrix}: none of its tensors is in {checkpoint.folder}; it was made from another model."
        )
    made = Ingredients(importance=weights)
    if calibrated is not None:
        made = Ingredients(
            factors=calibrated.factors,
            importance=calibrated.importance or weights,
            input_scales=calibrated.input_scales or {},
        )
    return everyone().first(made)  # machines may differ in a last bit, and norms and matrices must agree


def _fed(
    asked: Request,
    checkpoint: Checkpoint,
    plan: FolderPlan,
    data: Samples,
    made: Ingredients,
    findings: Findings | None,
) -> Iterator[FedWeight] | None:
    """Weights made with error feedback: where asked for, and unasked where factors are searched."""
    from jquant.distributed.team import everyone
    from jquant.writers.folder_feedback import enough, feed_back
    from jquant.writers.gguf_feedback import Feedback

    by_default = asked.feedback is None and asked.searches
    if not (asked.feedback or by_default):
        return None
    learned = enough(plan, checkpoint, data) if by_default else data
    if by_default and not asked.quiet:
        _show.remark(
            f"note: errors of weights are fed back, by {len(learned.tokens)} of {len(data.tokens)} "
            "samples; --no-feedback takes the nearest codes, --feedback all samples."
        )
    shown = _calibration.progress(learned, quiet=asked.quiet)
    feedback = Feedback(learned, batch=asked.batch, progress=shown)
    return feed_back(checkpoint, plan, feedback, made.factors, everyone(), findings)


def _write(
    asked: Request,
    out: Path,
    checkpoint: Checkpoint,
    plan: FolderPlan,
    made: Ingredients,
    fed: Iterator[FedWeight] | None,
) -> WrittenFolder:
    from jquant.writers.folder import write_folder

    total = sum(spec.nbytes for spec in checkpoint.source.specs.values())
    with ProgressBar(total, shown=not asked.quiet) as progress:
        return write_folder(
            checkpoint,
            plan,
            out,
            made,
            fed=fed,
            max_shard_bytes=asked.max_shard_bytes,
            resume=asked.resume,
            force=asked.force,
            progress=progress,
        )


def _report(
    asked: Request,
    out: Path,
    checkpoint: Checkpoint,
    plan: FolderPlan,
    calibrated: Calibrated | None,
    written: WrittenFolder,
    missed: str,
    start: float,
) -> None:
    """Say what was written, and write the scales that are asked for."""
    from jquant.io import scales as scales_file
    from jquant.smoothquant.report import smoothing_report, smoothing_table
    from jquant.writers.scales import scales_of

    stored = {name: weight.parts for name, weight in checkpoint.weights.items()}
    if asked.export_scales is not None:
        about = {"scheme": plan.scheme.name, "model": asked.model}
        found = scales_of(checkpoint, plan, out, calibrated)
        scales_file.write(asked.export_scales, found, about, force=asked.force)
    smoothing, target = calibrated and calibrated.smoothing, asked.target_error
    reached = {} if target is None else {"target_error": {"target": target, "reached": not missed}}
    report = _plan_report(checkpoint, plan, written.errors) | {
        "model": asked.model,
        "smoothing": smoothing_report(smoothing, stored) if smoothing else None,
        **reached,
        "files": [{"path": str(file), "bytes": file.stat().st_size} for file in written.files],
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_bytes": _runtime.peak_memory(),
    }
    if asked.json:
        _show.result_json(report)
    else:
        if smoothing and not asked.quiet:
            _show.remark(smoothing_table(smoothing, stored))
        _show.result(_summary(out, plan, report))
    if missed:
        _show.remark(f"jquant: {missed}")


def _missed(out: Path, smoothing: Smoothing | None, target: float | None) -> str:
    """What is to be said where blocks have more error than the target; "" where none has."""
    if smoothing is None or target is None:
        return ""
    errors = [after for _, after in smoothing.errors]
    above = [i for i, error in enumerate(errors) if not error <= target]
    if not above:
        return ""
    worst = max(above, key=errors.__getitem__)
    return (
        f"{out}: written, but smoothing leaves {len(above)} of {len(errors)} blocks above --target-error "
        f"{target:g}, block {worst} the most: {errors[worst]:.2e}; keep it in 16 bit with "
        f"--keep 'layers\\.{worst}\\.', or calibrate on more --samples."
    )


def _remark_groups(plan: FolderPlan) -> None:
    group = plan.scheme.weights.group_size
    if group not in (None, 128):
        _show.remark(f"note: groups of {group} weights, for rows here are no multiple of 128.")


def _plan_report(
    checkpoint: Checkpoint, plan: FolderPlan, errors: dict[str, float] | None = None
) -> dict[str, object]:
    from jquant.plan.report import by_type

    return {
        "scheme": plan.scheme.name,
        "group_size": plan.scheme.weights.group_size,
        "static_activations": plan.scheme.static,
        "asymmetric_activations": plan.scheme.asymmetric,
        "ignore": list(plan.ignore),
        "source_tensor_bytes": sum(spec.nbytes for spec in checkpoint.source.specs.values()),
        "tensor_bytes": sum(spec.nbytes for spec in plan.layout),
        "types": [{"type": t, "tensors": n, "bytes": b} for t, n, b in by_type(plan.layout)],
        "tensors": [
            {"name": name, "error": None if errors is None else errors.get(name)} for name in plan.quantized
        ],
    }


def _plan_table(plan: FolderPlan) -> str:
    from jquant.core.human import human_shape, human_size, text_table
    from jquant.plan.report import by_type

    rows = [(spec.name, human_shape(spec.shape), spec.type, human_size(spec.nbytes)) for spec in plan.layout]
    kinds = [(t, str(n), human_size(b)) for t, n, b in by_type(plan.layout)]
    tensors = text_table(("tensor", "shape", "type", "size"), rows, (3,))
    return f"{tensors}\n\n{text_table(('type', 'tensors', 'size'), kinds, (1, 2))}"


def _summary(out: Path, plan: FolderPlan, report: dict) -> str:
    from jquant.core.human import human_size

    size = sum(file["bytes"] for file in report["files"])
    known = [t for t in report["tensors"] if t["error"] is not None]  # of this run
    worst = max(known, key=lambda t: t["error"], default=None)
    lines = [
        f"{out}",
        f"  {plan.scheme.name}, {human_size(size)}, "
        f"{report['tensor_bytes'] / max(report['source_tensor_bytes'], 1):.1%} of the source's weights",
        f"  {len(plan.quantized)} weights quantized, {len(plan.ignore)} linear layers left as they are",
    ]
    if worst is not None:
        lines.append(f"  largest relative error {worst['error']:.2e}: {worst['name']}")
    memory = human_size(report["peak_memory_bytes"])
    lines.append(f"  {report['seconds']:.1f} s, peak memory {memory}")
    return "\n".join(lines)
