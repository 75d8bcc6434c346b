"""Gemma 2: norms before and after each half of a block, capped scores and logits, every other block a window.

    h = x + n2(Wo attention(rope(Wq n1), rope(Wk n1), Wv n1)),  n1 = rmsnorm(x)
    y = h + n4(down(gelu(gate n3) · up n3)),                    n3 = rmsnorm(h)

The embedding is multiplied by √hidden_size. Its norms multiply by 1 + w, llama.cpp's by w: the 1 is
added here. Scores and logits go through cap · tanh(· / cap).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import gguf
import numpy as np

from jquant.core import MetadataValue, UserError
from jquant.models._architecture import (
    DECODER_KEYS,
    HIDDEN,
    Architecture,
    Config,
    Weight,
    attention,
    decoder,
    mlp,
    sliding_window,
    weight,
)
from jquant.models._header import Traits

BLOCKS_OF_27B = 46  # llama.cpp knows by this that scores are divided by √(width / heads), not by √head_dim


def weights(config: Config) -> Iterator[Weight]:
    check_score_scale(config, BLOCKS_OF_27B)
    return gemma_weights(config, qk_norm=False)


def gemma_weights(config: Config, *, qk_norm: bool) -> Iterator[Weight]:
    def block(name: str) -> Iterator[Weight]:
        yield from attention(name, rotary_pairs=False, qk_norm=qk_norm)
        yield weight(f"{name}.pre_feedforward_layernorm.weight", HIDDEN)
        yield from mlp(f"{name}.mlp")
        yield weight(f"{name}.post_feedforward_layernorm.weight", HIDDEN)

    for entry in decoder(config, block):
        yield replace(entry, shift=1.0) if entry.name.endswith("norm.weight") else entry


def check_score_scale(config: Config, blocks_by_width: int) -> None:
    """llama.cpp does not read `query_pre_attn_scalar` but tells it from the number of blocks."""
    by_width = config.size("num_hidden_layers") == blocks_by_width
    wanted = (
        config.size(HIDDEN) // config.size("num_attention_heads") if by_width else config.size("head_dim")
    )
    if config.number("query_pre_attn_scalar") != wanted:
        raise UserError(
            f"config.json: 'query_pre_attn_scalar' = {config.number('query_pre_attn_scalar'):g} is not "
            f"supported: llama.cpp divides the scores of this model by √{wanted}."
        )


def header(config: Config) -> dict[str, MetadataValue]:
    return {
        **sliding_window(config),
        "attn_logit_softcapping": np.float32(config.number("attn_logit_softcapping")),
        "final_logit_softcapping": np.float32(config.number("final_logit_softcapping")),
    }


GEMMA_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # what counts is hidden_activation
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (True,),
    "cache_implementation": ("hybrid", None),
    "use_bidirectional_attention": (False, None),
}
GEMMA2 = Architecture(
    name="Gemma2ForCausalLM",
    gguf=gguf.MODEL_ARCH.GEMMA2,
    traits=Traits(
        gelu=True,
        embedding_scaled=True,
        window=4096,
        window_period=2,
        attention_softcap=50.0,
        final_softcap=30.0,
        blocks_scaled_by_width=BLOCKS_OF_27B,
    ),
    weights=weights,
    header=header,
    keys={
        **DECODER_KEYS,
        "rms_norm_eps": 1e-6,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    only=GEMMA_ONLY,
    rope_types=frozenset({"default"}),
)
