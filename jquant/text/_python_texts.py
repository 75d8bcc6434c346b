"""Texts that every machine has, since Python comes with them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

_LINES = 80  # one or two samples of 512 tokens
_ROUNDS = 6


def pydoc() -> bytes:
    """Python's manual pages."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()


def python() -> bytes:
    """Source code: the public modules of the standard library, a few lines of each in turn, so that few
    samples are of many modules, without the words at their heads; none where Python came without it."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = [path.read_text(encoding="utf-8").splitlines() for path in sorted(library.glob("[!_]*.py"))]
    starts = [_LINES * i for i in range(1, _ROUNDS + 1)]
    pieces = [lines[at : at + _LINES] for at in starts for lines in modules if len(lines) >= at + _LINES]
    return "\n\n".join("\n".join(piece) for piece in pieces).encode()
