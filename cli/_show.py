"""Results go to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import sys


def result(text: str) -> None:
    print(text)


def result_json(value: object) -> None:
    # ASCII: old vocabularies have halves of characters, which no encoding of stdout can write.
    print(json.dumps(value, indent=2))


def remark(text: str) -> None:
    print(text, file=sys.stderr)
