"""Options of a target size, bpw or KL divergence."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _errors, _options

if TYPE_CHECKING:
    from jquant.allocation import Target

_PANEL = "Target"


class By(Enum):
    usual = "usual"
    outputs = "outputs"
    gradients = "gradients"
    measured = "measured"


Size = Annotated[
    str | None,
    typer.Option(
        "--target-size",
        help="Best types for a file of at most this size, header included: 4GB, 3.5GiB, 89248832B.",
        rich_help_panel=_PANEL,
    ),
]
Bpw = Annotated[
    float | None,
    typer.Option("--target-bpw", help="The same for bits a weight, without header.", rich_help_panel=_PANEL),
]
Kld = Annotated[
    float | None,
    typer.Option(
        "--target-kld",
        help="Smallest file of this KL divergence, nats a token: measured on --calibration, or without it "
        "estimated, best with --weights gradients.",
        rich_help_panel=_PANEL,
    ),
]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="Only types that this one runs: llama.cpp-cpu, llama.cpp-cuda, llama.cpp-metal.",
        rich_help_panel=_PANEL,
    ),
]
Sensitivity = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        help="File to keep what is measured of each tensor, and to take it from.",
        rich_help_panel=_PANEL,
    ),
]
Weighting = Annotated[
    By,
    typer.Option(
        "--weights",
        help="Which tensors count how much: as usual for their role and depth; by what they change of "
        "their block's output on calibration text, a pass over it for each matrix of a block; by this "
        "model's gradients on that text, some three passes; or by the KL divergence on it with each matrix "
        "alone changed, some four passes for each block.",
        rich_help_panel=_PANEL,
    ),
]
SearchSeconds = Annotated[
    float,
    typer.Option(
        "--search-seconds",
        min=0.0,
        help="Time to improve the plan by running candidates on calibration text. Worth it below 3 bits.",
        rich_help_panel=_PANEL,
    ),
]


def target(size: str | None, bpw: float | None, kld: float | None) -> Target | None:
    """The one target that is given, or None."""
    if size is None and bpw is None and kld is None:
        return None
    from jquant.allocation import Target

    nbytes = None if size is None else _options.size_in_bytes(size)
    try:
        return Target(nbytes=nbytes, bpw=bpw, kld=kld)
    except ValueError as error:
        raise typer.BadParameter(_errors.as_options(str(error))) from None
