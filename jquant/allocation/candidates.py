"""A plan of least damage within a size: candidates of each tensor, then `allocate.choose`. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from jquant.allocation.knapsack import Option, choose, price_of, smallest
from jquant.core import TensorSpec, UserError, bits_per_weight, block_and_bytes
from jquant.core.human import human_size
from jquant.formats import FORMATS
from jquant.plan import NEED_IMPORTANCE, Plan, Profile, Settled, assemble, fitted, nearest_file_type
from jquant.plan.mixtures import Choice, role
from jquant.plan.profile import Bounds

# What an allocation chooses from where the profile does not say. Of types of one size the better ones: Q4_0
# and others with blocks of 32 are for rows that no larger block divides.
USUAL = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL",
    "Q4_K", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0",
)  # fmt: skip
_BLOCKS_OF_32 = frozenset({"IQ4_NL", "Q5_0", "Q5_1"})
ALIGNMENT = 32


class Candidates(NamedTuple):
    """What each free tensor may be, from the smallest type on, with bounds and without."""

    within: dict[str, tuple[str, ...]]
    without: dict[str, tuple[str, ...]]


def candidates(
    settled: Settled,
    profile: Profile | None,
    runtime: Collection[str],
    with_importance: Collection[str] | None,
) -> Candidates:
    """The types that each free tensor may have: those that the runtime runs, that we write, whose blocks
    divide the row and that the profile allows; and the type it has, if that is one of them or no smaller.

    with_importance: tensors with an imatrix entry, or None without imatrix. Types that need importance are
    for these, and for embeddings and output where there is an imatrix.

    Raises UserError where a profile's bounds leave a tensor without any.
    """
    named = profile.candidates if profile and profile.candidates else None
    within, without = {}, {}
    for spec in settled.free:
        has_any = with_importance is not None
        weighted = has_any and (spec.name in with_importance or role(spec.name) in ("token_embd", "output"))
        types = [
            type
            for type in named or USUAL
            if type in runtime
            and (type == spec.type or (type in FORMATS and FORMATS[type].can_encode))
            and spec.cols % block_and_bytes(type)[0] == 0
            and (weighted or type not in NEED_IMPORTANCE)
            and (named or spec.cols % 256 or type not in _BLOCKS_OF_32)
        ]
        if spec.type not in types and spec.type in runtime and named is None:
            types.append(spec.type)
        types.sort(key=bits_per_weight)
        bounds = settled.bounds[spec.name]
        allowed = tuple(type for type in types if bounds.violation(type) is None)
        if not allowed:
            raise UserError(_none_left(spec, types, bounds))
        within[spec.name], without[spec.name] = allowed, tuple(types)
    return Candidates(within, without)


def allocated(
    specs: Mapping[str, TensorSpec],
    settled: Settled,
    found: Candidates,
    damages: Mapping[str, Mapping[str, float]],
    *,
    budget: int,
    has_imatrix: bool,
    alignment: int = ALIGNMENT,
) -> Plan:
    """The plan of least total damage whose tensors, each padded to the alignment, take `budget` bytes.

    damages: of each free tensor in each of its candidates. Raises UserError where the smallest candidates
    are larger, with the constraint that binds and the nearest size.
    """
    fixed = _fixed_bytes(specs, settled, alignment)
    items = [_options(spec, found.within[spec.name], damages, alignment) for spec in settled.free]
    if fixed + smallest(items) > budget:
        raise TooSmallError(int(fixed + smallest(items)), _binding(settled, found, alignment))
    chosen = choose(items, float(budget - fixed))
    return _planned(specs, settled, items, chosen, has_imatrix)


def for_damage(
    specs: Mapping[str, TensorSpec],
    settled: Settled,
    found: Candidates,
    damages: Mapping[str, Mapping[str, float]],
    *,
    damage: float,
    has_imatrix: bool,
    alignment: int = ALIGNMENT,
) -> Plan:
    """The smallest plan whose total damage is at most `damage`, nats a token.

    Raises UserError where the largest candidates have more.
    """
    items = [_options(spec, found.within[spec.name], damages, alignment) for spec in settled.free]
    turned = [[Option(o.type, o.cost, o.size) for o in options] for options in items]
    if smallest(turned) > damage:
        raise UserError(
            f"a KL divergence of {damage:g} cannot be met within these types: the best of them are at "
            f"{smallest(turned):.3g}; allow larger types, or aim at that."
        )
    return _planned(specs, settled, items, choose(turned, damage), has_imatrix)


def price(
    specs: Mapping[str, TensorSpec],
    settled: Settled,
    found: Candidates,
    damages: Mapping[str, Mapping[str, float]],
    *,
    budget: float | None = None,
    damage: float | None = None,
    alignment: int = ALIGNMENT,
) -> float:
    """Nats that a byte is worth at this number of bytes of all tensors, or at this total damage."""
    items = [_options(spec, found.within[spec.name], damages, alignment) for spec in settled.free]
    if budget is not None:
        return price_of(items, budget - _fixed_bytes(specs, settled, alignment))
    assert damage is not None
    turned = price_of([[Option(o.type, o.cost, o.size) for o in options] for options in items], damage)
    return 1 / turned if turned > 0 else float("inf")


class TooSmallError(UserError):
    """No plan is as small as asked."""

    def __init__(self, tensor_bytes: int, binding: str):
        super().__init__(binding)
        self.tensor_bytes = tensor_bytes  # of the smallest plan, with padding
        self.binding = binding


def padded_bytes(spec: TensorSpec, type: str, alignment: int = ALIGNMENT) -> int:
    """Bytes of a tensor of this type in a file, up to the next tensor."""
    return -(-TensorSpec(spec.name, spec.shape, type).nbytes // alignment) * alignment


def _options(
    spec: TensorSpec, types: Sequence[str], damages: Mapping[str, Mapping[str, float]], alignment: int
) -> list[Option]:
    return [
        Option(type, float(padded_bytes(spec, type, alignment)), damages[spec.name][type]) for type in types
    ]


def _planned(
    specs: Mapping[str, TensorSpec],
    settled: Settled,
    items: Sequence[Sequence[Option]],
    chosen: Sequence[int],
    has_imatrix: bool,
) -> Plan:
    choices = dict(settled.chosen)
    for spec, options, i in zip(settled.free, items, chosen, strict=True):
        reason = f"least damage for its size: {options[i].cost:.2g} nats"
        bounds = settled.bounds[spec.name]
        if bounds.minimum == options[i].type or bounds.maximum == options[i].type:
            reason += f"; at the bound of {bounds.origin}"
        choices[spec.name] = Choice(options[i].type, reason)
    kind = nearest_file_type([TensorSpec(s.name, s.shape, choices[s.name].type) for s in settled.free])
    return assemble(specs, settled, kind, choices, has_imatrix=has_imatrix)


def _fixed_bytes(specs: Mapping[str, TensorSpec], settled: Settled, alignment: int) -> int:
    """Bytes of the tensors whose types are settled."""
    can_fall_back = {spec.name for spec in settled.quantizable}
    total = 0
    for name, choice in settled.chosen.items():
        type = fitted(specs[name], choice).type if name in can_fall_back else choice.type
        total += padded_bytes(specs[name], type, alignment)
    return total


def _binding(settled: Settled, found: Candidates, alignment: int) -> str:
    """What keeps the smallest plan from being smaller, in words."""
    cost: Counter[str] = Counter()
    for spec in settled.free:
        low, lower = found.within[spec.name][0], found.without[spec.name][0]
        if low != lower:
            more = padded_bytes(spec, low, alignment) - padded_bytes(spec, lower, alignment)
            cost[settled.bounds[spec.name].violation(lower) or ""] += more
    settled_by_type: Counter[str] = Counter()
    for spec in settled.quantizable:
        if spec.name in settled.chosen:
            choice = settled.chosen[spec.name]
            settled_by_type[f"{choice.reason} ({choice.type})"] += padded_bytes(
                spec, fitted(spec, choice).type, alignment
            )
    worst = [*cost.most_common(1), *settled_by_type.most_common(1)]
    if not worst:
        types = sorted({types[0] for types in found.within.values()}, key=bits_per_weight)
        return f"every tensor has its smallest type ({', '.join(types)})"
    why, more = max(worst, key=lambda item: item[1])
    return f"what binds is '{why}', {human_size(more)}"


def _none_left(spec: TensorSpec, types: Sequence[str], bounds: Bounds) -> str:
    if not types:
        return (
            f"{spec.name}: none of the candidates can be had for it (rows of {spec.cols}, no importance, or "
            "not run by the runtime); add others to the profile's candidates."
        )
    return (
        f"{bounds.violation(types[0]) or bounds.violation(types[-1])}: leaves {spec.name} none of "
        f"{', '.join(types)}; widen the bounds, or add candidates."
    )
