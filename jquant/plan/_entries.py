"""The entries of a plan: one tensor each, with the type it will have."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from jquant.core import TensorSpec, UserError, bits_per_weight, block_and_bytes
from jquant.plan.mixtures import Choice

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
