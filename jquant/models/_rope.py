"""Rotary embedding as llama.cpp computes it: pair i of a head is turned by position · frequency[i].

    frequency[i] = base^(−2i/dims) / divisor[i], then scaled:

    linear     / factor
    yarn       from / factor (slow pairs) to unscaled (fast ones); q and k are multiplied by a magnitude
    llama3     the divisors are stored in the file (rope_freqs)
    longrope   two sets of divisors: within the context of the first training, and beyond

Source: ggml_rope_ext and rope_yarn of ggml; Peng et al. 2023 (YaRN); Ding et al. 2024 (LongRoPE).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

BETA_FAST, BETA_SLOW = 32.0, 1.0  # turns within the first context beyond which a pair is fast, below slow


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How the heads of a block are turned."""

    dims: int  # of each head, from the first; the rest stay
    base: float = 10000.0
    factor: float = 1.0
    yarn: bool = False
    original_context: int = 0  # tokens
    attention_factor: float = 1.0

    @property
    def magnitude(self) -> float:
        """What q and k are multiplied by: YaRN's temperature, and what the file adds to it."""
        temperature = 0.1 * math.log(self.factor) + 1 if self.yarn and self.factor > 1 else 1.0
        return temperature * self.attention_factor

    def frequencies(self, divisors: np.ndarray | None = None) -> Float64[np.ndarray, " pairs"]:
        """Radians per token of each pair; divisors: [pairs], 1 where there are none."""
        i = np.arange(self.dims // 2)
        unscaled = self.base ** (-2.0 * i / self.dims)
        if divisors is not None:
            unscaled = unscaled / divisors
        if not self.yarn:
            return unscaled / self.factor
        low, high = math.floor(self._pair(BETA_FAST)), math.ceil(self._pair(BETA_SLOW))
        low, high = max(low, 0), min(high, self.dims - 1)
        slow = np.clip((i - low) / max(high - low, 0.001), 0, 1)
        return unscaled / self.factor * slow + unscaled * (1 - slow)

    def _pair(self, turns: float) -> float:
        """The pair, as a fraction, that makes so many turns within the original context."""
        wavelengths = self.original_context / (turns * 2 * math.pi)
        return self.dims * math.log(wavelengths) / (2 * math.log(self.base))


def angles(
    frequencies: Float64[np.ndarray, " pairs"], positions: np.ndarray
) -> Float32[np.ndarray, "tokens pairs"]:
    """Radians in [0, 2π), reduced in float64: a float32 of thousands of radians lacks the last digits."""
    return np.remainder(positions[:, None] * frequencies, 2 * math.pi).astype(np.float32)
