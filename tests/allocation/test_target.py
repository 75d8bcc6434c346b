"""Target sizes and what leads to them, judged by the files, and by models that are run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tables
from helpers.commands import printed
from helpers.decoders import Noisy
from helpers.divergence import divergence_of_decoders
from helpers.shapes import WIDE
from helpers.tiny_models import write_tiny
from typer.testing import CliRunner

import jquant
from jquant import models
from jquant.allocation import Sensitivity, Target
from jquant.allocation._fit import fit, measured, open_record, shortlist, tensor_weights
from jquant.allocation.by_divergence import measured_weights
from jquant.allocation.by_gradient import gradient_weights
from jquant.allocation.by_output import output_weights
from jquant.allocation.candidates import USUAL, Candidates, candidates
from jquant.allocation.errors import SAMPLE, grid_bits, relative_errors
from jquant.allocation.prior import usual_errors, usual_weights
from jquant.allocation.record import Record
from jquant.calibration import _importance as analyze
from jquant.checkpoints.model import Model, open_model
from jquant.checkpoints.weights import Weights
from jquant.core import UserError, bits_per_weight
from jquant.io import GgufSource
from jquant.io.imatrix import Imatrix
from jquant.plan import parse_profile, runtime_types, settle
from jquant.plan.header import recipe
from jquant.writers.gguf import write_gguf
from jquant_cli import _errors
from jquant_cli.main import app

CPU = runtime_types("llama.cpp-cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM", **WIDE)


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return open_model(folder)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory) -> Path:
    """Of rows that no superblock divides: a target has four types to choose from, which all compile soon."""
    return write_tiny(tmp_path_factory.mktemp("models") / "small", "LlamaForCausalLM")


@pytest.fixture(scope="module")
def small(small_folder) -> Model:
    return open_model(small_folder)


@pytest.fixture(scope="module")
def imatrix(model) -> Imatrix:
    return random_imatrix(model)


def random_imatrix(model: Model) -> Imatrix:
    """Random importance of every matrix but the embeddings."""
    rng = np.random.default_rng(0)
    names = [n for n, s in model.source.specs.items() if len(s.shape) > 1 and n != "token_embd.weight"]
    entries = {n: rng.chisquare(2, (1, model.source.specs[n].cols)).astype(np.float32) for n in names}
    return Imatrix(entries, {n: np.full(1, 512, np.float32) for n in names}, ["made up"], 1, 512)


@pytest.fixture(scope="module")
def sensitivity(model, imatrix) -> Sensitivity:
    return given(model, free(model, imatrix)[1])


def given(model: Model, found: Candidates) -> Sensitivity:
    """Damages as they could be measured, of every candidate: around the usual ones, as far as is usual."""
    rng = np.random.default_rng(0)
    errors = {
        name: {t: e * np.exp(0.1 * rng.standard_normal()) for t, e in usual_errors(types).items()}
        for name, types in found.without.items()
    }
    return Sensitivity(errors, usual_weights(list(model.source.specs), 2))


def sense(model: Model, imatrix: Imatrix | None, found: Candidates, file: Path | None = None) -> Sensitivity:
    record = open_record(model, imatrix, file)
    return measured(model, imatrix, found, tensor_weights(model, imatrix, found, record), record)


def free(model: Model, imatrix: Imatrix | None, text: str = ""):
    profile = parse_profile(text, "mine.toml") if text else None
    settled = settle(model.source.specs, model.metadata, profile=profile, has_imatrix=imatrix is not None)
    return settled, candidates(settled, profile, CPU, imatrix.entries if imatrix else None)


def tensor_types(file: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(file)).tensors}


@pytest.mark.parametrize(
    ("which", "share"),
    [("small", 0.5), *(pytest.param("model", share, marks=pytest.mark.every) for share in (0.2, 0.3, 0.45))],
)
def test_a_target_size_is_met_to_half_a_percent_and_never_exceeded(request, tmp_path, which, share):
    model = request.getfixturevalue(which)
    imatrix = random_imatrix(model) if which == "model" else None
    settled, found = free(model, imatrix)
    sensitivity = given(model, found)
    target = int(share * sum(spec.nbytes for spec in model.source.specs.values()) / 2)

    def about(made):
        return recipe(made, imatrix=imatrix, effort="fast", target=Target(nbytes=target))

    made = fit(
        model,
        settled,
        found,
        sensitivity,
        Target(nbytes=target),
        imatrix=imatrix,
        imatrix_name="i",
        recipe=about,
    )
    out = tmp_path / "out.gguf"
    write_gguf(model, made, out, imatrix=imatrix, imatrix_name="i", recipe=about(made))
    assert 0.995 * target <= out.stat().st_size <= target
    assert tensor_types(out) == {entry.name: entry.type for entry in made.entries}


def test_a_target_bpw_is_that_of_all_tensors(model, imatrix, sensitivity):
    settled, found = free(model, imatrix)
    made = fit(model, settled, found, sensitivity, Target(bpw=4.0), imatrix=imatrix)
    assert 3.98 < made.bpw <= 4.0


def test_a_target_kld_takes_fewer_bytes_for_more_divergence(model, imatrix, sensitivity):
    settled, found = free(model, imatrix)
    loose, strict = (
        fit(model, settled, found, sensitivity, Target(kld=kld), imatrix=imatrix) for kld in (1.0, 0.1)
    )
    by_type = sensitivity.damages()
    assert loose.nbytes < strict.nbytes
    assert sum(by_type[e.name][e.type] for e in strict.entries if e.name in by_type) <= 0.1


@pytest.mark.parametrize(
    ("which", "kld"),
    [
        ("small_folder", 0.02),
        pytest.param("folder", 0.3, marks=pytest.mark.every),
        pytest.param("folder", 0.02, marks=pytest.mark.every),
    ],
)
def test_a_target_kld_is_met_by_measurement_where_there_is_text(request, tmp_path, which, kld):
    folder = request.getfixturevalue(which)
    out, calibration = tmp_path / "out.gguf", tmp_path / "text.txt"
    calibration.write_text("There was once a little girl who lived in a small house. " * 400)
    options = ("--target-kld", kld, "--calibration", calibration, "--sequence-length", 32, "--samples", 8)
    report = json.loads(printed("quantize", folder, out, *options, "--json", "-q"))
    assert report["search"]["best_kld"] <= kld
    original, made = open_model(folder), GgufSource(out)
    tokens = analyze.load_samples(original, str(calibration), samples=8, sequence_length=32).tokens
    expected = divergence_of_decoders(
        models.decoder(Weights(original.source), original.metadata),
        models.decoder(Weights(made), made.metadata),
        tokens,
    )
    assert report["search"]["best_kld"] == pytest.approx(expected, rel=1e-2)


def test_bounds_hold_under_a_target(model, imatrix, sensitivity):
    text = '[[rule]]\nrole = "attention"\nmin = "Q6_K"'
    settled, found = free(model, imatrix, text)
    made = fit(model, settled, found, sensitivity, Target(bpw=5.0), imatrix=imatrix)
    attention = [e for e in made.entries if "attn_" in e.name and len(e.shape) > 1]
    assert attention
    assert all(e.bpw >= bits_per_weight("Q6_K") for e in attention)


def test_a_target_too_small_names_what_binds_and_the_nearest_that_can_be_met(model, imatrix, sensitivity):
    settled, found = free(model, imatrix, '[[rule]]\nmatch = "ffn_"\nmin = "Q6_K"')
    with pytest.raises(UserError, match=r"mine\.toml, line 1: at least Q6_K") as caught:
        fit(model, settled, found, sensitivity, Target(nbytes=400_000), imatrix=imatrix)
    nearest = int(str(caught.value).split("nbytes=")[1].split()[0])
    made = fit(model, settled, found, sensitivity, Target(nbytes=nearest), imatrix=imatrix)
    assert all(e.type == "Q6_K" for e in made.entries if "ffn_" in e.name and "norm" not in e.name)
    with pytest.raises(UserError):
        fit(model, settled, found, sensitivity, Target(nbytes=nearest - 32), imatrix=imatrix)


def test_candidates_are_what_runtime_importance_and_rows_allow(model, imatrix):
    _, without = free(model, None)
    assert all(not type.startswith(("IQ1", "IQ2")) for types in without.within.values() for type in types)
    settled, _ = free(model, imatrix, 'candidates = ["TQ1_0", "Q4_K"]')
    profile = parse_profile('candidates = ["TQ1_0", "Q4_K"]', "mine.toml")
    for name, expected in (("llama.cpp-cpu", ("TQ1_0", "Q4_K")), ("llama.cpp-cuda", ("Q4_K",))):
        found = candidates(settled, profile, runtime_types(name), imatrix.entries)
        assert set(found.within.values()) == {expected}


@pytest.fixture(scope="module")
def measured_of_all(model, imatrix) -> Sensitivity:
    """Of all usual types, whose encoders are compiled for it."""
    return sense(model, imatrix, free(model, imatrix)[1])


@pytest.mark.parametrize("source", ["sensitivity", pytest.param("measured_of_all", marks=pytest.mark.every)])
@pytest.mark.parametrize("bpw", [2.5, 3.5, 5.0])
def test_a_few_types_do_almost_as_well_as_all(request, model, imatrix, source, bpw):
    sensitivity = request.getfixturevalue(source)
    settled, found = free(model, imatrix)
    target = Target(bpw=bpw)
    few = shortlist(model, settled, found, sensitivity.weights, target, named=True)

    def damage(candidates: Candidates) -> float:
        made = fit(model, settled, candidates, sensitivity, target, imatrix=imatrix)
        by_type = sensitivity.damages()
        return sum(by_type[e.name][e.type] for e in made.entries if e.name in by_type)

    assert len({t for types in few.within.values() for t in types}) <= len(USUAL) // 2
    assert few.without == found.without
    assert damage(few) <= 1.05 * damage(found)


@pytest.mark.parametrize(
    ("bpw", "named", "sparse"), [(2.7, False, False), (2.7, True, True), (1.95, False, True)]
)
def test_less_than_two_bits_only_where_they_must_be_or_were_named(
    model, imatrix, sensitivity, bpw, named, sparse
):
    settled, found = free(model, imatrix)
    few = shortlist(model, settled, found, sensitivity.weights, Target(bpw=bpw), named=named)
    assert any(bits_per_weight(t) < 2 for types in few.within.values() for t in types) == sparse


def test_every_tensor_keeps_a_type_that_its_bounds_allow(model, imatrix, sensitivity):
    settled, found = free(
        model,
        imatrix,
        '[[rule]]\nmatch = "blk.0.attn_k"\ntype = "Q8_0"\n[[rule]]\n'
        'match = "blk.1.attn_k"\nmin = "Q5_K"\nmax = "Q5_K"',
    )
    few = shortlist(model, settled, found, sensitivity.weights, Target(bpw=2.5))
    assert few.within["blk.1.attn_k.weight"] == ("Q5_K",)
    assert all(few.within.values())


@pytest.mark.parametrize("chosen", [("IQ4_NL", "Q8_0"), pytest.param(USUAL, marks=pytest.mark.every)])
def test_usual_errors_are_those_of_other_weights_up_to_a_factor(model, chosen):
    """The tiny model's weights are random; the distances between types are as usual."""
    name = "blk.0.ffn_up.weight"
    types = [t for t in usual_errors(chosen) if not jquant.FORMATS[t].needs_importance]
    measured_here = relative_errors(model.source, {name: types}, {})[name]
    ratios = [measured_here[t] / usual_errors([t])[t] for t in types]
    assert max(ratios) / min(ratios) < 2, dict(zip(types, ratios, strict=True))


BITS = {"Q4_K": 4, "Q4_0": 4, "Q5_K": 5, "Q2_K": 4, "Q8_0": None}


@pytest.mark.parametrize("type", tables.rows(BITS, {"Q4_0", "Q8_0"}))
def test_weights_of_a_quantized_file_are_known_by_their_steps(model, tmp_path, type):
    out, back = tmp_path / "q.gguf", tmp_path / "f16.gguf"
    printed("quantize", model.path, out, "--type", type, "--pure", "-q")
    printed("quantize", out, back, "--type", "F16", "-q")
    name = "blk.0.ffn_up.weight"
    assert grid_bits(open_model(back).source, [name]).get(name) == BITS[type]
    assert grid_bits(model.source, [name]) == {}


def test_rows_that_no_superblock_divides_have_candidates_with_blocks_of_32(small):
    settled, found = free(small, None)
    made = fit(small, settled, found, sense(small, None, found), Target(bpw=6.0))
    assert made.fallbacks == ()
    assert 5.5 < made.bpw <= 6.0


@pytest.mark.parametrize("type", tables.rows(["IQ4_NL", "Q2_K", "IQ3_S", "Q4_K"], {"IQ4_NL"}))
def test_the_error_of_a_sample_is_that_of_the_tensor(model, imatrix, type):
    name, format = "blk.0.ffn_up.weight", jquant.FORMATS[type]
    spec = model.source.specs[name]
    assert spec.size > 8 * SAMPLE
    x = Weights(model.source).tensor(name)
    w = imatrix.importance(spec)
    found = relative_errors(model.source, {name: [type]}, {name: w})[name][type]
    whole = np.asarray(jquant.dequantize(jquant.quantize(jnp.asarray(x), format, jnp.asarray(w))))
    expected = float((w * (whole - x) ** 2).sum() / (w * x * x).sum())
    assert found == pytest.approx(expected, rel=0.1)


TOKENS = np.random.default_rng(0).integers(3, 390, (8, 32))


@pytest.fixture(scope="module")
def by_gradient(small) -> dict[str, float]:
    return gradient_weights(decoder_of(small), TOKENS, {})


@pytest.fixture(scope="module")
def by_output(small) -> dict[str, float]:
    return output_weights(decoder_of(small), TOKENS, {}, usual_weights(list(small.source.specs), 2))


@pytest.fixture(scope="module")
def by_divergence(small) -> dict[str, float]:
    (found,) = measured_weights(decoder_of(small), TOKENS, {})
    return found


def decoder_of(model: Model) -> models.Decoder:
    return models.decoder(Weights(model.source), model.metadata)


def covers(model: Model, found: Mapping[str, float], prefix: str = "") -> bool:
    """Whether every free matrix has a weight that is a number, and none is negative."""
    names = {spec.name for spec in free(model, None)[0].free if spec.name.startswith(prefix)}
    return found.keys() >= names and all(np.isfinite(value) and value >= 0 for value in found.values())


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.1.attn_v.weight", "output.weight"])
def test_gradient_weights_foretell_the_divergence_of_small_errors(small, by_gradient, name):
    weights, decoder = Weights(small.source), decoder_of(small)
    x, rng, error = weights.tensor(name), np.random.default_rng(1), 1e-3
    local = np.repeat(np.square(x).reshape(len(x), -1, 32).mean(-1), 32, axis=1)
    found = []
    for _ in range(4):
        noise = (rng.standard_normal(x.shape) * np.sqrt(local)).astype(np.float32)
        noise *= np.sqrt(error * np.square(x).sum() / np.square(noise).sum())
        noisy = models.decoder(Noisy(weights, name, x + noise), small.metadata)
        found.append(divergence_of_decoders(decoder, noisy, TOKENS) / error)
    assert by_gradient[name] == pytest.approx(np.mean(found), rel=0.3)


def test_gradient_weights_cover_every_matrix(small, by_gradient):
    assert covers(small, by_gradient)
    assert min(by_gradient[spec.name] for spec in free(small, None)[0].free) > 0


other_architectures = pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Gemma2ForCausalLM"])


@pytest.mark.every
@other_architectures
def test_gradient_weights_cover_every_matrix_of_the_blocks(architecture, tmp_path):
    other = open_model(write_tiny(tmp_path / "model", architecture))
    found = gradient_weights(decoder_of(other), TOKENS[:2, :16], {})
    assert covers(other, found)
    assert min(found[spec.name] for spec in free(other, None)[0].free) > 0


def test_output_weights_foretell_what_an_error_changes_of_the_output_of_its_block(small, by_output):
    weights, decoder = Weights(small.source), decoder_of(small)
    usual = usual_weights(list(small.source.specs), len(decoder.blocks))
    assert covers(small, by_output, "blk.")
    assert sum(by_output.values()) == pytest.approx(sum(usual[name] for name in by_output))

    def changed(name: str) -> float:
        """Of the last block's output, by rounding to Q4_0: a share of its size, for a relative error of 1."""
        x = weights.tensor(name)
        whole = as_q4_0(x)
        noisy = models.decoder(Noisy(weights, name, whole), small.metadata)
        y, new = (last_output(one, TOKENS) for one in (decoder, noisy))
        error = float(((whole - x) ** 2).sum() / (x * x).sum())
        return float((((new - y) ** 2).sum(-1) / (y * y).sum(-1)).mean()) / error

    last = len(decoder.blocks) - 1
    names = [f"blk.{last}.{name}.weight" for name in ("attn_v", "attn_output", "ffn_up", "ffn_down")]
    unit = by_output[names[0]] / changed(names[0])
    for name in names[1:]:
        assert by_output[name] == pytest.approx(unit * changed(name), rel=0.3), name


def as_q4_0(x: np.ndarray) -> np.ndarray:
    """What the type keeps of it, by gguf-py."""
    type = gguf.GGMLQuantizationType.Q4_0
    return gguf.quants.dequantize(gguf.quants.quantize(x, type), type)


def last_output(decoder, tokens) -> np.ndarray:
    x = jnp.asarray(decoder.embed(tokens))
    for i, block in enumerate(decoder.blocks):
        angles = jnp.asarray(decoder.angles(i, tokens.shape[1]))
        x = models.run_block(block, decoder.load_block(i), x, angles)
    return np.asarray(x)


def test_measured_weights_are_the_divergence_with_one_matrix_changed(small, by_divergence):
    weights, decoder = Weights(small.source), decoder_of(small)
    for name in ("blk.0.attn_v.weight", "blk.0.ffn_down.weight", "blk.1.ffn_up.weight"):
        x = weights.tensor(name)
        whole = as_q4_0(x)
        error = float(((whole - x) ** 2).sum() / (x * x).sum())
        found = divergence_of_decoders(
            decoder, models.decoder(Noisy(weights, name, whole), small.metadata), TOKENS
        )
        assert by_divergence[name] == pytest.approx(found / error, rel=0.3), name


def assert_the_same_in_waves(
    model: Model, tokens: np.ndarray, whole: Mapping[str, float], monkeypatch
) -> None:
    decoder = decoder_of(model)
    assert covers(model, whole, "blk.")
    monkeypatch.setattr("jquant.allocation.by_divergence.IN_MEMORY", 1)
    waves = list(measured_weights(decoder, tokens, {}))
    assert [{int(name.split(".")[1]) for name in wave} for wave in waves] == [{0}, {1}]
    assert waves[0] | waves[1] == pytest.approx(whole, rel=1e-4)
    assert list(measured_weights(decoder, tokens, {}, known=waves[0])) == [{}, waves[1]]


def test_measured_weights_are_the_same_in_waves(small, by_divergence, monkeypatch):
    assert_the_same_in_waves(small, TOKENS, by_divergence, monkeypatch)


@pytest.mark.every
@other_architectures
def test_measured_weights_cover_every_matrix_of_the_blocks_in_waves_too(architecture, tmp_path, monkeypatch):
    other, tokens = open_model(write_tiny(tmp_path / "model", architecture)), TOKENS[:2, :16]
    (whole,) = measured_weights(decoder_of(other), tokens, {})
    assert_the_same_in_waves(other, tokens, whole, monkeypatch)


@pytest.mark.every
@other_architectures
def test_output_weights_cover_every_matrix_of_the_blocks(architecture, tmp_path):
    other = open_model(write_tiny(tmp_path / "model", architecture))
    usual = usual_weights(list(other.source.specs), 2)
    assert covers(other, output_weights(decoder_of(other), TOKENS[:2, :16], {}, usual), "blk.")


def test_usual_weights_of_all_layers_do_not_depend_on_their_number():
    def total(layers: int) -> float:
        names = [f"blk.{i}.attn_v.weight" for i in range(layers)]
        return sum(usual_weights(names, layers).values())

    assert total(4) == pytest.approx(total(80))


def test_a_record_is_continued_and_gives_the_same_numbers(small, tmp_path):
    file = tmp_path / "record.jsonl"
    _, found = free(small, None)
    whole = sense(small, None, found, file)
    assert whole == sense(small, None, found)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][: len(lines[4]) // 2])  # a run that was killed
    assert sense(small, None, found, file) == whole
    assert sorted(file.read_text().splitlines()) == sorted("".join(lines).splitlines())


def test_a_record_of_another_run_is_refused(small, tmp_path):
    file, imatrix = tmp_path / "record.jsonl", random_imatrix(small)
    sense(small, None, free(small, None)[1], file)
    with pytest.raises(UserError, match="another imatrix"):
        sense(small, imatrix, free(small, imatrix)[1], file)


def test_a_record_that_is_none_is_refused_with_its_line(tmp_path):
    file = tmp_path / "record.jsonl"
    Record(file, {"model": 1})
    with file.open("a") as opened:
        opened.write("nonsense\n")
    with pytest.raises(UserError, match="line 2"):
        Record(file, {"model": 1})


def test_the_header_says_how_the_file_was_made_and_like_repeats_it(small_folder, tmp_path):
    folder = small_folder
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    text = printed("quantize", folder, first, "--target-bpw", 5.5, "--profile", "balanced", "--json", "-q")
    about = json.loads(gguf.GGUFReader(str(first)).fields["jquant.recipe"].contents())
    assert about["profile"] == "balanced"
    assert about["target"] == "5.5 bpw"
    types = tensor_types(first)
    report = json.loads(text)
    assert {t["name"]: t["type"] for t in report["tensors"]} == types
    assert sum(t["share"] for t in report["tensors"]) == pytest.approx(1, abs=1e-3)
    assert all(t["damage"] is not None for t in report["tensors"] if "ffn_up" in t["name"])
    printed("quantize", folder, second, "--like", first, "-q")
    assert tensor_types(second) == types


@pytest.mark.parametrize("weights", ["outputs", "gradients", "measured"])
def test_weights_of_the_model_and_search_make_a_file_of_the_size(small_folder, tmp_path, weights):
    out, calibration = tmp_path / "out.gguf", tmp_path / "text.txt"
    calibration.write_text("There was once a little girl who lived in a small house. " * 400)
    options = ("--target-bpw", 6.0, "--weights", weights, "--calibration", calibration)
    options += ("--samples", 8, "--sequence-length", 32)
    text = printed("quantize", small_folder, out, *options, "--search-seconds", 1e-3, "--json", "-q")
    report = json.loads(text)
    assert report["bpw"] <= 6.0
    assert report["search"]["measured"] == 1
    assert 0 < report["search"]["best_kld"] == report["search"]["first_kld"]


@pytest.mark.parametrize(
    ("options", "code", "what"),
    [
        (("--target-size", "10kB"), _errors.INPUT, "nearest possible target is --target-size"),
        (("--target-bpw", "1"), _errors.INPUT, "nearest possible target is --target-bpw"),
        (("--target-size", "1GB", "--target-bpw", "3"), _errors.USAGE, "give one of"),
        (("--target-size", "many"), _errors.USAGE, "expected a size"),
        (("--target-bpw", "-1"), _errors.USAGE, "above 0"),
        (("--target-bpw", "5", "--type", "Q4_0"), _errors.USAGE, "a target chooses"),
        (("--target-bpw", "5", "--runtime", "llama.cpp-cdua"), _errors.INPUT, "did you mean llama.cpp-cuda"),
        (("--like", "missing.gguf"), _errors.INPUT, "missing.gguf"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(small_folder, tmp_path, options, code, what):
    out = tmp_path / "out.gguf"
    result = CliRunner().invoke(app, ["quantize", str(small_folder), str(out), *options, "-q"])
    assert result.exit_code == code, result.output
    assert what in " ".join(result.stderr.replace("│", " ").split())
    assert not out.exists()


def test_a_file_of_another_model_is_no_example(small_folder, tmp_path):
    other, out = tmp_path / "other.gguf", tmp_path / "out.gguf"
    printed("quantize", write_tiny(tmp_path / "m", "MixtralForCausalLM"), other, "--type", "F16", "-q")
    result = CliRunner().invoke(app, ["quantize", str(small_folder), str(out), "--like", str(other), "-q"])
    assert result.exit_code == _errors.INPUT
    assert "same architecture" in result.stderr
