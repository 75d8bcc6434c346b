"""The arguments of `to_gguf`, read: mistakes in them show before a model is opened, and name the argument."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from jquant.allocation import SensitivityKind, Target
from jquant.calibration import Texts
from jquant.core import Effort, OutputError, UserError, default_threads
from jquant.core.human import size_in_bytes
from jquant.io import check_no_input, check_target
from jquant.io import imatrix as imatrix_file
from jquant.io.imatrix import Imatrix
from jquant.plan import (
    Profile,
    Rule,
    file_type,
    parse_rule,
    read_profile,
    runtime_types,
    tensor_type,
)
from jquant.text.samples import Samples

AnyFile = str | os.PathLike[str]
_MEASURED_HERE = "jquant quantize --analyze"  # what a header calls an imatrix that no file holds


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a file is to be, but for its model."""

    out: Path | None
    type: str  # of the file, where no target and no other file says what each tensor gets
    imatrix: Imatrix | None
    imatrix_name: str
    analyze: bool
    feedback: bool | None
    feedback_samples: Samples | None
    samples: Samples | Texts
    target: Target | None
    rules: tuple[Rule, ...]
    profile: Profile | None
    like: Path | None
    pure: bool
    output_type: str | None
    embedding_type: str | None
    protects: bool
    protection_type: str
    protection_coverage: float
    balances: bool
    effort: Effort
    sensitivity: SensitivityKind | Mapping[str, float]
    record: Path | None
    search_seconds: float
    runtime: str
    max_shard_bytes: int | None
    allow_fallback: bool
    threads: int
    resume: bool
    force: bool
    batch: int

    @property
    def has_imatrix(self) -> bool:
        """Whether types that need importance may be planned."""
        return self.analyze or bool(self.feedback) or self.imatrix is not None

    @property
    def plan_needs_text(self) -> bool:
        """Whether the target's types depend on measurements on text. A divergence does where one is named."""
        if self.target is None:
            return False
        is_named = isinstance(self.samples, Samples) or bool(self.samples.calibration)
        measured = bool(self.search_seconds) or self.sensitivity in ("outputs", "gradients", "measured")
        return measured or (self.target.kld is not None and is_named)

    @property
    def balances_now(self) -> bool:
        """Balancing changes weights, and no plan but a target's looks at these."""
        return self.balances and (self.out is not None or self.target is not None)

    @property
    def needs_text(self) -> bool:
        feeds = bool(self.feedback) and self.feedback_samples is None
        return feeds or self.analyze or self.protects or self.balances_now or self.plan_needs_text


def read_options(
    out: AnyFile | None,
    *,
    type: str | None,
    imatrix: Imatrix | AnyFile | None,
    analyze: bool,
    feedback: Samples | bool | None,
    samples: Samples | Texts | None,
    target: Target | None,
    rules: Sequence[str | Rule],
    profile: Profile | AnyFile | None,
    like: AnyFile | None,
    pure: bool,
    output_type: str | None,
    embedding_type: str | None,
    protect_super_weights: bool,
    protection_type: str,
    protection_coverage: float,
    balance_inputs: bool,
    effort: Effort,
    sensitivity: SensitivityKind | Mapping[str, float],
    record: AnyFile | None,
    search_seconds: float,
    runtime: str,
    max_shard_size: int | str | None,
    allow_fallback: bool,
    threads: int | None,
    resume: bool,
    force: bool,
    batch: int,
) -> Options:
    """Raises UserError for what is no value of its argument, or goes with no other; reads profile and
    imatrix. OutputError where the output may not be written."""
    if analyze and imatrix is not None:
        raise UserError("analyze=True: measures what imatrix= would read; give one of them.")
    if target is not None and (type or pure or like is not None):
        raise UserError("target=: chooses the types itself; leave type=, pure= and like= away.")
    if like is not None and (type or pure):
        raise UserError("like=: says what each type is; leave type= and pure= away.")
    for name, value, allowed in (("effort", effort, Effort), ("sensitivity", sensitivity, SensitivityKind)):
        if isinstance(value, str) and value not in get_args(allowed):
            raise UserError(f"{name}={value!r}: expected one of {', '.join(get_args(allowed))}.")
    _check_numbers(protection_coverage, search_seconds, threads, batch)
    profile_file = profile
    profile = read_profile(profile) if isinstance(profile, str | os.PathLike) else profile
    with _naming("type", type):
        kind = file_type(type or (profile and profile.file_type) or "Q4_K_M").name
    out = None if out is None else Path(out)
    with _naming("max_shard_size", max_shard_size):
        shard = size_in_bytes(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    if out is not None:
        named = samples.calibration if isinstance(samples, Texts) else None
        check_no_input(out, [imatrix, like, profile_file, record, *(named or ())])
        if not shard:
            check_target(out, force=force or resume)
    with _naming("runtime", runtime):
        runtime_types(runtime)
    fed = feedback if isinstance(feedback, Samples) else None
    return Options(
        out=out,
        type=kind,
        imatrix=imatrix_file.read(Path(imatrix)) if isinstance(imatrix, str | os.PathLike) else imatrix,
        imatrix_name=_name_of(imatrix, analyze),
        analyze=analyze,
        feedback=True if fed is not None else bool(feedback) if feedback is not None else None,
        feedback_samples=fed,
        samples=samples or fed or Texts(),
        target=target,
        rules=tuple(rule if isinstance(rule, Rule) else parse_rule(rule) for rule in rules),
        profile=profile,
        like=None if like is None else Path(like),
        pure=pure,
        output_type=output_type and tensor_type(output_type, f"output_type={output_type}"),
        embedding_type=embedding_type and tensor_type(embedding_type, f"embedding_type={embedding_type}"),
        protects=protect_super_weights,
        protection_type=tensor_type(protection_type, f"protection_type={protection_type}"),
        protection_coverage=protection_coverage,
        balances=balance_inputs,
        effort=effort,
        sensitivity=sensitivity,
        record=None if record is None else Path(record),
        search_seconds=search_seconds,
        runtime=runtime,
        max_shard_bytes=shard,
        allow_fallback=allow_fallback,
        threads=threads or default_threads(),
        resume=resume,
        force=force,
        batch=batch,
    )


def _check_numbers(coverage: float, seconds: float, threads: int | None, batch: int) -> None:
    if not 0 <= coverage <= 1:
        raise UserError(f"protection_coverage={coverage}: expected a share from 0 to 1.")
    if not seconds >= 0:
        raise UserError(f"search_seconds={seconds}: expected 0 or more.")
    for name, value in (("threads", threads), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: expected 1 or more.")


def _name_of(imatrix: Imatrix | AnyFile | None, analyze: bool) -> str:
    if isinstance(imatrix, str | os.PathLike):
        return str(Path(imatrix))
    return _MEASURED_HERE if analyze else ""


@contextlib.contextmanager
def _naming(name: str, value: object) -> Iterator[None]:
    """Errors that begin with the argument."""
    try:
        yield
    except OutputError:
        raise
    except UserError as error:
        raise UserError(f"{name}={value}: {error}") from None
