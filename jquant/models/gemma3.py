"""Gemma 3 (text): Gemma 2 with norms of q and k and without caps; five blocks of six have a window.

Blocks with a window turn q and k with base 10,000 and without scaling, the others as config.json says.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from jquant.models._architecture import DECODER_KEYS, Architecture, Config, Weight, sliding_window
from jquant.models._header import Traits
from jquant.models.gemma2 import GEMMA_ONLY, check_score_scale, gemma_weights

BLOCKS_OF_27B = 62


def weights(config: Config) -> Iterator[Weight]:
    check_score_scale(config, BLOCKS_OF_27B)
    return gemma_weights(config, qk_norm=True)


GEMMA3 = Architecture(
    name="Gemma3ForCausalLM",
    gguf=gguf.MODEL_ARCH.GEMMA3,
    traits=Traits(
        gelu=True,
        embedding_scaled=True,
        window_period=6,
        window_rotary_base=10000.0,
        blocks_scaled_by_width=BLOCKS_OF_27B,
    ),
    weights=weights,
    header=sliding_window,
    keys={
        **DECODER_KEYS,
        "rms_norm_eps": 1e-6,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    only={
        **GEMMA_ONLY,
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "rope_local_base_freq": (10000.0,),
        "sliding_window_pattern": (6, None),
        "_sliding_window_pattern": (6, None),
    },
    rope_types=frozenset({"default", "linear"}),
)
