"""Results go to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def result(text: str) -> None:
    print(text)


def result_json(value: object) -> None:
    # ASCII: old vocabularies have halves of characters, which no encoding of stdout can write.
    print(json.dumps(value, indent=2))


def remark(text: str) -> None:
    print(text, file=sys.stderr)


def file(path: Path, text: str) -> None:
    """Write a report, whole under its name or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
