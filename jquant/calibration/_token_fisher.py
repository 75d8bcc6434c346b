"""What an error at each token of a block's output costs the model's predictions.

    KL ≈ ½ Σ_t f_t |e_t|²,   f_t = mean_c (∂ log p(y) / ∂ h_tc)²,   y drawn from the predictions

f is the Fisher information of a token, for an error e in no particular direction. Tokens differ by orders of
magnitude: those that all later ones attend to (attention sinks) count most, and they are where the inputs of
matrices are outliers, too.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from jquant.calibration._forward_back import ScratchTape
from jquant.calibration._walk import Progress
from jquant.calibration.gradients import SQUARES, sampled_labels, stream_gradients
from jquant.core import BlockwiseModel


def token_fisher(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    *,
    lengths: Int[np.ndarray, " s"] | None = None,
    batch: int = 4,
    seed: int = 0,
    progress: Progress = lambda done, count: None,
) -> Float[np.ndarray, "blocks s t"]:
    """f behind each block. Arguments and errors are those of `gradients.stream_gradients`; seed: of y."""
    tape = _Tape(len(model.blocks))
    blocks = stream_gradients(
        model,
        tokens,
        SQUARES,
        sampled_labels(seed),
        lengths=lengths,
        batch=batch,
        tape=tape,
        progress=progress,
    )
    for _ in blocks:  # statistics of matrices, which nobody asked for
        pass
    return np.stack([tape.fisher[i] for i in range(len(model.blocks))])


class _Tape(ScratchTape):
    """Before the gradient behind a block is let go of, its squares are summed."""

    def __init__(self, blocks: int):
        super().__init__(blocks)
        self.fisher: dict[int, np.ndarray] = {}

    def finish(self, block: int, result: object) -> None:
        behind = self.cotangents(block + 1, ())  # it is there, of whatever shape
        self.fisher[block] = np.stack([np.mean(np.square(one), axis=-1) for one in behind])
        super().finish(block, result)
