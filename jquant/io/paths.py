"""Where a model lies: a path of this machine, or a URL that fsspec knows (gs://, s3://, https://, …).

Of a URL only what is asked for is read, by byte range: headers, then the rows that a run works on.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TypeAlias

import numpy as np
from upath import UPath

from jquant.core import UserError

AnyPath: TypeAlias = Path | UPath

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def user_cache_dir() -> Path:
    """Where this user's caches lie: JQUANT_CACHE, XDG_CACHE_HOME, or the platform's usual place."""
    if folder := os.environ.get("JQUANT_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "jquant"
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir()) / f"jquant-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "jquant"


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


def open_url(url: str) -> UPath:
    """The file or folder at a URL. UserError where its protocol is not known, or nothing is there."""
    protocol = url.partition("://")[0]
    try:
        path = UPath(url)
        found = path.exists()
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{url}: {protocol}:// cannot be read here ({error}); install fsspec's package for it (gs: "
            "gcsfs, s3: s3fs, https: aiohttp), or copy the model to this machine."
        ) from None
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"{url}: cannot be reached: {error}.") from None
    if not found:
        raise UserError(f"{url}: no such file or folder, or no permission to see it.")
    return path


def local(path: AnyPath, what: str) -> Path:
    """The path where it is of this machine. UserError where not; what: what needs it to be."""
    if isinstance(path, Path):
        return path
    raise UserError(f"{path}: {what} needs the model on this machine; copy it here first.")


def read_range(path: AnyPath, start: int, count: int) -> np.ndarray:
    """uint8 [count], or fewer where the file ends. Raises OSError."""
    if isinstance(path, Path):
        return np.fromfile(path, np.uint8, count, offset=start)
    data = path.fs.cat_file(path.path, start=start, end=start + count) if count else b""
    assert isinstance(data, bytes)
    return np.frombuffer(data, np.uint8)
