"""Qwen1.5, Qwen2 and Qwen2.5: Llama with biases on q, k and v. llama.cpp turns halves: no rows reordered."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from jquant.core import UserError
from jquant.models._architecture import (
    DECODER_KEYS,
    HIDDEN,
    Q_ROWS,
    Architecture,
    Config,
    Weight,
    attention,
    decoder,
    mlp,
)


def weights(config: Config) -> Iterator[Weight]:
    check_square(config)

    def block(name: str) -> Iterator[Weight]:
        yield from attention(name, rotary_pairs=False, qkv_bias=True)
        yield from mlp(f"{name}.mlp")

    return decoder(config, block)


def check_square(config: Config) -> None:
    """llama.cpp's Qwen2 has no head size of its own: the heads together are as wide as the model."""
    if config.size(Q_ROWS) != config.size(HIDDEN):
        raise UserError(
            f"config.json: num_attention_heads · head_dim = {config.size(Q_ROWS)} differs from hidden_size "
            f"{config.size(HIDDEN)}; llama.cpp's Qwen2 needs them equal."
        )


QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    gguf=gguf.MODEL_ARCH.QWEN2,
    weights=weights,
    keys={**DECODER_KEYS, "rms_norm_eps": 1e-6, "sliding_window": None, "max_window_layers": None},
    only={"use_sliding_window": (False, None), "attention_bias": (True,), "mlp_bias": (False,)},
)
