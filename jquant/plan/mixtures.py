"""Which tensor type each tensor gets in each of llama.cpp's file types.

A mixture spends more bits where a model is sensitive: the output, attn_v (small and shared between query
heads), ffn_down in the first and last layers. The tables below say where. A row applies to some file types
under a condition; the first row that holds decides; where none does, the tensor gets the base type.

Terms. role: what the tensor does, read from its name. site: where in the model it sits, as layer or
position i of n. n_gqa: query heads for each key head.
Source: llama_tensor_get_type_impl in llama-quant.cpp of llama.cpp.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jquant.core import TensorSpec
from jquant.plan._kept import matrix_axes
from jquant.plan.file_types import FileType

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_ROLES = (  # the first that occurs in a name
    ("attn_qkv.weight", "attn_v"),  # a fused matrix is treated as the most sensitive of its parts
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)


def role(name: str) -> str:
    """ "output", "token_embd", "attn_v", …, or "other"."""
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "token_embd"
    return next((role for part, role in _ROLES if part in name), "other")


def layer(name: str) -> int:
    """The number in "blk.7.…"; −1 for a tensor outside the layers."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def in_mixture_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """By layer, then by name: the order in which llama.cpp counts, whatever the order in the file."""
    return sorted(specs, key=lambda spec: (layer(spec.name), spec.name.encode()))


@dataclass(frozen=True)
class Hyperparameters:
    """What the mixtures ask of a model."""

    architecture: str
    n_layer: int
    n_expert: int
    n_head: int  # of layer 0, as below
    n_head_kv: int
    n_attn_v: int  # tensors with this role
    is_tied: bool  # no output matrix: the token embeddings serve as one
    has_imatrix: bool

    @property
    def n_gqa(self) -> int:
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Models whose attn_v is so small beside the rest that it always gets five bits."""
        layers = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
        if self.architecture == "llama" and self.n_head == self.n_head_kv:
            return False
        return layers.get(self.architecture) == self.n_layer


class Site(NamedTuple):
    model: Hyperparameters
    i: int
    n: int


class Choice(NamedTuple):
    type: str
    reason: str
    fallback: str | None = None  # for rows that do not fit, where it is not the usual one


class Condition(NamedTuple):
    words: str
    holds: Callable[[Site], bool]


def _both(a: Condition, b: Condition) -> Condition:
    return Condition(f"{a.words}, {b.words}", lambda s: a.holds(s) and b.holds(s))


def _is_outer_or_third(s: Site) -> bool:
    return s.i < s.n // 8 or s.i >= 7 * s.n // 8 or (s.i - s.n // 8) % 3 == 2


always = Condition("", lambda s: True)
grouped = Condition("4 or more query heads share it", lambda s: s.model.n_gqa >= 4)
shared = Condition(
    "4 or more query heads or experts share it", lambda s: s.model.n_gqa >= 4 or s.model.n_expert >= 4
)
eight_experts = Condition("small beside 8 experts", lambda s: s.model.n_expert == 8)
with_imatrix = Condition("with an imatrix", lambda s: s.model.has_imatrix)
without_imatrix = Condition("without an imatrix", lambda s: not s.model.has_imatrix)
first_two = Condition("the first two", lambda s: s.i < 2)
first_four = Condition("the first four", lambda s: s.i < 4)
first_eighth = Condition("the first eighth of layers", lambda s: s.i < s.n // 8)
first_sixteenth = Condition("the first sixteenth of layers", lambda s: s.i < s.n // 16)
middle = Condition("between the first and last eighth of layers", lambda s: s.n // 8 <= s.i < 7 * s.n // 8)
more_bits = Condition("the first and last eighth of layers and every third between", _is_outer_or_third)


class Row(NamedTuple):
    file_types: frozenset[str]  # empty: all
    condition: Condition
    type: str | None  # None: the base type


def _rows(*rows: tuple[str, Condition, str | None]) -> tuple[Row, ...]:
    return tuple(
        Row(frozenset(() if names == "*" else names.split()), condition, type)
        for names, condition, type in rows
    )


MIXTURES = {
    "attn_v": _rows(
        ("*", eight_experts, "Q8_0"),
        ("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", grouped, "Q4_K"),
        ("Q2_K", always, "Q3_K"),
        ("IQ3_XXS", without_imatrix, "IQ3_S"),
        ("IQ3_M", always, "Q4_K"),
        ("Q3_K_M", first_two, "Q5_K"),
        ("Q3_K_M", always, "Q4_K"),
        ("Q3_K_L", always, "Q5_K"),
        ("IQ4_NL IQ4_XS", grouped, "Q5_K"),
        ("Q4_K_M Q5_K_M", more_bits, "Q6_K"),
        ("Q4_K_S", first_four, "Q5_K"),
    ),
    "attn_k": _rows(
        ("*", eight_experts, "Q8_0"),
        ("IQ3_XS", always, "IQ3_XXS"),
        ("IQ3_XXS", always, "IQ2_S"),
    ),
    "attn_q": _rows(
        ("IQ3_XS", always, "IQ3_XXS"),
        ("IQ3_XXS", always, "IQ2_S"),
    ),
    "attn_output": _rows(
        ("Q2_K IQ3_XS IQ3_XXS Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M IQ3_S IQ3_M IQ4_XS", eight_experts, "Q5_K"),
        ("*", eight_experts, None),
        ("Q2_K", always, "Q3_K"),
        ("IQ3_XXS", always, "IQ3_S"),
        ("Q3_K_M IQ3_M", always, "Q4_K"),
        ("Q3_K_L", always, "Q5_K"),
    ),
    "ffn_down": _rows(
        ("Q2_K", always, "Q3_K"),
        ("Q2_K_S IQ3_M", first_eighth, "Q4_K"),
        ("IQ3_M", _both(eight_experts, more_bits), "Q4_K"),
        ("IQ3_XXS", _both(first_eighth, without_imatrix), "Q4_K"),
        ("IQ3_XXS", without_imatrix, "Q3_K"),
        ("Q3_K_M", first_sixteenth, "Q5_K"),
        ("Q3_K_M", always, "Q4_K"),
        ("Q3_K_L", always, "Q5_K"),
        ("Q4_K_M Q5_K_M", more_bits, "Q6_K"),
        ("Q4_K_S", first_eighth, "Q5_K"),
        ("IQ4_NL IQ4_XS", _both(first_eighth, without_imatrix), "Q5_K"),
        # An imatrix lets the first layers of these symmetric types go astray; a minimum per block does not.
        ("Q4_0", _both(first_eighth, with_imatrix), "Q4_1"),
        ("Q5_0", _both(first_eighth, with_imatrix), "Q5_1"),
    ),
    "ffn_gate": _rows(("IQ3_XS", middle, "IQ3_XXS")),
    "ffn_up": _rows(("IQ3_XS", middle, "IQ3_XXS")),
    # Only embeddings that are not also the output come here.
    "token_embd": _rows(
        ("TQ1_0 TQ2_0 Q2_0", always, "Q4_K"),
        ("IQ3_XXS", always, "IQ3_S"),
    ),
}  # fmt: skip

# Below three bits the tables are others; what has no row stays at the base type.
LOW_BITS = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
LOW_BIT_MIXTURES = {
    "attn_v": _rows(
        ("*", shared, "Q4_K"),
        ("IQ2_S IQ2_M", always, "IQ3_S"),
        ("*", always, "Q2_K"),
    ),
    "attn_k": _rows(("*", eight_experts, "Q4_K")),
    "attn_output": _rows(
        ("*", eight_experts, "Q5_K"),
        ("IQ1_S IQ1_M", always, "IQ2_XXS"),
        ("IQ2_S IQ2_M", always, "IQ3_S"),
    ),
    "ffn_down": _rows(
        ("IQ2_S IQ2_M", first_eighth, "IQ3_S"),
        ("*", first_eighth, "Q2_K"),
    ),
    "token_embd": _rows(
        ("IQ2_S IQ2_M", always, "IQ3_S"),
        ("*", always, "Q2_K"),
    ),
}

# Falcon's rows come before the common ones.
FALCON = {
    "attn_output": _rows(
        ("Q3_K_L", always, "Q4_K"),
        ("*", always, None),
    ),
    "ffn_down": _rows(
        ("Q3_K_M", first_sixteenth, "Q5_K"),
        ("Q3_K_M", more_bits, "Q4_K"),
        ("Q3_K_L", always, "Q4_K"),
        ("Q4_K_M", first_sixteenth, "Q6_K"),
        ("Q4_K_M", more_bits, "Q5_K"),
        ("Q3_K_M Q4_K_S", always, None),
    ),
}


def mixture(kind: FileType, model: Hyperparameters, specs: Iterable[TensorSpec]) -> Iterator[Choice]:
    """A type for each of these tensors, which come in `in_mixture_order` and may all be quantized."""
    before: Counter[str] = Counter()  # role -> tensors of this role so far
    for spec in specs:
        what = role(spec.name)
        yield _special(kind, model, spec, what) or _by_table(kind, model, spec, what, before[what])
        before[what] += 1


def _special(kind: FileType, model: Hyperparameters, spec: TensorSpec, what: str) -> Choice | None:
    """The output, and the file types and architectures that have a rule of their own."""
    if model.architecture == "glm5-next" and re.search(r"attn_q_[ab]|nextn\.eh_proj", spec.name):
        return Choice("Q8_0", "too sensitive for less in this architecture")
    is_output = what == "output" or (what == "token_embd" and model.is_tied)
    if kind.name == "MXFP4_MOE":
        is_expert = matrix_axes(spec.shape) > 2 and (
            model.architecture != "bailingmoe3" or what in ("ffn_up", "ffn_gate", "ffn_down")
        )
        if is_expert and not is_output:
            return Choice("MXFP4", "an expert")
        return Choice("Q8_0", "not an expert")
    if is_output:
        why = "serves as the output too" if what == "token_embd" else "the output"
        if model.architecture == "falcon" or kind.base == "Q8_0":
            return Choice("Q8_0", why)
        if kind.name in LOW_BITS | {"IQ3_XXS"}:
            return Choice("Q5_K", why, fallback="Q8_0")
        return Choice("Q6_K", why)
    return None


def _by_table(kind: FileType, model: Hyperparameters, spec: TensorSpec, what: str, before: int) -> Choice:
    is_low = kind.name in LOW_BITS
    # Experts may sit in some layers only, so that their number says nothing about the layer: the name does.
    by_name = what.startswith("ffn_") and model.n_expert > 1 and not is_low
    i = layer(spec.name) if by_name else before
    site = Site(model, i, model.n_attn_v if what == "attn_v" else model.n_layer)

    rows = (LOW_BIT_MIXTURES if is_low else MIXTURES).get(what, ())
    if model.architecture == "falcon" and not is_low:
        rows = (*FALCON.get(what, ()), *rows)
    for row in rows:
        if (not row.file_types or kind.name in row.file_types) and row.condition.holds(site):
            chosen = Choice(row.type or kind.base, f"{what}: {row.condition.words}".removesuffix(": "))
            break
    else:
        chosen = Choice(kind.base, "the base type")
    if what == "attn_v" and not is_low and model.is_70b and chosen.type in ("Q3_K", "Q4_K"):
        return Choice("Q5_K", "attn_v: small in a model of this size")
    return chosen
