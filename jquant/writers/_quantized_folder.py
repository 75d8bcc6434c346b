"""A folder that was written, or only planned, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jquant.plan.report import by_type
from jquant.smoothquant.report import smoothing_report
from jquant.smoothquant.smoothing import Smoothing
from jquant.writers.folder_plan import FolderPlan


@dataclass(frozen=True, kw_only=True)
class QuantizedFolder:
    path: Path | None  # None: it is only planned
    plan: FolderPlan
    source_tensor_bytes: int
    stored: Mapping[str, Sequence[str]]  # names in the folder, by GGUF name
    target_error: float | None = None
    # What there is once the folder is written.
    files: Sequence[Path] = ()
    errors: Mapping[str, float] = field(default_factory=dict)  # relative, of each weight this run quantized
    smoothing: Smoothing | None = None
    fed_samples: int = 0  # that error feedback learned from; 0: there was none

    @property
    def missed(self) -> str:
        """What is to be said where blocks have more error than the target; "" where none has."""
        if self.smoothing is None or self.target_error is None:
            return ""
        errors = [after for _, after in self.smoothing.errors]
        above = [i for i, error in enumerate(errors) if not error <= self.target_error]
        if not above:
            return ""
        worst = max(above, key=errors.__getitem__)
        return (
            f"{self.path}: written, but smoothing leaves {len(above)} of {len(errors)} blocks above "
            f"target_error={self.target_error:g}, block {worst} the most: {errors[worst]:.2e}; keep it in 16 "
            f"bit with keep='layers\\.{worst}\\.', or calibrate on more samples=."
        )

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        scheme, written = self.plan.scheme, self.path is not None
        planned = {
            "scheme": scheme.name,
            "group_size": scheme.weights.group_size,
            "static_activations": scheme.static,
            "asymmetric_activations": scheme.asymmetric,
            "ignore": list(self.plan.ignore),
            "source_tensor_bytes": self.source_tensor_bytes,
            "tensor_bytes": sum(spec.nbytes for spec in self.plan.layout),
            "types": [{"type": t, "tensors": n, "bytes": b} for t, n, b in by_type(self.plan.layout)],
            "tensors": [{"name": name, "error": self.errors.get(name)} for name in self.plan.quantized],
        }
        if not written:
            return planned
        target = {"target": self.target_error, "reached": not self.missed}
        return planned | {
            "smoothing": smoothing_report(self.smoothing, self.stored) if self.smoothing else None,
            **({} if self.target_error is None else {"target_error": target}),
            "files": [{"path": str(file), "bytes": file.stat().st_size} for file in self.files],
        }
