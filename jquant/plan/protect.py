"""Protection of single weights: their tensors get a larger type, and the search reproduces the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jquant.core import TensorSpec
from jquant.plan._plan import Entry, Plan, fitted
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


def _protected(entry: Entry, positions: Sequence[tuple[int, int]], type: str) -> Entry:
    where = ", ".join(f"[{row}, {column}]" for row, column in positions)
    reason = f"{entry.reason}; protected: super weight{'s' if len(positions) > 1 else ''} {where}"
    source = TensorSpec(entry.name, entry.shape, entry.source_type)
    raised = fitted(source, Choice(type, reason))
    return raised if raised.bpw > entry.bpw else replace(entry, reason=reason)
