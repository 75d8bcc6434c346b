"""What the inputs of every matrix of a model are like, measured on samples of text, block by block.

The activations of all samples go through block after block and are kept on the host; one block's weights and
a few samples are on the device at a time. A model of any depth needs the memory of one block.

A Calibrator is three pure functions. Its statistics are sums or maxima, so batches, runs and hosts merge in
any order, and a stack of experts has one set for each, of the tokens that the router sent there.
"""

from jquant.calibration._calibrators import (
    ABSOLUTE_MAXIMA,
    HESSIAN,
    MEANS,
    SECOND_MOMENTS,
    Calibrator,
    Stats,
    add,
    count_of,
    merge,
)
from jquant.calibration._collect import collect, shared_inputs, within_block
from jquant.calibration._forward_back import forward_back, matrix_gradients
from jquant.calibration._importance import imatrix_of, importance, load_samples, unreached, unreached_notes
from jquant.calibration._measure import STATISTICS, measure
from jquant.calibration._spikes import Found, SuperWeight, loss, with_loss_changes
from jquant.calibration._statistics import add_rows, init_all, weights_of
from jquant.calibration._texts import Texts
from jquant.calibration._token_fisher import token_fisher
from jquant.calibration._walk import (
    Progress,
    Turn,
    batches,
    embed_into,
    padded,
    real_tokens,
    run_through,
    shape_of,
    turn,
    walk,
)

__all__ = [
    "ABSOLUTE_MAXIMA",
    "HESSIAN",
    "MEANS",
    "SECOND_MOMENTS",
    "STATISTICS",
    "Calibrator",
    "Found",
    "Progress",
    "Stats",
    "SuperWeight",
    "Texts",
    "Turn",
    "add",
    "add_rows",
    "batches",
    "collect",
    "count_of",
    "embed_into",
    "forward_back",
    "imatrix_of",
    "importance",
    "init_all",
    "load_samples",
    "loss",
    "matrix_gradients",
    "measure",
    "merge",
    "padded",
    "real_tokens",
    "run_through",
    "shape_of",
    "shared_inputs",
    "token_fisher",
    "turn",
    "unreached",
    "unreached_notes",
    "walk",
    "weights_of",
    "with_loss_changes",
    "within_block",
]
