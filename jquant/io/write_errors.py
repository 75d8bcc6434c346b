"""What the operating system refuses while a file is written, told as the user can mend it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jquant.core import OutputError


@contextlib.contextmanager
def reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}; free some space or name another folder."
        ) from error
