"""Qwen3 (dense): Llama with an RMS norm over each head of q and k. llama.cpp turns halves: no reordering."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from jquant.models._architecture import DECODER_KEYS, Architecture, Config, Weight, attention, decoder, mlp


def weights(config: Config) -> Iterator[Weight]:
    def block(name: str) -> Iterator[Weight]:
        yield from attention(name, rotary_pairs=False, qk_norm=True)
        yield from mlp(f"{name}.mlp")

    return decoder(config, block)


QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    gguf=gguf.MODEL_ARCH.QWEN3,
    weights=weights,
    keys={
        **DECODER_KEYS,
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "sliding_window": None,
        "max_window_layers": None,
    },
    only={"use_sliding_window": (False, None), "attention_bias": (False,), "mlp_bias": (False,)},
)
