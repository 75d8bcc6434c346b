"""`jquant analyze --method`: what each method writes, judged by its calibrator and by other readers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import run
from helpers.tables import rows
from helpers.tiny_models import LINES, write_tiny
from safetensors import safe_open
from safetensors.numpy import save_file

from jquant.calibration import HESSIAN, SECOND_MOMENTS, collect, load_samples, merge
from jquant.calibration import _measure as methods
from jquant.calibration.gradients import FISHER, collect_gradients, sampled_labels
from jquant.calibration.ranges import RANGES, quantile
from jquant.checkpoints.model import open_model
from jquant.checkpoints.weights import Weights
from jquant.core import UserError
from jquant.io import imatrix
from jquant.io.statistics import open_statistics
from jquant.models import decoder as decoder_of

SMALL = ("--samples", 3, "--sequence-length", 20, "--batch", 2, "-q")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(LINES * 4))
    return path


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("moe") / "qwen2-moe", "Qwen2MoeForCausalLM")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("llama") / "llama", "LlamaForCausalLM", num_hidden_layers=3)


def calibration(folder: Path, text: Path):
    model = open_model(folder)
    samples = load_samples(model, str(text), samples=3, sequence_length=20)
    return decoder_of(Weights(model.source), model.metadata), samples


def test_hessians_are_stored_once_for_each_input_and_read_by_any_name(moe, text, tmp_path):
    out = tmp_path / "hessian.safetensors"
    run("analyze", moe, "-c", text, "-o", out, "--method", "hessian", *SMALL)
    decoder, samples = calibration(moe, text)
    wanted = collect(decoder, samples.tokens, HESSIAN, lengths=samples.lengths, batch=2)
    found = open_statistics(out)
    assert set(found.keys) == set(wanted)
    for name, stats in wanted.items():
        read = found.read(name)
        assert read.keys() == stats.keys()
        for key, value in stats.items():
            np.testing.assert_array_equal(read[key], value, err_msg=name)
    with safe_open(out, "np") as file:
        stored = {name.removeprefix("blk.0.") for name in file.keys() if name.startswith("blk.0.attn")}  # noqa: SIM118
        about = file.metadata()
    assert stored == {f"{m}.weight.{key}" for m in ("attn_k", "attn_output") for key in ("xtx", "count")}
    assert about | {"shared": ""} == {
        "jquant.statistics": "1",
        "method": "hessian",
        "model": "qwen2-moe",
        "dataset": "calibration.txt",
        "sha256": samples.digest,
        "samples": "3",
        "sequence_length": "20",
        "jquant": "0.1.0",
        "shared": "",
    }
    shared = json.loads(about["shared"])
    assert shared["blk.1.attn_q.weight"] == shared["blk.1.attn_v.weight"] == "blk.1.attn_k.weight"
    assert shared["blk.0.ffn_up_exps.weight"] == "blk.0.ffn_gate_exps.weight"


def test_ranges_are_those_of_the_inputs(moe, text, tmp_path):
    out = tmp_path / "ranges.safetensors"
    shown = run("analyze", moe, "-c", text, "-o", out, "-m", "ranges", *SMALL, "--json")
    assert json.loads(shown.stdout)["method"] == "ranges"
    decoder, samples = calibration(moe, text)
    squares = collect(decoder, samples.tokens, SECOND_MOMENTS, batch=2)
    for name, stats in squares.items():
        read = open_statistics(out).read(name)
        np.testing.assert_allclose(read["sum2"], stats["sum2"], rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(read["count"], stats["count"])
        seen = np.broadcast_to(np.asarray(stats["count"])[..., None], read["absmax"].shape)
        np.testing.assert_array_equal(read["histogram"].sum(-1), seen)
        assert (read["absmax"] ** 2 <= read["sum2"] * 1.0001).all()


@pytest.mark.parametrize("q", [0.1, 0.5, 0.99, 1.0])
def test_quantiles_bound_those_of_the_values(q):
    x = np.random.default_rng(0).standard_t(3, (3000, 5)).astype(np.float32) * np.float32(
        [1, 9, 1e-3, 50, 0.1]
    )
    ones = jnp.ones(1500, jnp.float32)
    update = jax.jit(RANGES.update)
    halves = [update(RANGES.init(5), jnp.asarray(part), ones) for part in (x[:1500], x[1500:])]
    found = quantile(RANGES.merge(*halves), q)
    wanted = np.quantile(np.abs(x), q, axis=0, method="inverted_cdf")
    assert (found >= wanted * 0.99999).all()
    assert (found < wanted * 2**0.25 * 1.00001).all()
    if q == 1:
        np.testing.assert_array_equal(found, np.abs(x).max(0))


def test_ranges_of_halves_merge_to_those_of_the_whole(moe, text):
    decoder, samples = calibration(moe, text)
    whole = collect(decoder, samples.tokens, RANGES)
    merged = merge(RANGES, *(collect(decoder, samples.tokens[p], RANGES) for p in (slice(1), slice(1, 3))))
    for name, stats in whole.items():
        np.testing.assert_allclose(merged[name]["absmax"], stats["absmax"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(merged[name]["sum"], stats["sum"], rtol=1e-4, atol=1e-4)
        # A magnitude may fall to the other side of an edge where a batch of another size rounds otherwise.
        ours, wanted = (np.asarray(found["histogram"]) for found in (merged[name], stats))
        assert np.abs(ours - wanted).sum() <= wanted.sum() / 1000


def test_fisher_writes_an_importance_matrix_that_says_so_and_quantize_takes_it(text, tmp_path):
    model = write_tiny(tmp_path / "model", "LlamaForCausalLM")
    out = tmp_path / "fisher.gguf"
    run("analyze", model, "-c", text, "-o", out, "--method", "fisher", *SMALL)
    field = gguf.GGUFReader(str(out)).fields["jquant.method"]
    assert field.contents() == "fisher"
    decoder, samples = calibration(model, text)
    found = imatrix.read(out)
    wanted = collect_gradients(decoder, samples.tokens, FISHER, sampled_labels(0), batch=2)
    assert found.method == "fisher"
    for name, stats in wanted.items():
        mean = np.asarray(stats["fisher"]).mean(0) / 60
        np.testing.assert_allclose(found.entries[name][0], mean, rtol=1e-4, err_msg=name)
        assert found.counts[name] == 60
    run("quantize", model, tmp_path / "with.gguf", "-t", "Q4_0", "--imatrix", out, "-q")
    run("quantize", model, tmp_path / "without.gguf", "-t", "Q4_0", "-q")
    assert (tmp_path / "with.gguf").read_bytes() != (tmp_path / "without.gguf").read_bytes()


def test_matrices_of_two_methods_do_not_merge(llama, text, tmp_path):
    run("analyze", llama, "-c", text, "-o", tmp_path / "im.gguf", *SMALL)
    arguments = ("analyze", llama, "-c", text, "-m", "fisher", "--merge", tmp_path / "im.gguf", *SMALL)
    assert "im.gguf: was made by method imatrix, not fisher" in run(*arguments, code=3).stderr
    fisher = imatrix.Imatrix({}, {}, [], 1, 4, "fisher")
    with pytest.raises(UserError, match="different methods do not merge: fisher and imatrix"):
        imatrix.merge([imatrix.read(tmp_path / "im.gguf"), fisher])
    with pytest.raises(UserError, match=r"a \.dat file cannot say that method fisher made it"):
        imatrix.write_dat(tmp_path / "x.dat", fisher)


def test_outputs_that_a_method_cannot_write_are_refused_at_once(llama, tmp_path):
    for method, output in (("hessian", "x.gguf"), ("ranges", "x.dat"), ("fisher", "x.dat")):
        refused = run("analyze", llama, "-m", method, "-o", tmp_path / output, code=2)
        assert method in refused.stderr
    assert "safetensors" in run("analyze", llama, "-m", "hessian", code=2).stderr
    assert not list(tmp_path.iterdir())


def test_files_of_another_kind_are_refused(llama, tmp_path):
    with pytest.raises(UserError, match="is a safetensors file of something else"):
        open_statistics(llama / "model.safetensors")
    with pytest.raises(UserError, match="cannot be opened"):
        open_statistics(tmp_path / "absent.safetensors")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UserError, match="is a GGUF file"):
        open_statistics(tmp_path / "a.gguf")
    tensors = {"blk.0.x.weight.xtx": np.ones((2, 2), np.float32)}
    for metadata, message in (
        ({"jquant.statistics": "2"}, "has form 2 of statistics, known is 1"),
        ({"jquant.statistics": "1"}, "lack the method or what is shared"),
        ({"jquant.statistics": "1", "method": "hessian", "shared": '{"a": "b"}'}, "a should share b"),
    ):
        save_file(tensors, tmp_path / "b.safetensors", metadata)
        with pytest.raises(UserError, match=message):
            open_statistics(tmp_path / "b.safetensors")


def test_an_existing_output_stays_without_force_and_a_failed_run_leaves_nothing(
    llama, text, tmp_path, monkeypatch
):
    out = tmp_path / "h.safetensors"
    out.write_bytes(b"mine")
    run("analyze", llama, "-c", text, "-o", out, "-m", "hessian", *SMALL, code=4)
    assert out.read_bytes() == b"mine"

    def failing(*arguments, **options):
        yield from ()
        raise UserError("enough.")

    monkeypatch.setattr(methods, "stream", failing)
    run("analyze", llama, "-c", text, "-o", out, "-m", "hessian", "--force", *SMALL, code=3)
    assert [path.name for path in tmp_path.iterdir()] == ["h.safetensors"]
    assert out.read_bytes() == b"mine"


METHODS = {"hessian": "safetensors", "ranges": "safetensors", "fisher": "gguf"}


@pytest.mark.parametrize("method", rows(METHODS, {"hessian", "fisher"}))
def test_a_run_that_stops_anywhere_continues_to_the_same_bytes(method, llama, text, tmp_path, monkeypatch):
    """Killed at each step that is left, again and again, until it is done."""
    steps = [("jquant.calibration._collect", "_step")]
    if method == "fisher":
        steps = [("jquant.calibration.gradients", "_step"), ("jquant.calibration._walk", "run_block")]
    whole, out, folder = (tmp_path / f"{name}.{METHODS[method]}" for name in ("whole", "out", "checkpoint"))
    monkeypatch.setattr("jquant_cli._runtime.mesh", lambda asked: None)  # one device, whose steps are counted
    run("analyze", llama, "-c", text, "-o", whole, "-m", method, *SMALL)
    arguments = ("analyze", llama, "-c", text, "-o", out, "-m", method, *SMALL, "--checkpoint-dir", folder)
    left = 0

    def stopping(function):
        def step(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return function(*arguments)

        return step

    for module, name in steps:
        monkeypatch.setattr(f"{module}.{name}", stopping(getattr(sys.modules[module], name)))
    resume: tuple[str, ...] = ()
    kills = 0
    while not out.exists():
        left = 3  # a block has two batches: each run ends within a block
        try:
            run(*arguments, *resume)
        except AssertionError:
            kills += 1
        assert kills < 20
        resume = ("--resume",)
    assert kills >= 2
    assert out.read_bytes() == whole.read_bytes()
    assert not list(folder.glob("activations*"))
    assert not list(folder.glob("cotangents*"))


def test_the_checkpoint_of_another_method_is_refused(llama, text, tmp_path):
    folder = tmp_path / "checkpoint"
    run("analyze", llama, "-c", text, "--checkpoint-dir", folder, *SMALL)
    for method, output in (("fisher", "a.gguf"), ("ranges", "a.safetensors")):
        arguments = ("analyze", llama, "-c", text, "-m", method, "-o", tmp_path / output)
        refused = run(*arguments, "--checkpoint-dir", folder, "--resume", *SMALL, code=3)
        assert f"method: imatrix there, {method} here" in refused.stderr
        assert not (tmp_path / output).exists()


@pytest.mark.processes
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_process_continues_to_the_same_bytes(method, text, tmp_path):
    model = write_tiny(tmp_path / "model", "LlamaForCausalLM", num_hidden_layers=12, hidden_size=256)
    whole, out, folder = (tmp_path / f"{name}.{METHODS[method]}" for name in ("whole", "out", "checkpoint"))
    jquant = str(Path(sys.executable).with_name("jquant"))
    command = [jquant, "analyze", str(model), "-c", str(text), "-m", method, "--samples", "8", "-q"]
    command += ["--sequence-length", "100"]
    subprocess.run([*command, "-o", str(whole)], check=True, stdout=subprocess.DEVNULL)
    command += ["-o", str(out), "--checkpoint-dir", str(folder)]
    for done in (2, 7):
        resume = ["--resume"] if (folder / "run.json").exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(folder.glob("block-*.npz"))) < done:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not out.exists()
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
    assert out.read_bytes() == whole.read_bytes()
