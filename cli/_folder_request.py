"""What `jquant quantize` is asked to write as a folder, and the options that only folders have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import _options

_PANEL = "Folders"
_AUTO = "auto"  # of --keep

Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        help="W8A8, FP8, W4A16, GPTQ, AWQ: REGEX of weights to leave as they are, by their names in the "
        "folder. Repeatable. auto: those whose rounding costs several times the average, the default of W8A8 "
        "whose factors are searched; none: none of them.",
        rich_help_panel=_PANEL,
    ),
]

Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        min=0.0,
        max=1.0,
        help="W8A8: smooth all inputs with this alpha, rather than search the best factors.",
        rich_help_panel=_PANEL,
    ),
]
NoSmooth = Annotated[
    bool,
    typer.Option(
        "--no-smooth", help="W8A8: leave outliers of inputs where they are.", rich_help_panel=_PANEL
    ),
]
StaticActivations = Annotated[
    bool,
    typer.Option(
        "--static-activations",
        help="W8A8, FP8: one calibrated scale for all inputs of a matrix, rather than one for each token.",
        rich_help_panel=_PANEL,
    ),
]
AsymmetricActivations = Annotated[
    bool,
    typer.Option(
        "--asymmetric-activations",
        help="W8A8: codes of a token's inputs that cover its range, from least to largest, with a zero in "
        "between: more exact, but not all of vLLM's kernels multiply them; those for NVIDIA GPUs do.",
        rich_help_panel=_PANEL,
    ),
]
TargetError = Annotated[
    float | None,
    typer.Option(
        "--target-error",
        min=0.0,
        help="W8A8: mean KL divergence, in nats, that smoothing is to leave in no block, as far as a block's "
        "output error tells; exit code 6 where it does.",
        rich_help_panel=_PANEL,
    ),
]
ExportScales = Annotated[
    Path | None,
    typer.Option(
        "--export-scales",
        help="W8A8, FP8, W4A16, GPTQ, AWQ: also write scales of weights and, where they were measured, "
        "smoothing factors and ranges of inputs to this safetensors file.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    model: str
    out: Path | None  # None: the plan alone is shown
    type: str
    keep: list[str]
    alpha: float | None
    no_smooth: bool
    static: bool
    asymmetric: bool
    target_error: float | None
    export_scales: Path | None
    imatrix: Path | None
    analyze: bool
    feedback: bool | None
    texts: _options.Texts
    batch: int
    revision: str | None
    pre_tokenizer: str | None
    max_shard_bytes: int | None
    resume: bool
    force: bool
    json: bool
    quiet: bool

    def __post_init__(self) -> None:
        """Raises BadParameter for a value that goes with no other; options as such are in the table."""
        if _AUTO in self.keep and (self.type != "W8A8" or self.no_smooth):
            raise typer.BadParameter("auto is for W8A8 that is smoothed", param_hint="--keep")
