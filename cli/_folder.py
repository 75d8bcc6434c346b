"""`jquant quantize MODEL OUTDIR --type W8A8`: a folder in a scheme of compressed-tensors, GPTQ or AWQ."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _calibration, _errors, _options, _runtime, _show
from ._options import OUTPUT
from ._progress import ProgressBar

if TYPE_CHECKING:
    from jquant.folders import Checkpoint, FolderPlan
    from jquant.smoothing import Smoothing

_PANEL = "Types"
_AUTO, _NONE = "auto", "none"  # --keep
_SCHEMES = ("W8A8", "FP8", "W4A16", "GPTQ", "AWQ")  # here too, for --help is not to wait for JAX
# fmt: off
_KNOWN = frozenset({
    "model", "out", "type", "keep", "alpha", "no_smooth", "imatrix", "analyze", "calibration", "samples",
    "sequence_length", "seed", "parse_special", "batch", "revision", "pre_tokenizer", "dry_run",
    "max_shard_size", "force", "json", "quiet", "threads", "feedback", "static_activations",
    "asymmetric_activations", "target_error", "export_scales", "resume", "coordinator", "processes",
    "process",
})
# fmt: on

Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        help="W8A8, FP8, W4A16, GPTQ, AWQ: REGEX of weights to leave as they are, by their names in the "
        "folder. Repeatable. auto: those whose rounding costs several times the average, the default of W8A8 "
        "whose factors are searched; none: none of them.",
        rich_help_panel=_PANEL,
    ),
]

Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        min=0.0,
        max=1.0,
        help="W8A8: smooth all inputs with this alpha, rather than search the best factors.",
        rich_help_panel=_PANEL,
    ),
]
NoSmooth = Annotated[
    bool,
    typer.Option(
        "--no-smooth", help="W8A8: leave outliers of inputs where they are.", rich_help_panel=_PANEL
    ),
]
StaticActivations = Annotated[
    bool,
    typer.Option(
        "--static-activations",
        help="W8A8, FP8: one calibrated scale for all inputs of a matrix, rather than one for each token.",
        rich_help_panel=_PANEL,
    ),
]
AsymmetricActivations = Annotated[
    bool,
    typer.Option(
        "--asymmetric-activations",
        help="W8A8: codes of a token's inputs that cover its range, from least to largest, with a zero in "
        "between: more exact, but not all of vLLM's kernels multiply them; those for NVIDIA GPUs do.",
        rich_help_panel=_PANEL,
    ),
]
TargetError = Annotated[
    float | None,
    typer.Option(
        "--target-error",
        min=0.0,
        help="W8A8: mean KL divergence, in nats, that smoothing is to leave in no block, as far as a block's "
        "output error tells; exit code 6 where it does.",
        rich_help_panel=_PANEL,
    ),
]
ExportScales = Annotated[
    Path | None,
    typer.Option(
        "--export-scales",
        help="W8A8, FP8, W4A16, GPTQ, AWQ: also write scales of weights and, where they were measured, "
        "smoothing factors and ranges of inputs to this safetensors file.",
        rich_help_panel=OUTPUT,
    ),
]


def is_scheme(type: str | None) -> bool:
    return type is not None and type.upper() in _SCHEMES


def quantize(
    context: typer.Context,
    model: str,
    out: Path | None,
    type: str,
    *,
    keep: list[str],
    alpha: float | None,
    no_smooth: bool,
    static: bool,
    asymmetric: bool,
    target_error: float | None,
    export_scales: Path | None,
    imatrix: Path | None,
    analyze: bool,
    feedback: bool | None,
    texts: _options.Texts,
    batch: int,
    revision: str | None,
    pre_tokenizer: str | None,
    dry_run: bool,
    max_shard_bytes: int | None,
    resume: bool,
    force: bool,
    json: bool,
    quiet: bool,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> None:
    """What `jquant quantize` does for these types, in one process or as one of several."""
    _refuse_others(context, type)
    type = type.upper()
    if type != "W8A8" and (alpha is not None or no_smooth):
        raise typer.BadParameter("is for W8A8", param_hint="--alpha, --no-smooth")
    if type not in ("W8A8", "FP8") and static:
        raise typer.BadParameter("is for W8A8 and FP8", param_hint="--static-activations")
    if type != "W8A8" and asymmetric:
        raise typer.BadParameter("is for W8A8", param_hint="--asymmetric-activations")
    if asymmetric and static:
        raise typer.BadParameter(
            "has one scale for each token, not --static-activations", param_hint="--asymmetric-activations"
        )
    smooths = type == "W8A8" and not no_smooth
    if target_error is not None and not smooths:
        raise typer.BadParameter("is for W8A8 that is smoothed", param_hint="--target-error")
    keeps = _AUTO in keep or (not keep and smooths and alpha is None)
    keep = [pattern for pattern in keep if pattern not in (_AUTO, _NONE)]
    if keeps and not smooths:
        raise typer.BadParameter("auto is for W8A8 that is smoothed", param_hint="--keep")
    if smooths and (imatrix or analyze):
        raise typer.BadParameter(
            "is measured anyway where W8A8 is smoothed", param_hint="--imatrix, --analyze"
        )
    start = time.monotonic()
    _runtime.start_jax()
    reports = _runtime.join(coordinator, processes, process)
    quiet = quiet or not reports

    from dataclasses import replace

    from jquant.core import UserError
    from jquant.fitting import Feedback
    from jquant.folder_feedback import enough, feed_back
    from jquant.folder_writer import Ingredients, write_folder
    from jquant.folders import open_checkpoint, plan_folder
    from jquant.io import check_folder, check_target, hub
    from jquant.io import imatrix as imatrix_file
    from jquant.io import scales as scales_file
    from jquant.io.paths import local
    from jquant.scale_export import scales_of
    from jquant.schemes import SCHEMES
    from jquant.schemes import asymmetric as with_zeros
    from jquant.smooth_report import smoothing_report, smoothing_table
    from jquant.team import everyone
    from jquant.w8a8 import measure_model, smooth_model

    if out is not None and not dry_run:
        check_folder(out, force=force)
        if export_scales is not None:
            check_target(export_scales, force=force)
    importance = imatrix_file.read(imatrix) if imatrix else None
    path = local(hub.resolve(model, revision=revision), f"--type {type}")
    checkpoint = open_checkpoint(path, name=hub.name_of(model), pre_tokenizer=pre_tokenizer)
    scheme = replace(SCHEMES[type], static=static)
    plan = plan_folder(checkpoint, with_zeros(scheme) if asymmetric else scheme, keep)
    if not quiet:
        _remark_groups(plan)
    if dry_run or out is None:
        if keeps and not quiet:
            _show.remark("note: weights that stand out, once they are measured, will stay as they are.")
        if reports:
            _show.result_json(_plan_report(checkpoint, plan)) if json else _show.result(_plan_table(plan))
        return
    data = calibrated = smoothing = None
    if analyze or smooths or feedback or static:
        data = _calibration.read(checkpoint.model, texts, quiet=quiet)
        if analyze:
            importance = _calibration.importance(checkpoint.model, data, batch=batch, quiet=quiet)
    weights = importance.by_tensor(checkpoint.model.source.specs.values()) if importance else {}
    if importance and not weights:
        raise UserError(f"{imatrix}: none of its tensors is in {path}; it was made from another model.")
    if smooths and data is not None:
        calibrated = smooth_model(
            checkpoint,
            plan,
            data,
            alpha,
            judge=target_error is not None,
            keep=keeps,
            batch=batch,
            progress=_calibration.progress(data, quiet=quiet),
            searching=_calibration.by_block("searched", quiet=quiet),
            team=everyone(),
        )
        weights, smoothing = calibrated.importance, calibrated.smoothing
        kept = [name for name in plan.quantized if name not in calibrated.plan.quantized]
        plan = calibrated.plan
        if kept and not quiet:
            names = ", ".join(name.removesuffix(".weight") for name in kept)
            _show.remark(f"note: {names} stand out and stay as they are; --keep none rounds them too.")
    elif static and data is not None:
        shown = _calibration.progress(data, quiet=quiet)
        calibrated = measure_model(checkpoint, plan, data, batch=batch, progress=shown)
    made = Ingredients(
        factors=calibrated.factors if calibrated else {},
        importance=weights,
        input_scales=(calibrated and calibrated.input_scales) or {},
    )
    made = everyone().first(made)  # machines may differ in a last bit, and norms and matrices must agree
    fed = None
    by_default = feedback is None and smooths and alpha is None
    if data is not None and (feedback or by_default):
        learned = enough(plan, checkpoint, data) if by_default else data
        if by_default and not quiet:
            _show.remark(
                f"note: errors of weights are fed back, by {len(learned.tokens)} of {len(data.tokens)} "
                "samples; --no-feedback takes the nearest codes, --feedback all samples."
            )
        shown = _calibration.progress(learned, quiet=quiet)
        fed = feed_back(
            checkpoint, plan, Feedback(learned, batch=batch, progress=shown), made.factors, everyone()
        )
    total = sum(spec.nbytes for spec in checkpoint.source.specs.values())
    with ProgressBar(total, shown=not quiet) as progress:
        written = write_folder(
            checkpoint,
            plan,
            out,
            made,
            fed=fed,
            max_shard_bytes=max_shard_bytes,
            resume=resume,
            force=force,
            progress=progress,
        )
    missed = _missed(out, smoothing, target_error) if smoothing and target_error is not None else ""
    if reports:
        stored = {name: weight.parts for name, weight in checkpoint.weights.items()}
        if export_scales is not None:
            found = scales_of(checkpoint, plan, out, calibrated)
            scales_file.write(export_scales, found, {"scheme": plan.scheme.name, "model": model}, force=force)
        report = _plan_report(checkpoint, plan, written.errors) | {
            "model": model,
            "smoothing": smoothing_report(smoothing, stored) if smoothing else None,
            **(
                {"target_error": {"target": target_error, "reached": not missed}}
                if target_error is not None
                else {}
            ),
            "files": [{"path": str(file), "bytes": file.stat().st_size} for file in written.files],
            "seconds": round(time.monotonic() - start, 3),
            "peak_memory_bytes": _runtime.peak_memory(),
        }
        if json:
            _show.result_json(report)
        else:
            if smoothing and not quiet:
                _show.remark(smoothing_table(smoothing, stored))
            _show.result(_summary(out, plan, report))
        if missed:
            _show.remark(f"jquant: {missed}")
    if missed:
        raise typer.Exit(_errors.UNREACHED)


def _missed(out: Path, smoothing: Smoothing, target: float) -> str:
    """What is to be said where blocks have more error than the target; "" where none has."""
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


def _refuse_others(context: typer.Context, type: str) -> None:
    """Options that say something of GGUF files only."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _KNOWN and source is not None and source.name == "COMMANDLINE":
            hint = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"says nothing of {type.upper()}, which has --keep", param_hint=hint)


def _remark_groups(plan: FolderPlan) -> None:
    group = plan.scheme.weights.group_size
    if group not in (None, 128):
        _show.remark(f"note: groups of {group} weights, for rows here are no multiple of 128.")


def _plan_report(
    checkpoint: Checkpoint, plan: FolderPlan, errors: dict[str, float] | None = None
) -> dict[str, object]:
    from jquant.report import by_type

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
    from jquant.report import by_type
    from jquant.text import human_shape, human_size, text_table

    rows = [(spec.name, human_shape(spec.shape), spec.type, human_size(spec.nbytes)) for spec in plan.layout]
    kinds = [(t, str(n), human_size(b)) for t, n, b in by_type(plan.layout)]
    tensors = text_table(("tensor", "shape", "type", "size"), rows, (3,))
    return f"{tensors}\n\n{text_table(('type', 'tensors', 'size'), kinds, (1, 2))}"


def _summary(out: Path, plan: FolderPlan, report: dict) -> str:
    from jquant.text import human_size

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
