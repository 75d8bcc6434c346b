"""`jquant quantize MODEL OUT --type Q4_K_M`: from the request to the GGUF file and its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import _calibration, _errors, _runtime, _show, _targets
from ._gguf_request import Chosen, Effort, Request, Run
from ._progress import ProgressBar, TaskProgress
from .profile import read_profile

if TYPE_CHECKING:
    from jquant.evaluation.coherence import Coherence
    from jquant.plan import Plan, Rule
    from jquant.text.samples import Samples
    from jquant.writers.gguf import Written
    from jquant.writers.gguf_feedback import Feedback


def quantize(asked: Request, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """What `jquant quantize` does for GGUF's types, in one process or as one of several."""
    start = time.monotonic()
    _runtime.start_jax()
    reports = _runtime.join(coordinator, processes, process)

    from dataclasses import replace

    from jquant.calibration import super_weights as protection
    from jquant.plan import check_encodable, protect
    from jquant.plan.report import plan_report, plan_table, remarks
    from jquant.writers.gguf_feedback import check_importance

    asked = replace(asked, quiet=asked.quiet or not reports)
    run = _opened(asked)
    _measure(run)
    chosen = _chosen(run)
    if asked.out is not None:
        check_encodable(chosen.plan)
    run.feedback = _feedback(run, chosen.plan)
    plan = protect(chosen.plan, run.protected, asked.protection_type)
    if asked.protect:
        run.remark(f"note: {protection.note(run.super_weights, run.protected)}")
    if asked.analyze and run.importance is None and run.data is not None and asked.out is not None:
        run.importance = _calibration.importance(run.opened, run.data, batch=asked.batch, quiet=asked.quiet)
    if run.feedback is not None and asked.out is not None:
        check_importance(plan, run.protected, run.importance)
    if not asked.quiet:
        for remark in remarks(plan, run.importance.entries if run.importance else None):
            run.remark(f"note: {remark}")
    if asked.out is None:
        if reports and asked.json:
            _show.result_json(plan_report(plan, damages=chosen.damages))
        elif reports:
            _show.result(plan_table(plan))
        return
    if asked.verbose and not asked.json:
        _show.remark(plan_table(plan))
    written = _write(run, plan, asked.out)
    if reports:
        _report(run, chosen._replace(plan=plan), asked.out, written, start)


def _opened(asked: Request) -> Run:
    """The model, and all else that is read; slips of the command line show before a download."""
    from jquant.checkpoints.model import open_model
    from jquant.io import check_target, hub
    from jquant.io import imatrix as imatrix_file
    from jquant.plan import file_type, runtime_types, tensor_type

    profile = read_profile(asked.profile) if asked.profile else None
    type = file_type(asked.type or (profile and profile.file_type) or "Q4_K_M").name
    if asked.out is not None:
        if asked.check:
            from jquant.evaluation.engines import require_llama_cpp

            require_llama_cpp()
        if not asked.max_shard_bytes:
            check_target(asked.out, force=asked.force or asked.resume)
    runtime_types(asked.runtime)
    tensor_type(asked.protection_type, "--protection-type")
    rules = _rules(asked.rules, asked.rules_file)
    importance = imatrix_file.read(asked.imatrix) if asked.imatrix else None
    path = hub.resolve(asked.model, revision=asked.revision)
    opened = open_model(path, name=hub.name_of(asked.model), pre_tokenizer=asked.pre_tokenizer)
    run = Run(asked, profile, type, rules, importance, opened)
    for remark in opened.remarks:
        run.remark(f"note: {remark}")
    return run


def _measure(run: Run) -> None:
    """What the plan depends on: samples of text, importance for a target, super weights."""
    from jquant.calibration import super_weights as protection

    asked = run.asked
    balances = asked.balance and (asked.out is not None or asked.target is not None)
    needed = asked.analyze or asked.feedback or asked.protect or balances
    if needed or (asked.target and asked.plan_needs_text):
        run.data = _calibration.read(run.opened, asked.texts, quiet=asked.quiet)
    if balances and run.data is not None:
        _balance(run, run.data)
    if asked.target and asked.analyze and run.data is not None:
        run.importance = _calibration.importance(run.opened, run.data, batch=asked.batch, quiet=asked.quiet)
    specs = run.opened.source.specs
    run.protected = protection.of_profile(run.profile, specs) if run.profile else {}
    if asked.protect and run.data is not None:
        run.super_weights = protection.super_weights(run.opened, run.data).harmful
        covered = protection.protected(run.super_weights, specs, asked.protection_coverage)
        run.protected = protection.united_positions(run.protected, covered)


def _balance(run: Run, data: Samples) -> None:
    """From here on the model is the balanced one."""
    from jquant.distributed.team import everyone
    from jquant.smoothquant.balance import balance_model

    asked = run.asked
    shown = _calibration.by_block("balanced", quiet=asked.quiet)
    run.balanced = balance_model(run.opened, data, batch=asked.batch, team=everyone(), progress=shown)
    run.remark(f"note: {run.balanced}")
    run.opened = run.balanced.model
    if run.importance is not None:
        run.importance = run.balanced.imatrix(run.importance)


def _chosen(run: Run) -> Chosen:
    """A type for each tensor: the file type's, those of another file, or the best for the target."""
    from jquant.plan import plan, protect_settled, settle

    asked, source = run.asked, run.opened
    has_imatrix = asked.analyze or bool(asked.feedback) or run.importance is not None
    if asked.target is None and asked.like is None:
        return Chosen(
            plan(
                source.source.specs,
                source.metadata,
                run.type,
                rules=run.rules,
                profile=run.profile,
                pure=asked.pure,
                output_type=asked.output_type,
                embedding_type=asked.embedding_type,
                has_imatrix=has_imatrix,
                allow_fallback=asked.allow_fallback,
            ),
            {},
        )
    settled = settle(
        source.source.specs,
        source.metadata,
        rules=run.rules,
        profile=run.profile,
        output_type=asked.output_type,
        embedding_type=asked.embedding_type,
        has_imatrix=has_imatrix,
    )
    if asked.like is not None:
        return Chosen(_targets.like(source, settled, asked.like, has_imatrix, asked.allow_fallback), {})
    assert asked.target is not None
    return Chosen(
        *_targets.plan(
            source,
            protect_settled(settled, run.protected, asked.protection_type),
            asked.target,
            run.importance,
            asked.imatrix_name,
            run.recipe,
            profile=run.profile,
            runtime=asked.runtime,
            file=asked.sensitivity,
            weighting=asked.weighting,
            seconds=asked.search_seconds,
            data=run.data if asked.plan_needs_text else None,
            max_shard_bytes=asked.max_shard_bytes,
            threads=asked.workers,
            quiet=asked.quiet,
        )
    )


def _feedback(run: Run, plan: Plan) -> Feedback | None:
    """Error feedback, where it is asked for, or pays and nothing is said of it."""
    from jquant.distributed import mesh
    from jquant.ldlq import tuning
    from jquant.writers.gguf_feedback import Feedback, pays

    asked, data = run.asked, run.data
    wanted = asked.feedback
    if wanted is None:
        wanted = asked.analyze and pays(plan, run.protected)
        if wanted:
            run.remark(
                "note: below 4 bits, layers are fitted with error feedback; --no-feedback does without."
            )
    if not wanted or data is None:
        return None
    tunes = asked.effort is Effort.best and not mesh.several()
    if asked.effort is Effort.best and not tunes:
        run.remark("note: tuning is of one process; several leave the file as error feedback made it.")
    return Feedback(
        data,
        batch=asked.batch,
        tuning=tuning.Settings() if tunes else None,
        announce=None if asked.quiet else lambda known: _show.remark(f"note: {known}"),
        progress=_calibration.progress(data, quiet=asked.quiet),
        tuning_progress=_calibration.tuning_progress(quiet=asked.quiet),
    )


def _write(run: Run, plan: Plan, out: Path) -> Written:
    from jquant.writers.gguf import write_gguf

    asked = run.asked
    total = sum(spec.nbytes for spec in run.opened.source.specs.values())
    with ProgressBar(total, shown=not asked.quiet) as progress:
        return write_gguf(
            run.opened,
            plan,
            out,
            imatrix=run.importance,
            imatrix_name=asked.imatrix_name,
            protected=run.protected,
            recipe=run.recipe(plan),
            effort=asked.effort.value,
            feedback=run.feedback,
            max_shard_bytes=asked.max_shard_bytes,
            threads=asked.workers,
            resume=asked.resume,
            force=asked.force,
            progress=progress,
        )


def _report(run: Run, chosen: Chosen, out: Path, written: Written, start: float) -> None:
    """Say what was written and how good it is; exit code 5 where --check finds that it makes no sense."""
    from jquant.calibration.report import as_json
    from jquant.plan.report import plan_report, summary
    from jquant.writers.quality import assess

    asked = run.asked
    starved = _calibration.starved(written.fed, quiet=asked.quiet)
    if written.tuned:
        run.remark(f"note: {written.tuned}")
    quality = assess(chosen.plan, written.errors, has_imatrix=run.importance is not None)
    for note in quality.notes:
        run.remark(f"note: {note}")
    for warning in quality.warnings:
        run.remark(f"warning: {warning}")
    report = plan_report(chosen.plan, errors=written.errors, damages=chosen.damages) | {
        "model": asked.model,
        "source_tensor_bytes": run.opened.tensor_bytes,
        "target": asked.target and str(asked.target),
        "search": chosen.search,
        "files": [{"path": str(file), "bytes": file.stat().st_size} for file in written.paths],
        "quality": quality.report(),
        **({"feedback": {name: one.error for name, one in written.fed.items()}} if run.feedback else {}),
        **({"starved_experts": starved} if starved else {}),
        **({"balance": [p._asdict() for p in run.balanced.places]} if run.balanced else {}),
        **({"tuning": written.tuned._asdict()} if written.tuned else {}),
        **({"super_weights": as_json(run.super_weights)} if asked.protect else {}),
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_bytes": _runtime.peak_memory(),
    }
    if not asked.json:
        _show.result(summary(report))
    verdict = _check(written.paths[0], asked.workers, asked.quiet) if asked.check else None
    if asked.json:
        _show.result_json(report | ({"check": verdict.report()} if verdict else {}))
    if verdict is not None and not verdict.passed:
        _show.remark(f"jquant: {out}: {verdict.failure}")
        raise typer.Exit(_errors.INCOHERENT)


def _check(file: Path, threads: int, quiet: bool) -> Coherence:
    """Whether the new file writes sense."""
    from jquant.evaluation import check_file

    progress = TaskProgress(shown=not quiet)
    verdict = check_file(file, threads=threads, progress=lambda share: progress(file.name, "check", share))
    if not quiet:
        _show.remark(f"check: coherence {verdict.verdict}")
    return verdict


def _rules(options: Sequence[str], file: Path | None) -> list[Rule]:
    """Rules of the command line before those of the file: the first match wins."""
    from jquant.core import UserError
    from jquant.plan import parse_rule, parse_rules_file

    found = [parse_rule(text) for text in options]
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--rules {file}: cannot be read ({error}).") from None
        found += parse_rules_file(text, str(file))
    return found
