"""Phi-3, Phi-3.5 and Phi-4 (text): Llama with q, k, v in one matrix, and gate and up in another. Phi-4-mini
turns the first three quarters of each head only.

Models for long contexts have two sets of divisors of the rotary frequencies (LongRoPE): one for texts within
the original context, one for longer ones. llama.cpp turns halves: no rows reordered. It ignores the window
that the header names; the models were trained with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from jquant.models._architecture import (
    DECODER_KEYS,
    HIDDEN,
    KV_ROWS,
    Q_ROWS,
    Architecture,
    Config,
    Weight,
    decoder,
    sliding_window,
    weight,
)
from jquant.models._header import Traits


def weights(config: Config) -> Iterator[Weight]:
    def block(name: str) -> Iterator[Weight]:
        yield weight(f"{name}.input_layernorm.weight", HIDDEN)
        yield weight(f"{name}.self_attn.qkv_proj.weight", f"{Q_ROWS} + {KV_ROWS} + {KV_ROWS}", HIDDEN)
        yield weight(f"{name}.self_attn.o_proj.weight", HIDDEN, Q_ROWS)
        yield weight(f"{name}.post_attention_layernorm.weight", HIDDEN)
        yield weight(f"{name}.mlp.gate_up_proj.weight", "intermediate_size + intermediate_size", HIDDEN)
        yield weight(f"{name}.mlp.down_proj.weight", HIDDEN, "intermediate_size")

    return decoder(config, block)


PHI3 = Architecture(
    name="Phi3ForCausalLM",
    gguf=gguf.MODEL_ARCH.PHI3,
    traits=Traits(),
    weights=weights,
    ignores_window=True,
    header=sliding_window,
    keys={
        **DECODER_KEYS,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "original_max_position_embeddings": None,
        "partial_rotary_factor": 1.0,
    },
    only={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "lm_head_bias": (False, None),
        "full_attn_mod": (1, None),
        "interpolate_factor": (1, None),
    },
    rope_types=frozenset({"default", "longrope"}),
)
