"""What a plan, and what the user asked for in it, must hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from jquant.core import TensorSpec, UserError, block_and_bytes
from jquant.formats import FORMATS
from jquant.plan._entries import Entry, Plan
from jquant.plan.file_types import FileType
from jquant.plan.mixtures import role
from jquant.plan.rules import Rule

NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
_NAMES_IN_ERRORS = 4


def check_used(
    rules: Sequence[Rule],
    output_type: str | None,
    embedding_type: str | None,
    specs: Mapping[str, TensorSpec],
    quantizable: Sequence[TensorSpec],
    *,
    is_tied: bool,
) -> None:
    """What the user asked for must concern a tensor; a rule without effect is nearly always a slip."""
    for rule in rules:
        if any(rule.matches(spec.name) for spec in quantizable):
            continue
        fixed = [name for name in specs if rule.matches(name)]
        if fixed:
            raise UserError(
                f"rule '{rule}' matches only tensors that are never quantized: {_some(fixed)}; remove it."
            )
        raise UserError(
            f"rule '{rule}' matches no tensor of this model, whose names are {_some(list(specs)[::-1])}."
        )
    roles = {role(spec.name) for spec in quantizable}
    if embedding_type and "token_embd" not in roles:
        raise UserError("a type for the embeddings was given, but the model has no token_embd.weight.")
    if output_type and not roles & ({"output", "token_embd"} if is_tied else {"output"}):
        raise UserError("a type for the output was given, but the model has no output.weight.")


def check_importance(kind: FileType, entries: Iterable[Entry]) -> None:
    """llama.cpp's rule: these types are useless without an imatrix, except in embeddings and output."""

    def needs(entry: Entry) -> bool:
        if entry.type == entry.source_type or role(entry.name) in ("token_embd", "output"):
            return False
        known = FORMATS.get(entry.type)
        by_type = entry.type in NEED_IMPORTANCE or (known is not None and known.needs_importance)
        return by_type or (kind.name == "Q2_K_S" and entry.type == "Q2_K")

    needing = [entry for entry in entries if needs(entry)]
    if needing:
        types = ", ".join(sorted({entry.type for entry in needing}))
        in_q2_k_s = " in a Q2_K_S file" if types == "Q2_K" else ""
        raise UserError(
            f"{types}{in_q2_k_s} needs an importance matrix ({_some(entry.name for entry in needing)}): pass "
            "imatrix=FILE, which `jquant analyze MODEL -o FILE` or llama-imatrix makes, or a larger type."
        )


def fallback_message(fallbacks: Sequence[Entry]) -> str:
    def words(entry: Entry) -> str:
        block, _ = block_and_bytes(entry.fallback_from or entry.type)
        return f"{entry.name} ({entry.fallback_from}: rows of {entry.shape[-1]} are no multiple of {block})"

    return (
        f"{len(fallbacks)} tensors cannot have their type: {_some(map(words, fallbacks))}. "
        "Allow fallbacks, or give them types with smaller blocks, e.g. rules=['ffn_down=Q5_0']."
    )


def check_encodable(plan: Plan) -> None:
    """Raise UserError, before anything is read, where jquant cannot decode the source or encode the type."""
    changed = [entry for entry in plan.entries if entry.type != entry.source_type]
    unreadable = [entry for entry in changed if entry.source_type not in FORMATS]
    if unreadable:
        types = ", ".join(sorted({entry.source_type for entry in unreadable}))
        raise UserError(
            f"jquant cannot read {types}, the type of {_some(entry.name for entry in unreadable)}; "
            "start from a model in another type, such as F16."
        )
    unwritable = [e for e in changed if e.type not in FORMATS or not FORMATS[e.type].can_encode]
    if unwritable:
        types = ", ".join(sorted({entry.type for entry in unwritable}))
        raise UserError(
            f"jquant cannot write {types} yet, the type of {_some(entry.name for entry in unwritable)}; "
            "choose another file type, or give these tensors another type, e.g. rules=['regex=Q8_0']."
        )


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - _NAMES_IN_ERRORS
    return ", ".join(names[:_NAMES_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
