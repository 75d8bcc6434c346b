"""What `to_gguf` does: measure, choose types, fit, write. Each step takes what those before it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from jquant.allocation import Allocated, allocate
from jquant.calibration import SuperWeight
from jquant.calibration import super_weights as protection
from jquant.checkpoints.model import Model
from jquant.core import Progress, Reporter, TensorSpec
from jquant.distributed import mesh
from jquant.distributed.team import everyone
from jquant.io import GgufSource
from jquant.io.imatrix import Imatrix
from jquant.ldlq import tuning
from jquant.plan import Plan, protect_settled, settle
from jquant.plan import like as plan_like
from jquant.plan import plan as plan_types
from jquant.plan.header import recipe
from jquant.plan.report import plan_table
from jquant.smoothquant.balance import Balanced, balance_model
from jquant.text.samples import Samples
from jquant.writers._gguf_file import GgufFile
from jquant.writers._gguf_options import Options
from jquant.writers._measured import measured_importance
from jquant.writers.gguf import write_gguf
from jquant.writers.gguf_feedback import Feedback, pays
from jquant.writers.quality import assess, starved, starved_note


class Known(NamedTuple):
    """A model, and what was measured of it before its types are chosen."""

    model: Model  # from balancing on the balanced one
    samples: Samples | None
    imatrix: Imatrix | None
    super_weights: list[SuperWeight] | None
    protected: dict[str, list[tuple[int, int]]]
    balanced: Balanced | None


def measure(model: Model, asked: Options, reporter: Reporter) -> Known:
    """What the plan depends on: samples of text, importance for a target, super weights."""
    samples, imatrix, balanced, harmful = None, asked.imatrix, None, None
    if asked.needs_text:
        samples = asked.samples if isinstance(asked.samples, Samples) else asked.samples.load(model)
        for remark in samples.remarks:
            reporter.note(remark)
    if asked.balances_now and samples is not None:
        step = reporter.steps("balance")
        balanced = balance_model(model, samples, batch=asked.batch, team=everyone(), progress=step)
        reporter.note(str(balanced))
        model = balanced.model
        imatrix = imatrix and balanced.imatrix(imatrix)
    if asked.target is not None and asked.analyze and samples is not None:
        imatrix = measured_importance(model, samples, batch=asked.batch, reporter=reporter)
    specs = model.source.specs
    protected = protection.of_profile(asked.profile, specs) if asked.profile else {}
    if asked.protects and samples is not None:
        harmful = protection.super_weights(model, samples).harmful
        covered = protection.protected(harmful, specs, asked.protection_coverage)
        protected = protection.united_positions(protected, covered)
    return Known(model, samples, imatrix, harmful, protected, balanced)


def types_of(known: Known, asked: Options, reporter: Reporter) -> Allocated:
    """A type for each tensor: the file type's, those of another file, or the best for the target."""
    specs, metadata = known.model.source.specs, known.model.metadata
    if asked.target is None and asked.like is None:
        plan = plan_types(
            specs,
            metadata,
            asked.type,
            rules=asked.rules,
            profile=asked.profile,
            pure=asked.pure,
            output_type=asked.output_type,
            embedding_type=asked.embedding_type,
            has_imatrix=asked.has_imatrix,
            allow_fallback=asked.allow_fallback,
        )
        return Allocated(plan, {})
    settled = settle(
        specs,
        metadata,
        rules=asked.rules,
        profile=asked.profile,
        output_type=asked.output_type,
        embedding_type=asked.embedding_type,
        has_imatrix=asked.has_imatrix,
    )
    if asked.like is not None:
        plan = plan_like(
            specs,
            settled,
            {name: spec.type for name, spec in GgufSource(asked.like).specs.items()},
            str(asked.like),
            has_imatrix=asked.has_imatrix,
            allow_fallback=asked.allow_fallback,
        )
        return Allocated(plan, {})
    assert asked.target is not None
    return allocate(
        known.model,
        protect_settled(settled, known.protected, asked.protection_type),
        asked.target,
        imatrix=known.imatrix,
        imatrix_name=asked.imatrix_name,
        profile=asked.profile,
        runtime=asked.runtime,
        sensitivity=asked.sensitivity,
        samples=known.samples if asked.plan_needs_text else None,
        search_seconds=asked.search_seconds,
        record=asked.record,
        recipe=partial(_recipe, known, asked),
        max_shard_bytes=asked.max_shard_bytes,
        threads=asked.threads,
        reporter=reporter,
    )


def _recipe(known: Known, asked: Options, plan: Plan) -> str:
    """How the file is made, for its header."""
    return recipe(
        plan,
        imatrix=known.imatrix,
        effort=asked.effort,
        profile=asked.profile,
        target=asked.target,
        rules=asked.rules,
        protected=known.protected,
        balanced=bool(known.balanced and known.balanced.places),
    )


def feedback_of(known: Known, plan: Plan, asked: Options, reporter: Reporter) -> Feedback | None:
    """Error feedback, where it is asked for, or pays and nothing is said of it."""
    samples, wanted = asked.feedback_samples or known.samples, asked.feedback
    if wanted is None:
        wanted = asked.analyze and pays(plan, known.protected)
        if wanted:
            reporter.note("below 4 bits, layers are fitted with error feedback; feedback=False does without.")
    if not wanted or samples is None:
        return None
    tunes = asked.effort == "best" and not mesh.several()
    if asked.effort == "best" and not tunes:
        reporter.note("tuning is of one process; several leave the file as error feedback made it.")
    return Feedback(
        samples,
        batch=asked.batch,
        tuning=tuning.Settings() if tunes else None,
        announce=(lambda forecast: reporter.note(str(forecast))) if reporter.is_heard else None,
        tuning_progress=_tuning(reporter),
    )


def _tuning(reporter: Reporter) -> tuning.Progress:
    def show(done: int, of: int, divergence: float) -> None:
        reporter.progress(Progress("tuning", done, of, f"KL divergence {divergence:.4f}"))

    return show


def write(
    file: GgufFile, known: Known, fitting: Feedback | None, asked: Options, out: Path, reporter: Reporter
) -> GgufFile:
    """Write the file, and say how good it is."""
    reporter.details(plan_table(file.plan))
    if fitting is not None:
        tokens = int(fitting.samples.lengths.sum())
        fitting = fitting._replace(progress=reporter.steps("feedback", tokens=tokens))
    written = write_gguf(
        known.model,
        file.plan,
        out,
        imatrix=known.imatrix,
        imatrix_name=asked.imatrix_name,
        protected=known.protected,
        recipe=_recipe(known, asked, file.plan),
        effort=asked.effort,
        feedback=fitting,
        max_shard_bytes=asked.max_shard_bytes,
        threads=asked.threads,
        resume=asked.resume,
        force=asked.force,
        progress=_bytes(known.model.source.specs, reporter),
    )
    if experts := starved(written.fed):
        reporter.note(starved_note(experts))
    if written.tuned:
        reporter.note(str(written.tuned))
    quality = assess(file.plan, written.errors, has_imatrix=known.imatrix is not None)
    for note in quality.notes:
        reporter.note(note)
    for warning in quality.warnings:
        reporter.warning(warning)
    return replace(
        file,
        paths=written.paths,
        errors=written.errors,
        fed=written.fed if fitting is not None else None,
        tuned=written.tuned,
        quality=quality,
    )


def _bytes(specs: Mapping[str, TensorSpec], reporter: Reporter) -> Callable[[str, int], None]:
    """Bytes of the source that are done, summed up over the threads that write."""
    total, done, lock = sum(spec.nbytes for spec in specs.values()), 0, Lock()

    def show(name: str, more: int) -> None:
        nonlocal done
        with lock:
            done += more
            reporter.progress(Progress("write", done, total, name))

    return show
