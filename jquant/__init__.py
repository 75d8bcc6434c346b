"""jquant: quantize language models with JAX, without Torch.

    import jquant

    model = jquant.open_model("SmolLM2-135M")
    samples = jquant.load_samples(model, "train.txt", samples=64)
    imatrix = jquant.importance(model, samples)
    jquant.to_gguf(model, "smol.gguf", type="IQ3_XXS", imatrix=imatrix)

Names are imported when they are first used: `import jquant` alone waits for nothing, not even for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jquant import (
        allocation,
        calibration,
        checkpoints,
        core,
        distributed,
        evaluation,
        formats,
        int8,
        io,
        ldlq,
        models,
        plan,
        smoothquant,
        text,
        writers,
    )
    from jquant.allocation import Target, allocate
    from jquant.calibration import importance, load_samples
    from jquant.checkpoints import open_model
    from jquant.core import Format, OutputError, QuantizedTensor, ScaledFormat, UserError, dequantize
    from jquant.evaluation import evaluate
    from jquant.formats import FORMATS, SCALED_FORMATS, quantize
    from jquant.io import Imatrix
    from jquant.writers import to_folder, to_gguf

__version__ = "0.1.0"

__all__ = [
    "FORMATS", "SCALED_FORMATS", "Format", "Imatrix", "OutputError", "QuantizedTensor", "ScaledFormat",
    "Target", "UserError", "allocate", "allocation", "calibration", "checkpoints", "core", "dequantize",
    "distributed", "evaluate", "evaluation", "formats", "importance", "int8", "io", "ldlq", "load_samples",
    "models", "open_model", "plan", "quantize", "smoothquant", "text", "to_folder", "to_gguf", "writers",
]  # fmt: skip

_WING_OF = {
    "FORMATS": "formats",
    "SCALED_FORMATS": "formats",
    "Format": "core",
    "Imatrix": "io",
    "OutputError": "core",
    "QuantizedTensor": "core",
    "ScaledFormat": "core",
    "Target": "allocation",
    "UserError": "core",
    "allocate": "allocation",
    "dequantize": "core",
    "evaluate": "evaluation",
    "importance": "calibration",
    "load_samples": "calibration",
    "open_model": "checkpoints",
    "quantize": "formats",
    "to_folder": "writers",
    "to_gguf": "writers",
}


def __getattr__(name: str) -> object:
    """A public name, or a wing, at its first use (PEP 562)."""
    if name in _WING_OF:
        value = getattr(importlib.import_module(f"jquant.{_WING_OF[name]}"), name)
    elif name in __all__:
        value = importlib.import_module(f"jquant.{name}")
    else:
        raise AttributeError(f"module 'jquant' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
