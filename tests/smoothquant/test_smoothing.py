"""Smoothing of whole models: the same predictions before rounding, better ones after it with outliers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward
from helpers.decoders import logits
from helpers.divergence import divergence
from helpers.folders import config_of, decoded, read, run
from helpers.outliers import TOKENS, calibration, with_outliers
from helpers.shapes import GROUPED
from helpers.tables import rows
from helpers.tiny_models import DTYPES, LINES, open_tiny, write_tiny

from jquant.core import UserError
from jquant.evaluation.engines import FlaxEngine
from jquant.models import ARCHITECTURES
from jquant.smoothquant import Search, search, smoothing
from jquant.smoothquant import _block_error as smooth_error
from jquant.smoothquant import _passes as smooth_passes
from jquant.smoothquant import _search as smooth_search
from jquant.smoothquant import _smooth as smooth
from jquant.smoothquant.report import advice, smoothing_report
from jquant.smoothquant.smoothing import Place, Smoothing, outlier_ratio
from jquant.writers.folder_plan import as_stored, factors_by_part, open_checkpoint

QUICK_ARCHITECTURES = {"LlamaForCausalLM", "Qwen2MoeForCausalLM"}
QUICK = Search(alphas=(0.3, 0.5, 0.7), samples=2, checked=2, tokens=48)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return with_outliers(write_tiny(folder, "LlamaForCausalLM", **GROUPED))


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(LINES * 12))
    return file


@pytest.mark.parametrize("architecture", rows(ARCHITECTURES, QUICK_ARCHITECTURES))
def test_a_smoothed_checkpoint_predicts_the_same(architecture, tmp_path):
    """The factors as the folder's writer applies them, against the oracle in float64."""
    folder = write_tiny(tmp_path, architecture)
    checkpoint = open_checkpoint(folder)
    decoder, rng = checkpoint.model.decoder(), np.random.default_rng(0)
    places = tuple(
        Place(i, c.name, c.consumers, np.exp(rng.standard_normal(c.shape)).astype(np.float32), None, 1.0, 1.0)
        for i, block in enumerate(decoder.blocks)
        for c in smooth.couplings(block)
    )
    by_part = factors_by_part(checkpoint, smoothing.factors(decoder, Smoothing(places)))
    tensors = dict(open_tiny(folder).tensors)
    for name, factors in by_part.items():
        x = tensors[name]
        tensors[name] = factors.times(x.reshape(-1, x.shape[-1]), 0).reshape(x.shape)
    config, tokens = config_of(folder), TOKENS[0].tolist()
    wanted = forward.logits(config, open_tiny(folder).tensors, tokens)
    np.testing.assert_allclose(forward.logits(config, tensors, tokens), wanted, atol=1e-4, rtol=1e-4)
    changed = sum(not np.array_equal(tensors[name], x) for name, x in open_tiny(folder).tensors.items())
    assert changed >= 0.6 * len(tensors)


@pytest.mark.parametrize("dtype", rows(DTYPES, {"bfloat16"}))
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_what_a_stored_norm_rounds_the_factors_take_up(architecture, dtype, tmp_path):
    checkpoint = open_checkpoint(write_tiny(tmp_path, architecture, torch_dtype=dtype))
    decoder, rng = checkpoint.model.decoder(), np.random.default_rng(0)
    places = tuple(
        Place(0, c.name, c.consumers, np.exp(rng.standard_normal(c.shape)).astype(np.float32), None, 1.0, 1.0)
        for c in smooth.couplings(decoder.blocks[0])
    )
    stored = as_stored(checkpoint, Smoothing(places))
    for before, after in zip(places, stored.places, strict=True):
        np.testing.assert_allclose(after.scales, before.scales, rtol=2e-2)
        if not before.name.endswith("norm"):
            continue
        (part,) = checkpoint.weights[f"blk.0.{before.name}.weight"].parts
        shift = checkpoint.weights[f"blk.0.{before.name}.weight"].shift
        w = open_tiny(tmp_path).tensors[part].astype(np.float32)
        # Divided by the factor that is declared, the norm is the one that can be stored.
        made = (w + shift) / after.scales - shift
        rounded = made.astype(DTYPES[dtype]).astype(np.float32)
        np.testing.assert_allclose(made, rounded, rtol=1e-5, atol=2e-6)


def test_extremes_are_those_of_the_inputs(model):
    checkpoint = open_checkpoint(model)
    samples = calibration(checkpoint.model)
    stats = smoothing.measure(checkpoint.model, samples)
    decoder = checkpoint.model.decoder()
    x = jnp.asarray(decoder.embed(samples.tokens))
    params, angles = decoder.load_block(0), jnp.asarray(decoder.angles(0, 48))
    shown = decoder.blocks[0].apply({"params": params}, x, angles, mutable="inputs")[1]["inputs"]
    given = np.abs(np.asarray(shown["attn_q"]["x"])).reshape(-1, 128)
    np.testing.assert_allclose(stats["blk.0.attn_q.weight"]["absmax"], given.max(0), rtol=1e-5)
    np.testing.assert_allclose(stats["blk.0.attn_q.weight"]["sum2"], (given**2).sum(0), rtol=1e-4)
    assert outlier_ratio(given.max(0)) > 50


def test_one_alpha_takes_outliers_away_and_brings_the_predictions_back(model, text, tmp_path):
    for name, options in {"plain": ["--no-smooth"], "half": ["--alpha", "0.5", "-c", text]}.items():
        run(model, tmp_path / name, "--type", "W8A8", "-q", *options)
    wanted = logits(open_checkpoint(model).model.decoder(), TOKENS)[:, :-1]
    plain, half = (
        divergence(wanted, np.stack(list(FlaxEngine(tmp_path / name).logits(list(TOKENS), [0] * 3))))
        for name in ("plain", "half")
    )
    assert plain > 0.1
    assert half < plain / 20


@pytest.mark.slow
def test_the_search_is_never_worse_than_any_alpha_on_the_samples_that_decide(model):
    checkpoint = open_checkpoint(model)
    decoder, samples = checkpoint.model.decoder(), calibration(checkpoint.model)
    stats = smoothing.measure(checkpoint.model, samples)
    quantized = frozenset(n for n in stats if "gate_inp" not in n)
    fisher = smooth_search.fisher_of(decoder, samples, QUICK)
    found = search(decoder, samples, stats, quantized, fisher, settings=QUICK)
    tokens, x = samples.tokens[:4, :48], jnp.asarray(decoder.embed(samples.tokens[:4, :48]))
    for i, block in enumerate(decoder.blocks):
        params, angles = decoder.load_block(i), jnp.asarray(decoder.angles(i, tokens.shape[1]))
        y = block.apply({"params": params}, x, angles)
        data = smooth_error.Data(x[2:], y[2:], jnp.ones(2 * 48), jnp.asarray(fisher[i]).reshape(-1))
        here = frozenset(n.split(".")[2] for n in quantized if n.startswith(f"blk.{i}."))

        def error(scales, params=params, block=block, data=data, angles=angles, here=here) -> float:
            logs = {name: jnp.log(jnp.asarray(s)) for name, s in scales.items()}
            return float(smooth_error.error(block, here, params, logs, data, angles))

        none = error({c.name: np.ones(c.shape, np.float32) for c in smooth.couplings(block)})
        fixed = [error(smoothing.fixed(decoder, stats, alpha).scales(i)) for alpha in QUICK.alphas]
        assert found.errors[i] == pytest.approx((none, error(found.scales(i))), rel=2e-2)
        assert found.errors[i][1] <= min(none, *fixed) * 1.02
        assert found.errors[i][1] < 0.2 * none
        x = y


@pytest.mark.slow
def test_channels_change_their_sign_where_codes_have_a_zero(model):
    """All places keep what they compute, and tokens have smaller ranges."""
    checkpoint = open_checkpoint(model)
    decoder, samples = checkpoint.model.decoder(), calibration(checkpoint.model)
    stats = smoothing.measure(checkpoint.model, samples)
    quantized = frozenset(stats)
    fisher = smooth_search.fisher_of(decoder, samples, QUICK)
    found = search(decoder, samples, stats, quantized, fisher, settings=QUICK, rounding=smooth_error.by_range)
    assert all(after < 0.2 * before for before, after in found.errors)
    block, params = decoder.blocks[0], decoder.load_block(0)
    x, angles = jnp.asarray(decoder.embed(samples.tokens)), jnp.asarray(decoder.angles(0, 48))
    y = block.apply({"params": params}, x, angles)
    ranges = []
    for signed in (True, False):
        scales = {name: jnp.asarray(s if signed else np.abs(s)) for name, s in found.scales(0).items()}
        assert signed == any(bool((s < 0).any()) for s in scales.values())
        made = smooth.smoothed(block, params, scales)
        again, shown = block.apply({"params": made}, x, angles, mutable="inputs")
        np.testing.assert_allclose(again, y, atol=1e-4 * float(jnp.abs(y).max()))
        given = shown["inputs"]["ffn_down"]["x"]
        ranges.append(float(jnp.mean((given.max(-1) - given.min(-1)) / jnp.abs(given).max(-1))))
    assert ranges[0] < ranges[1]
    judged = smooth_search.judged(decoder, samples, found._replace(errors=()), quantized, fisher,
                                  settings=QUICK, rounding=smooth_error.by_range)  # fmt: skip
    np.testing.assert_allclose(judged.errors, found.errors, rtol=2e-2)


def test_factors_of_their_own_fit_samples_better_than_any_alpha(model):
    checkpoint = open_checkpoint(model)
    decoder, samples = checkpoint.model.decoder(), calibration(checkpoint.model)
    stats = smoothing.measure(checkpoint.model, samples)
    block, params = decoder.blocks[0], decoder.load_block(0)
    x, angles = jnp.asarray(decoder.embed(samples.tokens[:3, :48])), jnp.asarray(decoder.angles(0, 48))
    data, shown = smooth_passes.through(block, params, x, jnp.full(3, 48), None, angles)
    here = frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"})
    inputs = {c.name: smoothing.maxima(c, 0, stats) for c in smooth.couplings(block)}
    compiled = smooth_error._error._cache_size()
    found = smooth_search.search_block(
        block, here, params, inputs, shown, data, data, angles, Search(steps=20)
    )
    assert smooth_error._error._cache_size() - compiled == 1  # whatever part of the block it is asked of
    # Where one place's own factors gain next to nothing, a last bit may decide for its alpha.
    assert list(found.alphas.values()).count(None) > len(found.alphas) / 2
    assert found.after < 0.95 * found.alpha < found.alpha < 0.2 * found.before


def test_maxima_do_not_hold_the_search_to_the_host(model):
    """They are made of statistics that are committed to it, and what a GPU's arrays are combined with that is
    committed to the host is computed on the host."""
    opened = open_checkpoint(model).model
    decoder, stats = opened.decoder(), smoothing.measure(opened, calibration(opened))
    assert all(s["absmax"].committed for s in stats.values())
    assert not any(smoothing.maxima(c, 0, stats).committed for c in smooth.couplings(decoder.blocks[0]))


def test_gradients_of_the_search_point_downhill(model):
    """Rounding hides the slope of a single channel, not that of a step along the gradient."""
    checkpoint = open_checkpoint(model)
    decoder, samples = checkpoint.model.decoder(), calibration(checkpoint.model)
    block, params = decoder.blocks[0], decoder.load_block(0)
    x, angles = jnp.asarray(decoder.embed(samples.tokens[:3, :48])), jnp.asarray(decoder.angles(0, 48))
    y, ones = block.apply({"params": params}, x, angles), jnp.ones(3 * 48)
    data = smooth_error.Data(x, y, ones, ones)
    here = frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"})
    logs = {c.name: jnp.zeros(c.shape) for c in smooth.couplings(block)}

    def loss(logs):
        return jnp.log(smooth_error.error(block, here, params, logs, data, angles))

    gradient = jax.grad(loss)(logs)
    length = float(np.sqrt(sum(float(jnp.sum(g**2)) for g in gradient.values())))
    step = 0.5
    moved = jax.tree.map(lambda a, g: a - step / length * g, logs, gradient)
    fallen = float(loss(logs) - loss(moved))
    assert fallen == pytest.approx(step * length, rel=0.5)


def test_the_command_searches_and_reports_every_place(model, text, tmp_path):
    output = run(model, tmp_path / "out", "--type", "W8A8", "--json", "-q", "-c", text, "--samples", "6",
                 "--sequence-length", "48")  # fmt: skip
    report = json.loads(output)["smoothing"]
    assert [row["place"] for row in report[:4]] == ["attn_norm", "attn_v", "ffn_norm", "ffn_up"]
    assert len(report) == 8
    for row in report:
        assert row["smoothed_block_error"] < 0.2 * row["block_error"]
    norms = [row for row in report if row["place"].endswith("norm")]
    assert all(row["outlier_ratio"] > 50 > 10 > row["smoothed_outlier_ratio"] for row in norms)
    wanted = logits(open_checkpoint(model).model.decoder(), TOKENS)[:, :-1]
    found = np.stack(list(FlaxEngine(tmp_path / "out").logits(list(TOKENS), [0] * 3)))
    assert divergence(wanted, found) < 0.02
    # The rest of the folder is the model's own.
    assert decoded(tmp_path / "out", "INT8").keys() == read(model).keys()


def test_a_bad_alpha_is_refused(model, text, tmp_path):
    for alpha in ("-0.1", "1.5", "nan"):
        run(model, tmp_path / "out", "--type", "W8A8", "--alpha", alpha, "-c", text, "-q", code=2)
    run(model, tmp_path / "out", "--type", "FP8", "--alpha", "0.5", code=2)
    run(model, tmp_path / "out", "--type", "W8A8", "--analyze", code=2)
    assert not (tmp_path / "out").exists()
    decoder = open_checkpoint(model).model.decoder()
    with pytest.raises(UserError, match="between 0 and 1"):
        smoothing.fixed(decoder, {}, 1.01)
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight: nothing is known"):
        smoothing.fixed(decoder, {}, 0.5)


@pytest.mark.parametrize("architecture", rows(ARCHITECTURES, QUICK_ARCHITECTURES))
def test_advice_names_the_matrices_of_the_best_place(architecture, tmp_path):
    checkpoint = open_checkpoint(write_tiny(tmp_path, architecture))
    weights = {name: weight for name, weight in checkpoint.weights.items() if name.endswith(".weight")}
    stored = {name: weight.parts for name, weight in weights.items()}
    names = {name for parts in stored.values() for name in parts}
    found = smooth.couplings(checkpoint.model.decoder().blocks[1])
    places = [Place(1, c.name, c.consumers, np.ones(4, np.float32), None, 1.0, 1.0) for c in found]

    def advised(left: list[float]) -> list[str]:
        """What is said of each place, when keeping it leaves these errors of 0.01."""
        kept = {1: {place.name: error for place, error in zip(places, left, strict=True)}}
        errors = ((1e-3, 1e-5), (1e-1, 1e-2), (1e-3, 1e-5), (1e-3, 1e-5))
        others = [place._replace(block=i) for i in (0, 2, 3) for place in places]
        judged = Smoothing((*places, *others), errors, kept)
        return [advice(judged, place, stored) for place in places]

    def matched(text: str) -> set[str]:
        return {name for name in names if re.search(text.split("'")[1], name)}

    for best, place in enumerate(places):
        said = advised([2e-3 if i == best else 9e-3 for i in range(len(places))])
        assert [bool(text) for text in said] == [i == best for i in range(len(places))]
        assert said[best].endswith("leaves 2.00e-03")
        wanted = {f"blk.1.{name}.weight" for name in place.consumers if "gate_inp" not in name}
        assert matched(said[best]) == {part for name in wanted for part in stored[name]}
    assert not any(advised([9e-3] * len(places)))


def test_an_alpha_that_leaves_outliers_is_to_be_higher():
    place = Place(0, "ffn_up", ("ffn_down",), np.ones(4, np.float32), 0.5, 500.0, 60.0)
    assert advice(Smoothing((place,)), place, {}) == "higher alpha"
    assert advice(Smoothing((place,)), place._replace(after=10.0), {}) == ""
    report = smoothing_report(Smoothing((place, place._replace(alpha=None))), {})
    assert [row["alpha"] for row in report] == [0.5, None]


def test_keeping_what_is_advised_needs_smoothing(model, tmp_path):
    run(model, tmp_path / "bad", "--type", "W8A8", "--no-smooth", "--keep", "auto", code=2)
    run(model, tmp_path / "bad", "--type", "FP8", "--keep", "auto", code=2)


@pytest.mark.slow
def test_what_is_advised_leaves_the_error_that_it_names(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(smoothing, "OUTSTANDING", 1.0)  # for the tiny model's places are much alike

    def report(out: str, *options: str) -> list[dict]:
        options += ("--json", "-q", "-c", text, "--samples", "6", "--sequence-length", "48")
        return json.loads(run(model, tmp_path / out, "--type", "W8A8", *options))["smoothing"]

    def kept(out: str) -> set[str]:
        made = read(tmp_path / out)
        return {name for name in read(model) if "proj" in name and f"{name}_scale" not in made}

    rows = report("as-it-is", "--alpha", "0.5", "--target-error", "1")
    advised = [row for row in rows if row["advice"]]
    assert advised
    assert not kept("as-it-is")
    errors = [row["smoothed_block_error"] for row in rows[::4]]
    for i, row in enumerate(advised):
        saved = row["smoothed_block_error"] - row["block_error_if_kept"]
        assert saved > sum(errors) / len(rows)
        option, pattern = row["advice"].split("'")[0].split()[-1], row["advice"].split("'")[1]
        again = report(f"kept-{i}", "--alpha", "0.5", "--target-error", "1", option, pattern)
        (made,) = [r for r in again if (r["block"], r["place"]) == (row["block"], row["place"])]
        assert made["smoothed_block_error"] == pytest.approx(row["block_error_if_kept"], rel=1e-3)
        assert kept(f"kept-{i}") == {n for n in read(model) if re.search(pattern, n) and "proj" in n}
    # All of them at once.
    made = report("auto", "--alpha", "0.5", "--keep", "auto")
    assert kept("auto") == set().union(*(kept(f"kept-{i}") for i in range(len(advised))))
    for i in range(2):
        saved = [r["smoothed_block_error"] - r["block_error_if_kept"] for r in advised if r["block"] == i]
        assert made[4 * i]["smoothed_block_error"] == pytest.approx(
            errors[i] - sum(saved), abs=1e-3 * errors[i]
        )
    assert not any(row["advice"] for row in made)
