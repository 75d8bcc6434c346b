"""Where things lie on this machine."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
BENCHMARKS = ROOT / "benchmarks"
SHARED = ROOT.parent / "shared"  # models and texts too large for the repository


def if_shared(name: str) -> Path | None:
    """This path in ../shared, where it is there. What cannot do without asks the fixture `shared`."""
    path = SHARED / name
    return path if path.exists() else None
