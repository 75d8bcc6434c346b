"""What `jquant quantize` is asked to write as GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from . import _options, _targets

if TYPE_CHECKING:
    from jquant.allocation import Target


class Effort(Enum):
    fast = "fast"
    best = "best"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    model: str
    out: Path | None  # None: the plan alone is shown
    type: str | None
    imatrix: Path | None
    analyze: bool
    balance: bool
    feedback: bool | None
    texts: _options.Texts
    batch: int
    rules: Sequence[str]
    rules_file: Path | None
    profile: str | None
    target: Target | None
    runtime: str
    sensitivity: Path | None
    weighting: _targets.By
    search_seconds: float
    like: Path | None
    pure: bool
    output_type: str | None
    embedding_type: str | None
    allow_fallback: bool
    revision: str | None
    pre_tokenizer: str | None
    protect: bool
    protection_type: str
    protection_coverage: float
    effort: Effort
    resume: bool
    force: bool
    max_shard_bytes: int | None
    threads: int | None
    check: bool
    json: bool
    quiet: bool
    verbose: bool
