"""From a model on disk to a GGUF file on disk: what `jquant quantize` and a script call.

model = open_model(Path("SmolLM2-135M"))
plan_ = plan(model.source.specs, model.metadata, "Q4_K_M")
write_gguf(model, plan_, Path("smol-q4.gguf"))
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gguf
import jax
import numpy as np

from jquant import fitting, io, models, sequential, tuning
from jquant.compressed import Decompressed
from jquant.core import Effort, Metadata, MetadataValue, Source, UserError
from jquant.fitting import Feedback
from jquant.formats import FORMATS
from jquant.io import GgufSink, GgufSource, tokenizer
from jquant.io.imatrix import Imatrix
from jquant.io.paths import AnyPath
from jquant.mesh import local_devices
from jquant.pipeline import Progress, run
from jquant.plan import FILE_TYPES, Plan
from jquant.schemes import METHOD, METHODS, Activations, Scheme, layout_of, scheme_of
from jquant.transcode import LOW_BPW
from jquant.transposed import Transposed

RECIPE = "jquant.recipe"  # metadata key
_END_BYTES = 1 << 16


class Rounding(NamedTuple):
    kind: Activations
    tensors: frozenset[str]  # whose inputs are to be rounded
    scales: Mapping[str, np.ndarray] | None = None  # of these inputs, [] or [experts]; None: each token's own


class Model(NamedTuple):
    """A model as GGUF would describe it, wherever it comes from."""

    path: AnyPath
    files: Sequence[AnyPath]  # that the tensors are made from
    source: Source  # tensors under GGUF names
    metadata: Metadata
    rounding: Rounding | None = None  # of the inputs of some of its matrices
    stored_bytes: int | None = None  # of its tensors, where `source` decodes them
    remarks: tuple[str, ...] = ()  # what the user should know of it

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors, as they are stored."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return sum(spec.nbytes for spec in self.source.specs.values())


def open_model(path: AnyPath, *, name: str | None = None, pre_tokenizer: str | None = None) -> Model:
    """A GGUF file of any architecture, or a Hugging Face folder of one that we know. Reads headers only.

    The folder may be one of compressed-tensors in a scheme that we write, or of GPTQ or AWQ in 4 bits: its
    weights are then float32.

    name: general.name of a model that has none of its own; default: the folder's.
    pre_tokenizer: GGUF's name for the way the tokenizer splits text, where it cannot be recognised.
    Raises UserError where the model cannot be read or has a setting that we do not handle.
    """
    source = io.open_source(path)
    if isinstance(source, GgufSource):
        return Model(path, source.files, source, source.metadata)
    folder = path if path.is_dir() else path.parent
    files = [*source.files, folder / "config.json"]  # rope_freqs follows from the configuration
    config, remarks = read_config(folder), ()
    language = models.language_part(config, source)
    if language is not None:
        config, source = language
        remarks = ("only the language model is converted: what sees images is a file of its own (mmproj).",)
    rounding = stored_bytes = None
    declared = config.get("quantization_config")
    if isinstance(declared, dict) and declared.get("quant_method") in METHODS:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        stored_bytes = sum(spec.nbytes for spec in source.specs.values())
        if declared["quant_method"] == METHOD:
            scheme = scheme_of(declared)
            source = Decompressed(source, scheme.weights)
            rounding = _rounding(config, scheme, source)
        else:
            source = Transposed(source, layout_of(declared))
    architecture = models.for_config(config)
    metadata = architecture.metadata(config, name or folder.resolve().name)
    metadata |= tokenizer.metadata(folder, config, pre=pre_tokenizer)
    seen = architecture.as_gguf(source, config)
    return Model(path, files, seen, metadata, rounding, stored_bytes, remarks)


def _rounding(config: dict, scheme: Scheme, source: Decompressed) -> Rounding | None:
    """What the scheme says of the inputs of the weights that are stored as codes."""
    if scheme.activations is None:
        return None
    architecture = models.for_config(config)
    weights = architecture.named(architecture.read_config(config))
    decoded = {name: weight for name, weight in weights.items() if weight.parts[0] in source.decoded}
    scales = None
    if scheme.static:
        stored = {name: [source.input_scale(part) for part in w.parts] for name, w in decoded.items()}
        scales = {n: np.array(s if decoded[n].stacked else s[0], np.float32) for n, s in stored.items()}
    return Rounding(scheme.activations, frozenset(decoded), scales)


def read_config(folder: AnyPath) -> dict:
    """config.json of a model's folder. Raises UserError where there is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; a Hugging Face model folder has one.") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object; got {type(config).__name__}.")
    return config


def output_metadata(
    model: Model, plan: Plan, imatrix: Imatrix | None, imatrix_name: str, *, recipe: str = ""
) -> Metadata:
    """The model's own metadata and what llama-quantize adds to it; recipe: JSON, of how the file was made."""
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
    kept = {k: v for k, v in model.metadata.items() if not k.startswith("quantize.imatrix.") and k != RECIPE}
    return {**kept, **added}


class Written(NamedTuple):
    paths: list[Path]
    errors: dict[str, float]  # relative error by tensor: see pipeline.run; with feedback that of the output
    fed: dict[str, sequential.Fed]  # tensors that error feedback made, without their bytes
    tuned: tuning.Gain | None = None  # where the file was tuned


def write_gguf(
    model: Model,
    plan: Plan,
    out: Path,
    *,
    imatrix: Imatrix | None = None,
    imatrix_name: str = "",
    protected: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    recipe: str = "",
    effort: Effort = "fast",
    feedback: Feedback | None = None,
    max_shard_bytes: int | None = None,
    threads: int = 2,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda name, done: None,
) -> Written:
    """Write the planned file, or its shards.

    The file appears under its final name when it is complete. A run that was killed leaves `OUT.partial`,
    which `resume` continues; the result has the same bytes as an undisturbed run.
    feedback: the matrices of the model's blocks are quantized with error feedback, but those with protected
    weights; all others as without. Where it says so, the whole file is then tuned.
    Raises OutputError where the output cannot be written, UserError where the input cannot be used.
    """
    importance = importance_of(model, imatrix, imatrix_name)
    metadata = output_metadata(model, plan, imatrix, imatrix_name, recipe=recipe)
    made_of = fingerprint(model, facts(model, plan, imatrix, protected or {}, effort, feedback))
    sink = GgufSink(
        out,
        metadata,
        plan.layout(),
        max_shard_bytes=max_shard_bytes,
        resume=resume,
        fingerprint=made_of,
        force=force,
    )
    try:
        fed = {}
        if feedback is not None and not sink.renaming:
            entries = fitting.fed_entries(plan, protected or {})
            fed = fitting.feed_back(model.source, model.metadata, entries, sink, feedback, threads)
        errors = run(
            model.source,
            plan,
            sink,
            importance=importance,
            protected=protected,
            effort=effort,
            threads=threads,
            devices=local_devices(),
            progress=progress,
        )
        tuned = None
        if feedback is not None and feedback.tuning is not None and not sink.renaming:
            tuned = fitting.tune(model.source, model.metadata, plan.layout(), sink, feedback, made_of)
        sink.commit()
        fitting.forget(out)
        return Written(sink.paths, errors | low_errors(plan, fed), fed, tuned)
    finally:
        sink.close()


def low_errors(plan: Plan, fed: Mapping[str, sequential.Fed]) -> dict[str, float]:
    """The errors that error feedback left in tensors of few bits, where they are known."""
    low = {entry.name for entry in plan.entries if FORMATS[entry.type].bpw <= LOW_BPW}
    return {name: f.error for name, f in fed.items() if name in low and math.isfinite(f.error)}


def importance_of(model: Model, imatrix: Imatrix | None, name: str) -> dict[str, np.ndarray]:
    """The imatrix's entries for the tensors of this model: float32 [matrices, cols] each."""
    if imatrix is None:
        return {}
    found = imatrix.by_tensor(model.source.specs.values())
    if not found:
        example = next(iter(imatrix.entries), "nothing")
        raise UserError(
            f"{name}: none of its {len(imatrix.entries)} tensors ({example}, …) is in {model.path}; "
            "this imatrix was made from another model."
        )
    return found


def facts(
    model: Model,
    plan: Plan,
    imatrix: Imatrix | None,
    protected: Mapping[str, Sequence[tuple[int, int]]],
    effort: Effort,
    feedback: Feedback | None = None,
) -> dict[str, str]:
    """What the bytes depend on, by name: alike wherever copies of the same files are quantized alike."""
    kept = sorted((name, sorted(positions)) for name, positions in protected.items())
    found = {**common_facts(model), "plan": digest([plan.to_json().encode()]), "effort": effort}
    if kept:
        found["protected weights"] = digest([str(kept).encode()])
    if feedback is not None:
        arrays = feedback.samples.tokens.tobytes(), feedback.samples.lengths.tobytes()
        found["feedback"] = digest(
            [f"{feedback.settings} {feedback.batch} {feedback.tuning}\n".encode(), *arrays]
        )
    if imatrix is not None:
        found["imatrix"] = digest(
            part
            for name, values in imatrix.entries.items()
            for part in (name.encode(), np.ascontiguousarray(values).tobytes())
        )
    return found


def common_facts(model: Model) -> dict[str, str]:
    """What any output of this model depends on."""
    return {
        "jquant": version("jquant"),
        "jax": f"{version('jax')} with jaxlib {version('jaxlib')} on {jax.default_backend()}",
        "model": digest(part for file in model.files for part in _ends(file)),
    }


def fingerprint(model: Model, facts: Mapping[str, str]) -> str:
    """Of these facts and the times of the model's files, to tell whether a run can continue another."""
    times = [file.stat().st_mtime_ns for file in model.files]
    return digest([json.dumps([dict(facts), times]).encode()])


def _ends(file: AnyPath) -> Iterator[bytes]:
    """Name, size, and some bytes of the beginning and of the end, which tell one training from another."""
    size = file.stat().st_size
    yield f"{file.name} {size}\n".encode()
    with file.open("rb") as opened:
        yield opened.read(_END_BYTES)
        opened.seek(max(size - _END_BYTES, 0))
        yield opened.read(_END_BYTES)


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of all of them."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
