"""`jquant quantize MODEL OUT --type TYPE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _errors, _folder, _folder_request, _gguf, _gguf_request, _options, _serves, _show, _targets
from ._options import CALIBRATION, OUTPUT, REPORTING

_TYPES = "GGUF files"


def _complete_type(incomplete: str) -> list[tuple[str, str]]:
    start = incomplete.upper()
    return [(name, about) for name, about in _all_types() if name.startswith(start)]


def _all_types() -> list[tuple[str, str]]:
    from jquant.checkpoints.schemes import SCHEMES
    from jquant.plan import FILE_TYPES

    return [(name, kind.about) for name, kind in [*FILE_TYPES.items(), *SCHEMES.items()]]


def _list_types(asked: bool) -> None:
    if asked:
        from jquant.core.human import text_table

        _show.result(text_table(("type", "what it is; sizes for an 8 B Llama 3"), _all_types()))
        raise typer.Exit


def _check_type(name: str) -> None:
    """Raises UserError for a name that is no type of GGUF files, with what else may be meant."""
    from jquant.core import UserError
    from jquant.plan import file_type

    try:
        file_type(name)
    except UserError as error:
        schemes = ", ".join(_serves.SCHEMES)
        meant = _serves.meant(name)
        raise UserError(f"--type {name}: {meant}{error} Of folders: {schemes}.") from None


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
            rich_help_panel=CALIBRATION,
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
    balance_inputs: Annotated[
        bool,
        typer.Option(
            "--balance-inputs",
            help="GGUF: the same model with other numbers in norms and behind them, which llama.cpp's "
            "rounding of inputs on a CPU harms less. For K-quants of 4 bits and more.",
            rich_help_panel=CALIBRATION,
        ),
    ] = False,
    feedback: Annotated[
        bool | None,
        typer.Option(
            "--feedback/--no-feedback",
            help="Fit each layer to the output of the original on --calibration, given what those before it "
            "lost. Minutes instead of seconds; the same size with far less damage below 4 bits. "
            "Default: with --analyze, where matrices have fewer than 4 bits; for W8A8 whose factors are "
            "searched, on a part of the samples.",
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
    keep: _folder_request.Keep = None,
    alpha: _folder_request.Alpha = None,
    no_smooth: _folder_request.NoSmooth = False,
    static_activations: _folder_request.StaticActivations = False,
    asymmetric_activations: _folder_request.AsymmetricActivations = False,
    target_error: _folder_request.TargetError = None,
    export_scales: _folder_request.ExportScales = None,
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
        _gguf_request.Effort,
        typer.Option(
            "--effort",
            help="fast, or best: some five times as long for up to 1% less error. With --feedback, best also "
            "tunes the whole file to the original's predictions, which takes several times longer again.",
            rich_help_panel=_TYPES,
        ),
    ] = _gguf_request.Effort.fast,
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
    output = _serves.output_of(type)
    _serves.refuse_others(context, output)
    texts = _options.Texts(calibration, samples, sequence_length, seed, parse_special)
    shard_bytes = _options.size_in_bytes(max_shard_size) if max_shard_size else None
    if output != _serves.GGUF:
        request = _folder_request.Request(
            model=model,
            out=None if dry_run else out,
            type=output,
            keep=keep or [],
            alpha=alpha,
            no_smooth=no_smooth,
            static=static_activations,
            asymmetric=asymmetric_activations,
            target_error=target_error,
            export_scales=export_scales,
            imatrix=imatrix,
            analyze=analyze,
            feedback=feedback,
            texts=texts,
            batch=batch,
            revision=revision,
            pre_tokenizer=pre_tokenizer,
            max_shard_bytes=shard_bytes,
            resume=resume,
            force=force,
            json=json,
            quiet=quiet,
        )
        _folder.quantize(request, coordinator, processes, process)
        return
    if type is not None:
        _check_type(type)
    target = _targets.target(target_size, target_bpw, target_kld)
    _gguf.quantize(
        _gguf_request.Request(
            model=model,
            out=None if dry_run else out,
            type=type,
            imatrix=imatrix,
            analyze=analyze,
            balance=balance_inputs,
            feedback=feedback,
            texts=texts,
            batch=batch,
            rules=rule or [],
            rules_file=rules,
            profile=profile,
            target=target,
            runtime=runtime,
            sensitivity=sensitivity,
            weighting=weighting,
            search_seconds=search_seconds,
            like=like,
            pure=pure,
            output_type=output_type,
            embedding_type=embedding_type,
            allow_fallback=not no_fallback,
            revision=revision,
            pre_tokenizer=pre_tokenizer,
            protect=protect_super_weights,
            protection_type=protection_type,
            protection_coverage=protection_coverage,
            effort=effort,
            resume=resume,
            force=force,
            max_shard_bytes=shard_bytes,
            threads=threads,
            check=check,
            json=json,
            quiet=quiet,
            verbose=verbose,
        ),
        *(coordinator, processes, process),
    )
