"""A model as a GGUF file: all that `jquant quantize` does for one, with the same defaults."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence

from jquant.allocation import SensitivityKind, Target
from jquant.calibration import Texts
from jquant.calibration import super_weights as protection
from jquant.checkpoints import AnyModel, Model
from jquant.checkpoints import opened as opened_model
from jquant.core import SILENT, Effort, Reporter
from jquant.io import check_no_input
from jquant.io.imatrix import Imatrix
from jquant.plan import Profile, Rule, check_encodable, protect
from jquant.plan.report import remarks
from jquant.text.samples import Samples
from jquant.writers._gguf_file import GgufFile
from jquant.writers._gguf_options import AnyFile, read_options
from jquant.writers._gguf_steps import feedback_of, measure, types_of, write
from jquant.writers._measured import measured_importance
from jquant.writers.gguf_feedback import check_importance


def to_gguf(
    model: AnyModel | Callable[[], Model],
    out: AnyFile | None,
    *,
    type: str | None = None,
    imatrix: Imatrix | AnyFile | None = None,
    analyze: bool = False,
    feedback: Samples | bool | None = None,
    samples: Samples | Texts | None = None,
    target: Target | None = None,
    rules: Sequence[str | Rule] = (),
    profile: Profile | AnyFile | None = None,
    like: AnyFile | None = None,
    pure: bool = False,
    output_type: str | None = None,
    embedding_type: str | None = None,
    protect_super_weights: bool = False,
    protection_type: str = "Q6_K",
    protection_coverage: float = 0.95,
    balance_inputs: bool = False,
    effort: Effort = "fast",
    sensitivity: SensitivityKind | Mapping[str, float] = "usual",
    record: AnyFile | None = None,
    search_seconds: float = 0.0,
    runtime: str = "llama.cpp-cpu",
    max_shard_size: int | str | None = None,
    allow_fallback: bool = True,
    threads: int | None = None,
    resume: bool = False,
    force: bool = False,
    batch: int = 4,
    reporter: Reporter = SILENT,
) -> GgufFile:
    """Quantize a model to a GGUF file, as `jquant quantize` does. If you are not sure, give a `type` alone.

    Of several processes all call this with the same arguments, and share the work.

    Args:
        model: one that is open, a path, a hub id, or what opens it once the other arguments are known to be
            sound.
        out: the file. None: nothing is written, and the result has the plan.
        type: llama.cpp's file type, such as "Q4_K_M", which is the default where the profile names none.
        imatrix: importance of each column, or llama.cpp's file of it. analyze: measure it here, on samples.
        feedback: fit each layer to the output of the original, on these samples or on `samples`. None: with
            analyze, where matrices have fewer than 4 bits.
        samples: text for whatever is measured on it, or where to take it from. None: `feedback`'s, else
            what `load_samples` takes by itself.
        target: a size or a divergence, in place of a type. sensitivity, record, search_seconds, runtime:
            how its types are chosen; see `allocate`.
        rules: "REGEX=TYPE" for the tensors whose name has a match; the first one wins.
        profile: bounds by role and layer: a preset's name, a TOML file, or a Profile.
        like: a GGUF file whose types to repeat. pure: one type for all matrices, no mixture.
        output_type, embedding_type: of output.weight and token_embd.weight.
        protect_super_weights: find the single weights without which the model is lost, keep them almost
            exactly and give their tensors `protection_type`; those that account for `protection_coverage` of
            the loss.
        balance_inputs: the same function with inputs that llama.cpp's rounding on a CPU harms less.
        effort: "best" searches some five times as long, and with feedback tunes the whole file.
        max_shard_size: bytes, or such as "2GB": the file is split. allow_fallback: take another type where a
            row length does not suit one. threads: default one a processor. resume: continue a run that was
            interrupted. force: replace the file. batch: samples on the device at a time.
        reporter: who hears notes and progress.

    Returns:
        The paths and the plan, with what was measured on the way.

    Raises:
        UserError: a ValueError, for an argument that makes no sense, which it names, and for input that
            cannot be used.
        OutputError: where the output exists or cannot be written.

    >>> file = jquant.to_gguf(model, out / "model.gguf", type="Q8_0", rules=["ffn_down=Q5_0"])
    >>> file.paths[0].name, sorted({entry.type for entry in file.plan.entries})
    ('model.gguf', ['F32', 'Q5_0', 'Q8_0'])
    """
    asked = read_options(
        out,
        type=type,
        imatrix=imatrix,
        analyze=analyze,
        feedback=feedback,
        samples=samples,
        target=target,
        rules=rules,
        profile=profile,
        like=like,
        pure=pure,
        output_type=output_type,
        embedding_type=embedding_type,
        protect_super_weights=protect_super_weights,
        protection_type=protection_type,
        protection_coverage=protection_coverage,
        balance_inputs=balance_inputs,
        effort=effort,
        sensitivity=sensitivity,
        record=record,
        search_seconds=search_seconds,
        runtime=runtime,
        max_shard_size=max_shard_size,
        allow_fallback=allow_fallback,
        threads=threads,
        resume=resume,
        force=force,
        batch=batch,
    )
    opened = model() if callable(model) else opened_model(model)
    if asked.out is not None:
        splits = asked.out.parent.glob(f"{glob.escape(asked.out.stem)}-?????-of-?????.gguf")
        for file in (asked.out, *(splits if asked.max_shard_bytes else ())):
            check_no_input(file, opened.files)
    for remark in opened.remarks:
        reporter.note(remark)
    known = measure(opened, asked, reporter)
    allocated = types_of(known, asked, reporter)
    if asked.out is not None:
        check_encodable(allocated.plan)
    fitting = feedback_of(known, allocated.plan, asked, reporter)
    plan = protect(allocated.plan, known.protected, asked.protection_type)
    if known.super_weights is not None:
        reporter.note(protection.note(known.super_weights, known.protected))
    if asked.analyze and known.imatrix is None and known.samples is not None and asked.out is not None:
        found = measured_importance(known.model, known.samples, batch=asked.batch, reporter=reporter)
        known = known._replace(imatrix=found)
    if fitting is not None and asked.out is not None:
        check_importance(plan, known.protected, known.imatrix)
    for remark in remarks(plan, known.imatrix and known.imatrix.entries):
        reporter.note(remark)
    file = GgufFile(
        plan=plan,
        source_tensor_bytes=known.model.tensor_bytes,
        target=asked.target,
        damages=allocated.damages,
        search=allocated.search,
        super_weights=known.super_weights,
        balanced=known.balanced.places if known.balanced else None,
    )
    return file if asked.out is None else write(file, known, fitting, asked, asked.out, reporter)
