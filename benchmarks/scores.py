"""The end of a benchmark of files: all of them scored on a text by `jquant evaluate`'s code in llama.cpp."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from record import record

import jquant
from jquant.evaluation import Evaluation
from jquant.evaluation.report import table
from jquant.text.samples import Text

CONTEXT = 512


def progress(name: str, task: str, share: float) -> None:
    """The file that is done."""
    if share == 1:
        print(name, file=sys.stderr, flush=True)


def score(args: argparse.Namespace, files: Mapping[Path, str]) -> None:
    """Print the scores of these files, under these names; the first is the original.

    args: text, chunks, threads, json, and perhaps context.
    """
    # Line ends as Python reads them, so that figures stay comparable with earlier ones.
    text = Text(args.text.name, args.text.read_text(encoding="utf-8").encode())
    context = getattr(args, "context", CONTEXT)
    found = jquant.evaluate(
        list(files),
        text=text,
        chunks=args.chunks,
        context=context,
        engine="llama.cpp",
        threads=args.threads,
        cache=False,
        progress=progress,
    )
    show(args, found, files)


def show(args: argparse.Namespace, found: Evaluation, files: Mapping[Path, str]) -> None:
    """Print the table, with these names, and write the figures down where args.json says."""
    rows = [replace(row, name=files[path]) for path, row in zip(files, found.rows, strict=True)]
    print(table(rows))
    if args.json:
        record(args, replace(found, rows=tuple(rows)).records())
