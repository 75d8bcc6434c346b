"""Options of a target size, bpw or KL divergence, and the way from them to a plan."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _options, _show

if TYPE_CHECKING:
    from jquant.allocation import Target
    from jquant.checkpoints.model import Model
    from jquant.io.imatrix import Imatrix
    from jquant.plan import Plan, Profile, Settled
    from jquant.text.samples import Samples

_PANEL = "Target"
SAMPLES = 8  # of the calibration text, that all weights but the usual, and search, look at


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
    if sum(value is not None for value in (size, bpw, kld)) > 1:
        raise typer.BadParameter("give one of --target-size, --target-bpw and --target-kld")
    for value, name in ((bpw, "--target-bpw"), (kld, "--target-kld")):
        if value is not None and not 0 < value < float("inf"):
            raise typer.BadParameter(f"expected a number above 0; got {value}", param_hint=name)
    from jquant.allocation import Target

    return Target(nbytes=None if size is None else _options.size_in_bytes(size), bpw=bpw, kld=kld)


def like(opened: Model, settled: Settled, file: Path, has_imatrix: bool, allow_fallback: bool) -> Plan:
    """The plan that repeats the types of a GGUF file."""
    from jquant.io import GgufSource
    from jquant.plan import like as plan_like

    types = {name: spec.type for name, spec in GgufSource(file).specs.items()}
    return plan_like(
        opened.source.specs,
        settled,
        types,
        str(file),
        has_imatrix=has_imatrix,
        allow_fallback=allow_fallback,
    )


def plan(
    opened: Model,
    settled: Settled,
    wanted: Target,
    imatrix: Imatrix | None,
    imatrix_name: str,
    recipe: Callable[[Plan], str],
    *,
    profile: Profile | None,
    runtime: str,
    file: Path | None,
    weighting: By,
    seconds: float,
    data: Samples | None,
    max_shard_bytes: int | None,
    threads: int,
    quiet: bool,
) -> tuple[Plan, dict[str, float], dict[str, Any] | None]:
    """The plan, the estimated damage of each tensor, and what the search reports, where there was one."""
    from jquant.allocation import _fit as dynamic
    from jquant.allocation.candidates import candidates
    from jquant.core import UserError
    from jquant.plan import runtime_types

    if seconds and wanted.kld is not None:
        raise typer.BadParameter("a search needs a size", param_hint="--search-seconds")
    with_importance = None if imatrix is None else imatrix.entries
    every = candidates(settled, profile, runtime_types(runtime), with_importance)
    tokens = None
    if data is not None:
        length = data.tokens.shape[1]
        tokens = data.tokens[data.lengths == length][:SAMPLES]
        if len(tokens) == 0:
            raise UserError(f"{data.dataset}: no sample has {length} tokens; give more text.")

    def fit(found, scales=None, target: Target = wanted) -> Plan:
        return dynamic.fit(
            opened,
            settled,
            found,
            sensitivity,
            target,
            imatrix=imatrix,
            imatrix_name=imatrix_name,
            recipe=recipe,
            max_shard_bytes=max_shard_bytes,
            scales=scales,
        )

    record = dynamic.open_record(opened, imatrix, file, weighting=weighting.value, tokens=tokens)
    shown = _line("sensitivity", quiet)
    weights = dynamic.tensor_weights(
        opened, imatrix, every, record, weighting=weighting.value, tokens=tokens, progress=shown
    )

    def measure(found):
        return dynamic.measured(opened, imatrix, found, weights, record, threads=threads, progress=shown)

    named = bool(profile and profile.candidates)
    found = dynamic.shortlist(opened, settled, every, weights, wanted, named=named)
    sensitivity = measure(found)
    try:
        made = fit(found)
    except UserError:
        if found == every:
            raise
        found = every
        sensitivity = measure(found)
        made = fit(found)
    report = None
    if wanted.kld is not None and tokens is not None:
        made, divergence = dynamic.met(
            opened,
            imatrix,
            wanted.kld,
            lambda kld: fit(found, target=dynamic.Target(kld=kld)),
            tokens,
            threads=threads,
            progress=_line("measured", quiet),
        )
        report = {"best_kld": divergence}
    if seconds and tokens is not None:
        made, best = dynamic.improved(
            opened,
            imatrix,
            found,
            sensitivity,
            lambda scales: fit(found, scales),
            tokens,
            seconds=seconds,
            threads=threads,
            progress=_search_line(seconds, quiet),
        )
        report = {"first_kld": best.first, "best_kld": best.divergence, "measured": best.measured}
    by_type = sensitivity.damages()
    damages = {e.name: by_type[e.name].get(e.type, 0.0) for e in made.entries if e.name in by_type}
    return made, damages, report


def _line(what: str, quiet: bool):
    """A line now and then, over the last one on a terminal."""

    def show(done: int, count: int) -> None:
        if quiet:
            return
        if sys.stderr.isatty():
            print(f"\r\x1b[K{what}: {done} of {count}", end="\n" if done == count else "", file=sys.stderr)
        elif done == count:
            _show.remark(f"{what}: {done} of {count}")

    return show


def _search_line(seconds: float, quiet: bool):
    def show(measured: int, best: float, used: float) -> None:
        if not quiet:
            left = max(seconds - used, 0.0)
            _show.remark(f"search: {measured} candidates, best KLD {best:.4f}, at most {left:.0f} s left")

    return show
