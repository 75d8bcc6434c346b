"""Qwen3-MoE: Qwen3 with a mixture of experts in every block.

The router takes the softmax over all experts, keeps the best `num_experts_per_tok`, and scales their weights
to sum to one: llama.cpp always scales, so `norm_topk_prob` must be true.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from jquant.models._architecture import (
    DECODER_KEYS,
    REQUIRED,
    Architecture,
    Config,
    Weight,
    attention,
    decoder,
    routed_experts,
)


def weights(config: Config) -> Iterator[Weight]:
    count = config.size("num_experts")

    def block(name: str) -> Iterator[Weight]:
        yield from attention(name, rotary_pairs=False, qk_norm=True)
        yield from routed_experts(name, count)

    return decoder(config, block)


QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    gguf=gguf.MODEL_ARCH.QWEN3MOE,
    weights=weights,
    aliases={"num_local_experts": "num_experts"},  # as transformers 5 saves it
    keys={
        **DECODER_KEYS,
        "rms_norm_eps": 1e-6,
        "num_experts": REQUIRED,
        "num_experts_per_tok": REQUIRED,
        "moe_intermediate_size": REQUIRED,
        "norm_topk_prob": False,
        "sliding_window": None,
        "max_window_layers": None,
    },
    only={
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
        "use_sliding_window": (False, None),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "qkv_bias": (False,),
        "shared_expert_intermediate_size": (0, None),
        "use_qk_norm": (True,),
    },
)
