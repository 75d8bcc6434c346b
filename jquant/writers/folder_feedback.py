"""Error feedback for folders: the matrices of a model's blocks in a ScaledFormat, fitted block by block.

What comes out is taken apart into codes and scales, see `ldlq.scaled`, and given the names and the order of
rows that the checkpoint has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

import jax.numpy as jnp
import numpy as np

from jquant import models
from jquant.calibration import real_tokens
from jquant.checkpoints.rescaled import Factors
from jquant.distributed.team import ALONE, Team, shares
from jquant.io.findings import Findings
from jquant.ldlq import sequential
from jquant.ldlq.scaled import by_groups, taken_apart
from jquant.smoothquant import smoothing
from jquant.text.samples import Samples
from jquant.writers.folder_plan import Checkpoint, FedWeight, FolderPlan, stored_format
from jquant.writers.gguf_feedback import Feedback

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
                quantized = taken_apart(jnp.asarray(rows), formats[name], blocked[name])
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
