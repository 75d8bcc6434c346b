"""The language model inside a model that also sees: what llama.cpp's main GGUF file holds.

config.json of such a model has the language model's in `text_config`, with what differs from the defaults of
its class; its tensors have a prefix, which has moved over the versions of transformers:

    language_model.model.layers.0…          → model.layers.0…
    model.language_model.layers.0…          → model.layers.0…
    vision_tower…, multi_modal_projector…   left out
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from jquant.core import Source, TensorSpec, UserError

# The class of the whole → that of the language model in it.
LANGUAGE_MODELS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_LEFT_OUT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))


def language_part(config: Mapping[str, object], source: Source) -> tuple[dict[str, object], Source] | None:
    """(config.json, tensors) of the language model, as if they were a checkpoint of its own; None where the
    model is no more than that.

    Raises UserError where config.json has no usable `text_config`.
    """
    named = config.get("architectures")
    whole = str(named[0]) if isinstance(named, list) and named else ""
    if whole not in LANGUAGE_MODELS:
        return None
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        raise UserError(f"config.json: {whole} needs 'text_config', a table; got {inner!r}.")
    special = {key: config[key] for key in _SPECIAL if key in config}
    own = {**special, **inner, "architectures": [LANGUAGE_MODELS[whole]]}
    return own, _Renamed(source, {_own(name): name for name in source.specs if not _LEFT_OUT.match(name)})


def _own(name: str) -> str:
    for prefix, instead in _PREFIXES:
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name


class _Renamed:
    """A Source under other names: new → old. Others are left out."""

    def __init__(self, source: Source, names: Mapping[str, str]):
        self._source, self._names = source, names
        specs = {new: source.specs[old] for new, old in names.items()}
        self._specs = {new: TensorSpec(new, spec.shape, spec.type) for new, spec in specs.items()}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return MappingProxyType(self._specs)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._source.read(self._names[name], start, stop)
