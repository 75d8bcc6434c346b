"""What a checkpoint needs to become W8A8: factors, searched or of one alpha, and static scales of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jquant import input_scales, smoothing
from jquant.calibrate import Progress, Stats
from jquant.folders import Checkpoint, FolderPlan, as_stored
from jquant.io.samples import Samples
from jquant.smooth_search import DEFAULT, Search, by_tensor, by_token, search
from jquant.smoothing import Smoothing
from jquant.transcode import FLOAT_DTYPES
from jquant.transforms.smooth import Factors


class Smoothed(NamedTuple):
    smoothing: Smoothing
    factors: Mapping[str, Factors]  # for `write_folder`
    importance: Mapping[str, np.ndarray]  # of the smoothed inputs, likewise
    input_scales: Mapping[str, np.float32] | None  # likewise, where the plan's scheme has static ones


def smooth_model(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    samples: Samples,
    alpha: float | None = None,
    *,
    settings: Search = DEFAULT,
    batch: int = 4,
    progress: Progress = lambda done, count: None,
    searching: Progress = lambda done, count: None,
) -> Smoothed:
    """alpha: of the plain method; None: search. progress: of measuring; searching: of the search.

    Raises UserError for a bad alpha, and for inputs that are not finite.
    """
    stats = smoothing.measure(checkpoint.model, samples, batch=batch, progress=progress)
    decoder, chosen = smoothing.open_decoder(checkpoint.model), set(plan.quantized)
    if alpha is None:
        quantized = frozenset(n for n, w in checkpoint.weights.items() if w.parts[0] in chosen)
        rounding = by_tensor if plan.scheme.static else by_token
        found = search(
            decoder, samples, stats, quantized, settings=settings, rounding=rounding, progress=searching
        )
    else:
        found = smoothing.fixed(decoder, stats, alpha)
    found = as_stored(checkpoint, found)
    importance = smoothing.importance(decoder, stats, found)
    scales = _scales(checkpoint, plan, samples, stats, found) if plan.scheme.static else None
    return Smoothed(found, smoothing.factors(decoder, found), importance, scales)


def static_scales(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    samples: Samples,
    *,
    batch: int = 4,
    progress: Progress = lambda done, count: None,
) -> dict[str, np.float32]:
    """`input_scales` for `write_folder` of a model that is not smoothed.

    Raises UserError for inputs that are not finite.
    """
    stats = smoothing.measure(checkpoint.model, samples, batch=batch, progress=progress)
    return _scales(checkpoint, plan, samples, stats, None)


def _scales(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    samples: Samples,
    stats: Mapping[str, Stats],
    found: Smoothing | None,
) -> dict[str, np.float32]:
    decoder, chosen, kind = (
        smoothing.open_decoder(checkpoint.model),
        set(plan.quantized),
        plan.scheme.activations,
    )
    assert kind is not None, f"{plan.scheme.name} leaves inputs as they are"
    dtypes = {
        name: FLOAT_DTYPES[checkpoint.source.specs[weight.parts[0]].type]
        for name, weight in checkpoint.weights.items()
        if weight.parts[0] in chosen
    }
    return input_scales.calibrate(decoder, samples, stats, dtypes, kind, found)
