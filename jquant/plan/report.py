"""What a run says of itself: tables for people, the same facts as JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jquant.core import TensorSpec, block_and_bytes
from jquant.core.human import human_shape, human_size, text_table
from jquant.plan._entries import Entry, Plan


def entry_report(
    entry: Entry, total: int, error: float | None = None, damage: float | None = None
) -> dict[str, Any]:
    """total: bytes of all tensors. error: relative, as measured. damage: estimated, nats a token."""
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "source_type": entry.source_type,
        "type": entry.type,
        "bytes": entry.nbytes,
        "share": round(entry.nbytes / max(total, 1), 6),
        "bpw": round(entry.bpw, 4),
        "fallback_from": entry.fallback_from,
        "extra_bpw": round(entry.extra_bpw, 4),
        "error": error,
        "damage": damage,
        "reason": entry.reason,
    }


def plan_report(
    plan: Plan, *, errors: Mapping[str, float] | None = None, damages: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The plan as JSON values. tensor_bytes counts weights only, not the file's header.

    errors, damages: by tensor, see `entry_report`.
    """
    tensors = [
        entry_report(e, plan.nbytes, (errors or {}).get(e.name), (damages or {}).get(e.name))
        for e in plan.entries
    ]
    fell_back = {e.name for e in plan.fallbacks}
    return {
        "file_type": plan.file_type,
        "tensor_bytes": plan.nbytes,
        "source_tensor_bytes": plan.source_nbytes,
        "bpw": round(plan.bpw, 4),
        "types": [
            {"type": kind, "tensors": n, "bytes": nbytes} for kind, n, nbytes in by_type(plan.layout())
        ],
        "fallbacks": [tensor for tensor in tensors if tensor["name"] in fell_back],
        "tensors": tensors,
    }


def by_type(specs: Collection[TensorSpec]) -> list[tuple[str, int, int]]:
    """(type, tensors, bytes), largest first."""
    sizes: dict[str, tuple[int, int]] = {}
    for spec in specs:
        n, nbytes = sizes.get(spec.type, (0, 0))
        sizes[spec.type] = n + 1, nbytes + spec.nbytes
    return sorted(((t, n, b) for t, (n, b) in sizes.items()), key=lambda item: -item[2])


def type_table(specs: Collection[TensorSpec]) -> str:
    """Size by type, with a total."""
    total = sum(spec.nbytes for spec in specs)
    rows = [(t, str(n), human_size(b), f"{b / max(total, 1):.1%}") for t, n, b in by_type(specs)]
    weights = sum(spec.size for spec in specs)
    bpw = f"{8 * total / max(weights, 1):.2f} bpw"
    return text_table(
        ("type", "tensors", "size", "share"),
        [*rows, ("total", str(len(specs)), human_size(total), bpw)],
        (1, 2, 3),
    )


def plan_table(plan: Plan) -> str:
    """One line a tensor, then size by type."""
    rows = [
        (e.name, human_shape(e.shape), e.source_type, e.type, human_size(e.nbytes), f"{e.bpw:.2f}", e.reason)
        for e in plan.entries
    ]
    header = ("tensor", "shape", "from", "to", "size", "bpw", "reason")
    return f"{text_table(header, rows, (4, 5))}\n\n{type_table(plan.layout())}"


def remarks(plan: Plan, importance: Collection[str] | None) -> list[str]:
    """What the user should know before waiting: fallbacks and their cost, weights quantized twice, …

    importance: names of the tensors in the imatrix, or None where there is no imatrix.
    """
    found = []
    if plan.fallbacks:
        kinds = sorted({f"{e.fallback_from} → {e.type}" for e in plan.fallbacks})
        found.append(
            f"another type because of the row length: {len(plan.fallbacks)} of {len(plan.entries)} tensors "
            f"({', '.join(kinds)}), {plan.extra_bpw:+.2f} bpw over the whole model; "
            "out=None lists them, allow_fallback=False forbids it."
        )
    if plan.requantized:
        kinds = sorted({e.source_type for e in plan.requantized})
        found.append(
            f"quantized already: {len(plan.requantized)} ({', '.join(kinds)}). They lose precision a second "
            "time; start from the original weights where you can."
        )
    if importance is not None:
        quantized = [e.name for e in plan.entries if block_and_bytes(e.type)[0] > 1]
        without = [name for name in quantized if name not in importance]
        if without:
            found.append(f"the imatrix says nothing of {len(without)} tensors, such as {without[0]}.")
    return found


def summary(report: Mapping[str, Any]) -> str:
    """The end of `jquant quantize`: what was written, how large, how long it took."""
    written = sum(file["bytes"] for file in report["files"])
    lines = [file["path"] for file in report["files"]]
    kinds = ", ".join(f"{t['tensors']} × {t['type']}" for t in report["types"])
    lines += [
        f"  {human_size(written)}, {report['bpw']:.2f} bpw, "
        f"{written / max(report['source_tensor_bytes'], 1):.1%} of the source",
        f"  {kinds}",
        f"  {report['seconds']:.1f} s, peak memory {human_size(report['peak_memory_bytes'])}",
    ]
    return "\n".join(lines)
