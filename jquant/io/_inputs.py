"""An output that is an input: the original would be gone when the result appears under its name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from jquant.core import OutputError


def check_no_input(out: Path, inputs: Iterable[object]) -> None:
    """Raises OutputError where `out` is a file or folder that is read, through links and other spellings too,
    or a folder that one lies in. inputs: paths, and names that may be paths; what is not on this machine is
    none."""
    if not out.exists():
        return
    for given in inputs:
        if not isinstance(given, str | os.PathLike):
            continue
        path = Path(os.path.expanduser(given))  # noqa: PTH111  (of a name that may be no path)
        if not _is_there(path):
            continue
        if out.samefile(path) or (out.is_dir() and path.is_file() and out.samefile(path.parent)):
            raise OutputError(
                f"{out}: is {'' if str(out) == str(path) else f'{path}, '}what this run reads, and would be "
                "replaced; give another name."
            )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
