"""Texts that every machine has, since Python comes with them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from jquant.core import UserError

_LINES = 80  # of each module: one or two samples of 512 tokens, so that few samples are of many modules


def pydoc() -> bytes:
    """Python's manual pages."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()


def python() -> bytes:
    """Source code: lines from the middle of each public module of the standard library.

    Raises UserError where Python was installed without them.
    """
    pieces = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) >= 2 * _LINES:
            start = (len(lines) - _LINES) // 2
            pieces.append("\n".join(lines[start : start + _LINES]))
    if not pieces:
        raise UserError("python: this Python has no source code of its library; give a file of code.")
    return "\n\n".join(pieces).encode()
