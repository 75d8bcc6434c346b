"""The next block's weights are read while this one is computed with."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax import Array

from jquant.core import Block, BlockwiseModel

Parameters = dict[str, dict[str, Array]]


class Ahead:
    """The same model, for one pass from its first block to its last. Two blocks are in memory."""

    def __init__(self, model: BlockwiseModel):
        self._model, self._pool = model, ThreadPoolExecutor(1, thread_name_prefix="jquant-ahead")
        self._next: tuple[int, Future[Parameters]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def blocks(self) -> Sequence[Block]:
        return self._model.blocks

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return self._model.embed(tokens)

    def load_block(self, i: int) -> Parameters:
        ahead, self._next = self._next, None
        here = ahead[1].result() if ahead is not None and ahead[0] == i else self._model.load_block(i)
        if i + 1 < len(self.blocks):
            # What jax.default_device says is of a thread, and the next block goes where this one went.
            device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
            self._next = i + 1, self._pool.submit(self._load, i + 1, device)
        return here

    def _load(self, i: int, device: Any) -> Parameters:
        with jax.default_device(device):
            return self._model.load_block(i)

    def angles(self, i: int, tokens: int) -> np.ndarray:
        return self._model.angles(i, tokens)

    def logits(self, x: Array) -> Array:
        return self._model.logits(x)
