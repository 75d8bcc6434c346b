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

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jquant.core import Metadata, TensorSpec, UserError, block_and_bytes
from jquant.plan._checks import check_importance, check_used, fallback_message
from jquant.plan._entries import Entry, Plan, fitted
from jquant.plan._kept import kept
from jquant.plan.file_types import FileType, nearest_file_type
from jquant.plan.file_types import file_type as find_file_type
from jquant.plan.mixtures import Choice, Hyperparameters, in_mixture_order, mixture, role
from jquant.plan.profile import Bounds, Profile
from jquant.plan.rules import Rule, tensor_type


class Settled(NamedTuple):
    """What is known before a mixture or a target is asked."""

    model: Hyperparameters
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
    model = _hyperparameters(specs, metadata, has_imatrix)
    chosen: dict[str, Choice] = {}
    quantizable: list[TensorSpec] = []
    for spec in in_mixture_order(specs.values()):
        keep = kept(spec, model.architecture)
        if keep is None:
            quantizable.append(spec)
        else:
            chosen[spec.name] = Choice(keep.type, keep.reason)
    check_used(rules, output_type, embedding_type, specs, quantizable, is_tied=model.is_tied)
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
        raise UserError(fallback_message(made.fallbacks))
    if not has_imatrix:
        check_importance(kind, entries)
    return made


def _bounded(choice: Choice, bounds: Bounds) -> Choice:
    nearest = bounds.nearest(choice.type)
    if nearest == choice.type:
        return choice
    return Choice(nearest, f"{choice.reason}: {choice.type}; {bounds.violation(choice.type)}")


def _hyperparameters(
    specs: Mapping[str, TensorSpec], metadata: Metadata, has_imatrix: bool
) -> Hyperparameters:
    architecture = str(metadata.get("general.architecture", ""))

    def number(key: str, default: int) -> int:
        """A count; where it differs by layer, that of layer 0."""
        value = np.ravel(np.asarray(metadata.get(f"{architecture}.{key}", default)))
        return int(value[0]) if value.size else default

    n_head = number("attention.head_count", 0)
    return Hyperparameters(
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


def like(
    specs: Mapping[str, TensorSpec],
    settled: Settled,
    types: Mapping[str, str],
    where: str,
    *,
    has_imatrix: bool,
    allow_fallback: bool = True,
) -> Plan:
    """The plan that gives every tensor the type that it has in another file. Rules and options still win.

    Raises UserError, which starts with `where`, for tensors that the other file does not have.
    """
    missing = [spec.name for spec in settled.free if spec.name not in types]
    if missing:
        raise UserError(
            f"{where}: has no tensor {missing[0]}, as {len(missing)} others of {len(specs)} of the model; "
            "take a file of the same architecture."
        )
    chosen = {**settled.chosen}
    for spec in settled.free:
        chosen[spec.name] = Choice(types[spec.name], f"as in {where}")
    kind = nearest_file_type([TensorSpec(s.name, s.shape, types[s.name]) for s in settled.free])
    return assemble(specs, settled, kind, chosen, has_imatrix=has_imatrix, allow_fallback=allow_fallback)
