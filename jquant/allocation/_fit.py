"""From a model and a target to a plan: sensitivity, allocation, and a search by measured KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jquant import io
from jquant.allocation._search import Found, Measure, groups, search
from jquant.allocation._search import Progress as SearchProgress
from jquant.allocation._shortlist import shortlist as plan_shortlist
from jquant.allocation.by_divergence import measured_weights
from jquant.allocation.by_gradient import gradient_weights
from jquant.allocation.by_output import output_weights
from jquant.allocation.candidates import Candidates, TooSmallError, allocated, for_damage, price
from jquant.allocation.errors import Progress, damages, grid_bits, relative_errors
from jquant.allocation.prior import usual_errors, usual_weights
from jquant.allocation.record import Record
from jquant.checkpoints.fingerprint import common_facts, digest_of_arrays, times_of
from jquant.checkpoints.model import Model
from jquant.core import UserError, bits_per_weight
from jquant.core.human import human_size
from jquant.io.imatrix import Imatrix
from jquant.plan import Plan, Settled
from jquant.plan.header import digest, output_metadata

Weighting = Literal["usual", "outputs", "gradients", "measured"]
_ATTEMPTS = 16
_FARTHEST = 4.0
ROUNDS = 6  # plans that are measured for a target divergence


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of these."""

    nbytes: int | None = None  # of the file, or of all its shards
    bpw: float | None = None  # of all tensors, without header
    kld: float | None = None  # nats a token

    def __str__(self) -> str:
        if self.nbytes is not None:
            return f"{self.nbytes} bytes"
        return f"{self.bpw} bpw" if self.bpw is not None else f"KL divergence {self.kld}"


@dataclass(frozen=True)
class Sensitivity:
    """Damages of each tensor in each of its types, with what they come from."""

    errors: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, float]

    def damages(self, scales: Mapping[str, float] | None = None) -> dict[str, dict[str, float]]:
        scales = scales or {}
        return damages(self.errors, {n: w * scales.get(n, 1.0) for n, w in self.weights.items()})


def open_record(
    model: Model,
    imatrix: Imatrix | None,
    file: Path | None,
    *,
    weighting: Weighting = "usual",
    tokens: np.ndarray | None = None,
) -> Record:
    """What was measured before, kept in this file. Raises UserError for a record of another run."""
    return Record(file, _run(model, imatrix, weighting, tokens))


def tensor_weights(
    model: Model,
    imatrix: Imatrix | None,
    found: Candidates,
    record: Record,
    *,
    weighting: Weighting = "usual",
    tokens: np.ndarray | None = None,
    progress: Progress = lambda done, count: None,
) -> dict[str, float]:
    """Nats a token for a relative error of 1 in each tensor. tokens: [samples, length], unless as usual."""
    weights = usual_weights(list(model.source.specs), _layers(model))
    if weighting == "usual":
        return weights
    blocks = [name for name in found.within if name.startswith("blk.")]
    if any(name not in record.weights for name in (found.within if weighting == "gradients" else blocks)):
        if tokens is None:
            raise UserError(f"weights by {weighting} need calibration text.")
        decoder = model.decoder()
        importance = importance_of(model, imatrix)
        if weighting == "outputs":
            record.add_weights(output_weights(decoder, tokens, importance, weights, progress=progress))
        elif weighting == "measured":
            known = record.weights
            for wave in measured_weights(decoder, tokens, importance, known=known, progress=progress):
                record.add_weights(wave)
        else:
            record.add_weights(gradient_weights(decoder, tokens, importance, progress=progress))
    return weights | record.weights


def shortlist(
    model: Model,
    settled: Settled,
    found: Candidates,
    weights: Mapping[str, float],
    target: Target,
    *,
    named: bool = False,
) -> Candidates:
    """Only the candidates of which a plan for this target will have something, by what is usual for types.

    A sum of damages thinks too well of types below two bits, so where a size can be had without them they
    are left out, unless the user named the candidates.
    """
    bits = grid_bits(model.source, found.within)
    errors = {name: usual_errors(types, bits.get(name)) for name, types in found.within.items()}
    expected, specs = damages(errors, weights), model.source.specs
    if target.kld is not None:
        value = price(specs, settled, found, expected, damage=target.kld)
        return plan_shortlist(specs, found, expected, value)
    nbytes = target.nbytes or (target.bpw or 0.0) * sum(spec.size for spec in specs.values()) / 8
    larger = found if named else _of_two_bits(found)
    value = price(specs, settled, larger, expected, budget=float(nbytes))
    if math.isfinite(value):
        return plan_shortlist(specs, larger, expected, value)
    return plan_shortlist(
        specs, found, expected, price(specs, settled, found, expected, budget=float(nbytes))
    )


def _of_two_bits(found: Candidates) -> Candidates:
    within = {
        name: tuple(type for type in of if bits_per_weight(type) >= 2) or of
        for name, of in found.within.items()
    }
    return found._replace(within=within)


def measured(
    model: Model,
    imatrix: Imatrix | None,
    found: Candidates,
    weights: Mapping[str, float],
    record: Record,
    *,
    threads: int = 2,
    progress: Progress = lambda done, count: None,
) -> Sensitivity:
    """Errors on samples of the weights, in every candidate that the record lacks."""
    errors = relative_errors(
        model.source,
        found.within,
        importance_of(model, imatrix),
        known=record.errors,
        found=record.add_errors,
        threads=threads,
        progress=progress,
    )
    return Sensitivity(errors, weights)


def importance_of(model: Model, imatrix: Imatrix | None) -> dict[str, np.ndarray]:
    """The imatrix's entries for the tensors of this model, [matrices, cols] each."""
    return {} if imatrix is None else imatrix.by_tensor(model.source.specs.values())


def fit(
    model: Model,
    settled: Settled,
    found: Candidates,
    sensitivity: Sensitivity,
    target: Target,
    *,
    imatrix: Imatrix | None = None,
    imatrix_name: str = "",
    recipe: Callable[[Plan], str] = lambda plan: "",
    max_shard_bytes: int | None = None,
    scales: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of least damage that meets the target. recipe: what the file's header will say of it.

    A target in bytes counts the whole file and is never exceeded. Raises UserError for one that cannot be
    met, with the constraint that binds and the nearest that can.
    """
    specs, has_imatrix = model.source.specs, imatrix is not None
    by_type = sensitivity.damages(scales)
    if target.kld is not None:
        return for_damage(specs, settled, found, by_type, damage=target.kld, has_imatrix=has_imatrix)

    def planned(budget: int) -> Plan:
        return allocated(specs, settled, found, by_type, budget=budget, has_imatrix=has_imatrix)

    def measure(plan: Plan) -> tuple[int, int]:
        """Bytes of the file, and those of them that are not tensors."""
        metadata = output_metadata(model.metadata, plan, imatrix, imatrix_name, recipe=recipe(plan))
        padded = sum(-(-entry.nbytes // 32) * 32 for entry in plan.entries)
        size = io.file_bytes(metadata, plan.layout(), max_shard_bytes)
        return size, size - padded

    if target.bpw is not None:
        weights = sum(spec.size for spec in specs.values())
        try:
            return planned(int(target.bpw * weights / 8))
        except TooSmallError as error:
            least = 8 * error.tensor_bytes / weights
            raise UserError(
                f"{target.bpw:g} bpw cannot be met: {error.binding}. The nearest possible target is "
                f"--target-bpw {np.ceil(1000 * least) / 1000:g}."
            ) from None
    assert target.nbytes is not None
    budget = target.nbytes - measure(planned(1 << 62))[1]
    for _ in range(_ATTEMPTS):
        try:
            plan = planned(budget)
        except TooSmallError as error:
            least = error.tensor_bytes + target.nbytes - budget
            raise UserError(
                f"{target.nbytes} bytes cannot be met: {error.binding}. The nearest possible target is "
                f"--target-size {least}B ({human_size(least)})."
            ) from None
        size, overhead = measure(plan)
        if size <= target.nbytes:
            return plan
        budget -= max(overhead + budget - target.nbytes, 1)  # the header depends on the plan by some bytes
    raise UserError(f"{target.nbytes} bytes cannot be met; try {budget} bytes.")


def improved(
    model: Model,
    imatrix: Imatrix | None,
    found: Candidates,
    sensitivity: Sensitivity,
    plan_for: Callable[[Mapping[str, float]], Plan],
    tokens: np.ndarray,
    *,
    seconds: float,
    threads: int = 2,
    progress: SearchProgress = lambda measured, best, used: None,
) -> tuple[Plan, Found]:
    """The best plan that a search by measured KL divergence on `tokens` finds, and what it measured."""
    measure = Measure(model.source, model.metadata, importance_of(model, imatrix), tokens, threads)

    def types(scales: Mapping[str, float]) -> dict[str, str]:
        return _changed(model, plan_for(scales))

    def reweigh(types: Mapping[str, str], scales: Mapping[str, float]) -> dict[str, float]:
        by_type = sensitivity.damages(scales)
        expected = {name: by_type[name][type] for name, type in types.items() if name in by_type}
        return factors(measure.shares(types).of, expected)

    grouped = groups(found.within, _layers(model))
    best = search(measure, types, grouped, seconds=seconds, reweigh=reweigh, progress=progress)
    return plan_for(best.scales), best


def met(
    model: Model,
    imatrix: Imatrix | None,
    kld: float,
    plan_for: Callable[[float], Plan],
    tokens: np.ndarray,
    *,
    threads: int = 2,
    progress: Progress = lambda done, count: None,
) -> tuple[Plan, float]:
    """The smallest plan found whose divergence, measured on `tokens`, is at most kld; and that divergence.

    plan_for: the plan of an estimated divergence, which is corrected by what is measured, ROUNDS times.
    Raises UserError where no plan is found that has so little.
    """
    measure = Measure(model.source, model.metadata, importance_of(model, imatrix), tokens, threads)
    estimate, best, least = kld, None, float("inf")
    for done in range(ROUNDS):
        try:
            plan = plan_for(estimate)
        except UserError:
            if best is None and done == 0:
                raise
            break  # what it would take to be better is more than the types allow
        divergence = measure(_changed(model, plan))
        progress(done + 1, ROUNDS)
        least = min(least, divergence)
        if divergence <= kld and (best is None or plan.nbytes < best[0].nbytes):
            best = plan, divergence
        if 0.95 * kld <= divergence <= kld or divergence <= 0:
            break
        estimate *= 0.98 * kld / divergence
    if best is None:
        raise UserError(
            f"a KL divergence of {kld:g} was not met in {ROUNDS} trials: the least measured is {least:.3g}; "
            "allow larger types, aim at that, or name a size."
        )
    return best


def _changed(model: Model, plan: Plan) -> dict[str, str]:
    """Types of the matrices that get another one."""
    specs = model.source.specs
    return {e.name: e.type for e in plan.entries if e.type != e.source_type and len(specs[e.name].shape) > 1}


def factors(of: Mapping[str, float], expected: Mapping[str, float]) -> dict[str, float]:
    """What the weights of tensors are to be multiplied by, so that damages become these shares.

    Only ratios between tensors count. A share of few tokens is noisy: factors are at most _FARTHEST.
    """
    ratios = {name: of.get(name, 0.0) / damage for name, damage in expected.items() if damage > 0}
    positive = [ratio for ratio in ratios.values() if ratio > 0]
    middle = float(np.median(positive)) if positive else 1.0
    return {n: float(np.clip(r / middle, 1 / _FARTHEST, _FARTHEST)) for n, r in ratios.items()}


def _layers(model: Model) -> int:
    architecture = model.metadata.get("general.architecture", "")
    value = np.ravel(np.asarray(model.metadata.get(f"{architecture}.block_count", 1)))
    return int(value[0]) if value.size else 1


def _run(
    model: Model, imatrix: Imatrix | None, weighting: Weighting, tokens: np.ndarray | None
) -> dict[str, object]:
    """What a record's numbers depend on."""
    of_text = weighting != "usual" and tokens is not None
    return {
        **common_facts(model),
        "times of files": times_of(model),
        "imatrix": imatrix and digest(imatrix),
        "weighting": weighting,
        "calibration": digest_of_arrays(tokens) if of_text else None,
    }
