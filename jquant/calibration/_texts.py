"""Which text to calibrate on, for what reads it only where it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jquant.calibration._importance import load_samples
from jquant.checkpoints.model import Model
from jquant.text.samples import Samples


@dataclass(frozen=True)
class Texts:
    """The arguments of `load_samples`, with what is usual."""

    calibration: Sequence[str] | None = None  # None: prose and source code
    samples: int = 512  # at most
    sequence_length: int = 512  # tokens
    seed: int | None = None
    parse_special: bool = False

    def load(self, model: Model) -> Samples:
        return load_samples(
            model,
            self.calibration,
            samples=self.samples,
            sequence_length=self.sequence_length,
            seed=self.seed,
            parse_special=self.parse_special,
        )
