"""Error feedback: of one matrix, around every format, and through a whole model."""

from __future__ import annotations

from dataclasses import replace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ggml
from helpers.matrices import hessian, matrix, output_error
from helpers.shapes import WIDE
from helpers.text import TEXT
from helpers.tiny_models import write_tiny

from jquant import FORMATS, dequantize, models, quantize
from jquant.calibration import load_samples
from jquant.checkpoints.model import open_model
from jquant.checkpoints.weights import Weights
from jquant.ldlq import sequential, streams
from jquant.ldlq.correction import CAUTIOUS, Moments, Strength, corrected, cross_validated
from jquant.ldlq.ldlq import factor, feedback
from jquant.ldlq.sequential import Fitter, Settings
from jquant.ldlq.streams import open_streams
from jquant.models import run_block
from jquant.models._stages import stages
from jquant.plan import plan
from jquant.writers.gguf import write_gguf
from jquant.writers.gguf_feedback import Feedback

# Groups of columns that share a code, as those of IQ types do, in a type that compiles in a second.
GROUPED = replace(FORMATS["Q4_0"], name="Q4_0 by eights", group_size=8)
QUICK = {"Q4_0", "Q3_K"}  # one scale for a block, and scales of runs; IQ types take ten seconds to compile
ENCODED = [pytest.param(GROUPED, id=GROUPED.name)] + [
    pytest.param(f, id=f.name, marks=[] if f.name in QUICK else [pytest.mark.every])
    for f in FORMATS.values()
    if f.can_encode and f.block_size > 1
]


def every(*rows: object) -> list:
    """Rows of a table beside its representatives."""
    return [pytest.param(row, marks=pytest.mark.every) for row in rows]


@pytest.mark.parametrize("format", ENCODED)
def test_a_part_of_a_block_is_coded_as_it_is_in_the_whole(format):
    B, G = format.block_size, format.group_size
    x, w = matrix(B, 16), jnp.asarray(np.abs(matrix(B, 16, seed=2)) + np.float32(0.1))
    scales = jax.jit(format.fit)(x, w)
    whole = format.reconstruct(format.assign(x, w, scales), scales)
    start = B // 2

    def own(a):
        return a if a.ndim < 2 else a[start * len(a) // B :][: max(G * len(a) // B, 1)]

    part = jax.tree.map(own, scales)
    got = format.reconstruct(format.assign(x[start : start + G], w[start : start + G], part), part)
    np.testing.assert_array_equal(got, whole[start : start + G])


@pytest.mark.parametrize("group", [1, 8])
def test_the_factors_give_the_hessian_back(group):
    H = hessian(64)
    U, D = factor(H, group, damping=0.0)
    U, D = np.asarray(U, np.float64) + np.eye(64), np.asarray(D, np.float64)
    whole = np.zeros((64, 64))
    for g, d in enumerate(D):
        whole[g * group : (g + 1) * group, g * group : (g + 1) * group] = d
    np.testing.assert_allclose(U @ whole @ U.T * float(jnp.trace(H)) / 64, H, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Q4_0", *every("Q2_K", "IQ2_XXS")])
def test_without_correlations_it_is_quantization_with_importance(name):
    W, importance = matrix(32, 512), np.exp(np.asarray(matrix(1, 512, seed=3))[0] / 2)
    H = jnp.asarray(np.diag(importance))
    found = feedback(W, factor(H, FORMATS[name].group_size, damping=0.0), FORMATS[name])
    plain = quantize(W, FORMATS[name], jnp.asarray(importance))
    same = np.mean(np.all(np.asarray(dequantize(found)) == np.asarray(dequantize(plain)), axis=1))
    assert same > 0.9  # the last bit of an importance may decide between two scales


@pytest.mark.parametrize("format", ENCODED)
def test_the_output_is_nearer_than_with_importance_alone(format):
    W, H = matrix(32, 512), hessian(512)
    fed = feedback(W, factor(H, format.group_size), format)
    plain = quantize(W, format, jnp.asarray(np.diagonal(H)))
    assert output_error(W, fed, H) < 0.9 * output_error(W, plain, H)


@pytest.mark.parametrize("name", ["Q3_K", *every("Q2_K", "IQ2_XXS", "TQ1_0")])
def test_the_bytes_are_what_ggml_reads(name):
    fed = feedback(matrix(32, 512), factor(hessian(512), FORMATS[name].group_size), FORMATS[name])
    data = np.asarray(fed.parts["blocks"])
    np.testing.assert_array_equal(ggml.decode(FORMATS[name].ggml_type, data), dequantize(fed))


@pytest.mark.parametrize("name", ["Q4_0", *every("Q2_K", "IQ2_XXS")])
@pytest.mark.parametrize("H", ["zero", "one token", "dead columns", "one column rules"])
def test_a_hessian_without_inverse_does_no_harm(name, H):
    x = np.asarray(matrix(1 if H == "one token" else 600, 512, seed=4)).copy()
    if H == "zero":
        x[:] = 0
    if H == "dead columns":
        x[:, ::2] = 0
    if H == "one column rules":
        x[:, 7] *= 1e4
    W, products = matrix(32, 512), jnp.asarray(x.T @ x)
    decoded = np.asarray(dequantize(feedback(W, factor(products, FORMATS[name].group_size), FORMATS[name])))
    assert np.isfinite(decoded).all()
    # However little the inputs say, weights remain near what they were.
    assert np.mean((np.asarray(W) - decoded) ** 2) < np.mean(np.square(W))


def test_the_correction_is_the_least_squares_fit_of_the_original_output():
    rng = np.random.default_rng(5)
    x0 = rng.standard_normal((400, 32))
    x = x0 + 0.3 * rng.standard_normal((400, 32))
    W = rng.standard_normal((8, 32))
    best = np.linalg.lstsq(x, x0 @ W.T, rcond=None)[0].T
    W, moments = jnp.asarray(W, jnp.float32), moments_of(x0, x)
    np.testing.assert_allclose(corrected(W, moments, 1.0, 0.0), best, atol=1e-3)
    np.testing.assert_array_equal(corrected(W, moments, 0.0, 0.0), W)


def moments_of(x0: np.ndarray, x: np.ndarray) -> Moments:
    return Moments(*(jnp.asarray(a, jnp.float32) for a in (x.T @ x, x0.T @ x)))


@pytest.mark.parametrize("tokens", [120, 400, 20_000])
def test_cross_validation_corrects_as_far_as_the_tokens_bear(tokens):
    rng, width = np.random.default_rng(6), 96
    mixed = np.eye(width) + 0.1 * rng.standard_normal((width, width)) / np.sqrt(width)

    def drawn(count):
        x = rng.standard_normal((count, width))
        return x @ mixed + 0.3 * rng.standard_normal((count, width)), x

    halves = [drawn(tokens // 2) for _ in range(2)]
    W = jnp.asarray(rng.standard_normal((64, width)), jnp.float32)
    found = cross_validated(W, tuple(moments_of(*half) for half in halves))
    x0, x = drawn(50_000)

    def lost(strength):
        made = corrected(W, moments_of(*map(np.concatenate, zip(*halves, strict=True))), *strength)
        return float(np.mean((x0 @ W.T - x @ made.T) ** 2))

    nothing, whole, ours = (lost(s) for s in (Strength(0.0, 0.05), Strength(1.0, 0.05), found))
    assert ours < nothing
    assert ours < 1.001 * whole
    if tokens == 120:
        assert whole > nothing  # it has learned more noise than there was to mend
        assert found.alpha < 0.5
    if tokens == 20_000:
        assert found.alpha > 0.9


def test_where_nothing_can_be_held_out_the_correction_is_cautious():
    x = np.random.default_rng(7).standard_normal((50, 16))
    moments = moments_of(x, x + 1)
    nothing = Moments(*(jnp.zeros_like(a) for a in moments))
    assert cross_validated(jnp.eye(16), (moments, nothing)) == CAUTIOUS


def opened(tmp_path, name, **settings):
    model = open_model(write_tiny(tmp_path / "model", name, **settings))
    return model, load_samples(model, TEXT, samples=6, sequence_length=32)


def planned_in(model, type="Q4_0"):
    """Every matrix in one type, which is one program for all of a width."""
    return plan(model.source.specs, model.metadata, type, pure=True)


def test_a_run_takes_the_trusted_part_of_the_correction_found(tmp_path, monkeypatch):
    model, samples = opened(tmp_path, "LlamaForCausalLM")
    decoder = models.decoder(Weights(model.source), model.metadata)
    x0 = decoder.embed(samples.tokens)
    x = x0 + 0.1 * np.random.default_rng(0).standard_normal(x0.shape).astype(np.float32)
    monkeypatch.setattr(sequential, "cross_validated", lambda W, halves: Strength(0.5, 0.2))

    def made(settings: Settings) -> np.ndarray:
        block = open_streams(decoder, 1, x0.copy(), x.copy(), samples.lengths, batch=4)
        return Fitter(settings).quantize(block, {"attn_q": FORMATS["Q4_0"]})["attn_q"].data

    found = made(Settings())
    trusted = Settings(correction=Strength(sequential.TRUST * 0.5, 0.2))
    np.testing.assert_array_equal(found, made(trusted))
    assert (found != made(Settings(correction=Strength(0.5, 0.2)))).any()


@pytest.mark.parametrize(
    ("name", "type"),
    [
        ("LlamaForCausalLM", "Q4_0"),
        *(
            pytest.param(name, type, marks=pytest.mark.every)
            for name in ("Phi3ForCausalLM", "MixtralForCausalLM")
            for type in ("Q4_0", "Q2_K")
        ),
    ],
)
def test_every_matrix_but_the_embeddings_is_fed_back_and_decodes(tmp_path, monkeypatch, name, type):
    if type == "Q4_0":
        for module in ("gguf", "_loop"):  # errors are told of types of few bits
            monkeypatch.setattr(f"jquant.writers.{module}.LOW_BPW", 5)
    model, samples = opened(tmp_path, name, **(WIDE if type == "Q2_K" else {}))
    planned = planned_in(model) if type == "Q4_0" else plan(model.source.specs, model.metadata, type)
    written = write_gguf(model, planned, tmp_path / "out.gguf", feedback=Feedback(samples))
    matrices = [
        n
        for n, s in model.source.specs.items()
        if n.startswith(("blk.", "output.")) and len(s.shape) > 1 and "inp" not in n
    ]
    assert "output.weight" in matrices
    assert sorted(written.fed) == sorted(matrices)
    assert all(0 < fed.error < 0.5 for fed in written.fed.values())
    assert written.errors.keys() >= {e.name for e in planned.entries if e.type == type}
    assert open_model(tmp_path / "out.gguf").source.specs.keys() == model.source.specs.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_matrix_is_fitted_to_what_the_quantized_blocks_give(tmp_path, tied):
    model, samples = opened(tmp_path, "LlamaForCausalLM", tie_word_embeddings=tied)
    planned = planned_in(model)
    write_gguf(model, planned, tmp_path / "out.gguf", feedback=Feedback(samples))
    name = "token_embd.weight" if tied else "output.weight"
    of_file = open_model(tmp_path / "out.gguf")
    original, quantized = (models.decoder(Weights(m.source), m.metadata) for m in (model, of_file))
    assert original.tied == tied

    def given(decoder: models.Decoder) -> np.ndarray:
        """float64 [tokens, width], made from the original's embeddings."""
        x = original.embed(samples.tokens)
        for i, block in enumerate(decoder.blocks):
            x = run_block(block, decoder.load_block(i), x, decoder.angles(i, x.shape[1]))
        return np.asarray(decoder.output_inputs(x), np.float64).reshape(-1, decoder.width)

    x0, x = given(original), given(quantized)
    W, fed = (Weights(m.source).tensor(name).astype(np.float64) for m in (model, of_file))
    format = FORMATS[of_file.source.specs[name].type]
    importance = jnp.asarray(np.mean(x * x, axis=0), jnp.float32)
    nearest = np.asarray(dequantize(quantize(jnp.asarray(W, jnp.float32), format, importance=importance)))
    wanted = (x0 if not tied else x) @ W.T  # a matrix that embeds tokens too is not to mend other losses
    assert np.mean((x @ fed.T - wanted) ** 2) < 0.9 * np.mean((x @ nearest.T - wanted) ** 2)
    assert np.mean((fed - W) ** 2) < 2 * np.mean((nearest - W) ** 2) or not tied


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        *every("Qwen2ForCausalLM", "Phi3ForCausalLM", "Gemma3ForCausalLM", "Qwen2MoeForCausalLM"),
    ],
)
def test_inputs_that_are_kept_are_those_computed_again(tmp_path, name):
    model, samples = opened(tmp_path, name)
    decoder = models.decoder(Weights(model.source), model.metadata)
    rng, real = np.random.default_rng(0), samples.lengths - 3
    x0 = decoder.embed(samples.tokens)
    x = x0 + 0.1 * rng.standard_normal(x0.shape).astype(np.float32)
    kept, again = (open_streams(decoder, 1, x0.copy(), x.copy(), real, batch=4) for _ in range(2))
    again.keeps = False
    format = FORMATS["Q4_0"]
    names = [n for n, p in kept.original.items() if p["weight"].ndim > 1 and p["weight"].shape[-1] % 32 == 0]
    for members in stages(names):
        ours, theirs = kept.gather(members), again.gather(members)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2), ours, theirs)
        for name in members:
            weight = kept.original[name]["weight"]
            rows = np.asarray(weight).reshape(-1, weight.shape[-1])
            data = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q4_0)
            for one in (kept, again):
                one.replace(name, data, format)
    assert kept.kept[1]
    assert again.kept == ({}, {})
    for one in (kept, again):
        one.advance()
    np.testing.assert_allclose(kept.x0, again.x0, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kept.x, again.x, rtol=1e-4, atol=1e-4)
    assert np.abs(kept.x - kept.x0).max() > 0.01


def test_inputs_that_do_not_fit_are_not_kept(tmp_path, monkeypatch):
    model, samples = opened(tmp_path, "LlamaForCausalLM")
    decoder = models.decoder(Weights(model.source), model.metadata)
    x = decoder.embed(samples.tokens)
    arguments = (decoder, 0, x, x, samples.lengths, 2)
    assert open_streams(*arguments).keeps
    # attn_output and ffn_gate see 64 columns and ffn_down 96, in both streams.
    size = 2 * 4 * (64 + 64 + 96) * samples.tokens.size
    monkeypatch.setattr(streams, "IN_MEMORY", 2 * size)
    assert open_streams(*arguments).keeps
    assert not open_streams(*arguments, samples=len(x) + 1).keeps


@pytest.mark.parametrize("name", ["LlamaForCausalLM", *every("MixtralForCausalLM")])
def test_a_run_that_was_cut_short_goes_on_to_the_same_bytes(tmp_path, name):
    model, samples = opened(tmp_path, name, num_hidden_layers=3)
    planned = planned_in(model)
    write_gguf(model, planned, tmp_path / "whole.gguf", feedback=Feedback(samples))

    class CutError(Exception):
        pass

    def cut(done, count):
        if done == 2:
            raise CutError

    with pytest.raises(CutError):
        write_gguf(model, planned, tmp_path / "cut.gguf", feedback=Feedback(samples, progress=cut))
    assert (tmp_path / "cut.gguf.partial").exists()
    write_gguf(model, planned, tmp_path / "cut.gguf", feedback=Feedback(samples), resume=True)
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_other_settings_do_not_continue_a_run(tmp_path):
    from jquant.checkpoints.fingerprint import fingerprint
    from jquant.writers.gguf import facts

    model, samples = opened(tmp_path, "LlamaForCausalLM")
    planned = planned_in(model)
    given = [None, Feedback(samples), Feedback(samples, settings=Settings(correction=Strength(0.5, 0.2)))]
    known = [facts(model, planned, None, {}, "fast", one) for one in given]
    assert len({fingerprint(model, one) for one in known}) == 3
