"""Space on the disk, taken before it is needed."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import BinaryIO


def reserve(file: BinaryIO, size: int) -> None:
    """Make a new file this long and occupy its blocks. Raises OSError where the disk has too few.

    A write through a memory map into a hole that the disk cannot fill kills the process.
    """
    if hasattr(os, "posix_fallocate") and size > 0:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            # Some file systems cannot reserve: there the hole stays.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), 0)
                raise
    os.ftruncate(file.fileno(), size)
