"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with routed experts and one shared expert, which has a gate of its own.

    moe(m) = Σ p_e expert_e(m) over the best `num_experts_per_tok` + sigmoid(g · m) shared(m)

p is the softmax over all experts, not scaled afterwards: `norm_topk_prob` must be false, as llama.cpp has it.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from jquant.models._architecture import (
    DECODER_KEYS,
    HIDDEN,
    REQUIRED,
    Architecture,
    Config,
    Weight,
    attention,
    decoder,
    mlp,
    routed_experts,
    weight,
)
from jquant.models._header import Traits
from jquant.models.qwen2 import check_square


def weights(config: Config) -> Iterator[Weight]:
    check_square(config)
    count = config.size("num_experts")

    def block(name: str) -> Iterator[Weight]:
        yield from attention(name, rotary_pairs=False, qkv_bias=True)
        yield from routed_experts(name, count)
        yield from mlp(f"{name}.mlp.shared_expert", "shared_expert_intermediate_size")
        yield weight(f"{name}.mlp.shared_expert_gate.weight", "1", HIDDEN)

    return decoder(config, block)


QWEN2_MOE = Architecture(
    name="Qwen2MoeForCausalLM",
    gguf=gguf.MODEL_ARCH.QWEN2MOE,
    traits=Traits(experts_normalized=False),
    weights=weights,
    keys={
        **DECODER_KEYS,
        "rms_norm_eps": 1e-6,
        "num_experts": REQUIRED,
        "num_experts_per_tok": REQUIRED,
        "moe_intermediate_size": REQUIRED,
        "shared_expert_intermediate_size": REQUIRED,
        "norm_topk_prob": False,
        "sliding_window": None,
        "max_window_layers": None,
    },
    only={
        "norm_topk_prob": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
        "use_sliding_window": (False, None),
        "attention_bias": (True,),
        "mlp_bias": (False,),
        "qkv_bias": (True,),
        "tie_word_embeddings": (False,),  # llama.cpp wants an output matrix
    },
)
