"""The header of a file: what llama-quantize adds, and the recipe that says how the file was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import gguf
import numpy as np

from jquant.core import VERSION, Metadata, MetadataValue
from jquant.io.imatrix import Imatrix
from jquant.plan._entries import Plan
from jquant.plan.file_types import FILE_TYPES
from jquant.plan.profile import Profile


def recipe(
    plan: Plan,
    *,
    imatrix: Imatrix | None,
    effort: str,
    profile: Profile | None = None,
    target: object = None,
    rules: Sequence[object] = (),
    protected: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    balanced: bool = False,
) -> str:
    """How a file was made, as JSON for its header; the types of its tensors stand there anyway."""
    about = {
        "jquant": VERSION,
        "file_type": plan.file_type,
        "profile": profile and profile.name,
        "target": target and str(target),
        "rules": [str(rule) for rule in rules],
        "effort": effort,
        "imatrix_sha256": imatrix and digest(imatrix),
        "protected": {name: [list(at) for at in places] for name, places in (protected or {}).items()},
        "balanced": balanced,
    }
    return json.dumps({key: value for key, value in about.items() if value}, separators=(",", ":"))


def digest(imatrix: Imatrix) -> str:
    """SHA-256 of an imatrix's names and values."""
    found = hashlib.sha256()
    for name in sorted(imatrix.entries):
        found.update(name.encode("utf-8", "surrogateescape"))
        found.update(np.ascontiguousarray(imatrix.entries[name]).tobytes())
    return found.hexdigest()


RECIPE = "jquant.recipe"  # metadata key


def output_metadata(
    metadata: Metadata, plan: Plan, imatrix: Imatrix | None, imatrix_name: str, *, recipe: str = ""
) -> Metadata:
    """The model's own `metadata` and what llama-quantize adds to it; recipe: JSON, how the file was made."""
    added: dict[str, MetadataValue] = {
        "general.quantization_version": np.uint32(gguf.GGML_QUANT_VERSION),
        "general.file_type": np.uint32(FILE_TYPES[plan.file_type].number),
    }
    if imatrix is not None:
        added |= {
            "quantize.imatrix.file": imatrix_name,
            "quantize.imatrix.dataset": ", ".join(imatrix.datasets),
            "quantize.imatrix.entries_count": np.uint32(len(imatrix.entries)),
            "quantize.imatrix.chunks_count": np.uint32(imatrix.chunk_count),
        }
    if recipe:
        added[RECIPE] = recipe
    # What a source says of an imatrix or a recipe was true of the source.
    kept = {k: v for k, v in metadata.items() if not k.startswith("quantize.imatrix.") and k != RECIPE}
    return {**kept, **added}
