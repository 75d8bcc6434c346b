"""A model as a Hugging Face folder in a scheme: all that `jquant quantize` does for one, with its defaults.

Options → checkpoint → plan → what is measured on text → codes → files. Nothing flows back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jquant.calibration import Texts
from jquant.checkpoints.fingerprint import digest_of_arrays, fingerprint
from jquant.checkpoints.model import Model
from jquant.core import SILENT, Progress, Reporter, UserError
from jquant.distributed import mesh
from jquant.distributed.team import everyone
from jquant.io import check_no_input, hub
from jquant.io import scales as scales_file
from jquant.io.findings import Findings
from jquant.io.imatrix import Imatrix
from jquant.io.paths import local
from jquant.text.samples import Samples
from jquant.writers._folder_options import AnyFile, FolderOptions, read_options
from jquant.writers._measured import measured_importance
from jquant.writers._quantized_folder import QuantizedFolder
from jquant.writers.folder import Ingredients, WrittenFolder, plan_facts, write_folder
from jquant.writers.folder_feedback import enough, feed_back
from jquant.writers.folder_plan import (
    Checkpoint,
    FedWeight,
    FolderPlan,
    checkpoint_of,
    open_checkpoint,
    plan_folder,
)
from jquant.writers.gguf_feedback import Feedback
from jquant.writers.scales import scales_of
from jquant.writers.w8a8 import Calibrated, measure_model, smooth_model

_USUAL_GROUP = 128

AnyCheckpoint = Checkpoint | Model | str | os.PathLike[str] | Callable[[], Checkpoint]


def to_folder(
    model: AnyCheckpoint,
    out: AnyFile | None,
    *,
    scheme: str = "W8A8",
    samples: Samples | Texts | None = None,
    alpha: float | None = None,
    smooth: bool = True,
    static_activations: bool = False,
    asymmetric_activations: bool = False,
    keep: str | Sequence[str] | None = None,
    imatrix: Imatrix | AnyFile | None = None,
    analyze: bool = False,
    feedback: Samples | bool | None = None,
    target_error: float | None = None,
    export_scales: AnyFile | None = None,
    max_shard_size: int | str | None = None,
    resume: bool = False,
    force: bool = False,
    batch: int = 4,
    reporter: Reporter = SILENT,
) -> QuantizedFolder:
    """Quantize a model to a folder that vLLM and transformers load, as `jquant quantize` does. If you are not
    sure, give a `scheme` and `samples` alone.

    Of several processes all call this with the same arguments, and share the work.

    Args:
        model: a Hugging Face folder that is open, its path, a hub id, or what opens it once the other
            arguments are known to be sound.
        out: the folder. None: nothing is written, and the result has the plan.
        scheme: "W8A8", "FP8", "W4A16", "GPTQ" or "AWQ".
        samples: text for whatever is measured on it, or where to take it from. None: what `load_samples`
            takes by itself. Read for smoothing, feedback, analyze and static_activations.
        alpha: W8A8: smooth all inputs with this alpha (SmoothQuant's equation 4); None: the best factors are
            searched. smooth: False leaves outliers of inputs where they are.
        static_activations: W8A8, FP8: one calibrated scale for all inputs of a matrix, rather than one for
            each token. asymmetric_activations: W8A8: codes that cover a token's range, with a zero.
        keep: regular expressions of weights to leave as they are, by their names in the folder. "auto":
            those whose rounding costs several times the average, which is the default where factors are
            searched; "none": none of them.
        imatrix: importance of each column, or llama.cpp's file of it. analyze: measure it here, on samples.
        feedback: fit each layer to the output of the original, on these samples or on `samples`. None: where
            factors are searched, on as many of the samples as 8 bits need.
        target_error: W8A8: mean KL divergence, in nats, that smoothing is to leave in no block, as far as a
            block's output error tells; what is missed stands in the result.
        export_scales: a safetensors file to write scales, smoothing factors and ranges of inputs to.
        max_shard_size: bytes, or such as "2GB". resume: continue a run that was interrupted. force: replace
            the folder. batch: samples on the device at a time.
        reporter: who hears notes and progress.

    Returns:
        The files and the plan, with what was measured on the way.

    Raises:
        UserError: a ValueError, for an argument that makes no sense, which it names, and for input that
            cannot be used.
        OutputError: where the output exists or cannot be written.

    >>> made = jquant.to_folder(model, out / "w8a8", scheme="W8A8", samples=samples, alpha=0.5)
    >>> made.plan.scheme.name, made.missed
    ('W8A8', '')
    """
    asked = read_options(
        out,
        scheme=scheme,
        samples=samples,
        alpha=alpha,
        smooth=smooth,
        static_activations=static_activations,
        asymmetric_activations=asymmetric_activations,
        keep=keep,
        imatrix=imatrix,
        analyze=analyze,
        feedback=feedback,
        target_error=target_error,
        export_scales=export_scales,
        max_shard_size=max_shard_size,
        resume=resume,
        force=force,
        batch=batch,
    )
    checkpoint = _opened(model, asked)
    if asked.export_scales is not None:
        check_no_input(asked.export_scales, checkpoint.model.files)
    plan = plan_folder(checkpoint, asked.scheme, asked.patterns)
    group = plan.scheme.weights.group_size
    if group not in (None, _USUAL_GROUP):
        reporter.note(f"groups of {group} weights, for rows here are no multiple of {_USUAL_GROUP}.")
    planned = QuantizedFolder(
        path=asked.out,
        plan=plan,
        source_tensor_bytes=_bytes_of(checkpoint),
        stored={name: weight.parts for name, weight in checkpoint.weights.items()},
        target_error=asked.target_error,
    )
    if asked.out is None:
        if asked.keeps_outstanding:
            reporter.note("weights that stand out, once they are measured, will stay as they are.")
        return planned
    return _make(planned, asked.out, checkpoint, asked, reporter)


def _make(
    planned: QuantizedFolder, out: Path, checkpoint: Checkpoint, asked: FolderOptions, reporter: Reporter
) -> QuantizedFolder:
    """Measure, fit and write."""
    text = _text(checkpoint, asked, reporter)
    with _findings(out, checkpoint, planned.plan, text, asked) as findings:
        calibrated = _calibrated(checkpoint, planned.plan, text, asked, findings, reporter)
        plan = calibrated.plan if calibrated else planned.plan
        made = _ingredients(checkpoint, text, calibrated, asked, reporter)
        fed = _fed(checkpoint, plan, text, made, asked, findings, reporter)
        written = _write(out, checkpoint, plan, made, fed, asked, reporter)
    if asked.export_scales is not None and mesh.is_first():
        about = {"scheme": plan.scheme.name, "model": checkpoint.title or str(checkpoint.folder)}
        found = scales_of(checkpoint, plan, out, calibrated)
        scales_file.write(asked.export_scales, found, about, force=asked.force)
    return replace(
        planned,
        plan=plan,
        files=written.files,
        errors=written.errors,
        smoothing=calibrated and calibrated.smoothing,
        fed_samples=fed.samples if fed else 0,
    )


def _opened(model: AnyCheckpoint, asked: FolderOptions) -> Checkpoint:
    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, Model):
        return checkpoint_of(model)
    if isinstance(model, str):
        path = local(hub.resolve(model), f"scheme={asked.scheme.name!r}")
        return open_checkpoint(path, name=hub.name_of(model))._replace(title=model)
    return model() if callable(model) else open_checkpoint(Path(model))


def _bytes_of(checkpoint: Checkpoint) -> int:
    return sum(spec.nbytes for spec in checkpoint.source.specs.values())


def _text(checkpoint: Checkpoint, asked: FolderOptions, reporter: Reporter) -> Samples | None:
    """None where nothing is measured."""
    if not asked.needs_text:
        return None
    found = asked.samples if isinstance(asked.samples, Samples) else asked.samples.load(checkpoint.model)
    for remark in found.remarks:
        reporter.note(remark)
    return found


def _findings(
    out: Path, checkpoint: Checkpoint, plan: FolderPlan, text: Samples | None, asked: FolderOptions
) -> AbstractContextManager[Findings | None]:
    """What a run of one process keeps for the one that resumes it."""
    if text is None or everyone().count > 1:
        return nullcontext()
    known = plan_facts(checkpoint, plan) | {
        "text": digest_of_arrays((text.tokens, text.lengths)),
        "options": asked.facts,
    }
    return Findings(out, fingerprint(checkpoint.model, known), resume=asked.resume)


def _calibrated(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    text: Samples | None,
    asked: FolderOptions,
    findings: Findings | None,
    reporter: Reporter,
) -> Calibrated | None:
    """Smoothing and what comes with it, or static scales alone; None where neither is asked for."""
    if text is None or not (asked.smooths or asked.scheme.static):
        return None
    measuring = reporter.steps("measure", tokens=_tokens(text))
    if not asked.smooths:
        return measure_model(checkpoint, plan, text, batch=asked.batch, progress=measuring, findings=findings)
    found = smooth_model(
        checkpoint,
        plan,
        text,
        asked.alpha,
        judge=asked.target_error is not None,
        keep=asked.keeps_outstanding,
        batch=asked.batch,
        progress=measuring,
        searching=reporter.steps("smoothing"),
        team=everyone(),
        findings=findings,
    )
    kept = [name for name in plan.quantized if name not in found.plan.quantized]
    if kept:
        names = ", ".join(name.removesuffix(".weight") for name in kept)
        reporter.note(f"{names} stand out and stay as they are; keep='none' rounds them too.")
    return found


def _ingredients(
    checkpoint: Checkpoint,
    text: Samples | None,
    calibrated: Calibrated | None,
    asked: FolderOptions,
    reporter: Reporter,
) -> Ingredients:
    """What weights are made with, the same in all processes."""
    importance = asked.imatrix
    if asked.analyze and text is not None:
        importance = measured_importance(checkpoint.model, text, batch=asked.batch, reporter=reporter)
    weights = importance.by_tensor(checkpoint.model.source.specs.values()) if importance else {}
    if importance and not weights:
        raise UserError(
            f"{asked.imatrix_name}: none of its tensors is in {checkpoint.folder}; it was made from another "
            "model."
        )
    made = Ingredients(importance=weights)
    if calibrated is not None:
        made = Ingredients(
            factors=calibrated.factors,
            importance=calibrated.importance or weights,
            input_scales=calibrated.input_scales or {},
        )
    return everyone().first(made)  # machines may differ in a last bit, and norms and matrices must agree


class _Fed(NamedTuple):
    weights: Iterator[FedWeight]
    samples: int  # that they are learned from


def _fed(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    text: Samples | None,
    made: Ingredients,
    asked: FolderOptions,
    findings: Findings | None,
    reporter: Reporter,
) -> _Fed | None:
    """Weights made with error feedback: where asked for, and unasked where factors are searched."""
    by_default = asked.feedback is None and asked.searches
    if text is None or not (asked.feedback or by_default):
        return None
    learned = enough(plan, checkpoint, text) if by_default else text
    if by_default:
        reporter.note(
            f"errors of weights are fed back, by {len(learned.tokens)} of {len(text.tokens)} samples; "
            "feedback=False takes the nearest codes, feedback=True all samples."
        )
    step = reporter.steps("feedback", tokens=_tokens(learned))
    feedback = Feedback(learned, batch=asked.batch, progress=step)
    weights = feed_back(checkpoint, plan, feedback, made.factors, everyone(), findings)
    return _Fed(weights, len(learned.tokens))


def _write(
    out: Path,
    checkpoint: Checkpoint,
    plan: FolderPlan,
    made: Ingredients,
    fed: _Fed | None,
    asked: FolderOptions,
    reporter: Reporter,
) -> WrittenFolder:
    total, done = _bytes_of(checkpoint), 0

    def show(name: str, more: int) -> None:
        nonlocal done
        done += more
        reporter.progress(Progress("write", done, total, name))

    return write_folder(
        checkpoint,
        plan,
        out,
        made,
        fed=fed and fed.weights,
        max_shard_bytes=asked.max_shard_bytes,
        resume=asked.resume,
        force=asked.force,
        progress=show,
    )


def _tokens(text: Samples) -> int:
    return int(text.lengths.sum())
