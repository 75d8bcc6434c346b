"""The end of a benchmark of files: all of them scored on a text by `jquant evaluate`'s code in llama.cpp."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from record import record

from jquant.evaluation import Settings, compare, open_file
from jquant.evaluation.report import record as figures
from jquant.evaluation.report import table
from jquant.text.samples import Text

CONTEXT = 512


def _progress(name: str, task: str, share: float) -> None:
    if share == 1:
        print(name, file=sys.stderr, flush=True)


def score(args: argparse.Namespace, files: Mapping[Path, str]) -> None:
    """Print the scores of these files, under these names; the first is the original.

    args: text, chunks, threads, json, and perhaps context.
    """
    # Line ends as Python reads them, so that figures stay comparable with earlier ones.
    text = Text(args.text.name, args.text.read_text(encoding="utf-8").encode())
    context = getattr(args, "context", CONTEXT)
    settings = Settings(engine="llama.cpp", chunks=args.chunks, threads=args.threads, context=context)
    found = compare([open_file(path) for path in files], settings, text=text, progress=_progress)
    rows = [replace(row, name=files[path]) for path, row in zip(files, found.rows, strict=True)]
    print(table(rows))
    if args.json:
        record(args, [figures(row) for row in rows])
