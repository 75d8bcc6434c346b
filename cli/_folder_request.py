"""What `jquant quantize` is asked to write as a folder: its options, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import _options
from ._options import OUTPUT

_PANEL = "Types"
_AUTO, _NONE = "auto", "none"  # --keep
_SCHEMES = ("W8A8", "FP8", "W4A16", "GPTQ", "AWQ")  # here too, for --help is not to wait for JAX
# fmt: off
_KNOWN = frozenset({
    "model", "out", "type", "keep", "alpha", "no_smooth", "imatrix", "analyze", "calibration", "samples",
    "sequence_length", "seed", "parse_special", "batch", "revision", "pre_tokenizer", "dry_run",
    "max_shard_size", "force", "json", "quiet", "threads", "feedback", "static_activations",
    "asymmetric_activations", "target_error", "export_scales", "resume", "coordinator", "processes",
    "process",
})
# fmt: on

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
        rich_help_panel=OUTPUT,
    ),
]


def is_scheme(type: str | None) -> bool:
    return type is not None and type.upper() in _SCHEMES


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

    @property
    def smooths(self) -> bool:
        return self.type == "W8A8" and not self.no_smooth

    @property
    def searches(self) -> bool:
        """Whether factors are searched, rather than those of an alpha taken."""
        return self.smooths and self.alpha is None

    @property
    def keeps_outstanding(self) -> bool:
        return _AUTO in self.keep or (not self.keep and self.searches)

    @property
    def patterns(self) -> list[str]:
        """Of weights to leave as they are."""
        return [pattern for pattern in self.keep if pattern not in (_AUTO, _NONE)]

    @property
    def needs_text(self) -> bool:
        return self.analyze or self.smooths or bool(self.feedback) or self.static

    def check(self, context: typer.Context) -> None:
        """Raises BadParameter for what does not go together, or says nothing of folders."""
        _refuse_others(context, self.type)
        if self.type != "W8A8" and (self.alpha is not None or self.no_smooth):
            raise typer.BadParameter("is for W8A8", param_hint="--alpha, --no-smooth")
        if self.type not in ("W8A8", "FP8") and self.static:
            raise typer.BadParameter("is for W8A8 and FP8", param_hint="--static-activations")
        if self.type != "W8A8" and self.asymmetric:
            raise typer.BadParameter("is for W8A8", param_hint="--asymmetric-activations")
        if self.asymmetric and self.static:
            raise typer.BadParameter(
                "has one scale for each token, not --static-activations",
                param_hint="--asymmetric-activations",
            )
        if self.target_error is not None and not self.smooths:
            raise typer.BadParameter("is for W8A8 that is smoothed", param_hint="--target-error")
        if self.keeps_outstanding and not self.smooths:
            raise typer.BadParameter("auto is for W8A8 that is smoothed", param_hint="--keep")
        if self.smooths and (self.imatrix or self.analyze):
            raise typer.BadParameter(
                "is measured anyway where W8A8 is smoothed", param_hint="--imatrix, --analyze"
            )


def _refuse_others(context: typer.Context, type: str) -> None:
    """Options that say something of GGUF files only."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _KNOWN and source is not None and source.name == "COMMANDLINE":
            hint = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"says nothing of {type.upper()}, which has --keep", param_hint=hint)
