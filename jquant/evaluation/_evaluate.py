"""Files beside their original, from names to a table: what `jquant evaluate` computes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from upath import UPath

from jquant.checkpoints import AnyModel, Model
from jquant.core import default_threads
from jquant.evaluation import report
from jquant.evaluation._compare import Comparison, Progress, Settings, compare, engine_for, open_file
from jquant.evaluation.engines import versions
from jquant.evaluation.report import Row
from jquant.io import user_cache_dir
from jquant.text import questions as questions_file
from jquant.text.held_out import read_held_out
from jquant.text.samples import Text

CHUNKS, CONTEXT = 100, 512  # enough to tell files apart


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. As text it is the table that the command prints."""

    rows: tuple[Row, ...]  # the original, then the candidates
    about: Mapping[str, object]  # what the figures are of, as JSON values: engine, versions, text, chunks
    cache: Path | None  # where the original's predictions are kept
    predictions_bytes: int  # of them

    def __str__(self) -> str:
        return f"{report.table(self.rows)}\n\n{self.caption}"

    @property
    def caption(self) -> str:
        """One line that says what the figures are of."""
        return report.caption(self.about)

    def records(self) -> list[dict[str, object]]:
        """Every figure of every row under a flat name, standard errors with "_se": rows of a data frame."""
        return [report.record(row) for row in self.rows]


def evaluate(
    files: AnyModel | Sequence[AnyModel],
    *,
    text: str | os.PathLike[str] | Text | None = None,
    chunks: int | None = CHUNKS,
    context: int = CONTEXT,
    choices: str | os.PathLike[str] | None = None,
    questions: int | None = None,
    check: bool = False,
    no_text: bool = False,
    engine: str | None = None,
    threads: int | None = None,
    cache: bool | str | os.PathLike[str] = True,
    pre_tokenizer: str | None = None,
    revision: str | None = None,
    progress: Progress = lambda name, task, share: None,
) -> Evaluation:
    """Perplexity, KL divergence (nats a token) and accuracy of files beside their original, the first one.

    Args:
        files: GGUF files, folders, hub ids, or models that are open; llama.cpp runs GGUF files only.
        text: a file of plain text, "wikitext2" (its test part) or "pydoc". None: wikitext2, else pydoc.
        chunks: at most so many are scored; None: all.
        context: tokens of a chunk, whose second half is scored.
        choices: multiple-choice questions, JSON lines in ARC's form; at most `questions` of them, None: all.
        check: llama.cpp also writes with each file, and a verdict says whether that makes sense.
        no_text: leave the text out.
        engine: "llama.cpp" or "jax"; None: llama.cpp where it is installed and all files are GGUF.
        threads: None: one per processor.
        cache: whether the original's predictions are kept for later runs in the user's cache, or a folder.
        pre_tokenizer, revision: as in `open_model`, for all files.

    Raises:
        UserError: the files are not of one model, cannot be run, or the text is too short.
        ValueError: an argument is out of its range.

    >>> found = jquant.evaluate([folder, folder], text=text, context=32, chunks=2, engine="jax", cache=False)
    >>> found.records()[1]["kld_mean"] < 1e-6  # print(found) shows all figures as a table
    True
    """
    _check(chunks=(chunks, 1), context=(context, 4), questions=(questions, 1), threads=(threads, 1))
    if no_text and choices is None and not check:
        raise ValueError("no_text=True: leaves nothing to evaluate; give choices or check=True as well.")
    named = [files] if isinstance(files, Model | str | os.PathLike | UPath) else list(files)
    if not named:
        raise ValueError("files: none are given; name the original, then what to compare with it.")
    held_out = None if no_text else text if isinstance(text, Text) else read_held_out(_path(text))
    asked = [] if choices is None else questions_file.read(Path(choices))[:questions]
    opened = [open_file(file, pre_tokenizer=pre_tokenizer, revision=revision) for file in named]
    chosen = engine_for(opened, engine, check=check)
    folder = user_cache_dir() / "predictions" if cache is True else Path(cache) if cache else None
    settings = Settings(
        engine=chosen, context=context, chunks=chunks, cache=folder, threads=threads or default_threads()
    )
    found = compare(opened, settings, text=held_out, questions=asked, check=check, progress=progress)
    about = {"engine": chosen, "versions": versions(), "threads": settings.threads}
    about |= {} if held_out is None else _of_text(held_out, context, found)
    if choices is not None:
        about |= {"choices": Path(choices).name, "questions": len(asked)}
    kept = None if held_out is None else folder
    return Evaluation(tuple(found.rows), about, kept, found.predictions_bytes)


def _check(**bounds: tuple[int | None, int]) -> None:
    """Each argument, by name, with the least that it may be."""
    for name, (value, least) in bounds.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: needs to be {least} or more.")


def _path(text: str | os.PathLike[str] | None) -> str | None:
    return None if text is None else os.fspath(text)


def _of_text(text: Text, context: int, found: Comparison) -> dict[str, object]:
    return {
        "text": text.name,
        "sha256": text.digest,
        "context": context,
        "chunks": found.chunks,
        "chunks_in_text": found.chunks_in_text,
    }
