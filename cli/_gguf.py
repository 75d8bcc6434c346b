"""`jquant quantize MODEL OUT --type Q4_K_M`: from the request to `to_gguf`, and what it made as a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import _errors, _reporter, _runtime, _show
from ._gguf_request import Request
from ._progress import TaskProgress

if TYPE_CHECKING:
    from jquant.checkpoints import Model
    from jquant.core import Reporter
    from jquant.evaluation.coherence import Coherence
    from jquant.plan import Rule
    from jquant.writers import GgufFile


def quantize(asked: Request, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """What `jquant quantize` does for GGUF's types, in one process or as one of several."""
    start = time.monotonic()
    _runtime.start_jax()
    reports = _runtime.join(coordinator, processes, process)
    if asked.search_seconds and asked.target is not None and asked.target.kld is not None:
        raise typer.BadParameter("a search needs a size", param_hint="--search-seconds")
    if asked.out is not None and asked.check:
        from jquant.evaluation.engines import require_llama_cpp

        require_llama_cpp()
    quiet = asked.quiet or not reports
    with _reporter.reporter(quiet=quiet, details=asked.verbose and not asked.json) as reporter:
        file = _file(asked, reporter)
    if reports and asked.out is None:
        _show_plan(file, json=asked.json)
    elif reports:
        _report(asked, file, start, quiet)


def _file(asked: Request, reporter: Reporter) -> GgufFile:
    from jquant.calibration import Texts
    from jquant.writers import to_gguf

    return to_gguf(
        lambda: _opened(asked),
        asked.out,
        type=asked.type,
        imatrix=asked.imatrix,
        analyze=asked.analyze,
        feedback=asked.feedback,
        samples=Texts(*asked.texts),
        target=asked.target,
        rules=[*asked.rules, *_rules_of(asked.rules_file)],
        profile=asked.profile,
        like=asked.like,
        pure=asked.pure,
        output_type=asked.output_type,
        embedding_type=asked.embedding_type,
        protect_super_weights=asked.protect,
        protection_type=asked.protection_type,
        protection_coverage=asked.protection_coverage,
        balance_inputs=asked.balance,
        effort=asked.effort.value,
        sensitivity=asked.weighting.value,
        record=asked.sensitivity,
        search_seconds=asked.search_seconds,
        runtime=asked.runtime,
        max_shard_size=asked.max_shard_bytes,
        allow_fallback=asked.allow_fallback,
        threads=asked.threads,
        resume=asked.resume,
        force=asked.force,
        batch=asked.batch,
        reporter=reporter,
    )


def _opened(asked: Request) -> Model:
    from jquant.checkpoints import open_model

    return open_model(asked.model, pre_tokenizer=asked.pre_tokenizer, revision=asked.revision)


def _rules_of(file: Path | None) -> Sequence[Rule]:
    """The rules of --rules, which come after those of the command line: the first match wins."""
    from jquant.core import UserError
    from jquant.plan import parse_rules_file

    if file is None:
        return ()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--rules {file}: cannot be read ({error}).") from None
    return parse_rules_file(text, str(file))


def _show_plan(file: GgufFile, *, json: bool) -> None:
    from jquant.plan.report import plan_table

    if json:
        _show.result_json(file.report())
    else:
        _show.result(plan_table(file.plan))


def _report(asked: Request, file: GgufFile, start: float, quiet: bool) -> None:
    """What was written and how good it is; exit code 5 where --check finds that it makes no sense."""
    from jquant.plan.report import summary

    report: dict[str, Any] = file.report() | {
        "model": asked.model,
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_bytes": _runtime.peak_memory(),
    }
    for kind in ("notes", "warnings"):
        report["quality"][kind] = [_errors.as_options(text) for text in report["quality"][kind]]
    if not asked.json:
        _show.result(summary(report))
    verdict = (
        _check(file.paths[0], asked.threads or _runtime.default_threads(), quiet) if asked.check else None
    )
    if asked.json:
        _show.result_json(report | ({"check": verdict.report()} if verdict else {}))
    if verdict is not None and not verdict.passed:
        _show.remark(f"jquant: {asked.out}: {verdict.failure}")
        raise typer.Exit(_errors.INCOHERENT)


def _check(file: Path, threads: int, quiet: bool) -> Coherence:
    """Whether the new file writes sense."""
    from jquant.evaluation import check_file

    progress = TaskProgress(shown=not quiet)
    verdict = check_file(file, threads=threads, progress=lambda share: progress(file.name, "check", share))
    if not quiet:
        _show.remark(f"check: coherence {verdict.verdict}")
    return verdict
