"""The factors with which a checkpoint becomes W8A8: searched or of one alpha, and as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jquant import smoothing
from jquant.calibrate import Progress
from jquant.folders import Checkpoint, FolderPlan, as_stored
from jquant.io.samples import Samples
from jquant.smooth_search import DEFAULT, Search, search
from jquant.smoothing import Smoothing
from jquant.transforms.smooth import Factors


class Smoothed(NamedTuple):
    smoothing: Smoothing
    factors: Mapping[str, Factors]  # for `write_folder`
    importance: Mapping[str, np.ndarray]  # of the smoothed inputs, likewise


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
        found = search(decoder, samples, stats, quantized, settings=settings, progress=searching)
    else:
        found = smoothing.fixed(decoder, stats, alpha)
    found = as_stored(checkpoint, found)
    importance = smoothing.importance(decoder, stats, found)
    return Smoothed(found, smoothing.factors(decoder, found), importance)
