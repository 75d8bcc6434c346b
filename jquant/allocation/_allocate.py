"""From a model and a target to the types that meet it at the least damage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Int

from jquant.allocation._fit import (
    SensitivityKind,
    fit,
    improved,
    measured,
    met,
    open_record,
    shortlist,
    tensor_weights,
)
from jquant.allocation._target import Target
from jquant.allocation.candidates import Candidates, candidates
from jquant.checkpoints.model import Model
from jquant.core import SILENT, Progress, Reporter, UserError, default_threads
from jquant.io.imatrix import Imatrix
from jquant.plan import Plan, Profile, Settled, runtime_types
from jquant.text.samples import Samples

SAMPLES = 8  # whole ones of the text: what all sensitivities but the usual, and search, look at


class Allocated(NamedTuple):
    plan: Plan
    damages: dict[str, float]  # estimated, nats a token, by tensor
    search: dict[str, float] | None = None  # divergences that were measured, and of how many plans


def allocate(
    model: Model,
    settled: Settled,
    target: Target,
    *,
    imatrix: Imatrix | None = None,
    imatrix_name: str = "",
    profile: Profile | None = None,
    runtime: str = "llama.cpp-cpu",
    sensitivity: SensitivityKind | Mapping[str, float] = "usual",
    samples: Samples | None = None,
    search_seconds: float = 0.0,
    record: Path | None = None,
    recipe: Callable[[Plan], str] = lambda plan: "",
    max_shard_bytes: int | None = None,
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> Allocated:
    """Types that meet a target at the least sum of damages: damage = sensitivity · error, of each tensor.

    The error of a type in a tensor is measured on a part of its weights; see `errors`.

    Args:
        settled: what rules and profile say already, of `jquant.plan.settle`.
        target: bytes count the whole file with its header and are never exceeded.
        imatrix, imatrix_name: importance, and what the header calls it. Without it, types that need
            importance are no candidates.
        profile: its candidates. runtime: what is to run the file; see `jquant.plan.RUNTIMES`.
        sensitivity: nats that a relative error of 1 costs in each tensor: "usual" for role and depth, or of
            this model on `samples` by what it changes of block "outputs", by "gradients", or "measured" with
            one tensor changed at a time; or the numbers themselves, by tensor.
        samples: text for these, and for the next two. A target divergence is met as measured on it, and
            without it as estimated.
        search_seconds: time for running whole candidates on the samples. For sizes, worth it below 3 bits.
        record: file that keeps what is measured of each tensor, and gives it to the next run.
        recipe: what the header will say of a plan. threads: default one a processor.

    Returns:
        The plan, the damage expected of each tensor, and what was measured of plans, where any was.

    Raises:
        UserError: for a target that cannot be met, with what binds and the nearest that can; for a record of
            another run; for samples that are needed and not given.

    >>> settled = jquant.plan.settle(model.source.specs, model.metadata)
    >>> plan, damages, _ = jquant.allocate(model, settled, jquant.Target(bpw=6))
    >>> plan.bpw <= 6, damages["output.weight"] > 0
    (True, True)
    """
    kind = _kind(sensitivity)
    if search_seconds and target.kld is not None:
        raise UserError("search_seconds=: a search needs a size; target= is a divergence.")
    if search_seconds and samples is None:
        raise UserError("search_seconds=: candidates are run on text; give samples=.")
    threads = threads or default_threads()
    tokens = None if samples is None else _whole(samples)
    every = candidates(settled, profile, runtime_types(runtime), imatrix and imatrix.entries)
    kept = open_record(model, imatrix, record, weighting=kind, tokens=tokens)
    step = reporter.steps("sensitivity")
    if isinstance(sensitivity, Mapping):
        weights = _given(sensitivity, every)
    else:
        weights = tensor_weights(model, imatrix, every, kept, weighting=kind, tokens=tokens, progress=step)
    named = bool(profile and profile.candidates)
    found = shortlist(model, settled, every, weights, target, named=named)
    damage = measured(model, imatrix, found, weights, kept, threads=threads, progress=step)

    def fitted(wanted: Target = target, scales: Mapping[str, float] | None = None) -> Plan:
        return fit(
            model,
            settled,
            found,
            damage,
            wanted,
            imatrix=imatrix,
            imatrix_name=imatrix_name,
            recipe=recipe,
            max_shard_bytes=max_shard_bytes,
            scales=scales,
        )

    try:
        plan = fitted()
    except UserError:
        if found == every:
            raise
        found = every
        damage = measured(model, imatrix, found, weights, kept, threads=threads, progress=step)
        plan = fitted()
    search = None
    if target.kld is not None and tokens is not None:
        plan, divergence = met(
            model,
            imatrix,
            target.kld,
            lambda kld: fitted(Target(kld=kld)),
            tokens,
            threads=threads,
            progress=reporter.steps("measured"),
        )
        search = {"best_kld": divergence}
    if search_seconds and tokens is not None:
        plan, best = improved(
            model,
            imatrix,
            found,
            damage,
            lambda scales: fitted(scales=scales),
            tokens,
            seconds=search_seconds,
            threads=threads,
            progress=_searching(search_seconds, reporter),
        )
        search = {"first_kld": best.first, "best_kld": best.divergence, "measured": best.measured}
    by_type = damage.damages()
    damages = {e.name: by_type[e.name].get(e.type, 0.0) for e in plan.entries if e.name in by_type}
    return Allocated(plan, damages, search)


def _kind(sensitivity: SensitivityKind | Mapping[str, float]) -> SensitivityKind:
    """What a record calls it: numbers that are given need none, as the usual."""
    if isinstance(sensitivity, Mapping):
        return "usual"
    if sensitivity not in get_args(SensitivityKind):
        raise UserError(
            f"sensitivity={sensitivity!r}: expected one of {', '.join(get_args(SensitivityKind))}, "
            "or numbers by tensor."
        )
    return sensitivity


def _given(sensitivity: Mapping[str, float], found: Candidates) -> Mapping[str, float]:
    missing = [name for name in found.within if name not in sensitivity]
    if missing:
        raise UserError(f"sensitivity=: has no number for {len(missing)} tensors, such as {missing[0]}.")
    return sensitivity


def _whole(samples: Samples) -> Int[np.ndarray, "s t"]:
    """The first few samples without padding."""
    length = samples.tokens.shape[1]
    tokens = samples.tokens[samples.lengths == length][:SAMPLES]
    if len(tokens) == 0:
        raise UserError(f"{samples.dataset}: no sample has {length} tokens; give more text.")
    return tokens


def _searching(seconds: float, reporter: Reporter) -> Callable[[int, float, float], None]:
    def show(count: int, best: float, used: float) -> None:
        reached = f"{count} candidates, best KLD {best:.4f}"
        reporter.progress(Progress("search", min(used, seconds), seconds, reached))

    return show
