"""Protection of single weights: their tensors get a larger type, and the search reproduces the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jquant.core import TensorSpec, bits_per_weight
from jquant.plan._entries import Entry, Plan, fitted
from jquant.plan._plan import Settled
from jquant.plan.mixtures import Choice
from jquant.plan.rules import tensor_type

# Of a tensor's name: [row, column] of its weights, rows counted through all experts of a stack.
Positions = Mapping[str, Sequence[tuple[int, int]]]


def protect(plan: Plan, positions: Positions, type: str) -> Plan:
    """The plan with `type` for the tensors that hold these weights; one that is larger already stays.

    Where rows are no whole number of blocks, the type falls back as any other. UserError for an unknown type.
    """
    type = tensor_type(type, "the type of protected tensors")

    def entry(old: Entry) -> Entry:
        return _protected(old, positions[old.name], type) if old.name in positions else old

    return replace(plan, entries=tuple(map(entry, plan.entries)))


def protect_settled(settled: Settled, positions: Positions, type: str) -> Settled:
    """The same before a target chooses types, so that what these tensors take counts.

    Where rules, options or the profile name or demand a larger type, that stays. UserError as of `protect`.
    """
    type = tensor_type(type, "the type of protected tensors")
    chosen = dict(settled.chosen)
    for spec in settled.quantizable:
        if spec.name not in positions:
            continue
        least = settled.bounds[spec.name].minimum
        choice = chosen.get(spec.name) or (Choice(least, "the profile's least") if least else None)
        if choice is None or bits_per_weight(fitted(spec, choice).type) < bits_per_weight(type):
            choice = Choice(type, "the type of protected tensors")
        chosen[spec.name] = choice
    free = [spec for spec in settled.free if spec.name not in chosen]
    return settled._replace(chosen=chosen, free=free)


def _protected(entry: Entry, positions: Sequence[tuple[int, int]], type: str) -> Entry:
    where = ", ".join(f"[{row}, {column}]" for row, column in positions)
    reason = f"{entry.reason}; protected: super weight{'s' if len(positions) > 1 else ''} {where}"
    source = TensorSpec(entry.name, entry.shape, entry.source_type)
    raised = fitted(source, Choice(type, reason))
    return raised if raised.bpw > entry.bpw else replace(entry, reason=reason)
