"""How far a file has moved from its original: perplexity, KL divergence, coherence; engines that run it."""

from jquant.core import kl_divergence
from jquant.evaluation._compare import Settings, check_file, compare, engine_for, open_file
from jquant.evaluation._evaluate import Evaluation, evaluate

__all__ = [
    "Evaluation",
    "Settings",
    "check_file",
    "compare",
    "engine_for",
    "evaluate",
    "kl_divergence",
    "open_file",
]
