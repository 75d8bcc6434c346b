"""How long error feedback will take, told before it begins: its parts are timed on one batch and a few rows.

What is timed has to be compiled for the run anyway, so that a forecast costs seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jquant.calibration import within_block
from jquant.core import BlockwiseModel, Format, Head
from jquant.ldlq.ldlq import ROWS, Factor
from jquant.ldlq.sequential import Fitter
from jquant.ldlq.streams import open_streams
from jquant.models import stages


class Forecast(NamedTuple):
    passes: float  # seconds in blocks and their statistics
    search: float  # seconds in choosing codes

    def __str__(self) -> str:
        minutes = (self.passes + self.search) / 60
        share = self.search / (self.passes + self.search)
        return f"error feedback: about {max(minutes, 0.1):.1f} min, {share:.0%} of it in the search for codes"


def forecast(
    model: BlockwiseModel,
    tokens: Int[np.ndarray, "s t"],
    formats: Mapping[str, Format],
    *,
    head: Head | None = None,
    batch: int = 4,
    threads: int = 2,
) -> Forecast:
    """Of `sequential.feed_back` with these arguments: as if all blocks were like the first that has any of
    them, and nothing of an earlier run were there. Where only the output matrix is to be made, of block 0."""
    i = min((int(name.split(".")[1]) for name in formats if name.startswith("blk.")), default=0)
    own = {within_block(name): format for name, format in formats.items() if name.startswith(f"blk.{i}.")}
    few = tokens[:batch]
    x, real = model.embed(few), np.full(len(few), tokens.shape[1], np.int32)
    streams = open_streams(model, i, x.copy(), x, real, len(few), samples=len(tokens))
    passes = 0.0
    for stage in stages(own):
        passes += _seconds(lambda stage=stage: streams.gather(stage))
    passes += _seconds(streams.advance)
    batches = -(-len(tokens) // len(few))
    search = _search(model, formats, head, Fitter(threads=threads))
    return Forecast(passes * batches * len(model.blocks), search)


def _search(model: BlockwiseModel, formats: Mapping[str, Format], head: Head | None, fitter: Fitter) -> float:
    """Seconds: a few rows of each width in each format are coded, all threads at once."""
    rows: Counter[tuple[int, Format]] = Counter()
    for i, block in enumerate(model.blocks):
        for name, shape in block.shapes:
            format = formats.get(f"blk.{i}.{name}")
            if format is not None:
                rows[shape[-1], format] += int(np.prod(shape[:-1]))
    output = None if head is None else formats.get(head.output_name)
    if head is not None and output is not None:
        rows[head.output_rows(0, 1).shape[-1], output] += head.output_slabs()[-1][1]
    total = 0.0
    for (width, format), count in rows.items():
        G, few = format.group_size, min(ROWS * fitter.threads, count)
        W = 0.02 * jax.random.normal(jax.random.key(0), (few, width))
        factors = Factor(jnp.zeros((width, width)), jnp.broadcast_to(jnp.eye(G), (width // G, G, G)))
        taken = _seconds(lambda W=W, factors=factors, format=format: fitter.rows(W, factors, format))
        total += taken * count / few
    return total


def _seconds(work: Callable[[], object]) -> float:
    """Of the second call: the first one compiles."""
    jax.block_until_ready(work())
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start
