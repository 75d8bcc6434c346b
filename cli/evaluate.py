"""`jquant evaluate ORIGINAL CANDIDATE…`: how far quantized files have moved from their original."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from . import _errors, _options, _runtime, _show
from ._options import OUTPUT
from ._progress import TaskProgress

_MEASURE, _RUN = "What is measured", "How it is run"
_CHUNKS = 100


@_errors.one_line_errors
def evaluate(
    original: Annotated[
        str, typer.Argument(help="GGUF file, Hugging Face folder, or hub id of the original.")
    ],
    candidates: Annotated[
        list[str] | None, typer.Argument(help="Files to compare with it; GGUF files or folders.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Text file, wikitext2 (its test part) or pydoc. Default: wikitext2, else pydoc.",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    chunks: Annotated[
        int,
        typer.Option("--chunks", min=0, help="Score at most so many; 0: all.", rich_help_panel=_MEASURE),
    ] = _CHUNKS,
    context: Annotated[
        int,
        typer.Option(
            "--context",
            min=4,
            help="Tokens of a chunk; the second half is scored.",
            rich_help_panel=_MEASURE,
        ),
    ] = 512,
    choices: Annotated[
        Path | None,
        typer.Option(
            "--choices",
            help="Multiple-choice questions to answer: JSON lines in ARC's form.",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    questions: Annotated[
        int,
        typer.Option("--questions", min=0, help="Answer at most so many; 0: all.", rich_help_panel=_MEASURE),
    ] = 0,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Also let the files write, and exit with 5 where a candidate makes no sense.",
            rich_help_panel=_MEASURE,
        ),
    ] = False,
    no_text: Annotated[
        bool,
        typer.Option(
            "--no-text", help="Leave the text out: only --choices or --check.", rich_help_panel=_MEASURE
        ),
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="llama.cpp or jax. Default: llama.cpp where it is installed and all files are GGUF.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Default: one per processor.", rich_help_panel=_RUN),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            help="Keep the original's predictions here. Default: in the user's cache.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    no_cache: Annotated[
        bool,
        typer.Option(
            "--no-cache", help="Do not keep the original's predictions for later runs.", rich_help_panel=_RUN
        ),
    ] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write every figure as CSV.", rich_help_panel=OUTPUT)
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table as Markdown.", rich_help_panel=OUTPUT)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", help="Write a page with figures, complete in one file.", rich_help_panel=OUTPUT
        ),
    ] = None,
    force: _options.Force = False,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
    revision: _options.Revision = None,
    pre_tokenizer: _options.PreTokenizer = None,
) -> None:
    """Perplexity, KL divergence and accuracy of quantized files beside their original, on held-out text.

    jquant evaluate model-f16.gguf model-q4.gguf model-q2.gguf --text test.txt --html report.html
    """
    if no_text and choices is None and not check:
        raise typer.BadParameter("needs --choices or --check", param_hint="--no-text")
    start = time.monotonic()
    _runtime.start_jax()

    from jquant.core.human import human_size
    from jquant.evaluation import Settings, compare, engine_for, open_file
    from jquant.evaluation import page as evaluate_html
    from jquant.evaluation import report as evaluate_report
    from jquant.evaluation.engines import versions
    from jquant.io import check_target, hub
    from jquant.io.paths import local
    from jquant.text import questions as questions_file
    from jquant.text.held_out import read_held_out

    # Slips of the command line show before a download.
    for target in filter(None, (csv, markdown, html)):
        check_target(target, force=force)
    held_out = None if no_text else read_held_out(text)
    asked = questions_file.read(choices)[: questions or None] if choices else []
    paths = [hub.resolve(model, revision=revision) for model in (original, *(candidates or []))]
    files = [open_file(local(path, "evaluate"), pre_tokenizer=pre_tokenizer) for path in paths]
    chosen = engine_for(files, engine, check=check)
    if not quiet and held_out is not None:
        for remark in held_out.remarks:
            _show.remark(f"warning: {remark}")
    settings = Settings(
        engine=chosen,
        context=context,
        chunks=chunks or None,
        cache=None if no_cache else cache_dir or _runtime.user_cache_dir() / "predictions",
        threads=threads or _runtime.default_threads(),
    )
    found = compare(
        files,
        settings,
        text=held_out,
        questions=asked,
        check=check,
        progress=TaskProgress(shown=not quiet),
    )
    rows = found.rows
    if not quiet and settings.cache is not None and held_out is not None:
        kept = f"{human_size(found.predictions_bytes)} in {settings.cache}"
        _show.remark(f"note: the original's predictions are kept for later runs, {kept}.")
    about: dict[str, object] = {"engine": chosen, "versions": versions(), "threads": settings.threads}
    if held_out is not None:
        about |= {
            "text": held_out.name,
            "sha256": held_out.digest,
            "context": context,
            "chunks": found.chunks,
            "chunks_in_text": found.chunks_in_text,
        }
    if choices is not None:
        about |= {"choices": choices.name, "questions": len(asked)}
    about["seconds"] = round(time.monotonic() - start, 3)
    about["peak_memory_bytes"] = _runtime.peak_memory()

    caption = evaluate_report.caption(about)
    made = {
        csv: lambda: evaluate_report.as_csv(rows),
        markdown: lambda: evaluate_report.markdown(rows, caption),
        html: lambda: evaluate_html.page(rows, about),
    }
    for target, content in made.items():
        if target is not None:
            _show.file(target, content())
    if json:
        _show.result_json({**about, "files": [evaluate_report.as_json(row) for row in rows]})
    else:
        _show.result(f"{evaluate_report.table(rows)}\n\n{caption}")
    failed = [row for row in rows[1:] or rows if row.coherence and not row.coherence.passed]
    for row in failed:
        if row.coherence:
            _show.remark(f"jquant: {row.name}: {row.coherence.failure}")
    if failed:
        raise typer.Exit(_errors.INCOHERENT)
