"""What a checkpoint needs to become W8A8: factors, searched or of one alpha, and static scales of inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jquant.calibration import Progress, Stats
from jquant.checkpoints import FLOAT_DTYPES
from jquant.checkpoints.rescaled import Factors
from jquant.distributed.team import ALONE, Team
from jquant.io.findings import Findings
from jquant.io.resume import arrays_of, stats_of
from jquant.smoothquant import (
    DEFAULT,
    Search,
    by_range,
    by_tensor,
    by_token,
    fisher_of,
    judged,
    search,
    smoothing,
)
from jquant.smoothquant import static_scales as input_scales
from jquant.smoothquant.smoothing import Smoothing
from jquant.text.samples import Samples
from jquant.writers.folder_plan import Checkpoint, FolderPlan, as_stored, leave_out


class Calibrated(NamedTuple):
    stats: Mapping[str, Stats]  # of the inputs of all matrices, before smoothing
    smoothing: Smoothing | None
    factors: Mapping[str, Factors]  # for `write_folder`
    importance: Mapping[str, np.ndarray]  # of the smoothed inputs, likewise
    input_scales: Mapping[str, np.float32] | None  # likewise, where the plan's scheme has static ones
    plan: FolderPlan  # the one that was given, but for what is kept because it stands out


def smooth_model(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    samples: Samples,
    alpha: float | None = None,
    *,
    judge: bool = False,
    keep: bool = False,
    settings: Search = DEFAULT,
    batch: int = 4,
    progress: Progress = lambda done, count: None,
    searching: Progress = lambda done, count: None,
    team: Team = ALONE,
    findings: Findings | None = None,
) -> Calibrated:
    """alpha: of the plain method; None: search. judge: measure the errors of blocks with an alpha too. keep:
    leave what is behind places that stand out as it is; what smoothing says is then of the other weights.
    progress: of measuring; searching: of the search. team: those who call this, and will keep the same.
    findings: of one process; what an interrupted run has measured and searched is recalled.

    Raises UserError for a bad alpha, and for inputs that are not finite.
    """
    stats = _measured(checkpoint, samples, batch, findings, progress)
    decoder = checkpoint.model.decoder()
    quantized = _quantized(checkpoint, plan)
    per_token = by_range if plan.scheme.asymmetric else by_token
    rounding = by_tensor if plan.scheme.static else per_token
    found = None if alpha is None else as_stored(checkpoint, smoothing.fixed(decoder, stats, alpha))
    if found is None or judge or keep:
        fisher = fisher_of(decoder, samples, settings, batch=batch)
        if found is None:
            searched = search(
                decoder,
                samples,
                stats,
                quantized,
                fisher,
                settings=settings,
                rounding=rounding,
                findings=findings,
                progress=searching,
            )
            found = as_stored(checkpoint, searched)
        found = judged(decoder, samples, found, quantized, fisher, settings=settings, rounding=rounding)
        left = json.loads(team.told(json.dumps(_outstanding(checkpoint, found)))) if keep else ()
        if left:
            plan = leave_out(checkpoint, plan, left)
            found = found.without_outstanding()
    importance = smoothing.importance(decoder, stats, found)
    scales = _scales(checkpoint, plan, samples, stats, found) if plan.scheme.static else None
    return Calibrated(stats, found, smoothing.factors(decoder, found), importance, scales, plan)


def _outstanding(checkpoint: Checkpoint, smoothing: Smoothing) -> list[str]:
    """Names in the checkpoint of the weights behind places that stand out."""
    return [
        part
        for place in smoothing.places
        if smoothing.stands_out(place)
        for name in place.matrices
        for part in checkpoint.weights[name].parts
    ]


def measure_model(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    samples: Samples,
    *,
    batch: int = 4,
    progress: Progress = lambda done, count: None,
    findings: Findings | None = None,
) -> Calibrated:
    """Of a model that is not smoothed; findings as of `smooth_model`. Raises UserError for inputs that are
    not finite."""
    stats = _measured(checkpoint, samples, batch, findings, progress)
    scales = _scales(checkpoint, plan, samples, stats, None) if plan.scheme.static else None
    return Calibrated(stats, None, {}, {}, scales, plan)


def _measured(
    checkpoint: Checkpoint, samples: Samples, batch: int, findings: Findings | None, progress: Progress
) -> Mapping[str, Stats]:
    """Statistics of all inputs."""
    known = findings and findings.recall("measured", 0)
    if known:
        return stats_of(known)
    stats = smoothing.measure(checkpoint.model, samples, batch=batch, progress=progress)
    if findings is not None:
        findings.remember("measured", 0, arrays_of(stats))
    return stats


def _quantized(checkpoint: Checkpoint, plan: FolderPlan) -> frozenset[str]:
    """GGUF names of the matrices that the plan quantizes."""
    chosen = set(plan.quantized)
    return frozenset(name for name, weight in checkpoint.weights.items() if weight.parts[0] in chosen)


def _scales(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    samples: Samples,
    stats: Mapping[str, Stats],
    found: Smoothing | None,
) -> dict[str, np.float32]:
    decoder, kind = checkpoint.model.decoder(), plan.scheme.activations
    assert kind is not None, f"{plan.scheme.name} leaves inputs as they are"
    dtypes = {
        name: FLOAT_DTYPES[checkpoint.source.specs[checkpoint.weights[name].parts[0]].type]
        for name in _quantized(checkpoint, plan)
    }
    return input_scales.calibrate(decoder, samples, stats, dtypes, kind, found)
