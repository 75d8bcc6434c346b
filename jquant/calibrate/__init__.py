"""What the inputs of every matrix of a model are like, measured on samples of text, block by block.

The activations of all samples go through block after block and are kept on the host; one block's weights and
a few samples are on the device at a time. A model of any depth needs the memory of one block.

A Calibrator is three pure functions. Its statistics are sums or maxima, so batches, runs and hosts merge in
any order, and a stack of experts has one set for each, of the tokens that the router sent there.
"""

from jquant.calibrate._calibrators import (
    ABSOLUTE_MAXIMA,
    HESSIAN,
    MEANS,
    SECOND_MOMENTS,
    Calibrator,
    Stats,
    add,
    add_or_raise,
    count_of,
    merge,
)
from jquant.calibrate._collect import (
    Progress,
    Through,
    collect,
    embed_into,
    padded,
    real_tokens,
    run_through,
    shared_inputs,
    stream,
    within_block,
)
from jquant.calibrate._statistics import add_inputs, add_rows, check_finite, finite, init_all, weights_of

__all__ = [
    "ABSOLUTE_MAXIMA",
    "HESSIAN",
    "MEANS",
    "SECOND_MOMENTS",
    "Calibrator",
    "Progress",
    "Stats",
    "Through",
    "add",
    "add_inputs",
    "add_or_raise",
    "add_rows",
    "check_finite",
    "collect",
    "count_of",
    "embed_into",
    "finite",
    "init_all",
    "merge",
    "padded",
    "real_tokens",
    "run_through",
    "shared_inputs",
    "stream",
    "weights_of",
    "within_block",
]
