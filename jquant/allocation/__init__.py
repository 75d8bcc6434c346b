"""Types of least damage for a size: what each tensor suffers, measured, and the choice among them."""

from jquant.allocation._allocate import Allocated, allocate
from jquant.allocation._fit import Sensitivity, SensitivityKind
from jquant.allocation._target import Target

__all__ = [
    "Allocated",
    "Sensitivity",
    "SensitivityKind",
    "Target",
    "allocate",
]
