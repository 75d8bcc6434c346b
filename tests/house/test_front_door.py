"""`import jquant`: the whole job in a page of Python, what it takes, and what it answers to mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import LINES, write_tiny
from typer.testing import CliRunner

import jquant
from jquant_cli.main import app


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(LINES * 4))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", "LlamaForCausalLM")


def the_page(
    folder: Path, text: Path, out: Path, length: int, alpha: float | None = None
) -> jquant.evaluation.Evaluation:
    """From a model to smaller files and how far they have moved, in public names only."""
    model = jquant.open_model(folder)
    samples = jquant.load_samples(model, text, samples=8, sequence_length=length)
    imatrix = jquant.importance(model, samples)
    imatrix.write(out / "imatrix.gguf")
    jquant.to_gguf(model, out / "original.gguf", type="F32")
    jquant.to_gguf(model, out / "small.gguf", type="IQ4_NL", imatrix=imatrix, feedback=samples)
    jquant.to_gguf(model, out / "target.gguf", target=jquant.Target(bpw=6), imatrix=imatrix)
    jquant.to_folder(model, out / "w8a8", scheme="W8A8", samples=samples, alpha=alpha)
    files = [out / name for name in ("original.gguf", "small.gguf", "target.gguf", "w8a8")]
    return jquant.evaluate(files, text=text, context=length, chunks=4, engine="jax", cache=False)


def check_page(found: jquant.evaluation.Evaluation) -> None:
    original, small, target, folder = found.records()
    assert "kld_mean" not in original
    # IQ4_NL is 4.5 bits, and more where the output matrix, of a larger type, is much of the model.
    assert 4.5 <= small["bpw"] < folder["bpw"] < original["bpw"]
    assert target["bpw"] <= 6.01 < folder["bpw"]
    assert 0 < folder["kld_mean"] < small["kld_mean"] < 1
    assert str(found).splitlines()[0].split()[:3] == ["file", "size", "bpw"]


def test_the_job_is_a_page_of_python(folder, text, tmp_path):
    """With one alpha for all inputs: their search is the real model's."""
    check_page(the_page(folder, text, tmp_path, 32, alpha=0.5))


@pytest.mark.slow
def test_the_job_is_a_page_of_python_on_a_real_model(shared, tmp_path):
    model, text = shared("data/models/stories15M"), shared("data/text/tinystories-130kB.txt")
    check_page(the_page(model, text, tmp_path, 256))


def test_arrays_are_quantized_inside_jit(folder, text):
    """A layer of a model: its inputs' Hessian, error feedback, smoothing and 8-bit integers, one program."""
    model = jquant.open_model(folder)
    samples = jquant.load_samples(model, text, samples=4, sequence_length=32)
    stats = jquant.calibration.collect(model.decoder(), samples.tokens, jquant.calibration.HESSIAN)
    H = stats["blk.0.ffn_up.weight"]["xtx"]
    W = jnp.asarray(model.decoder().load_block(0)["ffn_up"]["weight"])
    x = jax.random.normal(jax.random.key(0), (16, W.shape[1]))

    @jax.jit
    def errors(W, H, x):
        fed, plain = jquant.ldlq.quantize(W, H, "Q4_0"), jquant.quantize(W, "Q4_0")
        off = [jquant.dequantize(q) - W for q in (fed, plain)]
        lost = [jnp.einsum("ri,ij,rj->", r, H, r) for r in off]
        s = jquant.smoothquant.scales(x, W, 0.5)
        w8 = jquant.quantize(W * s[None], "INT8")
        y = jquant.int8.matmul(x / s[None], w8)
        return lost, y, jquant.evaluation.kl_divergence(x @ W.T, y)

    (fed, plain), y, divergence = errors(W, jnp.asarray(H), x)
    assert fed < 0.9 * plain
    np.testing.assert_allclose(y, x @ W.T, atol=0.02 * float(jnp.max(jnp.abs(x @ W.T))))
    assert divergence.shape == (16,)
    assert (divergence < 1e-3).all()


def test_error_feedback_of_a_matrix_is_that_of_a_file():
    """Two tiles of rows, the second not full: as many as the loop over a model's matrices takes at once."""
    from jquant.ldlq.ldlq import factor, feedback

    W, x = (jax.random.normal(jax.random.key(i), (n, 64)) for i, n in enumerate((300, 128)))
    format = jquant.FORMATS["Q4_0"]
    expected = feedback(W, factor(x.T @ x, format.group_size), format)
    found = jquant.ldlq.quantize(W, x.T @ x, "Q4_0")
    assert found.format is format
    np.testing.assert_array_equal(found.parts["blocks"], expected.parts["blocks"])


@pytest.mark.parametrize("name", ["UINT4", "INT8"])
def test_error_feedback_of_a_scaled_format_gives_its_codes_and_scales(name):
    from jquant.ldlq.ldlq import factor, feedback
    from jquant.ldlq.scaled import by_groups

    W, x = (jax.random.normal(jax.random.key(i), (n, 256)) for i, n in enumerate((6, 300)))
    format, H = jquant.SCALED_FORMATS[name], x.T @ x
    found = jax.jit(lambda W, H: jquant.ldlq.quantize(W, H, name))(W, H)
    shapes = {part: (a.shape, a.dtype) for part, a in jquant.quantize(W, name).parts.items()}
    assert {part: (a.shape, a.dtype) for part, a in found.parts.items()} == shapes
    expected = feedback(W, factor(H, 1), by_groups(format, 256))
    np.testing.assert_allclose(jquant.dequantize(found), jquant.dequantize(expected), rtol=1e-6)


def test_smoothing_scales_are_equation_4_but_for_a_common_factor():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 20, 8)), rng.standard_normal((5, 8))
    x[..., 3] *= 40
    expected = np.abs(x).max((0, 1)) ** 0.7 / np.abs(w).max(0) ** 0.3
    found = np.asarray(jquant.smoothquant.scales(jnp.asarray(x), jnp.asarray(w), 0.7))
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-5)
    maxima = jnp.asarray(np.abs(x).max((0, 1)))
    np.testing.assert_allclose(jquant.smoothquant.scales(maxima, jnp.asarray(w), 0.7), found, rtol=1e-6)


def test_every_public_name_is_there():
    assert set(jquant.__all__) < set(dir(jquant))
    for name in jquant.__all__:
        assert getattr(jquant, name) is not None
    assert not hasattr(jquant, "gguf_writer")


@pytest.mark.parametrize(
    ("table", "name", "answer"),
    [
        (
            "FORMATS",
            "Q4_K_M",
            r"is a file type, .* to_gguf\(…, type='Q4_K_M'\); formats of .* Q4_K,",
        ),
        ("FORMATS", "IQ2_M", "is a file type"),
        ("FORMATS", "q4k", "'q4k' is no format; 'Q4_K' is meant"),
        ("FORMATS", "W8A8", r"is a scheme .* to_folder\(…, scheme='W8A8'\)"),
        ("FORMATS", "INT8", r"jquant\.SCALED_FORMATS\['INT8'\] is meant"),
        ("FORMATS", "nonsense", "is no format; formats of a tensor: .*Q4_0,"),
        ("SCALED_FORMATS", "W4A16", r"is a scheme .*; formats of a tensor: .*INT4"),
        ("SCALED_FORMATS", "Q4_K", r"jquant\.FORMATS\['Q4_K'\] is meant"),
    ],
)
def test_a_table_of_formats_answers_with_what_is_meant(table, name, answer):
    formats = getattr(jquant, table)
    with pytest.raises(KeyError, match=answer.replace(" to_", r" jquant\.to_")):
        formats[name]
    assert name not in formats
    assert formats.get(name) is None
    with pytest.raises(TypeError):
        formats["mine"] = None


def test_a_format_is_named_by_a_string():
    w = jax.random.normal(jax.random.key(0), (4, 64))
    for name, format in (("Q8_0", jquant.FORMATS["Q8_0"]), ("INT8", jquant.SCALED_FORMATS["INT8"])):
        by_name, by_object = jquant.quantize(w, name), jquant.quantize(w, format)
        assert by_name.format is format
        for part, stored in by_object.parts.items():
            np.testing.assert_array_equal(by_name.parts[part], stored)


W, ONES = jnp.ones((4, 64)), jnp.ones(64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jquant.quantize(W, "Q4_K_M"), "format='Q4_K_M' is a file type"),
        (lambda: jquant.quantize(W, "Q4_K"), r"x: Q4_K needs rows of a multiple of 256 .* shape \(4, 64\)"),
        (lambda: jquant.quantize(W, "F8_E4M3"), "format: F8_E4M3 can be decoded but not encoded"),
        (lambda: jquant.quantize(jnp.ones((4, 256)), "IQ1_S"), "IQ1_S needs importance: pass"),
        (lambda: jquant.quantize(W, "Q4_0", ONES[:5]), r"importance of shape \(5,\) does not fit \(4, 64\)"),
        (lambda: jquant.ldlq.quantize(W, jnp.eye(64), "q40"), "format='q40' is no format; 'Q4_0' is meant"),
        (lambda: jquant.ldlq.quantize(W, jnp.eye(64), "Q4_K"), "W: Q4_K needs rows of a multiple of 256"),
        (lambda: jquant.smoothquant.scales(W, W, 1.5), "alpha=1.5: needs to be from 0 to 1"),
        (lambda: jquant.evaluate([]), "files: none are given"),
        (lambda: jquant.evaluate("a.gguf", no_text=True), "no_text=True: leaves nothing"),
        (lambda: jquant.evaluate("a.gguf", context=2), "context=2: needs to be 4 or more"),
        (lambda: jquant.evaluate("absent.gguf", text=__file__), "absent.gguf"),
    ],
)
def test_a_mistake_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.processes
def test_mistakes_in_shapes_name_the_argument():
    """In a process of its own: here jaxtyping would answer, before the function does."""
    code = """
import jax, jax.numpy as jnp, jquant
W = jnp.ones((4, 64))
calls = [
    lambda: jquant.quantize(jnp.ones(()), "Q4_0"),
    lambda: jquant.quantize(jnp.ones((4, 32), int), "Q4_0"),
    lambda: jquant.quantize(W, "Q4_0", effort="most"),
    lambda: jax.jit(lambda w: jquant.quantize(w, "Q4_K"))(W),
    lambda: jquant.ldlq.quantize(W, jnp.ones((4, 4)), "Q4_0"),
    lambda: jquant.ldlq.quantize(W[None], jnp.ones((64, 64)), "Q4_0"),
    lambda: jquant.smoothquant.scales(W, jnp.ones((2, 8))),
    lambda: jquant.dequantize(W),
]
for call in calls:
    try:
        print(call())
    except ValueError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    starts = [
        "x: Q4_0 needs rows of a multiple of 32 weights; got shape ()",
        "x: weights are real numbers; got int32",
        "effort='most': not known; choose from fast, best",
        "x: Q4_K needs rows of a multiple of 256 weights; got shape (4, 64)",
        "H: expected [cols, cols] of W, (64, 64); got shape (4, 4)",
        "W: expected a matrix, [rows, cols]; got shape (1, 4, 64)",
        "x of shape (4, 64) and w of shape (2, 8)",
        "q: expected what quantize returned; got ArrayImpl",
    ]
    for line, start in zip(found.stdout.splitlines(), starts, strict=True):
        assert line.startswith(start), line


def test_a_model_is_named_by_string_path_or_hub_id(folder, monkeypatch):
    by_path, by_string = jquant.open_model(folder), jquant.open_model(str(folder))
    assert by_path.source.specs == by_string.source.specs
    asked = {}

    def resolve(name: str, *, revision: str | None) -> Path:
        asked.update(name=name, revision=revision)
        return folder

    monkeypatch.setattr("jquant.io.hub.resolve", resolve)
    downloaded = jquant.open_model("hf:org/tiny:Q8_0", revision="v2")
    assert asked == {"name": "hf:org/tiny:Q8_0", "revision": "v2"}
    assert downloaded.metadata["general.name"] == "tiny"


def test_samples_are_of_a_path_a_string_or_several(folder, text):
    model = jquant.open_model(folder)
    found = [
        jquant.load_samples(of, calibration, samples=4, sequence_length=16).tokens
        for of, calibration in ((model, text), (model, str(text)), (folder, [text]))
    ]
    for tokens in found:
        np.testing.assert_array_equal(tokens, found[0])
    both = jquant.load_samples(model, [text, "pydoc"], samples=4, sequence_length=16)
    assert both.dataset == "text.txt + pydoc"
    with pytest.raises(ValueError, match="samples=0: needs to be 1 or more"):
        jquant.load_samples(model, text, samples=0)


def test_an_importance_matrix_writes_the_form_that_its_name_says(folder, text, tmp_path):
    samples = jquant.load_samples(folder, text, samples=4, sequence_length=16)
    imatrix = jquant.importance(folder, samples)
    for name in ("imatrix.gguf", "imatrix.dat"):
        imatrix.write(str(tmp_path / name))
        stored = jquant.Imatrix.read(tmp_path / name)
        assert stored.entries.keys() == imatrix.entries.keys()
        with pytest.raises(jquant.OutputError, match="exists"):
            imatrix.write(tmp_path / name)
        imatrix.write(tmp_path / name, force=True)
    assert (
        (tmp_path / "imatrix.gguf").read_bytes()[:4] == b"GGUF" != (tmp_path / "imatrix.dat").read_bytes()[:4]
    )


def test_evaluate_is_what_the_command_prints(folder, text):
    found = jquant.evaluate(
        [jquant.open_model(folder), folder], text=text, context=32, chunks=2, engine="jax", cache=False
    )
    options = ["--text", text, "--context", 32, "--chunks", 2, "--engine", "jax", "--no-cache", "-q"]
    command = CliRunner().invoke(app, [*map(str, ("evaluate", folder, folder, *options))])
    assert command.stdout == f"{found}\n"
    assert [row.name for row in found.rows] == [str(folder), str(folder)]
    assert found.records()[1]["kld_mean"] < 1e-6
    assert found.cache is None


def test_one_file_alone_is_scored(folder, text):
    found = jquant.evaluate(folder, text=text, context=32, chunks=2, engine="jax", cache=False)
    assert [row.name for row in found.rows] == ["llama"]
