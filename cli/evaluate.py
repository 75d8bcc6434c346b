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

    from jquant import evaluation
    from jquant.core.human import human_size
    from jquant.evaluation import page as evaluate_html
    from jquant.evaluation import report as evaluate_report
    from jquant.io import check_no_input, check_target
    from jquant.text.held_out import read_held_out

    # Slips of the command line show before a download.
    for target in filter(None, (csv, markdown, html)):
        check_target(target, force=force)
        check_no_input(target, [original, *(candidates or ()), text, choices])
    held_out = None if no_text else read_held_out(text)
    if not quiet and held_out is not None:
        for remark in held_out.remarks:
            _show.remark(f"warning: {remark}")
    found = evaluation.evaluate(
        [original, *(candidates or [])],
        text=held_out,
        chunks=chunks or None,
        context=context,
        choices=choices,
        questions=questions or None,
        check=check,
        no_text=no_text,
        engine=engine,
        threads=threads,
        cache=False if no_cache else cache_dir or True,
        pre_tokenizer=pre_tokenizer,
        revision=revision,
        progress=TaskProgress(shown=not quiet),
    )
    rows = found.rows
    if not quiet and found.cache is not None:
        kept = f"{human_size(found.predictions_bytes)} in {found.cache}"
        _show.remark(f"note: the original's predictions are kept for later runs, {kept}.")
    cost = {"seconds": round(time.monotonic() - start, 3), "peak_memory_bytes": _runtime.peak_memory()}
    about = {**found.about, **cost}
    made = {
        csv: lambda: evaluate_report.as_csv(rows),
        markdown: lambda: evaluate_report.markdown(rows, found.caption),
        html: lambda: evaluate_html.page(rows, about),
    }
    for target, content in made.items():
        if target is not None:
            _show.file(target, content())
    if json:
        _show.result_json({**about, "files": [evaluate_report.as_json(row) for row in rows]})
    else:
        _show.result(str(found))
    failed = [row for row in rows[1:] or rows if row.coherence and not row.coherence.passed]
    for row in failed:
        if row.coherence:
            _show.remark(f"jquant: {row.name}: {row.coherence.failure}")
    if failed:
        raise typer.Exit(_errors.INCOHERENT)
