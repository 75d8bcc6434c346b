"""What `jquant quantize` is asked to write as GGUF, and what is known of it on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _options, _runtime, _show, _targets

if TYPE_CHECKING:
    from jquant.allocation import Target
    from jquant.calibration import SuperWeight
    from jquant.checkpoints.model import Model
    from jquant.io.imatrix import Imatrix
    from jquant.plan import Plan, Profile, Rule
    from jquant.smoothquant.balance import Balanced
    from jquant.text.samples import Samples
    from jquant.writers.gguf_feedback import Feedback


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

    @property
    def imatrix_name(self) -> str:
        return str(self.imatrix or ("jquant quantize --analyze" if self.analyze else ""))

    @property
    def workers(self) -> int:
        return self.threads or _runtime.default_threads()

    @property
    def plan_needs_text(self) -> bool:
        """Whether the target's types depend on measurements on text."""
        kld = self.target is not None and self.target.kld is not None
        measured = bool(self.search_seconds) or self.weighting is not _targets.By.usual
        return measured or (kld and bool(self.texts.calibration))


@dataclass
class Run:
    """What is known of a request so far."""

    asked: Request
    profile: Profile | None
    type: str
    rules: Sequence[Rule]
    importance: Imatrix | None
    opened: Model
    data: Samples | None = None
    super_weights: list[SuperWeight] = field(default_factory=list)
    protected: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    feedback: Feedback | None = None
    balanced: Balanced | None = None

    def recipe(self, plan: Plan) -> str:
        from jquant.plan.header import recipe

        return recipe(
            plan,
            imatrix=self.importance,
            effort=self.asked.effort.value,
            profile=self.profile,
            target=self.asked.target,
            rules=self.rules,
            protected=self.protected,
            balanced=bool(self.balanced and self.balanced.places),
        )

    def remark(self, text: str) -> None:
        if not self.asked.quiet:
            _show.remark(text)


class Chosen(NamedTuple):
    plan: Plan
    damages: dict[str, float]  # of a target: estimated, by tensor
    search: dict[str, Any] | None = None
