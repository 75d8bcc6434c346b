"""What a file with few bits a weight may have lost, judged by the error of its tensors.

The relative error of a tensor is Σ w (x − x̂)² / Σ w x², of the bytes as they decode. It does not tell how
well a model speaks, but where it is large the model has lost much. Whether the file still answers in
sentences is for a check that runs it.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jquant.ldlq.sequential import Fed
from jquant.plan import Entry, Plan

# Mean relative error of the low-bit tensors from which the damage is called severe. SmolLM2-135M, quantized
# with an imatrix, has at 0.023 (IQ3_XXS) a mean KL divergence of 0.6 from the original, at 0.038 (IQ2_M) of
# 1.0, at 0.076 (IQ2_XXS) of 2.1 and at 0.113 (IQ1_M) of 3.5, where its sentences fall apart.
SEVERE = 0.06
EXCEPTIONAL = 2.0  # times the median of the tensors of its type
LOSSLESS = 1e-6  # only the rounding of scales to float16 is left
_NAMED = 5
_EXPERTS = 8  # in a note
# A larger type for each that is measured; without an imatrix only types that can do without.
_LARGER = {
    **dict.fromkeys(("Q1_0", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M"), "IQ2_XS"),
    **dict.fromkeys(("Q2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K"), "IQ3_XXS"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "Q3_K"), "Q4_K"),
}
_LARGER_WITHOUT_IMATRIX = {"IQ2_XS": "Q2_K", "IQ3_XXS": "Q3_K"}
_TERNARY = ("TQ1_0", "TQ2_0")


@dataclass(frozen=True)
class Quality:
    errors: Mapping[str, float]  # relative error by tensor
    mean: float | None  # over the weights of these tensors; None where there are none
    unmeasured: int  # tensors of few bits that an interrupted run had written
    exceptional: tuple[str, ...]  # far above the other tensors of their type, worst first
    lossless: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def report(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "mean_relative_error": self.mean,
            "unmeasured": self.unmeasured,
            "relative_errors": dict(self.errors),
            "exceptional": list(self.exceptional),
            "lossless": list(self.lossless),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def assess(plan: Plan, errors: Mapping[str, float], *, has_imatrix: bool) -> Quality:
    """Judge the relative errors that `pipeline.run` measured, and say what to do about them."""
    entries = {entry.name: entry for entry in plan.entries if entry.name in errors}
    exceptional = _exceptional(entries, errors)
    lossless = tuple(name for name in entries if errors[name] < LOSSLESS)
    size = sum(entry.size for entry in entries.values())
    mean = sum(errors[name] * entry.size for name, entry in entries.items()) / size if size else None
    unmeasured = sum(_is_measured(entry) and entry.name not in errors for entry in plan.entries)
    notes, warnings = [], []
    if unmeasured:
        notes.append(f"errors were measured of {len(entries)} tensors; {unmeasured} were written before.")
    ternary = [name for name in lossless if entries[name].type in _TERNARY]
    if ternary:
        notes.append(f"ternary already, stored without loss: {len(ternary)} tensors, such as {ternary[0]}.")
    if exceptional:
        shown = ", ".join(f"{name} ({errors[name]:.3f})" for name in exceptional[:_NAMED])
        worst = entries[exceptional[0]]
        more = f" and {len(exceptional) - _NAMED} more" if len(exceptional) > _NAMED else ""
        warnings.append(
            f"relative error far above the other tensors of their type: {shown}{more}; "
            f"give them more bits, e.g. {_rule(worst, has_imatrix)}."
        )
    if mean is not None and mean > SEVERE:
        warnings.append(_severe(entries, mean, has_imatrix))
    return Quality(dict(errors), mean, unmeasured, exceptional, lossless, tuple(notes), tuple(warnings))


def starved(fed: Mapping[str, Fed]) -> dict[str, list[int]]:
    """Experts that error feedback fitted with fewer tokens than they have columns, by tensor."""
    return {name: list(one.starved) for name, one in fed.items() if one.starved}


def starved_note(experts_of: Mapping[str, Sequence[int]]) -> str:
    """What the user should know of them; the tensor with the most is named."""
    name, experts = max(experts_of.items(), key=lambda item: len(item[1]))
    return (
        f"in {len(experts_of)} tensors experts saw fewer tokens than they have columns, most in {name}: "
        f"{list(experts[:_EXPERTS])}; they lean on their stack's mean. More samples= help."
    )


def _exceptional(entries: Mapping[str, Entry], errors: Mapping[str, float]) -> tuple[str, ...]:
    by_type = defaultdict(list)
    for name, entry in entries.items():
        by_type[entry.type].append(errors[name])
    medians = {type: statistics.median(found) for type, found in by_type.items()}
    found = [n for n, e in entries.items() if errors[n] > max(EXCEPTIONAL * medians[e.type], LOSSLESS)]
    return tuple(sorted(found, key=lambda name: -errors[name]))


def _is_measured(entry: Entry) -> bool:
    return entry.type in _LARGER and entry.type != entry.source_type and entry.size > 0


def _larger(type: str, has_imatrix: bool) -> str:
    larger = _LARGER[type]
    return larger if has_imatrix else _LARGER_WITHOUT_IMATRIX.get(larger, larger)


def _rule(entry: Entry, has_imatrix: bool) -> str:
    name = entry.name.replace(".", r"\.")
    return f"rules=['^{name}$={_larger(entry.type, has_imatrix)}']"


def _severe(entries: Mapping[str, Entry], mean: float, has_imatrix: bool) -> str:
    size, nbytes = Counter[str](), 0
    for entry in entries.values():
        size[entry.type] += entry.size
        nbytes += entry.nbytes
    larger = _larger(size.most_common(1)[0][0], has_imatrix)
    step = f"choose a larger type, such as {larger}, or more bits for some: rules=['ffn_down={larger}']"
    if not has_imatrix:
        step = f"pass imatrix=FILE, or {step}"
    return (
        f"severe damage is to be expected: {len(entries)} tensors of {8 * nbytes / size.total():.2f} bits a "
        f"weight have a relative error of {mean:.3f} on average (above {SEVERE} small models lose their "
        f"coherence); {step}."
    )
