"""What the operating system refuses while a file is written, told as the user can mend it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from jquant.core import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def reporting(
    path: Path,
    *,
    what: str = "be written",
    full: str = "free some space or name another folder",
    refused: str = "name another folder",
) -> Iterator[None]:
    """Errors of the file system as OutputError: the path, what it cannot, and what the user can do where the
    disk is full, or where something else is refused."""
    try:
        yield
    except OSError as error:
        remedy = full if error.errno in _FULL else refused
        raise OutputError(f"{path}: cannot {what}: {error.strerror}; {remedy}.") from error


# While an output is written that a later run can go on with.
reporting_to_resume = partial(reporting, full="free some space and continue with --resume")
