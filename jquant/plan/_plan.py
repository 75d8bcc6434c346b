"""The plan: which type every tensor of the file will have, and why. Pure: it sees headers, not weights.

A tensor's type is settled by the first of these that speaks:

1. Tensors that are never quantized (norms, routers, vectors, index tables): see `kept`.
2. `embedding_type` for the token embeddings, `output_type` for output.weight. The large per-layer
   embeddings of some models follow `embedding_type` unless a rule names them.
3. The first rule whose regex is found in the name.
4. `output_type` for the token embeddings of a model that has no output matrix of its own.
5. The first rule of the profile that holds for the tensor and gives a type.
6. With a target: the choice of least damage among the candidates within the profile's bounds, see `targets`.
   With a file to be like: the type that the tensor has there.
7. `pure`: the file type's base type; else the file type's mixture, see `mixtures`. The profile's bounds lift
   or lower either.

What is settled so, `protect` may still lift, for tensors with super weights; with a target that happens
before point 6 instead, by `protect_settled`, so that the size holds.

Without profile and target the order is llama-quantize's, and so are the types, with three differences: rules
also work for the file types F32, F16 and BF16; 4 also holds with `pure`; types from 2 fall back like all
others. Importance never changes a type; it says how the weights of a type are chosen.
A type whose block does not divide the row falls back to one with smaller blocks, and the entry says so; with
a target such types are no candidates of that tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from jquant.core import Metadata, TensorSpec, UserError, bits_per_weight, block_and_bytes
from jquant.formats import FORMATS
from jquant.plan.file_types import FileType
from jquant.plan.file_types import file_type as find_file_type
from jquant.plan.kept import kept
from jquant.plan.mixtures import Choice, Model, in_mixture_order, mixture, role
from jquant.plan.profile import Bounds, Profile
from jquant.plan.rules import Rule, tensor_type

# Types with blocks of 32 that stand in where a row is no whole number of larger blocks, as llama.cpp has
# them; NVFP4 and Q1_0, for which it has none, get the nearest in size.
_FALLBACKS = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "NVFP4"), "IQ4_NL"
    ),
    **dict.fromkeys(("Q1_0", "Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
_NAMES_IN_ERRORS = 4


@dataclass(frozen=True)
class Entry:
    """One tensor of the plan. shape is in NumPy order."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    reason: str
    fallback_from: str | None = None  # the type it would have if its rows were whole blocks

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.shape, self.type)

    @property
    def size(self) -> int:
        return self.spec.size

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def source_nbytes(self) -> int:
        return TensorSpec(self.name, self.shape, self.source_type).nbytes

    @property
    def bpw(self) -> float:
        return bits_per_weight(self.type)

    @property
    def extra_bpw(self) -> float:
        """What the fallback costs, in bits per weight of this tensor; 0 where there is none."""
        return self.bpw - bits_per_weight(self.fallback_from) if self.fallback_from else 0.0


@dataclass(frozen=True)
class Plan:
    """The tensors of the output, in the order of the source."""

    file_type: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without header and padding."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def source_nbytes(self) -> int:
        return sum(entry.source_nbytes for entry in self.entries)

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def bpw(self) -> float:
        return 8 * self.nbytes / max(self.size, 1)

    @property
    def fallbacks(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.fallback_from)

    @property
    def extra_bpw(self) -> float:
        """What all fallbacks cost, in bits per weight of the model."""
        return sum(entry.extra_bpw * entry.size for entry in self.fallbacks) / max(self.size, 1)

    @property
    def requantized(self) -> tuple[Entry, ...]:
        """Tensors that are quantized already and get another type: their error adds to the new one."""
        return tuple(
            e for e in self.entries if e.type != e.source_type and block_and_bytes(e.source_type)[0] > 1
        )

    def layout(self) -> list[TensorSpec]:
        """The tensors as the file will have them."""
        return [entry.spec for entry in self.entries]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote; UserError where the text is none."""
        try:
            data = json.loads(text)
            entries = tuple(Entry(**{**e, "shape": tuple(e["shape"])}) for e in data["entries"])
            plan = cls(data["file_type"], entries)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"not a plan: {error!r}; write it with to_json.") from None
        for entry in plan.entries:
            block_and_bytes(entry.type)
        return plan


class Settled(NamedTuple):
    """What is known before a mixture or a target is asked."""

    model: Model
    chosen: dict[str, Choice]  # points 1 to 5 at the head of this module
    free: list[TensorSpec]  # all others, in mixture order
    quantizable: list[TensorSpec]
    bounds: dict[str, Bounds]  # of the quantizable tensors, by the profile


def plan(
    specs: Mapping[str, TensorSpec],
    metadata: Metadata,
    file_type: str,
    *,
    rules: Sequence[Rule] = (),
    profile: Profile | None = None,
    pure: bool = False,
    output_type: str | None = None,
    embedding_type: str | None = None,
    has_imatrix: bool = False,
    allow_fallback: bool = True,
) -> Plan:
    """A type for every tensor, by the order of precedence at the head of this module.

    metadata: the GGUF header's; read are the architecture and its numbers of layers, heads and experts.

    Raises UserError for an unknown type, a rule or option that concerns no tensor, a type that needs an
    imatrix when there is none, and, with allow_fallback=False, for rows that are no whole number of blocks.
    """
    kind = find_file_type(file_type)
    block_and_bytes(kind.base)
    settled = settle(
        specs,
        metadata,
        rules=rules,
        profile=profile,
        output_type=output_type,
        embedding_type=embedding_type,
        has_imatrix=has_imatrix,
    )
    if pure or block_and_bytes(kind.base)[0] == 1:
        reason = "pure" if pure else "the base type"
        choices: Iterable[Choice] = (Choice(kind.base, reason) for _ in settled.free)
    else:
        choices = mixture(kind, settled.model, settled.free)
    chosen = dict(settled.chosen)
    for spec, choice in zip(settled.free, choices, strict=True):
        chosen[spec.name] = _bounded(choice, settled.bounds[spec.name])
    return assemble(specs, settled, kind, chosen, has_imatrix=has_imatrix, allow_fallback=allow_fallback)


def settle(
    specs: Mapping[str, TensorSpec],
    metadata: Metadata,
    *,
    rules: Sequence[Rule] = (),
    profile: Profile | None = None,
    output_type: str | None = None,
    embedding_type: str | None = None,
    has_imatrix: bool = False,
) -> Settled:
    """The tensors that are kept, and those for which rules, options or the profile name a type.

    Raises UserError for an unknown type, and for a rule or option that concerns no tensor.
    """
    if output_type is not None:
        output_type = tensor_type(output_type, "the output's type")
    if embedding_type is not None:
        embedding_type = tensor_type(embedding_type, "the embeddings' type")
    model = _model(specs, metadata, has_imatrix)
    chosen: dict[str, Choice] = {}
    quantizable: list[TensorSpec] = []
    for spec in in_mixture_order(specs.values()):
        keep = kept(spec, model.architecture)
        if keep is None:
            quantizable.append(spec)
        else:
            chosen[spec.name] = Choice(keep.type, keep.reason)
    _check_used(rules, output_type, embedding_type, specs, quantizable, is_tied=model.is_tied)
    profile = profile or Profile("")
    bounds = profile.bounds_of(quantizable, model.n_layer, is_tied=model.is_tied)
    free = []
    for spec in quantizable:
        choice = _by_user(spec, rules, output_type, embedding_type, is_tied=model.is_tied)
        bound = bounds[spec.name]
        if choice is None and bound.type is not None:
            choice = Choice(bound.type, f"profile {bound.origin}")
        if choice is None:
            free.append(spec)
        else:
            chosen[spec.name] = choice
    return Settled(model, chosen, free, quantizable, bounds)


def assemble(
    specs: Mapping[str, TensorSpec],
    settled: Settled,
    kind: FileType,
    chosen: Mapping[str, Choice],
    *,
    has_imatrix: bool,
    allow_fallback: bool = True,
) -> Plan:
    """The plan of these choices, one for every tensor, with fallbacks where rows do not fit.

    Raises UserError for a type that needs an imatrix when there is none, and for forbidden fallbacks.
    """
    can_fall_back = {spec.name for spec in settled.quantizable}
    entries = tuple(
        fitted(spec, chosen[spec.name])
        if spec.name in can_fall_back
        else Entry(spec.name, spec.shape, spec.type, chosen[spec.name].type, chosen[spec.name].reason)
        for spec in specs.values()
    )
    made = Plan(kind.name, entries)
    if made.fallbacks and not allow_fallback:
        raise UserError(_fallback_message(made.fallbacks))
    if not has_imatrix:
        _check_importance(kind, entries)
    return made


def _bounded(choice: Choice, bounds: Bounds) -> Choice:
    nearest = bounds.nearest(choice.type)
    if nearest == choice.type:
        return choice
    return Choice(nearest, f"{choice.reason}: {choice.type}; {bounds.violation(choice.type)}")


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
            "choose another file type, or give these tensors another type, e.g. --rule 'regex=Q8_0'."
        )


def _model(specs: Mapping[str, TensorSpec], metadata: Metadata, has_imatrix: bool) -> Model:
    architecture = str(metadata.get("general.architecture", ""))

    def number(key: str, default: int) -> int:
        """A count; where it differs by layer, that of layer 0."""
        value = np.ravel(np.asarray(metadata.get(f"{architecture}.{key}", default)))
        return int(value[0]) if value.size else default

    n_head = number("attention.head_count", 0)
    return Model(
        architecture=architecture,
        n_layer=number("block_count", 0),
        n_expert=number("expert_count", 0),
        n_head=n_head,
        n_head_kv=number("attention.head_count_kv", n_head),
        n_attn_v=sum(role(name) == "attn_v" for name in specs),
        is_tied="output.weight" not in specs,
        has_imatrix=has_imatrix,
    )


def _by_user(
    spec: TensorSpec,
    rules: Sequence[Rule],
    output_type: str | None,
    embedding_type: str | None,
    *,
    is_tied: bool,
) -> Choice | None:
    """What options and rules say of a tensor: points 2 to 4 at the head of this module."""
    what = role(spec.name)
    rule = next((rule for rule in rules if rule.matches(spec.name)), None)
    is_named = rule is not None and spec.name == "per_layer_token_embd.weight"
    if what == "token_embd" and embedding_type and not is_named:
        return Choice(embedding_type, "asked for: the embeddings' type")
    if what == "output" and output_type:
        return Choice(output_type, "asked for: the output's type")
    if rule is not None:
        return Choice(rule.type, f"asked for: rule '{rule}'")
    if what == "token_embd" and is_tied and output_type:
        return Choice(output_type, "asked for: the output's type, which the embeddings share")
    return None


def fitted(spec: TensorSpec, choice: Choice) -> Entry:
    """The entry of this choice, or of its fallback where the row is no whole number of blocks."""
    block, _ = block_and_bytes(choice.type)
    if spec.cols % block == 0:
        return Entry(spec.name, spec.shape, spec.type, choice.type, choice.reason)
    type = choice.fallback or _FALLBACKS.get(choice.type, "F16")
    blocks = f"{block}"
    smaller, _ = block_and_bytes(type)
    if spec.cols % smaller:
        blocks, type = f"{block} or {smaller}", "F16"
    reason = f"{choice.reason}; rows of {spec.cols} are no multiple of {blocks}"
    return Entry(spec.name, spec.shape, spec.type, type, reason, fallback_from=choice.type)


def _check_used(
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


def _check_importance(kind: FileType, entries: Iterable[Entry]) -> None:
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
            "--imatrix FILE, which `jquant analyze MODEL -o FILE` or llama-imatrix makes, or a larger type."
        )


def _fallback_message(fallbacks: Sequence[Entry]) -> str:
    def words(entry: Entry) -> str:
        block, _ = block_and_bytes(entry.fallback_from or entry.type)
        return f"{entry.name} ({entry.fallback_from}: rows of {entry.shape[-1]} are no multiple of {block})"

    return (
        f"{len(fallbacks)} tensors cannot have their type: {_some(map(words, fallbacks))}. "
        "Allow fallbacks, or give them types with smaller blocks, e.g. --rule 'ffn_down=Q5_0'."
    )


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - _NAMES_IN_ERRORS
    return ", ".join(names[:_NAMES_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
