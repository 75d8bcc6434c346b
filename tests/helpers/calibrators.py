"""Calibrators by name, and samples for them. Processes that tests start import these too."""

import numpy as np

from jquant.calibration import ABSOLUTE_MAXIMA, HESSIAN, MEANS, SECOND_MOMENTS

CALIBRATORS = {
    "second moments": SECOND_MOMENTS,
    "means": MEANS,
    "absolute maxima": ABSOLUTE_MAXIMA,
    "hessian": HESSIAN,
}
TOKENS = np.random.default_rng(3).integers(3, 350, (5, 40))
LENGTHS = np.array([40, 40, 13, 40, 1])  # how many of each sample's tokens count
