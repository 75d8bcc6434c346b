"""`jquant quantize MODEL OUTDIR --type W8A8`: from the request to `to_folder`, and its report."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import typer

from . import _errors, _reporter, _runtime, _show
from ._folder_request import Request

if TYPE_CHECKING:
    from jquant.core import Reporter
    from jquant.writers import QuantizedFolder
    from jquant.writers.folder_plan import Checkpoint, FolderPlan


def quantize(asked: Request, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """What `jquant quantize` does for these types, in one process or as one of several."""
    start = time.monotonic()
    _runtime.start_jax()
    reports = _runtime.join(coordinator, processes, process)
    quiet = asked.quiet or not reports
    with _reporter.reporter(quiet=quiet, details=False) as reporter:
        folder = _folder(asked, reporter)
    if reports and asked.out is None:
        _show_plan(folder, json=asked.json)
    elif reports:
        _report(asked, folder, start, quiet)
    if folder.missed:
        raise typer.Exit(_errors.UNREACHED)


def _folder(asked: Request, reporter: Reporter) -> QuantizedFolder:
    from jquant.calibration import Texts
    from jquant.writers import to_folder

    return to_folder(
        lambda: _opened(asked),
        asked.out,
        scheme=asked.type,
        samples=Texts(*asked.texts),
        alpha=asked.alpha,
        smooth=not asked.no_smooth,
        static_activations=asked.static,
        asymmetric_activations=asked.asymmetric,
        keep=asked.keep,
        imatrix=asked.imatrix,
        analyze=asked.analyze,
        feedback=asked.feedback,
        target_error=asked.target_error,
        export_scales=asked.export_scales,
        max_shard_size=asked.max_shard_bytes,
        resume=asked.resume,
        force=asked.force,
        batch=asked.batch,
        reporter=reporter,
    )


def _opened(asked: Request) -> Checkpoint:
    from jquant.io import hub
    from jquant.io.paths import local
    from jquant.writers.folder_plan import open_checkpoint

    path = local(hub.resolve(asked.model, revision=asked.revision), f"--type {asked.type}")
    opened = open_checkpoint(path, name=hub.name_of(asked.model), pre_tokenizer=asked.pre_tokenizer)
    return opened._replace(title=asked.model)


def _show_plan(folder: QuantizedFolder, *, json: bool) -> None:
    if json:
        _show.result_json(folder.report())
    else:
        _show.result(_plan_table(folder.plan))


def _report(asked: Request, folder: QuantizedFolder, start: float, quiet: bool) -> None:
    """Say what was written, what smoothing did, and where it misses the target."""
    from jquant.smoothquant.report import smoothing_table

    report: dict[str, Any] = folder.report() | {
        "model": asked.model,
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_bytes": _runtime.peak_memory(),
    }
    for place in report["smoothing"] or ():
        place["advice"] = place["advice"] and _errors.as_options(place["advice"])
    if asked.json:
        _show.result_json(report)
    else:
        if folder.smoothing and not quiet:
            _show.remark(_errors.as_options(smoothing_table(folder.smoothing, folder.stored)))
        _show.result(_summary(folder, report))
    if folder.missed:
        _show.remark(f"jquant: {_errors.as_options(folder.missed)}")


def _plan_table(plan: FolderPlan) -> str:
    from jquant.core.human import human_shape, human_size, text_table
    from jquant.plan.report import by_type

    rows = [(spec.name, human_shape(spec.shape), spec.type, human_size(spec.nbytes)) for spec in plan.layout]
    kinds = [(t, str(n), human_size(b)) for t, n, b in by_type(plan.layout)]
    tensors = text_table(("tensor", "shape", "type", "size"), rows, (3,))
    return f"{tensors}\n\n{text_table(('type', 'tensors', 'size'), kinds, (1, 2))}"


def _summary(folder: QuantizedFolder, report: dict[str, Any]) -> str:
    from jquant.core.human import human_size

    plan, size = folder.plan, sum(file["bytes"] for file in report["files"])
    known = [name for name in plan.quantized if name in folder.errors]  # of this run
    worst = max(known, key=folder.errors.__getitem__, default=None)
    lines = [
        f"{folder.path}",
        f"  {plan.scheme.name}, {human_size(size)}, "
        f"{report['tensor_bytes'] / max(report['source_tensor_bytes'], 1):.1%} of the source's weights",
        f"  {len(plan.quantized)} weights quantized, {len(plan.ignore)} linear layers left as they are",
    ]
    if worst is not None:
        lines.append(f"  largest relative error {folder.errors[worst]:.2e}: {worst}")
    memory = human_size(report["peak_memory_bytes"])
    lines.append(f"  {report['seconds']:.1f} s, peak memory {memory}")
    return "\n".join(lines)
