"""Llama 1–3.x, and models of the same form: SmolLM, SmolLM2, Yi, TinyLlama, DeepSeek-LLM.

    h = x + Wo attention(rope(Wq n), rope(Wk n), Wv n),  n = rmsnorm(x)
    y = h + down(silu(gate m) · up m),                   m = rmsnorm(h)

llama.cpp turns neighbouring rows of q and k, transformers the two halves of a head: rows are reordered.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from jquant.models._architecture import DECODER_KEYS, Architecture, Config, Weight, attention, decoder, mlp
from jquant.models._header import Traits


def weights(config: Config) -> Iterator[Weight]:
    bias = config.flag("attention_bias")

    def block(name: str) -> Iterator[Weight]:
        yield from attention(name, rotary_pairs=True, qkv_bias=bias, output_bias=bias)
        yield from mlp(f"{name}.mlp", bias=config.flag("mlp_bias"))

    return decoder(config, block)


LLAMA = Architecture(
    name="LlamaForCausalLM",
    gguf=gguf.MODEL_ARCH.LLAMA,
    traits=Traits(rotary_pairs=True),
    weights=weights,
    keys={**DECODER_KEYS, "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False},
    rope_types=frozenset({"default", "linear", "yarn", "llama3"}),
)
