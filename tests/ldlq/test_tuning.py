"""Tuning of what moves in a quantized file: bytes, gradients, what is kept, and runs cut short."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ggml
from helpers.text import cats
from helpers.tiny_models import write_tiny

from jquant import FORMATS, models, quantize
from jquant.calibration import load_samples
from jquant.checkpoints.model import open_model
from jquant.checkpoints.weights import Weights
from jquant.core import UserError
from jquant.ldlq import _tunable as moving
from jquant.ldlq import tuning
from jquant.plan import plan
from jquant.writers.gguf import write_gguf
from jquant.writers.gguf_feedback import Feedback

TEXT = cats(900)
# One number a block, and two of each superblock.
QUICK = {"Q4_0", "Q3_K", "MXFP4"}
ENCODED = [
    pytest.param(f, id=f.name, marks=[] if f.name in QUICK else [pytest.mark.every])
    for f in FORMATS.values()
    if f.can_encode and f.block_size > 1
]
STILL = {"MXFP4", "NVFP4"}  # their scales are integers


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A tiny model, its file of Q4_0, and samples."""
    folder = tmp_path_factory.mktemp("tuning")
    model = open_model(write_tiny(folder / "model", "LlamaForCausalLM"))
    write_gguf(model, planned_in(model), folder / "q4_0.gguf")
    samples = load_samples(model, TEXT, samples=24, sequence_length=32)
    return model, open_model(folder / "q4_0.gguf"), samples


def planned_in(model, type="Q4_0"):
    """Every matrix in one type, which is one program for all of a width."""
    return plan(model.source.specs, model.metadata, type, pure=True)


def decoder(model):
    return models.decoder(Weights(model.source), model.metadata)


def stored(format, seed=0):
    x = jnp.asarray(np.random.default_rng(seed).standard_t(5, (32, 512)), jnp.float32)
    return moving.Stored({"a.weight": quantize(x, format, jnp.ones(512)).parts["blocks"]}, {}, {})


@pytest.mark.parametrize("format", ENCODED)
def test_a_file_without_changes_keeps_its_bytes(format):
    formats, one = (("a.weight", format),), stored(format)
    none = moving.no_changes(formats, one)
    assert bool(none["a.weight"]) == (format.name not in STILL)
    same = moving.written(formats, one, none)
    np.testing.assert_array_equal(same.coded["a.weight"], one.coded["a.weight"])


@pytest.mark.parametrize("format", [p for p in ENCODED if p.id not in STILL])
def test_ggml_reads_what_was_changed(format):
    formats, one = (("a.weight", format),), stored(format)
    changes = jax.tree.map(lambda a: a + 0.25, moving.no_changes(formats, one))
    bytes_ = np.asarray(moving.written(formats, one, changes).coded["a.weight"])
    before = ggml.decode(format.ggml_type, np.asarray(one.coded["a.weight"]))
    after = ggml.decode(format.ggml_type, bytes_)
    # d and dmin are float16 each, and a weight may be the small difference of what they make.
    np.testing.assert_allclose(after, 1.25 * before, atol=1e-3 * np.abs(before).max())


@pytest.mark.parametrize("name", ["Q4_1", pytest.param("Q2_K", marks=pytest.mark.every)])
def test_numbers_put_in_twice_are_put_in_once(name):
    format = FORMATS[name]
    formats, one = (("a.weight", format),), stored(format)
    changes = jax.tree.map(lambda a: a + 0.1, moving.no_changes(formats, one))
    new = moving.written(formats, one, changes)
    numbers = moving.numbers(formats, new)
    for start in (one, new):
        again = moving.with_numbers(formats, start, numbers)
        np.testing.assert_array_equal(again["a.weight"], new.coded["a.weight"])


def test_a_step_goes_down_the_gradient_of_the_divergence(quantized):
    """The gradient through all blocks against differences of the divergence itself."""
    import optax

    original, file, samples = quantized
    model = decoder(file)
    tokens = samples.tokens[:2]
    student = tuning._Student(model, file.source, optax.sgd(1.0), 2)
    heads = tuning._Heads(decoder(original), model)
    batch = tuning._Batch(tokens, np.full(2, 32), tuning._outputs(decoder(original), tokens, 2, None))
    student.learn(heads, batch)
    steps, of_norm = student.changes()  # minus the gradient

    def at(size):
        moved = tuning._Student(model, file.source, optax.sgd(0.0), 2)
        moved._changes = [jax.tree.map(lambda a: size * a, own) for own in steps]
        moved._norm = size * of_norm
        return moved.learn(heads, batch)

    slope = sum(float(jnp.sum(a * a)) for a in jax.tree.leaves((steps, of_norm)))
    size = 0.07 / slope**0.5  # what float16 rounds of smaller steps shows
    assert (at(-size) - at(size)) / (2 * size) == pytest.approx(slope, rel=0.02)


def test_what_is_kept_has_the_divergence_that_is_reported(quantized):
    original, file, samples = quantized
    settings = tuning.Settings(epochs=3, rate=0.01, batch=5)
    tuned = tuning.tune(
        decoder(original), decoder(file), file.source, samples.tokens, aside=7, settings=settings
    )
    assert tuned.gain.after < 0.95 * tuned.gain.before
    new = dict(tuning.apply(tuned.numbers, decoder(file), file.source))

    class Changed:
        specs = file.source.specs

        def read(self, name, start=0, stop=None):
            return new[name][start:stop] if name in new else file.source.read(name, start, stop)

    assert divergence(original, open_as(file, Changed()), samples.tokens[-7:]) == pytest.approx(
        tuned.gain.after, rel=1e-4
    )


def open_as(model, source):
    return model._replace(source=source)


def divergence(original, other, tokens):
    """Mean KL divergence by NumPy, in float64, from the logits of both models."""
    of = []
    for model in map(decoder, (original, other)):
        x = jnp.asarray(tuning._outputs(model, tokens, len(tokens), None))
        z = np.asarray(model.logits(x), np.float64)
        of.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
    p, q = of
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_what_the_samples_set_aside_reject_is_not_kept(quantized):
    original, file, samples = quantized
    wild = tuning.Settings(epochs=1, rate=3.0, batch=8)
    tuned = tuning.tune(decoder(original), decoder(file), file.source, samples.tokens, aside=4, settings=wild)
    assert tuned.gain.after == tuned.gain.before
    assert not tuned.numbers


def test_padding_counts_for_nothing(quantized):
    original, file, samples = quantized
    longer = np.pad(samples.tokens[:8], ((0, 0), (0, 16)))
    found = [
        tuning.tune(
            decoder(original), decoder(file), file.source, tokens, aside=4, lengths=np.full(8, 32)
        ).gain
        for tokens in (samples.tokens[:8], longer)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.every
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"])
def test_every_architecture_is_tuned(tmp_path, name):
    model = open_model(write_tiny(tmp_path / "model", name))
    write_gguf(model, planned_in(model), tmp_path / "out.gguf")
    file = open_model(tmp_path / "out.gguf")
    samples = load_samples(model, TEXT, samples=10, sequence_length=32)
    settings = tuning.Settings(epochs=2, rate=0.01, batch=4)
    tuned = tuning.tune(
        decoder(model), decoder(file), file.source, samples.tokens, aside=2, settings=settings
    )
    assert tuned.gain.after < tuned.gain.before
    assert any("exps" in n for n in tuned.numbers) == (name == "MixtralForCausalLM")


def test_a_run_cut_short_while_it_changes_the_file_ends_with_the_same_bytes(tmp_path, quantized, monkeypatch):
    model, _, samples = quantized
    planned = planned_in(model)
    feedback = Feedback(samples, tuning=tuning.Settings(epochs=2, rate=0.01))
    whole = write_gguf(model, planned, tmp_path / "whole.gguf", feedback=feedback)
    assert whole.tuned is not None
    assert whole.tuned.after < whole.tuned.before
    plain = write_gguf(model, planned, tmp_path / "plain.gguf", feedback=Feedback(samples))
    assert plain.tuned is None
    assert plain.paths[0].stat().st_size == whole.paths[0].stat().st_size

    from jquant.io import GgufSink

    class CutError(Exception):
        pass

    count, rewrite = 0, GgufSink.rewrite

    def cut(sink, name, rows):
        nonlocal count
        count += 1
        if count == 5:
            raise CutError
        rewrite(sink, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(GgufSink, "rewrite", cut)
        with pytest.raises(CutError):
            write_gguf(model, planned, tmp_path / "cut.gguf", feedback=feedback)
    write_gguf(model, planned, tmp_path / "cut.gguf", feedback=feedback, resume=True)
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_one_sample_cannot_be_learned_from_and_judged(tmp_path, quantized):
    model, _, samples = quantized
    one = replace(samples, tokens=samples.tokens[:1], lengths=samples.lengths[:1])
    feedback = Feedback(one, tuning=tuning.Settings())
    with pytest.raises(UserError, match="two samples"):
        write_gguf(model, planned_in(model), tmp_path / "x", feedback=feedback)
    assert not list(tmp_path.iterdir())
