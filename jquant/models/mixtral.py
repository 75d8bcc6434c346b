"""Mixtral 8x7B and 8x22B: Mistral with a mixture of experts in place of the feed-forward layer.

The router takes the softmax over all experts, keeps the best `num_experts_per_tok`, and scales their weights
to sum to one. An expert is down(silu(gate m) · up m), with w1 = gate, w2 = down, w3 = up.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from jquant.models._architecture import (
    DECODER_KEYS,
    HIDDEN,
    Architecture,
    Config,
    Weight,
    attention,
    decoder,
    experts,
    sliding_window,
    weight,
)
from jquant.models._header import Traits


def weights(config: Config) -> Iterator[Weight]:
    count = config.size("num_local_experts")

    def block(name: str) -> Iterator[Weight]:
        yield from attention(name, rotary_pairs=True)
        moe = f"{name}.block_sparse_moe"
        yield weight(f"{moe}.gate.weight", "num_local_experts", HIDDEN)
        yield experts(f"{moe}.experts.{{}}.w1.weight", "intermediate_size", HIDDEN, count=count)
        yield experts(f"{moe}.experts.{{}}.w2.weight", HIDDEN, "intermediate_size", count=count)
        yield experts(f"{moe}.experts.{{}}.w3.weight", "intermediate_size", HIDDEN, count=count)

    return decoder(config, block)


MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    gguf=gguf.MODEL_ARCH.LLAMA,
    traits=Traits(rotary_pairs=True),
    weights=weights,
    ignores_window=True,
    header=sliding_window,
    keys={
        **DECODER_KEYS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    only={"attention_bias": (False,), "mlp_bias": (False,)},
)
