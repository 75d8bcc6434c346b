"""Gradients carried back block by block, against `jax.grad` of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import opened
from helpers.tables import rows
from helpers.tiny_models import write_tiny
from scipy.special import softmax
from scipy.stats import chisquare

from jquant import models
from jquant.calibration import SECOND_MOMENTS, collect, merge
from jquant.calibration._forward_back import ScratchTape
from jquant.calibration.gradients import (
    FISHER,
    FISHER_COLUMNS,
    FISHER_ROWS,
    GRADIENT,
    OUTPUT_PRODUCTS,
    collect_gradients,
    sampled_labels,
    text_labels,
    together,
)
from jquant.core import UserError
from jquant.models import ARCHITECTURES, Decoder

TOKENS = np.random.default_rng(3).integers(3, 350, (5, 24))
LENGTHS = np.array([24, 9, 24, 9, 2])
ALL = together(GRADIENT, FISHER, FISHER_COLUMNS, FISHER_ROWS, OUTPUT_PRODUCTS)


def whole_gradients(decoder: Decoder, samples: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Of −Σ log p of each sample's tokens but the first, by jax.grad; parameters by GGUF name."""
    params = [decoder.load_block(i) for i in range(len(decoder.blocks))]
    angles = [jnp.asarray(decoder.angles(i, samples.shape[1])) for i in range(len(decoder.blocks))]

    def loss(params: list[Mapping], x: jax.Array, labels: jax.Array) -> jax.Array:
        for block, p, a in zip(decoder.blocks, params, angles, strict=True):
            x = models.run_block(block, p, x, a)
        logp = jax.nn.log_softmax(decoder.logits(x)[0, :-1], axis=-1)
        return -jnp.sum(logp[jnp.arange(len(labels)), labels])

    gradient, found = jax.grad(loss), []  # each block is compiled once for all of its kind
    for sample in samples:
        of_blocks = gradient(params, jnp.asarray(decoder.embed(sample[None])), jnp.asarray(sample[1:]))
        found.append(
            {
                f"blk.{i}.{module}.{kind}": np.asarray(value)
                for i, block in enumerate(of_blocks)
                for module, parameters in block.items()
                for kind, value in parameters.items()
            }
        )
    return found


def assert_close(got, wanted, name: str) -> None:
    # Where a gradient is zero but for rounding, so is its square: some 1e-30.
    atol = max(2e-5 * np.abs(wanted).max(), 1e-24)
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize("architecture", rows(ARCHITECTURES, {"LlamaForCausalLM"}))
def test_gradients_are_those_of_the_whole_model(architecture, tmp_path):
    decoder = opened(write_tiny(tmp_path, architecture))
    found = collect_gradients(decoder, TOKENS[:3], GRADIENT, text_labels, batch=2)
    whole = whole_gradients(decoder, TOKENS[:3])
    matrices = {name for name in whole[0] if name.endswith(".weight") and "norm" not in name}
    assert found.keys() == matrices
    for name, stats in found.items():
        assert_close(stats["gradient"], sum(g[name] for g in whole), name)


@pytest.mark.parametrize(
    "architecture",
    rows(("LlamaForCausalLM", "Gemma2ForCausalLM", "Qwen2MoeForCausalLM"), {"LlamaForCausalLM"}),
)
def test_where_a_matrix_is_used_once_the_fisher_diagonal_is_the_mean_squared_gradient(architecture, tmp_path):
    """Of two tokens the second has no next one: nothing that is computed at it changes the loss."""
    decoder = opened(write_tiny(tmp_path, architecture))
    pairs = TOKENS[:4, :2]
    squares = [{k: np.square(g) for k, g in of.items()} for of in whole_gradients(decoder, pairs)]
    for name, stats in collect_gradients(decoder, pairs, FISHER, text_labels, batch=3).items():
        assert_close(stats["fisher"], sum(square[name] for square in squares), name)


def test_output_products_are_those_of_the_gradients_of_biases(tmp_path):
    decoder = opened(write_tiny(tmp_path, "Qwen2ForCausalLM"))
    whole = whole_gradients(decoder, TOKENS[:4, :2])
    found = collect_gradients(decoder, TOKENS[:4, :2], OUTPUT_PRODUCTS, text_labels)
    for block in range(2):
        for matrix in ("attn_q", "attn_k", "attn_v"):
            of_bias = [g[f"blk.{block}.{matrix}.bias"].reshape(-1, 1) for g in whole]
            name = f"blk.{block}.{matrix}.weight"
            assert_close(found[name]["ggt"], sum(g @ g.T for g in of_bias), name)


@pytest.mark.parametrize(
    "architecture", rows(("LlamaForCausalLM", "Qwen2MoeForCausalLM"), {"LlamaForCausalLM"})
)
def test_columns_and_rows_are_the_sums_of_the_fisher_diagonal(architecture, tmp_path):
    decoder = opened(write_tiny(tmp_path, architecture))
    for name, s in collect_gradients(decoder, TOKENS, ALL, text_labels, lengths=LENGTHS).items():
        np.testing.assert_allclose(s["fisher_columns"], s["fisher"].sum(-2), rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(s["fisher_rows"], s["fisher"].sum(-1), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("architecture", "labels"),
    [
        pytest.param("LlamaForCausalLM", text_labels, id="LlamaForCausalLM-text"),
        *(
            pytest.param(name, labels, id=f"{name}-{kind}", marks=pytest.mark.every)
            for name, labels, kind in (
                ("Gemma3ForCausalLM", text_labels, "text"),
                ("Qwen3MoeForCausalLM", sampled_labels(7), "sampled"),
            )
        ),
    ],
)
def test_two_halves_merge_to_the_whole(architecture, labels, tmp_path):
    decoder = opened(write_tiny(tmp_path, architecture))
    run = partial(collect_gradients, decoder, calibrator=ALL, labels=labels)
    whole = run(TOKENS, lengths=LENGTHS, batch=3)
    halves = [run(TOKENS[part], lengths=LENGTHS[part]) for part in (slice(2), slice(2, None))]
    merged = merge(ALL, *halves)
    assert merged.keys() == whole.keys()
    for tensor, stats in whole.items():
        for key, value in stats.items():
            assert_close(merged[tensor][key], value, f"{tensor} {key}")


@pytest.mark.parametrize(
    "architecture", rows(("LlamaForCausalLM", "MixtralForCausalLM"), {"LlamaForCausalLM"})
)
def test_padding_counts_for_nothing(architecture, tmp_path):
    decoder = opened(write_tiny(tmp_path, architecture))
    lengths = LENGTHS[:4]
    padded = np.where(np.arange(24) < lengths[:, None], TOKENS[:4], 5)
    together_ = collect_gradients(decoder, padded, ALL, text_labels, lengths=lengths)
    alone = [
        collect_gradients(decoder, TOKENS[k : k + 1, :n], ALL, text_labels)
        for k, n in enumerate(lengths.tolist())
    ]
    for name, stats in together_.items():
        for key, value in stats.items():
            assert_close(value, sum(np.asarray(a[name][key]) for a in alone), f"{name} {key}")


def test_tokens_are_counted_as_the_importance_matrix_counts_them(tmp_path):
    decoder = opened(write_tiny(tmp_path, "MixtralForCausalLM"))
    inputs = collect(decoder, TOKENS, SECOND_MOMENTS, lengths=LENGTHS)
    for name, stats in collect_gradients(decoder, TOKENS, FISHER_ROWS, text_labels, lengths=LENGTHS).items():
        np.testing.assert_array_equal(stats["count"], inputs[name]["count"])


def test_sampled_labels_follow_the_models_prediction():
    logits = np.random.default_rng(1).normal(0, 1.5, 7).astype(np.float32)
    tokens = np.random.default_rng(2).integers(0, 7, (40, 100))
    drawn = sampled_labels(0)(jnp.broadcast_to(jnp.asarray(logits), (40, 100, 7)), tokens)
    seen = np.bincount(np.asarray(drawn).reshape(-1), minlength=7)
    assert chisquare(seen, 4000 * softmax(logits.astype(np.float64))).pvalue > 1e-3


def test_one_draw_of_labels_is_repeated_and_another_seed_draws_others():
    logits = jnp.zeros((2, 50, 400))
    first, again, other = (
        sampled_labels(seed)(logits, TOKENS[:2].repeat(3, 1)[:, :50]) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first) != np.asarray(other)) > 0.9
    assert np.mean(np.asarray(first[0]) != np.asarray(first[1])) > 0.9


def test_activations_in_files_give_the_same(tmp_path):
    decoder = opened(write_tiny(tmp_path / "model", "LlamaForCausalLM"))
    (tmp_path / "scratch").mkdir()
    tape = ScratchTape(2, tmp_path / "scratch", in_memory=0)
    in_files = collect_gradients(decoder, TOKENS, FISHER, text_labels, tape=tape)
    jax.tree.map(
        np.testing.assert_array_equal, in_files, collect_gradients(decoder, TOKENS, FISHER, text_labels)
    )
    assert not list((tmp_path / "scratch").iterdir())


def test_one_block_is_loaded_at_a_time(tmp_path):
    decoder = opened(write_tiny(tmp_path, "LlamaForCausalLM", num_hidden_layers=3))
    order = []

    class Watched:
        blocks = decoder.blocks
        embed, angles, logits = decoder.embed, decoder.angles, decoder.logits

        def load_block(self, i):
            order.append(i)
            return decoder.load_block(i)

    seen = partial(collect_gradients, batch=1, progress=lambda done, count: order.append(f"{done}/{count}"))
    seen(Watched(), TOKENS, FISHER_ROWS, text_labels)
    assert order == [0, "1/6", 1, "2/6", 2, "3/6", 2, "4/6", 1, "5/6", 0, "6/6"]


def test_a_gradient_that_is_not_finite_is_named_with_its_sample(tmp_path):
    decoder = opened(write_tiny(tmp_path, "LlamaForCausalLM"))

    class Broken:
        blocks = decoder.blocks
        embed, load_block, angles = decoder.embed, decoder.load_block, decoder.angles

        def logits(self, x):
            z = decoder.logits(x)
            # 1e38 times the logits' own: the forward pass is finite, squares of gradients are not.
            of = z * jnp.float32(1e25) if self.hit(x) else z
            return z + (of - jax.lax.stop_gradient(of))

        def hit(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return self.calls == 5  # one trace for the shape, then a sample each

    with pytest.raises(UserError, match=r"blk\.1\.\w+\.weight: its gradient is not finite in sample 3"):
        collect_gradients(Broken(), TOKENS, FISHER, text_labels, batch=1)
