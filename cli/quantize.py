"""`jquant quantize MODEL OUT --type TYPE`."""

from __future__ import annotations

import time
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _calibration, _errors, _folder, _options, _runtime, _show, _targets
from ._options import CALIBRATION, OUTPUT, REPORTING
from ._progress import ProgressBar, TaskProgress
from .profile import read_profile

if TYPE_CHECKING:
    from jquant.coherence import Coherence
    from jquant.plan import Plan

_TYPES = "Types"


class _Effort(Enum):
    fast = "fast"
    best = "best"


def _complete_type(incomplete: str) -> list[tuple[str, str]]:
    start = incomplete.upper()
    return [(name, about) for name, about in _all_types() if name.startswith(start)]


def _all_types() -> list[tuple[str, str]]:
    from jquant.plan import FILE_TYPES
    from jquant.schemes import SCHEMES

    return [(name, kind.about) for name, kind in [*FILE_TYPES.items(), *SCHEMES.items()]]


def _list_types(asked: bool) -> None:
    if asked:
        from jquant.text import text_table

        _show.result(text_table(("type", "what it is; sizes for an 8 B Llama 3"), _all_types()))
        raise typer.Exit


@_errors.one_line_errors
def quantize(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder, GGUF file (any architecture), hub id such as org/name, or URL: gs://…."
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(help="GGUF file to write, or folder. Not needed with --dry-run.")
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            "-t",
            help="llama.cpp's file type: Q4_K_M, Q8_0, Q2_K, F16, …, or W8A8, FP8, W4A16, GPTQ, AWQ for a "
            "folder. Default: the profile's, else Q4_K_M.",
            autocompletion=_complete_type,
        ),
    ] = None,
    list_types: Annotated[
        bool,
        typer.Option("--list-types", callback=_list_types, is_eager=True, help="Show all types and exit."),
    ] = False,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            help="Importance of each column: llama.cpp's imatrix, GGUF or .dat.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    analyze: Annotated[
        bool,
        typer.Option(
            "--analyze",
            help="Measure the importance first, as jquant analyze does, instead of reading it.",
            rich_help_panel=CALIBRATION,
        ),
    ] = False,
    feedback: Annotated[
        bool | None,
        typer.Option(
            "--feedback/--no-feedback",
            help="Fit each layer to the output of the original on --calibration, given what those before it "
            "lost. Minutes instead of seconds; the same size with far less damage below 4 bits. "
            "Default: with --analyze, where matrices have fewer than 4 bits.",
            show_default=False,
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    calibration: _options.Calibration = None,
    samples: _options.Samples = 512,
    sequence_length: _options.SequenceLength = 512,
    seed: _options.Seed = None,
    parse_special: _options.ParseSpecial = False,
    batch: _options.Batch = 4,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help="REGEX=TYPE for the tensors whose name has a match. Repeatable; the first one wins.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(
            "--rules",
            help="File of such rules, as llama-quantize's --tensor-type-file.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            help="TOML file or preset with bounds by role and layer: see jquant profile list.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    target_size: _targets.Size = None,
    target_bpw: _targets.Bpw = None,
    target_kld: _targets.Kld = None,
    runtime: _targets.Runtime = "llama.cpp-cpu",
    sensitivity: _targets.Sensitivity = None,
    weighting: _targets.Weighting = _targets.By.usual,
    search_seconds: _targets.SearchSeconds = 0.0,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            help="GGUF file whose types to repeat, tensor by tensor.",
            rich_help_panel=_TYPES,
        ),
    ] = None,
    pure: Annotated[
        bool,
        typer.Option("--pure", help="One type for all matrices, no mixture.", rich_help_panel=_TYPES),
    ] = False,
    output_type: Annotated[
        str | None,
        typer.Option("--output-type", help="Type of output.weight.", rich_help_panel=_TYPES),
    ] = None,
    embedding_type: Annotated[
        str | None,
        typer.Option("--embedding-type", help="Type of token_embd.weight.", rich_help_panel=_TYPES),
    ] = None,
    keep: _folder.Keep = None,
    alpha: _folder.Alpha = None,
    no_smooth: _folder.NoSmooth = False,
    static_activations: _folder.StaticActivations = False,
    target_error: _folder.TargetError = None,
    export_scales: _folder.ExportScales = None,
    no_fallback: Annotated[
        bool,
        typer.Option(
            "--no-fallback",
            help="Stop where a row length does not suit the type, rather than take another.",
            rich_help_panel=_TYPES,
        ),
    ] = False,
    revision: _options.Revision = None,
    pre_tokenizer: _options.PreTokenizer = None,
    protect_super_weights: Annotated[
        bool,
        typer.Option(
            "--protect-super-weights",
            help="Find the single weights without which the model is lost, give their tensors a larger type "
            "and keep them almost exactly.",
            rich_help_panel=_TYPES,
        ),
    ] = False,
    protection_type: Annotated[
        str,
        typer.Option("--protection-type", help="Type of their tensors.", rich_help_panel=_TYPES),
    ] = "Q6_K",
    protection_coverage: Annotated[
        float,
        typer.Option(
            "--protection-coverage",
            min=0.0,
            max=1.0,
            help="Protect those that account for this share of the loss which the removal of each costs.",
            rich_help_panel=_TYPES,
        ),
    ] = 0.95,
    effort: Annotated[
        _Effort,
        typer.Option(
            "--effort",
            help="fast, or best: some five times as long for up to 1% less error. With --feedback, best also "
            "tunes the whole file to the original's predictions, which takes several times longer again.",
            rich_help_panel=_TYPES,
        ),
    ] = _Effort.fast,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            "-n",
            help="Show the plan: type and size of each tensor. Writes nothing.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a run that was interrupted.", rich_help_panel=OUTPUT),
    ] = False,
    force: _options.Force = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            help="Split into files of at most this size: 2GB, 500MB, 1.5GiB.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Default: one per processor.", rich_help_panel=OUTPUT),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Let llama.cpp write with the new file; exit code 5 where it makes no sense.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    coordinator: _options.Coordinator = None,
    processes: _options.Processes = None,
    process: _options.Process = None,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show the type of every tensor.", rich_help_panel=REPORTING),
    ] = False,
) -> None:
    """Quantize a model to a GGUF file, or with --type W8A8, FP8, W4A16, GPTQ or AWQ to a folder.

    jquant quantize SmolLM2-135M-Instruct smol-q4.gguf --type Q4_K_M
    """
    if out is None and not dry_run:
        raise typer.BadParameter("name the file to write, or add --dry-run", param_hint="OUT")
    if analyze and imatrix:
        raise typer.BadParameter(
            "measures what --imatrix would read; give one of them", param_hint="--analyze"
        )
    shard_bytes = _options.size_in_bytes(max_shard_size) if max_shard_size else None
    if _folder.is_scheme(type):
        _folder.quantize(
            context,
            model,
            out,
            str(type),
            keep=keep or [],
            alpha=alpha,
            no_smooth=no_smooth,
            static=static_activations,
            target_error=target_error,
            export_scales=export_scales,
            imatrix=imatrix,
            analyze=analyze,
            feedback=feedback,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            parse_special=parse_special,
            batch=batch,
            revision=revision,
            pre_tokenizer=pre_tokenizer,
            dry_run=dry_run,
            max_shard_bytes=shard_bytes,
            force=force,
            json=json,
            quiet=quiet,
        )
        return
    if keep:
        raise typer.BadParameter("is for W8A8, FP8, W4A16, GPTQ and AWQ; see --rule", param_hint="--keep")
    if alpha is not None or no_smooth:
        raise typer.BadParameter("is for W8A8", param_hint="--alpha, --no-smooth")
    if target_error is not None:
        raise typer.BadParameter("is for W8A8", param_hint="--target-error")
    if export_scales is not None:
        raise typer.BadParameter("is for W8A8, FP8, W4A16, GPTQ and AWQ", param_hint="--export-scales")
    if static_activations:
        raise typer.BadParameter("is for W8A8 and FP8", param_hint="--static-activations")
    target = _targets.target(target_size, target_bpw, target_kld)
    if target and (type or pure or like):
        raise typer.BadParameter("a target chooses the types itself", param_hint="--type, --pure, --like")
    if like and (type or pure):
        raise typer.BadParameter("--like says what each type is", param_hint="--type, --pure")
    start = time.monotonic()
    _runtime.start_jax()
    reports = _runtime.join(coordinator, processes, process)
    quiet = quiet or not reports

    from jquant import hosts, mesh, protection, tuning
    from jquant.analyze import as_json
    from jquant.convert import open_model, write_gguf
    from jquant.dynamic import recipe
    from jquant.fitting import Feedback, check_importance, pays
    from jquant.io import check_target, hub
    from jquant.io import imatrix as imatrix_file
    from jquant.plan import (
        check_encodable,
        file_type,
        plan,
        protect,
        protect_settled,
        runtime_types,
        settle,
        tensor_type,
    )
    from jquant.quality import assess
    from jquant.report import plan_report, plan_table, remarks, summary

    # Slips of the command line show before a download.
    several = mesh.several()
    if several and feedback:
        raise typer.BadParameter("runs in one process only", param_hint="--feedback")
    given_profile = read_profile(profile) if profile else None
    kind = file_type(type or (given_profile and given_profile.file_type) or "Q4_K_M").name
    if check and not dry_run:
        from jquant.engines import require_llama_cpp

        require_llama_cpp()
    if out is not None and not dry_run and not max_shard_size:
        check_target(out, force=force or resume)
    runtime_types(runtime)
    tensor_type(protection_type, "--protection-type")
    given_rules = _rules(rule, rules)
    importance = imatrix_file.read(imatrix) if imatrix else None
    path = hub.resolve(model, revision=revision)
    opened = open_model(path, name=hub.name_of(model), pre_tokenizer=pre_tokenizer)
    for remark in () if quiet else opened.remarks:
        _show.remark(f"note: {remark}")
    needs_text = bool(search_seconds) or weighting is _targets.By.gradients
    needs_text |= target_kld is not None and calibration is not None
    data = None
    if analyze or feedback or protect_super_weights or (target and needs_text):
        data = _calibration.read(
            opened,
            calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            parse_special=parse_special,
            quiet=quiet,
        )
    if target and analyze and data is not None:  # the types depend on it
        importance = _calibration.importance(opened, data, batch=batch, quiet=quiet)
    has_imatrix = analyze or bool(feedback) or importance is not None
    imatrix_name = str(imatrix or ("jquant quantize --analyze" if analyze else ""))
    specs, spikes = opened.source.specs, []
    protected = protection.of_profile(given_profile, specs) if given_profile else {}
    if protect_super_weights and data is not None:
        spikes = protection.super_weights(opened, data)
        covered = protection.protected(spikes, specs, protection_coverage)
        protected = protection.united_positions(protected, covered)
    damage: dict[str, float] = {}
    searched = None

    def about(made: Plan) -> str:
        return recipe(
            made,
            imatrix=importance,
            effort=effort.value,
            profile=given_profile,
            target=target,
            rules=given_rules,
            protected=protected,
        )

    if target is None and like is None:
        planned = plan(
            opened.source.specs,
            opened.metadata,
            kind,
            rules=given_rules,
            profile=given_profile,
            pure=pure,
            output_type=output_type,
            embedding_type=embedding_type,
            has_imatrix=has_imatrix,
            allow_fallback=not no_fallback,
        )
    else:
        settled = settle(
            opened.source.specs,
            opened.metadata,
            rules=given_rules,
            profile=given_profile,
            output_type=output_type,
            embedding_type=embedding_type,
            has_imatrix=has_imatrix,
        )
        if like is not None:
            planned = _targets.like(opened, settled, like, has_imatrix, not no_fallback)
        else:
            assert target is not None
            settled = protect_settled(settled, protected, protection_type)
            planned, damage, searched = _targets.plan(
                opened,
                settled,
                target,
                importance,
                imatrix_name,
                about,
                profile=given_profile,
                runtime=runtime,
                file=sensitivity,
                weighting=weighting,
                seconds=search_seconds,
                data=data if needs_text else None,
                max_shard_bytes=shard_bytes,
                threads=threads or _runtime.default_threads(),
                quiet=quiet,
            )
    if not dry_run:
        check_encodable(planned)
    if feedback is None:
        feedback = analyze and not several and pays(planned, protected)
        if feedback and not quiet:
            _show.remark(
                "note: below 4 bits, layers are fitted with error feedback; --no-feedback does without."
            )
    fed = None
    if feedback and data is not None:
        fed = Feedback(
            data,
            batch=batch,
            tuning=tuning.Settings() if effort is _Effort.best else None,
            announce=None if quiet else lambda known: _show.remark(f"note: {known}"),
            progress=_calibration.progress(data, quiet=quiet),
            tuning_progress=_calibration.tuning_progress(quiet=quiet),
        )
    planned = protect(planned, protected, protection_type)
    if protect_super_weights and not quiet:
        _show.remark(f"note: {protection.note(spikes, protected)}")
    if analyze and importance is None and data is not None and not dry_run:
        importance = _calibration.importance(opened, data, batch=batch, quiet=quiet)
    if fed is not None and not dry_run:
        check_importance(planned, protected, importance)
    if not quiet:
        for remark in remarks(planned, importance.entries if importance else None):
            _show.remark(f"note: {remark}")
    if verbose and not dry_run and not json:
        _show.remark(plan_table(planned))
    if dry_run or out is None:
        if not reports:
            return
        _show.result_json(plan_report(planned, damages=damage)) if json else _show.result(plan_table(planned))
        return

    total = sum(spec.nbytes for spec in opened.source.specs.values())
    write = hosts.write_gguf if several else partial(write_gguf, feedback=fed)
    with ProgressBar(total, shown=not quiet) as progress:
        written = write(
            opened,
            planned,
            out,
            imatrix=importance,
            imatrix_name=imatrix_name,
            protected=protected,
            recipe=about(planned),
            effort=effort.value,
            max_shard_bytes=shard_bytes,
            threads=threads or _runtime.default_threads(),
            resume=resume,
            force=force,
            progress=progress,
        )
    if not reports:
        return
    starved = _calibration.starved(written.fed, quiet=quiet)
    if written.tuned and not quiet:
        _show.remark(f"note: {written.tuned}")
    quality = assess(planned, written.errors, has_imatrix=importance is not None)
    if not quiet:
        for note in quality.notes:
            _show.remark(f"note: {note}")
        for warning in quality.warnings:
            _show.remark(f"warning: {warning}")
    report = plan_report(planned, errors=written.errors, damages=damage) | {
        "model": model,
        "target": target and str(target),
        "search": searched,
        "files": [{"path": str(file), "bytes": file.stat().st_size} for file in written.paths],
        "quality": quality.report(),
        **({"feedback": {name: one.error for name, one in written.fed.items()}} if feedback else {}),
        **({"starved_experts": starved} if starved else {}),
        **({"tuning": written.tuned._asdict()} if written.tuned else {}),
        **({"super_weights": as_json(spikes)} if protect_super_weights else {}),
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_bytes": _runtime.peak_memory(),
    }
    if not json:
        _show.result(summary(report))
    verdict = _check(written.paths[0], threads, quiet) if check else None
    if json:
        _show.result_json(report | ({"check": verdict.report()} if verdict else {}))
    if verdict is not None and not verdict.passed:
        _show.remark(f"jquant: {out}: {verdict.failure}")
        raise typer.Exit(_errors.INCOHERENT)


def _check(file: Path, threads: int | None, quiet: bool) -> Coherence:
    """Whether the new file writes sense."""
    from jquant.comparison import check_file

    progress = TaskProgress(shown=not quiet)
    verdict = check_file(
        file,
        threads=threads or _runtime.default_threads(),
        progress=lambda share: progress(file.name, "check", share),
    )
    if not quiet:
        _show.remark(f"check: coherence {verdict.verdict}")
    return verdict


def _rules(options: list[str] | None, file: Path | None) -> list:
    """Rules of the command line before those of the file: the first match wins."""
    from jquant.core import UserError
    from jquant.plan import parse_rule, parse_rules_file

    found = [parse_rule(text) for text in options or []]
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--rules {file}: cannot be read ({error}).") from None
        found += parse_rules_file(text, str(file))
    return found
