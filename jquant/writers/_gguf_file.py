"""A GGUF file that was written, or only planned, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jquant.allocation import Target
from jquant.calibration import SuperWeight
from jquant.calibration.report import as_json
from jquant.ldlq.sequential import Fed
from jquant.ldlq.tuning import Gain
from jquant.plan import Plan
from jquant.plan.report import plan_report
from jquant.smoothquant.balance import Place
from jquant.writers.quality import Quality, starved


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    plan: Plan
    source_tensor_bytes: int
    target: Target | None = None
    damages: Mapping[str, float] = field(
        default_factory=dict
    )  # of a target: estimated, nats a token, by tensor
    search: Mapping[str, float] | None = None  # divergences that were measured of plans, and of how many
    super_weights: Sequence[SuperWeight] | None = None  # None: they were not looked for
    balanced: Sequence[Place] | None = None  # norms whose scales changed; None: not asked for
    # What there is once the file is written.
    paths: Sequence[Path] = ()  # of the file, or of its shards
    errors: Mapping[str, float] = field(default_factory=dict)  # relative, by tensor of few bits
    fed: Mapping[str, Fed] | None = None  # tensors that error feedback made; None: there was none
    tuned: Gain | None = None
    quality: Quality | None = None

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        types = plan_report(self.plan, errors=self.errors, damages=self.damages)
        if self.quality is None:
            return types
        experts = starved(self.fed or {})
        return types | {
            "source_tensor_bytes": self.source_tensor_bytes,
            "target": self.target and str(self.target),
            "search": self.search,
            "files": [{"path": str(file), "bytes": file.stat().st_size} for file in self.paths],
            "quality": self.quality.report(),
            **({} if self.fed is None else {"feedback": {name: f.error for name, f in self.fed.items()}}),
            **({"starved_experts": experts} if experts else {}),
            **({} if self.balanced is None else {"balance": [place._asdict() for place in self.balanced]}),
            **({"tuning": self.tuned._asdict()} if self.tuned else {}),
            **({} if self.super_weights is None else {"super_weights": as_json(list(self.super_weights))}),
        }
