"""The search by measured KL divergence: what is measured, and what the search makes of it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import Noisy
from helpers.divergence import divergence_of_decoders
from helpers.tables import rows
from helpers.tiny_models import write_tiny

from jquant import models
from jquant.allocation._fit import factors, importance_of
from jquant.allocation._search import Measure, groups, search
from jquant.allocation.attribution import shares
from jquant.checkpoints.model import Model, open_model
from jquant.checkpoints.weights import Weights
from jquant.io import GgufSource
from jquant.io.imatrix import Imatrix
from jquant.plan import plan
from jquant.writers.gguf import write_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return open_model(write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM"))


def last(decoder: models.Decoder, tokens: np.ndarray) -> np.ndarray:
    """The output of the last block."""
    x = jnp.asarray(decoder.embed(tokens))
    for i, block in enumerate(decoder.blocks):
        x = models.run_block(block, decoder.load_block(i), x, jnp.asarray(decoder.angles(i, tokens.shape[1])))
    return np.asarray(x)


def noisy(model: Model, name: str, error: float) -> models.Decoder:
    """The model with normal noise in one tensor, of this relative error."""
    weights = Weights(model.source)
    x = weights.tensor(name)
    noise = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    noise *= np.sqrt(error * np.square(x).sum() / np.square(noise).sum())
    return models.decoder(Noisy(weights, name, x + noise), model.metadata)


@pytest.mark.parametrize(
    "name",
    rows(
        ("blk.0.ffn_down.weight", "blk.1.attn_v.weight", "output.weight", "token_embd.weight"),
        {"blk.0.ffn_down.weight", "output.weight"},
    ),
)
def test_a_tensor_that_alone_differs_has_the_whole_divergence(model, name):
    tokens = np.random.default_rng(0).integers(3, 390, (3, 24))
    original = models.decoder(Weights(model.source), model.metadata)
    changed = noisy(model, name, 1e-3)
    expected = divergence_of_decoders(original, changed, tokens)
    found = shares(original, changed, last(original, tokens), tokens)
    assert found.divergence == pytest.approx(expected, rel=1e-2)
    assert found.of[name] == pytest.approx(expected, rel=0.05)
    assert all(abs(share) < 1e-3 * expected for other, share in found.of.items() if other != name)


def test_shares_of_a_quantized_model_add_up_to_its_divergence(model):
    tokens = np.random.default_rng(0).integers(3, 390, (3, 24))
    made = plan(model.source.specs, model.metadata, "Q5_K_M")
    measure = Measure(model.source, model.metadata, {}, tokens)
    types = {e.name: e.type for e in made.entries if len(e.shape) > 1}
    found = measure.shares(types)
    assert found.of.keys() == types.keys()
    assert found.divergence == pytest.approx(measure(types), rel=1e-3)
    assert sum(found.of.values()) == pytest.approx(found.divergence, rel=0.1)


def test_factors_make_damages_shares_up_to_one_number():
    shares_of = {"a": 0.2, "b": 0.1, "c": 0.4, "noise": -0.01}
    found = factors(shares_of, {"a": 0.1, "b": 0.1, "c": 0.1, "noise": 0.1, "lossless": 0.0})
    assert found["a"] / found["b"] == pytest.approx(2)
    assert found["c"] / found["a"] == pytest.approx(2)
    assert found["noise"] == min(found.values()) > 0
    assert "lossless" not in found


def test_the_measured_divergence_is_that_of_the_file(model, tmp_path):
    names = [n for n, s in model.source.specs.items() if len(s.shape) > 1 and n != "token_embd.weight"]
    rng = np.random.default_rng(0)
    entries = {n: rng.chisquare(2, (1, model.source.specs[n].cols)).astype(np.float32) for n in names}
    imatrix = Imatrix(entries, {n: np.full(1, 512, np.float32) for n in names}, ["made up"], 1, 512)
    tokens = np.random.default_rng(0).integers(3, 390, (3, 24))
    made = plan(model.source.specs, model.metadata, "IQ2_M", has_imatrix=True)
    out = tmp_path / "out.gguf"
    write_gguf(model, made, out, imatrix=imatrix)
    measure = Measure(model.source, model.metadata, importance_of(model, imatrix), tokens)
    file = GgufSource(out)
    expected = divergence_of_decoders(
        models.decoder(Weights(model.source), model.metadata),
        models.decoder(Weights(file), file.metadata),
        tokens,
    )
    assert expected > 0
    assert measure({e.name: e.type for e in made.entries}) == pytest.approx(expected, rel=1e-4)
    assert measure({}) == pytest.approx(0, abs=1e-6)


def test_the_search_finds_weights_that_were_wrong():
    """Divergence by true weights, allocation by wrong ones: eight bits are given to the heavier group."""
    truth = {"a": 9.0, "b": 1.0}
    names = {"a": ["blk.0.ffn_up.weight"], "b": ["blk.0.ffn_down.weight"]}

    def allocate(scales):
        share = np.sqrt(scales[names["a"][0]] / scales[names["b"][0]])
        bits = round(4 + np.log2(share) / 2, 2)
        return {"a": f"{bits}", "b": f"{8 - bits}"}

    def measure(types):
        return sum(truth[n] * 4.0 ** -float(types[n]) for n in truth)

    found = search(measure, allocate, names, seconds=1e9)
    best = min(measure({"a": f"{b}", "b": f"{8 - b}"}) for b in np.arange(2, 6, 0.01))
    assert found.divergence < found.first
    assert found.divergence == pytest.approx(best, rel=0.01)


def test_the_search_ends_in_time():
    now = [0.0]

    def measure(types):
        now[0] += 10
        return 1 / now[0]

    counter = iter(range(1000))
    found = search(
        measure, lambda scales: {"t": str(next(counter))}, {"g": ["t"]}, seconds=55.0, clock=lambda: now[0]
    )
    assert (found.measured, now[0]) == (5, 50)


def test_shares_correct_weights_of_single_tensors_in_one_step():
    """Every tensor of the group has another true weight: no step of the group's weight finds that."""
    truth = {f"blk.{i}.ffn_up.weight": 4.0 ** (i - 1.5) for i in range(4)}

    def allocate(scales):
        bits = 4 + np.log2([scales[n] for n in truth]) / 2
        return dict(zip(truth, (f"{b}" for b in bits - bits.mean() + 4), strict=True))

    def damage(types):
        return {n: truth[n] * 4.0 ** -float(types[n]) for n in truth}

    def reweigh(types, scales):
        return factors(damage(types), {n: scales[n] * 4.0 ** -float(types[n]) for n in truth})

    found = search(
        lambda types: sum(damage(types).values()),
        allocate,
        {"ffn_up": list(truth)},
        seconds=1e9,
        reweigh=reweigh,
    )
    best = len(truth) * 4.0**-4 * np.exp(np.mean(np.log(list(truth.values()))))
    assert found.first > 2 * best
    assert found.divergence == pytest.approx(best, rel=0.01)
    assert found.measured < 10


def test_every_tensor_is_in_a_group_of_the_search(model):
    names = [name for name, spec in model.source.specs.items() if len(spec.shape) > 1]
    grouped = groups(dict.fromkeys(names), 2)
    assert {name for group in grouped.values() for name in group} == set(names)
