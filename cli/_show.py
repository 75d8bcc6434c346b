"""Results go to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import sys


def result(text: str) -> None:
    print(text)


def result_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def remark(text: str) -> None:
    print(text, file=sys.stderr)
