"""From a model's folder to a folder in a scheme of its own: what vLLM and transformers load.

checkpoint = open_checkpoint(Path("SmolLM2-135M"))
plan = plan_folder(checkpoint, SCHEMES["W8A8"])
write_folder(checkpoint, plan, Path("smol-w8a8"))  # of `folder_writer`
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jquant import models
from jquant.checkpoints import FLOAT_DTYPES
from jquant.checkpoints import gptq_awq as transposed
from jquant.checkpoints.model import Model, open_model, read_config
from jquant.checkpoints.rescaled import Factors, RowFactors, factors_for
from jquant.checkpoints.schemes import METHODS, Scheme, fitting
from jquant.core import QuantizedTensor, ScaledFormat, Source, TensorSpec, UserError
from jquant.io import SafetensorsSource
from jquant.io.paths import local
from jquant.models import Weight
from jquant.smoothquant.smoothing import Smoothing

INPUT_SCALE = ".input_scale"


class Checkpoint(NamedTuple):
    """A Hugging Face folder under its own names, and the model that it makes."""

    folder: Path
    config: Mapping[str, object]
    source: Source
    weights: Mapping[str, Weight]  # GGUF name → the tensors that it is made of
    model: Model
    title: str = ""  # what the user calls it, where that is not the folder


class FolderPlan(NamedTuple):
    scheme: Scheme
    quantized: tuple[str, ...]  # names of weights in the checkpoint
    ignore: tuple[str, ...]  # linear layers that stay as they are
    layout: tuple[TensorSpec, ...]


class FedWeight(NamedTuple):
    """A weight of the checkpoint that error feedback has made."""

    name: str
    quantized: QuantizedTensor
    error: float  # tr ΔHΔᵀ / tr WHWᵀ of the matrix, or the stack of experts, that it belongs to


def open_checkpoint(path: Path, *, name: str | None = None, pre_tokenizer: str | None = None) -> Checkpoint:
    """Reads headers only. Raises UserError where `path` is no such folder, or is quantized already."""
    _original_config(path)
    return checkpoint_of(open_model(path, name=name, pre_tokenizer=pre_tokenizer))


def checkpoint_of(model: Model) -> Checkpoint:
    """The folder that a model was opened from. Raises UserError as `open_checkpoint`, and for a model that is
    not on this machine, or was rescaled since it was opened: a folder is made from what is stored."""
    path = local(model.path, "a folder of codes")
    if model.changes:
        raise UserError(f"{path}: this model was rescaled since it was opened; open the original.")
    config = _original_config(path)
    architecture = models.for_config(config)
    weights = architecture.named(architecture.read_config(config))
    return Checkpoint(_folder_of(path), config, SafetensorsSource(path), weights, model)


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _original_config(path: Path) -> dict[str, object]:
    """config.json of a folder that is not quantized."""
    if path.suffix == ".gguf" or (path.is_dir() and not any(path.glob("*.safetensors*"))):
        raise UserError(
            f"{path}: give the model's Hugging Face folder (config.json, *.safetensors): what vLLM and "
            "transformers load is made of its names and tokenizer files, which a GGUF file lacks."
        )
    folder = _folder_of(path)
    config = read_config(folder)
    declared = config.get("quantization_config")
    if isinstance(declared, dict) and declared.get("quant_method") in METHODS:
        raise UserError(f"{folder}: is quantized already; start from the original.")
    return config


def _matrix(name: str) -> models.Matrix | None:
    """Of a GGUF name, blk.3.attn_q.weight."""
    part = re.fullmatch(r"blk\.\d+\.(.+)\.weight", name)
    return models.matrix(part[1]) if part else None


def _is_quantized(name: str) -> bool:
    """Whether schemes quantize it: linear layers of blocks, without routers."""
    row = _matrix(name)
    return row is not None and row.is_quantized


def _is_other_linear(name: str) -> bool:
    """What else transformers builds as a linear layer."""
    row = _matrix(name)
    return name == "output.weight" or (row is not None and row.form == "router")


def plan_folder(checkpoint: Checkpoint, scheme: Scheme, keep: Sequence[str] = ()) -> FolderPlan:
    """What each tensor becomes. keep: regular expressions; weights whose name has a match stay as they are.

    Raises UserError for an expression that is none, or matches nothing, and where no group size fits.
    """
    patterns = [_pattern(text) for text in keep]
    specs = checkpoint.source.specs
    linear = [part for n, w in checkpoint.weights.items() if _is_quantized(n) for part in w.parts]
    other = [part for n, w in checkpoint.weights.items() if _is_other_linear(n) for part in w.parts]
    for pattern in patterns:
        if not any(pattern.search(name) for name in linear):
            raise UserError(
                f"keep={pattern.pattern!r}: matches none of the {len(linear)} weights, such as {linear[0]}."
            )
    kept = [name for name in linear if any(pattern.search(name) for pattern in patterns)]
    stays = set(kept)
    for weight in checkpoint.weights.values():
        some = [part for part in weight.parts if part in stays]
        if some and len(some) < len(weight.parts):
            raise UserError(
                f"keep=: matches {some[0]} but not all {len(weight.parts)} experts of its stack, which "
                "runtimes hold in one type; keep all or none."
            )
    quantized = [name for name in linear if name not in stays]
    scheme = fitting(scheme, [specs[name].cols for name in quantized])
    for name in quantized:
        if specs[name].type not in ("F32", "F16", "BF16"):
            raise UserError(f"{name}: is stored as {specs[name].type}; start from weights of 16 or 32 bits.")
    ignore = _modules((*kept, *other)) | {"lm_head"}
    return _planned(checkpoint, scheme, quantized, ignore)


def leave_out(checkpoint: Checkpoint, plan: FolderPlan, names: Collection[str]) -> FolderPlan:
    """The plan but for these weights, which stay as they are."""
    quantized = [name for name in plan.quantized if name not in names]
    return _planned(checkpoint, plan.scheme, quantized, {*plan.ignore, *_modules(names)})


def _planned(
    checkpoint: Checkpoint, scheme: Scheme, quantized: Sequence[str], ignore: Iterable[str]
) -> FolderPlan:
    chosen, specs = set(quantized), checkpoint.source.specs.values()
    layout = [made for s in specs for made in (_made(s, scheme) if s.name in chosen else [s])]
    return FolderPlan(scheme, tuple(quantized), tuple(sorted(ignore)), tuple(layout))


def _modules(weights: Iterable[str]) -> set[str]:
    return {name.removesuffix(".weight") for name in weights}


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"keep={text!r}: not a regular expression ({error}).") from None


def _made(spec: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
    """The tensors that stand for a quantized weight."""
    if scheme.transposed is not None:
        return transposed.specs_of(scheme.transposed, spec)
    format, module = scheme.weights, spec.name.removesuffix(".weight")
    rows, cols = spec.shape
    made = [
        TensorSpec(f"{module}.{format.part}", (rows, cols // format.per_code), format.type),
        TensorSpec(f"{module}.weight_scale", (rows, format.groups(cols)), spec.type),
    ]
    if format.per_code > 1:
        made.append(TensorSpec(f"{module}.weight_shape", (2,), "I64"))
    if scheme.static:
        made.append(TensorSpec(module + INPUT_SCALE, (1,), spec.type))
    return made


def names_of(spec: TensorSpec, scheme: Scheme) -> list[str]:
    """Of the tensors that are written with a quantized weight: all that stand for it but its input scale."""
    return [made.name for made in _made(spec, scheme) if not made.name.endswith(INPUT_SCALE)]


def factors_by_part(checkpoint: Checkpoint, factors: Mapping[str, Factors]) -> dict[str, RowFactors]:
    """The factors of each tensor of the checkpoint that has any, biases included."""
    found = {}
    for name, weight in checkpoint.weights.items():
        given = factors_for(name, factors)
        if given is None:
            continue
        for i, part in enumerate(weight.parts):
            rows, cols = (
                None if a is None else np.asarray(a[i] if a.ndim > 1 else a, np.float32) for a in given
            )
            vector = len(checkpoint.source.specs[part].shape) == 1
            found[part] = RowFactors(rows, cols, vector, weight.shift)
    return found


def as_stored(checkpoint: Checkpoint, smoothing: Smoothing) -> Smoothing:
    """The smoothing with the factors that norms have as they are stored: w / w′ for a norm w that becomes w′.
    What 16 bits round, the matrices behind them take up."""
    places = []
    for place in smoothing.places:
        weight = checkpoint.weights.get(f"blk.{place.block}.{place.name}.weight")
        if weight is not None and place.name.endswith("norm"):
            (part,) = weight.parts
            dtype = FLOAT_DTYPES[checkpoint.source.specs[part].type]
            w = checkpoint.source.read(part).view(dtype).astype(np.float32)[0]
            made = RowFactors(1 / place.scales, None, True, weight.shift).times(w[None], 0)[0]
            rounded = made.astype(dtype).astype(np.float32) + np.float32(weight.shift)
            w = w + np.float32(weight.shift)
            live = (w != 0) & (rounded != 0)
            scales = np.where(live, w / np.where(live, rounded, 1), place.scales)
            place = place._replace(scales=scales.astype(np.float32))
        places.append(place)
    return smoothing._replace(places=tuple(places))


def stored_format(scheme: Scheme, spec: TensorSpec) -> ScaledFormat:
    """The scheme's format for a weight of the checkpoint: its scales have the weight's own type, or its
    layout's."""
    return replace(scheme.weights, scale_type=spec.type if scheme.transposed is None else "F16")
