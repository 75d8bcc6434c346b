"""Rescalings that leave the function alone: outliers of inputs moved into weights (SmoothQuant)."""

from jquant.smoothquant._block_error import by_range, by_tensor, by_token
from jquant.smoothquant._scales import scales
from jquant.smoothquant._search import DEFAULT, Search, fisher_of, judged, search
from jquant.smoothquant._smooth import smooth

__all__ = [
    "DEFAULT",
    "Search",
    "by_range",
    "by_tensor",
    "by_token",
    "fisher_of",
    "judged",
    "scales",
    "search",
    "smooth",
]
