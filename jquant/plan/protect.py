"""Protection of single weights: their tensors get a larger type, and the search reproduces the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jquant.core import UserError, block_and_bytes
from jquant.plan._plan import Entry, Plan
from jquant.plan.rules import tensor_type

# Of a tensor's name: [row, column] of its weights, rows counted through all experts of a stack.
Positions = Mapping[str, Sequence[tuple[int, int]]]


def protect(plan: Plan, positions: Positions, type: str) -> Plan:
    """The plan with `type` for the tensors that hold these weights; one that is larger already stays.

    Raises UserError for an unknown type, and where its blocks do not divide the rows of such a tensor.
    """
    type = tensor_type(type, "the type of protected tensors")
    entries = tuple(
        _protected(e, positions[e.name], type) if e.name in positions else e for e in plan.entries
    )
    return replace(plan, entries=entries)


def _protected(entry: Entry, positions: Sequence[tuple[int, int]], type: str) -> Entry:
    where = ", ".join(f"[{row}, {column}]" for row, column in positions)
    holds = f"{entry.reason}; protected: super weight{'s' if len(positions) > 1 else ''} {where}"
    raised = replace(entry, type=type, reason=holds, fallback_from=None)
    block, _ = block_and_bytes(type)
    if entry.shape[-1] % block:
        raise UserError(
            f"{entry.name}: rows of {entry.shape[-1]} are no multiple of {block}, so {type} cannot protect "
            "its super weights; choose another type, e.g. --protection-type Q8_0."
        )
    return raised if raised.bpw > entry.bpw else replace(entry, reason=holds)
