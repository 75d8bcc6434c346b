"""Statistics of the inputs of matrices, against those that a float64 forward pass records."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward
from helpers.calibrators import CALIBRATORS, TOKENS
from helpers.decoders import opened
from helpers.tables import rows
from helpers.tiny_models import open_tiny, write_tiny

from jquant.calibration import HESSIAN, MEANS, SECOND_MOMENTS, collect, merge
from jquant.calibration._prefetch import Ahead
from jquant.calibration.activations import OnDevice, Scratch
from jquant.core import UserError
from jquant.models import ARCHITECTURES


def recorded_inputs(folder: Path, tokens: np.ndarray, monkeypatch) -> dict[tuple[int, str], np.ndarray]:
    """(block, transformers' name of the matrix in it) → float64 [tokens, width], as the oracle has it."""
    config = json.loads((folder / "config.json").read_text())
    found = defaultdict(list)
    block = {}  # parameters are grouped by block: which one a dictionary belongs to
    linear = forward.linear

    def record(p, name, x):
        found[block.setdefault(id(p), len(block)), name].append(np.atleast_2d(x))
        kept.append(p)  # so that its id is not given to another
        return linear(p, name, x)

    monkeypatch.setattr(forward, "linear", record)
    for sample in tokens:
        block.clear()
        kept: list = []
        forward.logits(config, open_tiny(folder).tensors, sample.tolist())
    return {key: np.concatenate(parts) for key, parts in found.items()}


def gguf_name(architecture: str, block: int, name: str) -> tuple[str, int | None]:
    """The GGUF tensor of a matrix and, in a stack, which one it is."""
    parts = name.split(".")
    expert = int(parts.pop(parts.index("experts") + 1)) if "experts" in parts else None
    if architecture.startswith("Phi3"):
        parts = [part.replace("q_proj", "qkv_proj") for part in parts]  # whose input is that of k and v
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture].gguf, 8)
    found = names.get_name(f"model.layers.{block}.{'.'.join(parts)}")
    assert found is not None
    return f"{found}.weight", expert


@pytest.mark.parametrize("architecture", rows(ARCHITECTURES, {"LlamaForCausalLM", "Qwen2MoeForCausalLM"}))
def test_second_moments_are_those_of_the_inputs_in_float64(architecture, tmp_path, monkeypatch):
    folder = write_tiny(tmp_path, architecture)
    inputs = recorded_inputs(folder, TOKENS, monkeypatch)
    found = collect(opened(folder), TOKENS, SECOND_MOMENTS, batch=2)
    counts = {name: np.zeros_like(stats["count"]) for name, stats in found.items()}
    for (block, name), x in inputs.items():
        if architecture.startswith("Phi3") and name in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        tensor, expert = gguf_name(architecture, block, name)
        sums, count = found[tensor]["sum2"], found[tensor]["count"]
        if expert is not None:
            sums, count = sums[expert], count[expert]
        assert count == len(x), name
        counts[tensor][() if expert is None else expert] = count
        np.testing.assert_allclose(sums, (x**2).sum(0), rtol=1e-4, atol=1e-6, err_msg=f"{block} {name}")
    for name, stats in found.items():  # nothing is reported that the oracle does not compute
        np.testing.assert_array_equal(stats["count"], counts[name], err_msg=name)


@pytest.mark.parametrize("architecture", rows(ARCHITECTURES, {"LlamaForCausalLM"}))
def test_products_of_bfloat16_tell_nearly_the_same(architecture, tmp_path):
    decoder = opened(write_tiny(tmp_path, architecture))
    exact = collect(decoder, TOKENS, SECOND_MOMENTS)
    rounded = collect(decoder.at("bfloat16"), TOKENS, SECOND_MOMENTS)
    for name, stats in exact.items():
        if "exps" not in name:  # a router may send a token elsewhere
            np.testing.assert_allclose(rounded[name]["sum2"], stats["sum2"], rtol=0.1, err_msg=name)
            assert (np.asarray(rounded[name]["sum2"]) != np.asarray(stats["sum2"])).any(), name


def test_a_hessian_of_bfloat16_inputs_is_the_sum_of_their_products(tmp_path):
    """Products of bfloat16 are exact in float32: what is summed is not rounded once more."""
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (300, 16)), jnp.bfloat16)
    found = HESSIAN.update(HESSIAN.init(16), x, jnp.ones(300))["xtx"]
    assert found.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(found, exact.T @ exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("calibrator", [SECOND_MOMENTS, HESSIAN])
def test_it_is_all_the_same_where_activations_lie_and_when_weights_are_read(calibrator, tmp_path):
    decoder = opened(write_tiny(tmp_path, "LlamaForCausalLM", num_hidden_layers=3))
    expected = collect(decoder, TOKENS, calibrator, batch=2, store=Scratch())
    with Ahead(decoder) as ahead:
        found = collect(ahead, TOKENS, calibrator, batch=2, store=OnDevice(2))
    assert found.keys() == expected.keys()
    for tensor, stats in expected.items():
        for key, value in stats.items():
            np.testing.assert_array_equal(found[tensor][key], value, err_msg=tensor)


def test_blocks_read_ahead_go_to_the_device_that_their_user_chose(tmp_path):
    decoder, second = opened(write_tiny(tmp_path, "LlamaForCausalLM", num_hidden_layers=3)), jax.devices()[1]
    with Ahead(decoder) as ahead, jax.default_device(second):
        found = [ahead.load_block(i)["attn_q"]["weight"] for i in range(3)]
    assert all(weight.devices() == {second} for weight in found)
    for i, weight in enumerate(found):
        np.testing.assert_array_equal(weight, decoder.load_block(i)["attn_q"]["weight"])


@pytest.mark.parametrize("name", rows(CALIBRATORS, {"hessian"}))
def test_two_halves_merge_to_the_whole(name, tmp_path):
    calibrator, decoder = CALIBRATORS[name], opened(write_tiny(tmp_path, "Qwen2MoeForCausalLM"))
    whole = collect(decoder, TOKENS, calibrator)
    halves = [collect(decoder, part, calibrator) for part in (TOKENS[:2], TOKENS[2:])]
    merged = merge(calibrator, *halves)
    assert merged.keys() == whole.keys()
    for tensor, stats in whole.items():
        for key, value in stats.items():
            np.testing.assert_allclose(merged[tensor][key], value, rtol=2e-5, atol=1e-3, err_msg=tensor)


def test_statistics_of_a_matrix_are_what_their_names_say():
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (50, 6)).astype(np.float32)
    weight = (np.arange(50) % 5 > 0).astype(np.float32)
    kept = x[weight > 0].astype(np.float64)
    wanted = {
        "second moments": ("sum2", (kept**2).sum(0)),
        "means": ("sum", kept.sum(0)),
        "absolute maxima": ("absmax", np.abs(kept).max(0)),
        "hessian": ("xtx", kept.T @ kept),
    }
    for name, calibrator in CALIBRATORS.items():
        stats = jax.jit(calibrator.update)(calibrator.init(6), jnp.asarray(x), jnp.asarray(weight))
        key, value = wanted[name]
        np.testing.assert_allclose(stats[key], value, rtol=1e-5, atol=1e-4)
        assert stats["count"] == 40


@pytest.mark.parametrize(
    "architecture", rows(("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"), {"Qwen2MoeForCausalLM"})
)
def test_the_diagonal_of_the_hessian_is_the_imatrix(architecture, tmp_path):
    decoder = opened(write_tiny(tmp_path, architecture))
    squares = collect(decoder, TOKENS, SECOND_MOMENTS)
    for name, stats in collect(decoder, TOKENS, HESSIAN).items():
        xtx = stats["xtx"]
        np.testing.assert_allclose(np.diagonal(xtx, axis1=-2, axis2=-1), squares[name]["sum2"], rtol=2e-5)
        np.testing.assert_allclose(xtx, xtx.swapaxes(-1, -2), rtol=1e-6, atol=1e-6 * np.abs(xtx).max())


@pytest.mark.parametrize(
    "architecture", rows(("LlamaForCausalLM", "MixtralForCausalLM"), {"LlamaForCausalLM"})
)
def test_padding_counts_for_nothing(architecture, tmp_path):
    decoder = opened(write_tiny(tmp_path, architecture))
    lengths = np.array([40, 7, 23])
    padded = np.where(np.arange(40) < lengths[:, None], TOKENS[:3], 5)
    together = collect(decoder, padded, SECOND_MOMENTS, lengths=lengths)
    alone = [collect(decoder, TOKENS[k : k + 1, :n], SECOND_MOMENTS) for k, n in enumerate(lengths.tolist())]
    for name, stats in together.items():
        np.testing.assert_allclose(stats["sum2"], sum(a[name]["sum2"] for a in alone), rtol=2e-4, atol=1e-4)
        np.testing.assert_array_equal(stats["count"], sum(a[name]["count"] for a in alone))


def test_activations_in_a_file_give_the_same(tmp_path):
    decoder = opened(write_tiny(tmp_path / "model", "LlamaForCausalLM"))
    (tmp_path / "scratch").mkdir()
    in_file = collect(decoder, TOKENS, MEANS, store=Scratch(tmp_path / "scratch", in_memory=0))
    in_memory = collect(decoder, TOKENS, MEANS)
    jax.tree.map(np.testing.assert_array_equal, in_file, in_memory)
    assert not list((tmp_path / "scratch").iterdir())


def test_one_block_is_loaded_at_a_time(tmp_path):
    decoder = opened(write_tiny(tmp_path, "LlamaForCausalLM", num_hidden_layers=4))
    order = []

    class Watched:
        blocks = decoder.blocks
        embed, angles, logits = decoder.embed, decoder.angles, decoder.logits

        def load_block(self, i):
            order.append(i)
            return decoder.load_block(i)

    collect(Watched(), TOKENS, MEANS, batch=1, progress=lambda done, count: order.append(f"{done}/{count}"))
    assert order == [0, "1/4", 1, "2/4", 2, "3/4", 3, "4/4"]


def test_an_input_that_is_not_finite_is_named_with_its_sample(tmp_path):
    decoder = opened(write_tiny(tmp_path, "LlamaForCausalLM"))

    class Broken:
        blocks = decoder.blocks
        load_block, angles, logits = decoder.load_block, decoder.angles, decoder.logits

        def embed(self, tokens):
            x = decoder.embed(tokens)
            if len(x):
                x[3, 5, 7] = np.inf
            return x

    with pytest.raises(UserError, match=r"blk\.0\.\w+\.weight: its input is not finite in sample 3"):
        collect(Broken(), TOKENS, SECOND_MOMENTS, batch=2)


def test_statistics_of_different_models_do_not_merge(tmp_path):
    stats = {"blk.0.attn_q.weight": MEANS.init(4)}
    with pytest.raises(ValueError, match="different models"):
        merge(MEANS, stats, {})
