"""Error feedback for folders: the matrices of a model's blocks in a ScaledFormat, fitted block by block.

`sequential` and `feedback` know formats by blocks with their scale among the bytes. A ScaledFormat is one of
these where its groups, or whole rows, are the blocks; what comes out is taken apart again into codes and
scales, and given the names and the order of rows that the checkpoint has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import PyTree

from jquant import models
from jquant.calibration import real_tokens
from jquant.checkpoints.rescaled import Factors
from jquant.core import FLOAT_DTYPES, Format, QuantizedTensor, ScaledFormat
from jquant.distributed.team import ALONE, Team, shares
from jquant.io.findings import Findings
from jquant.ldlq import sequential
from jquant.smoothquant import smoothing
from jquant.text.samples import Samples
from jquant.writers.folder_plan import Checkpoint, FedWeight, FolderPlan, stored_format
from jquant.writers.gguf_feedback import Feedback

SCALE_BYTES = 4
TOKENS_A_COLUMN = 8  # enough to learn from in 8 bits: twice as many left as much of SmolLM2-135M's error


def feed_back(
    checkpoint: Checkpoint,
    plan: FolderPlan,
    feedback: Feedback,
    factors: Mapping[str, Factors] | None = None,
    team: Team = ALONE,
    findings: Findings | None = None,
) -> Iterator[FedWeight]:
    """The weights that the plan quantizes, block by block. factors: of the smoothing before it. team: each
    learns from a part of the samples, and all get the same weights. findings: of one process; blocks that an
    interrupted run has fed are recalled."""
    model, chosen = checkpoint.model, set(plan.quantized)
    decoder = model.decoder()
    architecture = models.for_config(checkpoint.config)
    config = architecture.read_config(checkpoint.config)
    formats = {
        name: stored_format(plan.scheme, checkpoint.source.specs[weight.parts[0]])
        for name, weight in checkpoint.weights.items()
        if chosen.issuperset(weight.parts)
    }
    blocked = {name: by_groups(format, model.source.specs[name].cols) for name, format in formats.items()}
    mine = shares(len(feedback.samples.tokens), team.me, team.count)

    @lru_cache(maxsize=1)
    def known(i: int) -> dict[str, np.ndarray]:
        return (findings and findings.recall("fed", i)) or {}

    blocks = sequential.feed_back(
        smoothing.Smoothed(decoder, factors) if factors else decoder,
        feedback.samples.tokens[mine],
        blocked,
        lengths=feedback.samples.lengths[mine],
        settings=feedback.settings,
        earlier=lambda name: known(int(name.split(".")[1])).get(f"{name}|data"),
        batch=feedback.batch,
        team=team,
        progress=feedback.progress,
    )
    for i, block in enumerate(blocks):
        for name, fed in _remembered(findings, i, known(i), block).items():
            for part, rows in architecture.as_stored(config, checkpoint.weights[name], fed.data):
                quantized = _taken_apart(rows, formats[name], blocked[name].block_bytes)
                yield FedWeight(part, quantized, fed.error)


def _remembered(
    findings: Findings | None, i: int, known: Mapping[str, np.ndarray], made: Mapping[str, sequential.Fed]
) -> Mapping[str, sequential.Fed]:
    """The block with the errors that are known of it, or from now on known itself."""
    if known:
        return {name: fed._replace(error=float(known[f"{name}|error"])) for name, fed in made.items()}
    if findings is not None and made:
        data = {f"{name}|data": fed.data for name, fed in made.items()}
        errors = {f"{name}|error": np.array(fed.error) for name, fed in made.items()}
        findings.remember("fed", i, data | errors)
    return made


def enough(plan: FolderPlan, checkpoint: Checkpoint, samples: Samples) -> Samples:
    """The first samples, as many as feedback in 8 bits needs."""
    cols = max((checkpoint.source.specs[name].cols for name in plan.quantized), default=0)
    held = np.cumsum(real_tokens(samples.tokens, samples.lengths))
    count = int(np.searchsorted(held, TOKENS_A_COLUMN * cols)) + 1
    return replace(samples, tokens=samples.tokens[:count], lengths=samples.lengths[:count])


def by_groups(format: ScaledFormat, cols: int) -> Format:
    """The format whose blocks are the groups, or rows of so many columns: codes of 8 bits, then the scale,
    and the zero, as float32."""
    return _by_blocks(format, format.group_size or cols)


@cache
def _by_blocks(format: ScaledFormat, size: int) -> Format:
    return Format(
        name=format.name,
        ggml_type=None,
        block_size=size,
        block_bytes=size + SCALE_BYTES * len(format.scale_parts),
        fit=partial(_fit, format),
        assign=partial(_assign, format),
        reconstruct=partial(_reconstruct, format),
        pack=_pack,
        unpack=partial(_unpack, format),
    )


def _fit(format: ScaledFormat, blocks: Array, importance: Array | None = None) -> PyTree:
    scales = format.fit(blocks.T, None if importance is None else importance.T)
    dtype = FLOAT_DTYPES[format.scale_type]
    return jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), scales)


def _assign(format: ScaledFormat, blocks: Array, importance: Array | None, scales: PyTree) -> Array:
    return format.assign(blocks.T, scales).T


def _reconstruct(format: ScaledFormat, codes: Array, scales: PyTree) -> Array:
    return format.reconstruct(codes.T, scales).T


def _pack(codes: Array, scales: PyTree) -> Array:
    bytes_ = [lax.bitcast_convert_type(a, jnp.uint8).T for a in jax.tree.leaves(scales)]
    return jnp.concatenate([lax.bitcast_convert_type(codes, jnp.uint8), *bytes_])


def _unpack(format: ScaledFormat, data: Array) -> tuple[Array, PyTree]:
    start = len(data) - SCALE_BYTES * len(format.scale_parts)
    codes, *scales = jnp.split(data, list(range(start, len(data), SCALE_BYTES)))
    found = tuple(lax.bitcast_convert_type(a.T, jnp.float32) for a in scales)
    dtype = jnp.float8_e4m3fn if format.type == "F8_E4M3" else jnp.int8
    return lax.bitcast_convert_type(codes, dtype), found if format.zeros else found[0]


def _taken_apart(rows: np.ndarray, format: ScaledFormat, block_bytes: int) -> QuantizedTensor:
    """rows: uint8 [rows, groups · block_bytes] of `by_groups`."""
    blocks = jnp.asarray(rows.reshape(-1, block_bytes).T)
    codes, scales = jax.device_get(_unpack(format, blocks))
    packed = format.pack(jnp.asarray(codes.T.reshape(len(rows), -1)))
    dtype = FLOAT_DTYPES[format.scale_type]
    stored = [jnp.asarray(a.reshape(len(rows), -1), dtype) for a in jax.tree.leaves(scales)]
    by_name = zip(format.scale_parts, stored, strict=True)
    return QuantizedTensor({format.part: packed, **dict(by_name)}, format)
