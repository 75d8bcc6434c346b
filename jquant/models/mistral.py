"""Mistral 7B, Mistral Nemo, Mistral Small (text): Llama without biases, under llama.cpp's Llama.

Mistral 7B v0.1 attends to the last `sliding_window` tokens only. llama.cpp's Llama attends to all of them:
the same up to that many tokens, and what its own converter settles for.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from jquant.models._architecture import (
    DECODER_KEYS,
    Architecture,
    Config,
    Weight,
    attention,
    decoder,
    mlp,
    sliding_window,
)
from jquant.models._header import Traits


def weights(config: Config) -> Iterator[Weight]:
    def block(name: str) -> Iterator[Weight]:
        yield from attention(name, rotary_pairs=True)
        yield from mlp(f"{name}.mlp")

    return decoder(config, block)


MISTRAL = Architecture(
    name="MistralForCausalLM",
    gguf=gguf.MODEL_ARCH.LLAMA,
    traits=Traits(rotary_pairs=True),
    weights=weights,
    ignores_window=True,
    header=sliding_window,
    keys={**DECODER_KEYS, "rms_norm_eps": 1e-6, "sliding_window": None},
    only={"attention_bias": (False,), "mlp_bias": (False,)},
)
