"""Calibration over a mesh: the statistics of one device, but for the order of float32 sums."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from helpers.calibrators import CALIBRATORS, LENGTHS, TOKENS
from helpers.commands import JQUANT
from helpers.decoders import opened
from helpers.processes import JOIN, Ended, free_address, run, start, wait
from helpers.tables import rows
from helpers.text import cats
from helpers.tiny_models import write_tiny
from safetensors.numpy import load_file
from typer.testing import CliRunner

from jquant.calibration import collect
from jquant.calibration import sharded as parallel
from jquant.core import UserError
from jquant.distributed import team
from jquant.distributed.mesh import make_mesh
from jquant.io import imatrix
from jquant_cli.main import app

QUICK = {"LlamaForCausalLM"}
TOLERANCE = 1e-5  # of the largest of a statistic: terms of some sums cancel


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, stats in expected.items():
        for key, value in stats.items():
            ours, theirs = np.asarray(found[name][key]), np.asarray(value)
            if key == "count":
                np.testing.assert_array_equal(ours, theirs)
            else:
                atol = TOLERANCE * np.abs(theirs).max()
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=f"{name} {key}")


@pytest.mark.parametrize("model", [pytest.param(1, marks=pytest.mark.every), 2])
@pytest.mark.parametrize("kind", rows(CALIBRATORS, {"hessian"}))
@pytest.mark.parametrize("architecture", rows(("LlamaForCausalLM", "Qwen2MoeForCausalLM"), QUICK))
def test_two_devices_measure_what_one_does(architecture, kind, model, tmp_path):
    decoder = opened(write_tiny(tmp_path, architecture))
    through = parallel.over(make_mesh({"model": model}))
    calibrator = CALIBRATORS[kind]
    alone = collect(decoder, TOKENS, calibrator, lengths=LENGTHS, batch=2)
    both = collect(decoder, TOKENS, calibrator, lengths=LENGTHS, batch=1, through=through)
    assert_same(both, alone)


@pytest.mark.parametrize("architecture", rows(("LlamaForCausalLM", "Qwen2MoeForCausalLM"), QUICK))
def test_devices_along_model_have_rows_of_a_hessian_each(architecture, tmp_path, monkeypatch):
    decoder = opened(write_tiny(tmp_path, architecture))
    seen = {}

    def watch(mesh, a, usual=parallel._global):
        made = usual(mesh, a)
        seen.setdefault(made.shape, set()).update(shard.data.shape for shard in made.addressable_shards)
        return made

    monkeypatch.setattr(parallel, "_global", watch)
    through = parallel.over(make_mesh({"model": 2}))
    collect(decoder, TOKENS, CALIBRATORS["hessian"], lengths=LENGTHS, through=through)
    squares = {shape: parts for shape, parts in seen.items() if len(shape) > 2}
    assert squares
    for shape, parts in squares.items():
        assert parts == {(*shape[:-2], shape[-2] // 2, shape[-1])}
    assert seen[(1,)] == {(1,)}  # how many tokens


def test_an_odd_width_is_not_split(tmp_path):
    spec = jax.sharding.PartitionSpec
    shapes = (("attn_q.weight", (8, 7)), ("ffn_down_exps.weight", (3, 8, 6)))
    block = opened(write_tiny(tmp_path, "LlamaForCausalLM")).blocks[0].clone(shapes=shapes)
    names = frozenset({"attn_q", "ffn_down_exps"})
    layout = parallel._layout(block, CALIBRATORS["hessian"], names, make_mesh({"model": 2}))
    assert layout["attn_q"] == {"xtx": spec("data"), "count": spec("data")}
    assert layout["ffn_down_exps"]["xtx"] == spec("data", None, "model")


@pytest.mark.parametrize("device", [0, 1])
def test_an_input_that_is_not_finite_is_told_with_its_sample(device, tmp_path):
    decoder = opened(write_tiny(tmp_path, "LlamaForCausalLM"))
    through = parallel.over(make_mesh(), first=100)

    class Broken:
        blocks = decoder.blocks
        load_block, angles, logits = decoder.load_block, decoder.angles, decoder.logits

        def embed(self, tokens):
            x = decoder.embed(tokens)
            if len(x) > 2 + device:
                x[2 + device, 3, 5] = np.inf
            return x

    with pytest.raises(UserError, match=rf"its input is not finite in sample {102 + device} "):
        collect(Broken(), TOKENS, CALIBRATORS["second moments"], batch=1, through=through)


def test_the_table_splits_what_a_model_axis_divides():
    spec = jax.sharding.PartitionSpec
    assert parallel.partition("attn_q.weight", (64, 32), 4) == spec("model")
    assert parallel.partition("attn_q.bias", (64,), 4) == spec("model")
    assert parallel.partition("attn_k.weight", (6, 32), 4) == spec()
    assert parallel.partition("ffn_down.weight", (32, 96), 4) == spec(None, "model")
    assert parallel.partition("ffn_down_exps.weight", (8, 32, 96), 4) == spec(None, None, "model")
    assert parallel.partition("attn_norm.weight", (64,), 4) == spec()


@pytest.mark.parametrize(("samples", "processes"), [(5, 2), (7, 7), (12, 5)])
def test_samples_are_shared_whole_and_evenly(samples, processes):
    parts = [range(samples)[team.shares(samples, i, processes)] for i in range(processes)]
    assert [i for part in parts for i in part] == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_without_a_sample_is_refused():
    with pytest.raises(UserError, match="2 samples for 3 processes"):
        team.shares(2, 0, 3)


MEASURE = (
    JOIN
    + """
import numpy as np
from pathlib import Path
from helpers.calibrators import CALIBRATORS, LENGTHS, TOKENS
from jquant import models
from jquant.calibration import sharded as parallel
from jquant.distributed import team
from jquant.calibration import collect
from jquant.checkpoints.model import open_model
from jquant.checkpoints.weights import Weights
sizes, folder, out = sys.argv[4:]
with mesh.together():
    model = open_model(Path(folder))
    decoder = models.decoder(Weights(model.source), model.metadata)
    mine = team.shares(len(TOKENS), process, processes)
    through = parallel.over(mesh.make_mesh(mesh.parse_mesh(sizes)), mine.start)
    found = collect(
        decoder, TOKENS[mine], CALIBRATORS["hessian"], lengths=LENGTHS[mine], batch=1, through=through
    )
    flat = {f"{name} {key}": np.asarray(v) for name, s in found.items() for key, v in s.items()}
    np.savez(f"{out}/{process}.npz", **flat)
"""
)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "devices", "sizes"),
    [
        (2, 2, "model=2"),
        (1, 8, "data=8"),
        (1, 8, "data=2,model=4"),
        (3, 1, "data=3"),
        (4, 2, "data=4,model=2"),
    ],
)
def test_processes_and_devices_measure_what_one_does(processes, devices, sizes, tmp_path):
    decoder = opened(write_tiny(tmp_path / "model", "LlamaForCausalLM"))
    expected = collect(decoder, TOKENS, CALIBRATORS["hessian"], lengths=LENGTHS)
    ended = run(MEASURE, processes, sizes, str(tmp_path / "model"), str(tmp_path), devices=devices)
    assert [e.code for e in ended] == [0] * processes, ended
    for i in range(processes):
        flat = np.load(tmp_path / f"{i}.npz")
        found = {}
        for label in flat:
            name, key = label.split()
            found.setdefault(name, {})[key] = flat[label]
        assert_same(found, expected)


def analyze(
    processes: int, *arguments: object, others: tuple[object, ...] = (), devices: int = 1
) -> list[Ended]:
    """The command in so many processes, all but the first with more arguments."""
    joined = ["--coordinator", free_address(), "--processes", str(processes)] if processes > 1 else []
    common = [JQUANT, "analyze", *map(str, arguments), *joined]
    commands = [[*common, *(["--process", str(i)] if joined else [])] for i in range(processes)]
    return wait(start([c + list(map(str, others if i else ())) for i, c in enumerate(commands)], devices))


@pytest.fixture(scope="module")
def folder_and_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyzed")
    text = folder / "text.txt"
    text.write_bytes(cats(400).data)
    write_tiny(folder / "model", "LlamaForCausalLM")
    return folder / "model", ["--calibration", text, "--samples", 6, "--sequence-length", 64]


@pytest.mark.processes
def test_analyze_in_two_processes_writes_what_one_measures(folder_and_text, tmp_path):
    model, options = folder_and_text
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    (alone,) = analyze(1, model, "-o", one, *options)
    both = analyze(2, model, "-o", two, *options, "--mesh", "model=2", "--json", devices=2)
    assert [e.code for e in (alone, *both)] == [0, 0, 0], (alone, both)
    assert json.loads(both[0].out)["samples"] == 6
    assert both[1].out == ""
    ours, theirs = imatrix.read(two), imatrix.read(one)
    assert ours.counts.keys() == theirs.counts.keys()
    for name, entry in theirs.entries.items():
        np.testing.assert_allclose(ours.entries[name], entry, rtol=1e-4, err_msg=name)
        np.testing.assert_array_equal(ours.counts[name], theirs.counts[name])


@pytest.mark.processes
@pytest.mark.parametrize("method", ["hessian", "ranges"])
def test_statistics_of_two_processes_are_those_of_one(method, folder_and_text, tmp_path):
    model, options = folder_and_text
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    (alone,) = analyze(1, model, "-o", one, *options, "--method", method)
    both = analyze(2, model, "-o", two, *options, "--method", method, "--checkpoint-dir", tmp_path / "kept")
    assert [e.code for e in (alone, *both)] == [0, 0, 0], (alone, both)
    ours, theirs = load_file(two), load_file(one)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        atol = 1e-4 * np.abs(value).max()
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=atol, err_msg=name)


STATISTICS = (
    JOIN
    + """
from pathlib import Path
from jquant.calibration import _measure as methods
from jquant.calibration import load_samples
from jquant.checkpoints.model import open_model
folder, text, out = sys.argv[4:]
with mesh.together():
    model = open_model(Path(folder))
    samples = load_samples(model, text, samples=4, sequence_length=32)
    methods.write_statistics(Path(out), model, samples, "hessian", mesh=mesh.make_mesh())
"""
)


@pytest.mark.processes
def test_an_output_that_only_the_first_process_makes_ends_all(folder_and_text, tmp_path):
    model, options = folder_and_text
    out = tmp_path / "h.safetensors"
    out.write_bytes(b"mine")
    for ended in run(STATISTICS, 2, str(model), str(options[1]), str(out)):
        assert ended.code == 1
        assert "h.safetensors: exists; give another name, or --force" in ended.err
    assert out.read_bytes() == b"mine"


@pytest.mark.processes
def test_processes_of_which_one_has_a_checkpoint_are_refused_and_leave_nothing(folder_and_text, tmp_path):
    model, options = folder_and_text
    kept = ("--checkpoint-dir", tmp_path / "kept")
    for ended in analyze(2, model, *options, others=kept):
        assert ended.code == 3
        assert "process 1 has checkpoint kept" in ended.err
    for ended in analyze(2, model, *options, *kept, others=("--seed", 3)):
        assert ended.code == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_processes_with_other_samples_are_refused(folder_and_text, tmp_path):
    model, options = folder_and_text
    for ended in analyze(2, model, "-o", tmp_path / "m.gguf", *options, others=("--seed", 3)):
        assert ended.code == 3
        assert "process 1 has tokens" in ended.err
    assert not list(tmp_path.iterdir())


def test_a_wrong_mesh_is_told_before_anything_is_computed(folder_and_text, tmp_path):
    model, options = folder_and_text
    command = ["analyze", model, "-o", tmp_path / "m.gguf", *options, "--mesh", "data=3"]
    ended = CliRunner().invoke(app, [*map(str, command)])
    assert ended.exit_code == 3
    assert "--mesh data=3,model=1: makes 3 devices, but there are 2 (cpu)" in ended.stderr
