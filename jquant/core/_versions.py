"""Which versions made a result: they stand beside it, and a run of others does not continue it."""

from __future__ import annotations

from importlib.metadata import version

import jquant  # the face, which has the number, is there before any wing

VERSION: str = jquant.__version__


def versions(*packages: str) -> dict[str, str]:
    """Of jquant and of these packages, by name."""
    return {"jquant": VERSION} | {package: version(package) for package in packages}
