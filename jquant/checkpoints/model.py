"""A model on disk as GGUF would describe it, wherever it comes from: what `gguf_writer` writes from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from upath import UPath

from jquant import io, models
from jquant.checkpoints._precedence import check_is_model, check_is_model_folder, own_output
from jquant.checkpoints.compressed_tensors import Decompressed
from jquant.checkpoints.gptq_awq import Transposed
from jquant.checkpoints.schemes import METHOD, METHODS, InputKind, Scheme, layout_of, scheme_of
from jquant.checkpoints.weights import Weights
from jquant.core import Metadata, Source, UserError, parse_json
from jquant.io import GgufSource, hub
from jquant.io.paths import AnyPath
from jquant.text import tokenizer


class Rounding(NamedTuple):
    kind: InputKind
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
    changes: str = ""  # digest of what `source` makes of the files' tensors beyond their names and order

    def __repr__(self) -> str:
        """In one line: metadata holds a whole vocabulary."""
        architecture = self.metadata.get("general.architecture")
        return f"Model({str(self.path)!r}, {architecture}, {len(self.source.specs)} tensors)"

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors, as they are stored."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return sum(spec.nbytes for spec in self.source.specs.values())

    def decoder(self) -> models.Decoder:
        """What the model computes, block by block, for `jquant.calibration.collect`. Reads vectors only.

        Raises UserError where the architecture's function is not known.
        """
        return models.decoder(Weights(self.source), self.metadata)


AnyModel: TypeAlias = Model | str | os.PathLike[str] | UPath  # one that is open, or what `open_model` takes


def opened(model: AnyModel) -> Model:
    """The model itself where it is open."""
    return model if isinstance(model, Model) else open_model(model)


def open_model(
    path: str | os.PathLike[str] | UPath,
    *,
    name: str | None = None,
    pre_tokenizer: str | None = None,
    revision: str | None = None,
) -> Model:
    """A GGUF file of any architecture, or a Hugging Face folder of one that we know. Reads headers only, and
    where config.json ties an output matrix that is stored all the same, both, to hold one against the other.

    The folder may be one of compressed-tensors in a scheme that we write, or of GPTQ or AWQ in 4 bits: its
    weights are then float32.

    path: a folder or a GGUF file. A string may also be a hub id, "org/name" or "org/name:Q8_0", whose files
    are downloaded, or a URL such as gs://bucket/model, of which nothing is read but what a run works on.
    name: general.name of a model that has none of its own; default: the folder's, or the hub id's.
    pre_tokenizer: GGUF's name for the way the tokenizer splits text, where it cannot be recognised.
    revision: branch, tag or commit on the hub.
    Raises UserError where the model cannot be had or read, or has a setting that we do not handle.

    >>> model = jquant.open_model(folder)
    >>> model.source.specs["blk.0.ffn_down.weight"].shape
    (64, 96)
    """
    if isinstance(path, str):
        asked, path = path, hub.resolve(path, revision=revision)
        name = name or hub.name_of(asked)
    elif not isinstance(path, Path | UPath):
        path = Path(path)
    source = io.open_source(path)
    if isinstance(source, GgufSource):
        check_is_model(path, source.metadata)
        return Model(path, source.files, source, source.metadata)
    folder = path if path.is_dir() else path.parent
    files = [*source.files, folder / "config.json"]  # rope_freqs follows from the configuration
    config, remarks = read_config(folder), source.remarks
    language = models.language_part(config, source)
    if language is not None:
        config, source = language
        remarks += ("only the language model is converted: what sees images is a file of its own (mmproj).",)
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
    config, said = own_output(config, source, architecture)
    remarks += said + architecture.remarks(config)
    metadata = architecture.metadata(config, name or hub.folder_name(folder))
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
    if not path.is_file():
        check_is_model_folder(folder, None)
    try:
        config = parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; a Hugging Face model folder has one.") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object; got {type(config).__name__}.")
    check_is_model_folder(folder, config)
    return config
