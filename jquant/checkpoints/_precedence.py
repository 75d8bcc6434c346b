"""Where a folder states one thing twice, which statement counts; and what lies there instead of a model.

| stated twice | counts | then |
|-|-|-|
| model.safetensors, and an index of other shards | model.safetensors | a remark (`io.safetensors`) |
| `tie_word_embeddings`, and an `lm_head.weight` of other numbers | `lm_head.weight` | a remark |
| `rope_scaling`, and `rope_parameters` | both | refused where they differ |
| `vocab_size`, and the tokenizer | `vocab_size` where it is larger | refused where it is smaller |
| ids of special tokens: the tokenizer's names, config.json, generation_config.json | the first of these | |
| chat_template.jinja, tokenizer_config.json, chat_template.json | the first of these | (`text.tokenizer`) |
| `quantization_config`, and tensors that it does not describe | none | refused |

All but the last two rows are what transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jquant.checkpoints._transcode import FLOAT_DTYPES
from jquant.core import Metadata, Source, UserError
from jquant.io.paths import AnyPath
from jquant.models import Architecture

OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SLAB_BYTES = 1 << 26

# general.type of GGUF files that are no model.
_OTHER_KINDS = {
    "adapter": "a LoRA adapter; merge it into its model first (llama-export-lora), and give that",
    "imatrix": "an importance matrix; give it as imatrix= beside a model",
    "mmproj": "the part of a model that sees (mmproj), not quantized here; give the language model's file",
}


def own_output(
    config: Mapping[str, object], source: Source, architecture: Architecture
) -> tuple[Mapping[str, object], tuple[str, ...]]:
    """config.json as the tensors have it, and remarks.

    A checkpoint whose config says that the output matrix is the embedding may hold one of its own all the
    same. Where its numbers differ it is what predicts tokens, as in transformers.
    """
    names = source.specs.keys()
    tied = architecture.read_config(config).flag("tie_word_embeddings")
    if not tied or OUTPUT not in names or EMBEDDING not in names or _equal(source, OUTPUT, EMBEDDING):
        return config, ()
    remark = (
        f"config.json says tie_word_embeddings, but {OUTPUT} holds other numbers than {EMBEDDING}: it is "
        "kept as the output matrix."
    )
    return {**config, "tie_word_embeddings": False}, (remark,)


def _equal(source: Source, one: str, other: str) -> bool:
    """Whether two tensors are the same numbers, read a slab of rows at a time."""
    a, b = source.specs[one], source.specs[other]
    if a.shape != b.shape:
        return False
    step = max(_SLAB_BYTES // a.row_bytes, 1)
    for start in range(0, a.rows, step):
        stop = min(start + step, a.rows)
        if not np.array_equal(_rows(source, one, start, stop), _rows(source, other, start, stop)):
            return False
    return True


def _rows(source: Source, name: str, start: int, stop: int) -> np.ndarray:
    stored = np.asarray(source.read(name, start, stop))
    return stored.view(FLOAT_DTYPES[source.specs[name].type]).astype(np.float32)


def check_is_model(path: AnyPath, metadata: Metadata) -> None:
    """Raises UserError where a GGUF file says that it is something else."""
    kind = str(metadata.get("general.type", "model"))
    if kind != "model":
        what = _OTHER_KINDS.get(kind, f"of general.type {kind!r}; give a model")
        raise UserError(f"{path}: is no model but {what}.")


def check_is_model_folder(folder: AnyPath, config: Mapping[str, object] | None) -> None:
    """Raises UserError where a folder holds something else: an adapter, or MLX's own quantized weights."""
    if config is None and (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: is a LoRA adapter (adapter_config.json), which is no model by itself; merge it first "
            "(peft: model.merge_and_unload().save_pretrained(folder)), and give that folder."
        )
    declared = (config or {}).get("quantization")
    if isinstance(declared, Mapping) and "group_size" in declared and "bits" in declared:
        raise UserError(
            f"{folder}: holds weights that MLX has quantized ({declared['bits']} bits), which are not read "
            "here; give the 16-bit original."
        )
