"""Types of least damage for a size: what each tensor suffers, measured, and the choice among them."""

from jquant.allocation._fit import Sensitivity, Target

__all__ = [
    "Sensitivity",
    "Target",
]
