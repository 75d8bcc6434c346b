"""The arguments of `to_folder`, read: mistakes show before a model is opened, and name the argument."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jquant.calibration import Texts
from jquant.checkpoints.schemes import SCHEMES, Scheme, asymmetric
from jquant.core import UserError
from jquant.core.human import size_in_bytes
from jquant.io import check_folder, check_target
from jquant.io import imatrix as imatrix_file
from jquant.io.imatrix import Imatrix
from jquant.text.samples import Samples

AnyFile = str | os.PathLike[str]
AUTO, NONE = "auto", "none"  # of `keep`


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """What a folder is to be, but for its model."""

    out: Path | None
    scheme: Scheme
    samples: Samples | Texts
    alpha: float | None
    smooths: bool
    keep: tuple[str, ...]
    imatrix: Imatrix | None
    imatrix_name: str
    analyze: bool
    feedback: bool | None
    target_error: float | None
    export_scales: Path | None
    max_shard_bytes: int | None
    resume: bool
    force: bool
    batch: int

    @property
    def searches(self) -> bool:
        """Whether factors are searched, rather than those of an alpha taken."""
        return self.smooths and self.alpha is None

    @property
    def keeps_outstanding(self) -> bool:
        return AUTO in self.keep or (not self.keep and self.searches)

    @property
    def patterns(self) -> list[str]:
        """Of weights to leave as they are."""
        return [pattern for pattern in self.keep if pattern not in (AUTO, NONE)]

    @property
    def needs_text(self) -> bool:
        return self.analyze or self.smooths or bool(self.feedback) or self.scheme.static

    @property
    def facts(self) -> str:
        """What findings of an interrupted run depend on, besides model, plan and text."""
        how = (self.scheme.asymmetric, self.alpha, self.smooths, self.keep)
        return str((*how, self.target_error, self.feedback, self.batch))


def scheme_named(name: str) -> Scheme:
    """In any case. Raises UserError for one that is none."""
    found = SCHEMES.get(name.strip().upper())
    if found is None:
        raise UserError(f"scheme={name!r}: is none of {', '.join(SCHEMES)}.")
    return found


def read_options(
    out: AnyFile | None,
    *,
    scheme: str,
    samples: Samples | Texts | None,
    alpha: float | None,
    smooth: bool,
    static_activations: bool,
    asymmetric_activations: bool,
    keep: str | Sequence[str] | None,
    imatrix: Imatrix | AnyFile | None,
    analyze: bool,
    feedback: Samples | bool | None,
    target_error: float | None,
    export_scales: AnyFile | None,
    max_shard_size: int | str | None,
    resume: bool,
    force: bool,
    batch: int,
) -> FolderOptions:
    """Raises UserError for what is no value of its argument, or goes with no other; reads the imatrix.
    OutputError where an output may not be written."""
    chosen = scheme_named(scheme)
    if isinstance(feedback, Samples):
        if samples is not None and samples is not feedback:
            raise UserError("feedback=: learns from samples=; give one of the two, or feedback=True.")
        samples, feedback = feedback, True
    _check_scheme(chosen, alpha, smooth, static_activations, asymmetric_activations)
    asked = FolderOptions(
        out=None if out is None else Path(out),
        scheme=replace(asymmetric(chosen) if asymmetric_activations else chosen, static=static_activations),
        samples=Texts() if samples is None else samples,
        alpha=alpha,
        smooths=chosen.smooths and smooth,
        keep=(keep,) if isinstance(keep, str) else tuple(keep or ()),
        imatrix=None,
        imatrix_name=str(Path(imatrix)) if isinstance(imatrix, str | os.PathLike) else "imatrix=",
        analyze=analyze,
        feedback=feedback,
        target_error=target_error,
        export_scales=None if export_scales is None else Path(export_scales),
        max_shard_bytes=_shard_bytes(max_shard_size),
        resume=resume,
        force=force,
        batch=batch,
    )
    _check(asked, given_imatrix=imatrix is not None)
    if asked.out is not None:
        check_folder(asked.out, force=force)
        if asked.export_scales is not None:
            check_target(asked.export_scales, force=force)
    read = imatrix_file.read(Path(imatrix)) if isinstance(imatrix, str | os.PathLike) else imatrix
    return replace(asked, imatrix=read)


def _check_scheme(scheme: Scheme, alpha: float | None, smooth: bool, static: bool, asymmetric: bool) -> None:
    """What only some schemes know."""
    for argument, is_given, knows in (
        ("alpha=", alpha is not None, [s.name for s in SCHEMES.values() if s.smooths]),
        ("smooth=False", not smooth, [s.name for s in SCHEMES.values() if s.smooths]),
        ("static_activations=True", static, [s.name for s in SCHEMES.values() if s.activations]),
        ("asymmetric_activations=True", asymmetric, [s.name for s in SCHEMES.values() if s.smooths]),
    ):
        if is_given and scheme.name not in knows:
            raise UserError(f"{argument}: is for {' and '.join(knows)}, not {scheme.name}.")
    if static and asymmetric:
        raise UserError(
            "asymmetric_activations=True: has one scale for each token, not static_activations=True."
        )
    if alpha is not None and not smooth:
        raise UserError("alpha=: does nothing with smooth=False; give one of them.")
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(f"alpha={alpha}: expected a number from 0 to 1.")


def _check(asked: FolderOptions, *, given_imatrix: bool) -> None:
    """What goes with what."""
    if asked.target_error is not None and not asked.smooths:
        raise UserError("target_error=: is for W8A8 that is smoothed.")
    if asked.target_error is not None and not asked.target_error >= 0:
        raise UserError(f"target_error={asked.target_error}: expected 0 or more.")
    if asked.keeps_outstanding and not asked.smooths:
        raise UserError("keep='auto': is for W8A8 that is smoothed.")
    if given_imatrix and asked.analyze:
        raise UserError("analyze=True: measures what imatrix= would read; give one of them.")
    if asked.smooths and (given_imatrix or asked.analyze):
        raise UserError(
            f"{'analyze=True' if asked.analyze else 'imatrix='}: is measured anyway where W8A8 is smoothed."
        )
    if asked.batch < 1:
        raise UserError(f"batch={asked.batch}: expected 1 or more.")


def _shard_bytes(size: int | str | None) -> int | None:
    if not isinstance(size, str):
        return size
    try:
        return size_in_bytes(size)
    except UserError as error:
        raise UserError(f"max_shard_size={size!r}: {error}") from None
