"""Importance that a writer measures itself."""

from __future__ import annotations

import jax

from jquant import calibration
from jquant.checkpoints import Model
from jquant.core import Reporter
from jquant.distributed import mesh
from jquant.io.imatrix import Imatrix
from jquant.text.samples import Samples


def measured_importance(model: Model, samples: Samples, *, batch: int, reporter: Reporter) -> Imatrix:
    """Measured on all devices; experts whose importance is a guess are noted."""
    found = calibration.importance(
        model,
        samples,
        batch=batch,
        mesh=mesh.make_mesh() if jax.device_count() > 1 else None,
        progress=reporter.steps("importance", tokens=int(samples.lengths.sum())),
    )
    for note in calibration.unreached_notes(calibration.unreached(found)):
        reporter.note(note)
    return found
