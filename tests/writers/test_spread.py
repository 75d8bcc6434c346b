"""Quantization by several processes: the bytes of one, also after a kill and with another number of them.

Two processes are started once in every run, all others in the tier of processes. A process that differs is
also played by this one: what it would say is kept, and said to the one that is tested.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import JQUANT, printed
from helpers.gguf_files import imatrix_file
from helpers.processes import JOIN, Ended, free_address, run, start, wait
from helpers.shapes import WIDE
from helpers.tiny_models import write_tiny
from typer.testing import CliRunner

from jquant.checkpoints import slab_rows
from jquant.checkpoints.model import open_model
from jquant.checkpoints.schemes import SCHEMES
from jquant.core import Rows
from jquant.distributed import mesh
from jquant.io import GgufSource
from jquant.plan import Entry, plan
from jquant.writers import folder as folder_writer
from jquant.writers import folder_plan as folders
from jquant.writers._spread import COPIED, PARTS, cost, portion, spread
from jquant.writers.gguf import write_gguf
from jquant_cli.main import app

QUANTIZE = (
    JOIN
    + """
import os, signal
from pathlib import Path
from jquant.checkpoints import model as convert
from jquant.writers.gguf import write_gguf
from jquant.plan import plan
folder, out, kind, resume, killed = sys.argv[4:]

def progress(name, done):
    global written
    written += done if name else 0
    if name and str(process) == killed:
        os.kill(os.getpid(), signal.SIGKILL)

try:
    written = 0
    with mesh.together():
        model = convert.open_model(Path(folder))
        planned = plan(model.source.specs, model.metadata, kind)
        write_gguf(model, planned, Path(out), resume=bool(resume), threads=1, progress=progress)
    print(written)
except mesh.LostError as error:
    print(error, file=sys.stderr, flush=True)
    mesh.leave(3)
"""
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "moe"
    return write_tiny(folder, "MixtralForCausalLM", **WIDE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny", "MixtralForCausalLM", num_hidden_layers=1)


TWICE = (
    JOIN
    + """
from pathlib import Path
from jquant.checkpoints.model import open_model
from jquant.plan import plan
from jquant.writers.gguf import write_gguf
folder, out = map(Path, sys.argv[4:])

def write(kind, file):
    with mesh.together():
        model = open_model(folder)
        planned = plan(model.source.specs, model.metadata, kind)
        write_gguf(model, planned, file, threads=1, max_shard_bytes=100_000)

try:
    write("Q4_0" if process else "Q8_0", out / "refused.gguf")
except mesh.SharedError as error:
    print(error)
write("Q8_0", out / "many.gguf")
"""
)


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> tuple[list[Ended], Path]:
    """How two processes ended that were refused first and wrote a file then, and the folder of the file."""
    out = tmp_path_factory.mktemp("two")
    return run(TWICE, 2, str(tiny), str(out)), out


def test_two_processes_write_the_bytes_of_one(two, tiny, tmp_path):
    ended, out = two
    assert [e.code for e in ended] == [0, 0], ended
    model, alone = open_model(tiny), tmp_path / "many.gguf"
    write_gguf(model, plan(model.source.specs, model.metadata, "Q8_0"), alone, max_shard_bytes=100_000)
    files = contents(tmp_path)
    assert len(files) > 1
    assert contents(out) == files  # no part is left, and nothing of what was refused


def test_two_processes_of_other_types_are_refused(two):
    for ended in two[0]:
        assert "process 1 has " in ended.out
        assert "need the same version, model and options" in ended.out


class _SaidError(Exception):
    """The first message of a process that differs: it is not to go on."""


def beside(monkeypatch: pytest.MonkeyPatch, theirs: Callable[[], object]) -> None:
    """Make this process 0 of a run whose process 1 would do `theirs`."""
    told = []

    def kept(text: str = "") -> list[str]:
        told.append(text)
        raise _SaidError

    monkeypatch.setattr(mesh, "exchange", kept)
    with pytest.raises(_SaidError):
        theirs()
    monkeypatch.setattr(mesh, "exchange", lambda text="": [text, *told])


def quantize(processes: int, *arguments: object, others: tuple[object, ...] = ()) -> list[Ended]:
    """The command in so many processes, all but the first with more arguments."""
    address, ids = free_address(), range(processes)
    common = [
        JQUANT,
        "quantize",
        *map(str, arguments),
        "--coordinator",
        address,
        "--processes",
        str(processes),
    ]
    return wait(start([[*common, "--process", str(i), *map(str, others if i else ())] for i in ids]))


@pytest.mark.parametrize("shares", [1, 2, 3, 7])
def test_costs_are_spread_whole_and_nearly_evenly(shares):
    costs = np.random.default_rng(shares).integers(1, 1000, 50).tolist()
    found = spread(costs, shares)
    assert sorted(i for share in found for i in share) == list(range(50))
    sums = [sum(costs[i] for i in share) for share in found]
    # Graham's bound for the largest first: 4/3 of the best, which is at least the mean.
    assert max(sums) <= 4 / 3 * max(sum(costs) / shares, max(costs))


@pytest.mark.parametrize("shares", [2, 3, 64])
def test_rows_are_spread_whole_and_evenly_however_large_a_tensor_is(shares):
    shapes = {"embedding": (150_000, 4096), "experts": (128, 1536, 4096), "norm": (4096,), "q": (8192, 4096)}
    types = dict(zip(shapes, ("Q6_K", "IQ2_XXS", "F32", "Q4_K"), strict=True))
    entries = {n: Entry(n, s, "F32" if n == "norm" else "F16", types[n], "") for n, s in shapes.items()}
    left = [Rows(name, 0, entry.spec.rows) for name, entry in entries.items()]
    left[0] = Rows("embedding", 999, 150_000)  # an earlier run had begun it
    found = [portion(left, entries, shares, share) for share in range(shares)]
    for name, first, last in left:
        parts = sorted(rows for share in found for rows in share if rows.name == name)
        assert (parts[0].start, parts[-1].stop) == (first, last)
        for one, next_one in itertools.pairwise(parts):
            assert one.stop == next_one.start
            assert (one.stop - first) % slab_rows(entries[name].spec.cols) == 0
    costs = [sum(cost(entries[rows.name], rows.stop - rows.start) for rows in share) for share in found]
    assert max(costs) <= (1 + 1 / PARTS) * sum(costs) / shares
    if shares == 64:
        assert len({rows.name for share in found for rows in share}) < sum(map(len, found)) / 8
    assert portion(left, entries, 1, 0) == left


def test_what_is_only_copied_has_a_cost_of_any_type():
    assert cost(Entry("ffn_gate_tid2eid.weight", (8, 32), "I32", "I32", ""), 8) == COPIED * 256


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "kind"),
    [(2, "Q2_K"), pytest.param(3, "IQ2_M", marks=pytest.mark.slow)],
)
def test_several_processes_write_the_bytes_of_one(processes, kind, model, tmp_path):
    matrix = imatrix_file(tmp_path / "imatrix.gguf", model, prefix="blk.")
    options = ["--type", kind, "--imatrix", matrix, "--max-shard-size", "700kB", "--threads", 1]
    one, many = tmp_path / "one.gguf", tmp_path / "many.gguf"
    told = json.loads(printed("quantize", model, one, *options, "--json"))
    ended = quantize(processes, model, many, *options, "--json")
    assert [e.code for e in ended] == [0] * processes, ended
    assert [e.out for e in ended[1:]] == [""] * (processes - 1)
    first = json.loads(ended[0].out)
    for ours, theirs in zip(first["tensors"], told["tensors"], strict=True):
        # The errors too, which others have measured; sums of floats.
        error = theirs["error"]
        assert ours == theirs | {"error": None if error is None else pytest.approx(error, rel=1e-5)}
    assert len(first["files"]) == len(told["files"]) > 1
    for ours, theirs in zip(first["files"], told["files"], strict=True):
        assert Path(ours["path"]).read_bytes() == Path(theirs["path"]).read_bytes()
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("before", "after"), [(3, 2), *(pytest.param(*n, marks=pytest.mark.slow) for n in [(2, 4), (3, 1)])]
)
def test_a_killed_process_and_another_number_of_them_give_the_same_file(before, after, model, tmp_path):
    out = tmp_path / "m.gguf"
    arguments = [str(model), str(out), "Q8_0"]
    ended = run(QUANTIZE, before, *arguments, "", "1")
    assert ended[1].code == -signal.SIGKILL
    assert [e.code for e in (ended[0], *ended[2:])] == [3] * (before - 1)
    assert "a process of this run is gone" in ended[0].err
    assert not out.exists()
    journals = {p.name: p.read_text().count("\n") for p in tmp_path.glob("*.jsonl")}
    assert set(journals) == {f"m.gguf.partial{i}.jsonl" for i in ["", *(f".{i}" for i in range(1, before))]}
    assert journals["m.gguf.partial.jsonl"] > 2  # others went on with their shares
    ended = run(QUANTIZE, after, *arguments, "resume", "")
    assert [e.code for e in ended] == [0] * after, ended
    alone = tmp_path / "alone.gguf"
    run(QUANTIZE, 1, str(model), str(alone), "Q8_0", "", "")
    assert out.read_bytes() == alone.read_bytes()
    assert not list(tmp_path.glob("*partial*"))


# Slabs of a few rows, of which the second process makes nine.
OF_ROWS = QUANTIZE.replace(
    "\ntry:",
    "\nfrom jquant.checkpoints import _transcode\n_transcode.SLAB_WEIGHTS = 1 << 13\nseen = []\ntry:",
    1,
).replace("    if name and", "    seen.append(name)\n    if len(seen) == 9 and")


@pytest.mark.processes
def test_rows_of_one_tensor_are_shared_and_those_that_are_there_are_kept(model, tmp_path):
    out, alone = tmp_path / "m.gguf", tmp_path / "alone.gguf"
    arguments = [str(model), str(out), "Q4_K_M"]
    ended = run(OF_ROWS, 3, *arguments, "", "1")
    assert [e.code for e in ended] == [3, -signal.SIGKILL, 3], ended
    lines = [json.loads(x) for p in tmp_path.glob("*.jsonl") for x in p.read_text().splitlines()]
    begun = {line[0] for line in lines if isinstance(line, list)}
    assert begun - {line for line in lines if isinstance(line, str)}
    ended = run(OF_ROWS, 2, *arguments, "resume", "")
    assert [e.code for e in ended] == [0, 0], ended
    (everything,) = run(QUANTIZE, 1, str(model), str(alone), "Q4_K_M", "", "")
    assert sum(int(e.out) for e in ended) < 0.9 * int(everything.out)  # the others' rows were there
    assert out.read_bytes() == alone.read_bytes()
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("others", [["--type", "Q8_0"], ["--effort", "best"], ["--resume"]], ids=" ".join)
def test_processes_with_other_options_are_refused(others, tiny, tmp_path, monkeypatch):
    arguments = ["quantize", str(tiny), str(tmp_path / "m.gguf")]
    beside(monkeypatch, lambda: CliRunner().invoke(app, [*arguments, *others], catch_exceptions=False))
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 3
    assert "process 1 has" in ended.stderr
    assert "need the same version, model and options" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_processes_of_a_command_with_other_options_end_with_one_line(model, tmp_path):
    out = tmp_path / "m.gguf"
    for ended in quantize(2, model, out, others=("--type", "Q8_0")):  # beside the default, Q4_K_M
        assert ended.code == 3
        assert "process 1 has" in ended.err
        assert "need the same version, model and options" in ended.err
        assert len(ended.err.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["model", "jquant"])
def test_processes_with_another_model_or_version_are_refused(what, tiny, tmp_path, monkeypatch):
    # The same shapes, and another seed: only the weights differ.
    other = write_tiny(tmp_path / "other", "MixtralForCausalLM", seed=1, num_hidden_layers=1)
    out = tmp_path / "out"
    out.mkdir()

    def write(folder: Path) -> None:
        opened = open_model(folder)
        write_gguf(opened, plan(opened.source.specs, opened.metadata, "Q8_0"), out / "m.gguf")

    def theirs() -> None:
        if what == "model":
            return write(other)
        with pytest.MonkeyPatch.context() as newer:
            newer.setattr("jquant.checkpoints.fingerprint.VERSION", "9.9")
            return write(tiny)

    beside(monkeypatch, theirs)
    with pytest.raises(mesh.SharedError, match=f"process 1 has {what} "):
        write(tiny)
    assert not list(out.iterdir())


@pytest.mark.processes
def test_an_output_that_exists_ends_all_with_one_line(model, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"mine")
    for ended in quantize(2, model, out, "--type", "Q8_0"):
        assert ended.code in (3, 4)
        assert f"{out}: exists; give another name, or --force" in ended.err
    assert out.read_bytes() == b"mine"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"the {n} cats sat on {n + 1} mats, and so did I." for n in range(400)))
    return path


@pytest.mark.processes
def test_processes_balance_inputs_alike(model, text, tmp_path):
    plainly = ["--type", "Q4_K", "--pure", "--json"]
    options = [*plainly, "--balance-inputs", "-c", text, "--samples", 6, "--sequence-length", 64]
    one, many, plain = (tmp_path / f"{name}.gguf" for name in ("one", "many", "plain"))
    told = json.loads(printed("quantize", model, one, *options))
    ended = quantize(2, model, many, *options)
    assert [e.code for e in ended] == [0, 0], ended
    assert json.loads(ended[0].out)["balance"] == told["balance"]
    assert many.read_bytes() == one.read_bytes()
    printed("quantize", model, plain, *plainly)
    assert plain.read_bytes() != one.read_bytes()


@pytest.mark.processes
def test_processes_share_error_feedback(model, text, tmp_path):
    options = ["--type", "Q2_K", "--feedback", "--calibration", text, "--samples", 6]
    # The weight of a token is bounded by the median of its batch: these are the same for one and for many.
    options += ["--batch", 3, "--sequence-length", 64, "--json"]
    one, many = tmp_path / "one.gguf", tmp_path / "many.gguf"
    told = json.loads(printed("quantize", model, one, *options))
    ended = quantize(2, model, many, *options, "--effort", "best")
    assert [e.code for e in ended] == [0, 0], ended
    assert "tuning is of one process" in ended[0].err
    first = json.loads(ended[0].out)
    assert first["feedback"].keys() == told["feedback"].keys()
    for name, error in told["feedback"].items():
        if name.startswith("blk.0."):  # the next block learns from codes that are others, see below
            assert first["feedback"][name] == pytest.approx(error, rel=0.1), name
    ours, theirs = GgufSource(many), GgufSource(one)
    assert ours.specs == theirs.specs
    # Sums in another order turn a code here and there, and all that comes behind it learns from that.
    for name in ("attn_k", "attn_q", "attn_v"):
        same = ours.read(f"blk.0.{name}.weight") == theirs.read(f"blk.0.{name}.weight")
        assert np.mean(same) > 0.99, name
    assert not list(tmp_path.glob("*partial*"))


FED = (
    JOIN
    + """
import os, signal
from pathlib import Path
from jquant.checkpoints import model as convert
from jquant.writers.gguf import write_gguf
from jquant.calibration import load_samples
from jquant.writers.gguf_feedback import Feedback
from jquant.plan import plan
folder, out, text, resume, killed = sys.argv[4:]

def progress(done, count):
    if done == 1 and str(process) == killed:
        os.kill(os.getpid(), signal.SIGKILL)

try:
    with mesh.together():
        model = convert.open_model(Path(folder))
        samples = load_samples(model, text, samples=6, sequence_length=64)
        planned = plan(model.source.specs, model.metadata, "Q2_K")
        fed = Feedback(samples, progress=progress)
        write_gguf(model, planned, Path(out), feedback=fed, resume=bool(resume), threads=1)
except mesh.LostError as error:
    print(error, file=sys.stderr, flush=True)
    mesh.leave(3)
"""
)


@pytest.mark.slow
@pytest.mark.processes
def test_a_process_killed_in_error_feedback_ends_all_and_the_run_goes_on(model, text, tmp_path):
    whole, out = tmp_path / "whole.gguf", tmp_path / "m.gguf"
    arguments = [str(model), str(out), str(text)]
    ended = run(FED, 2, *arguments, "", "1")
    assert [e.code for e in ended] == [3, -signal.SIGKILL], ended
    assert "a process of this run is gone" in ended[0].err
    assert not out.exists()
    ended = run(FED, 2, *arguments, "resume", "")
    assert [e.code for e in ended] == [0, 0], ended
    assert [e.code for e in run(FED, 2, str(model), str(whole), str(text), "", "")] == [0, 0]
    ours, theirs = GgufSource(out), GgufSource(whole)
    for name in ours.specs:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name), err_msg=name)


FOLDER = (
    JOIN
    + """
import os, signal
from pathlib import Path
from jquant.writers import folder as folder_writer
from jquant.writers import folder_plan as folders
from jquant.checkpoints.schemes import SCHEMES
folder, out, resume, killed = sys.argv[4:]
written = []

def progress(name, done):
    written.append(name)
    if len(written) == 4 and str(process) == killed:
        os.kill(os.getpid(), signal.SIGKILL)

try:
    with mesh.together():
        checkpoint = folders.open_checkpoint(Path(folder))
        plan = folders.plan_folder(checkpoint, SCHEMES["W4A16"])
        options = dict(max_shard_bytes=300_000, resume=bool(resume), progress=progress)
        folder_writer.write_folder(checkpoint, plan, Path(out), **options)
    print(len(written))
except mesh.LostError as error:
    print(error, file=sys.stderr, flush=True)
    mesh.leave(3)
"""
)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after"), [(3, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_processes_share_a_folder_and_another_number_of_them_goes_on(before, after, model, tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    ended = run(FOLDER, before, str(model), str(out), "", "1")
    assert ended[1].code == -signal.SIGKILL
    assert [e.code for e in (ended[0], *ended[2:])] == [3] * (before - 1), ended
    assert not out.exists()
    ended = run(FOLDER, after, str(model), str(out), "resume", "")
    assert [e.code for e in ended] == [0] * after, ended
    (everything,) = run(FOLDER, 1, str(model), str(alone), "", "")
    assert sum(int(e.out) for e in ended) < int(everything.out)  # the others' weights were there
    assert contents(out) == contents(alone)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.processes
@pytest.mark.parametrize(
    "options", [["--alpha", "0.5"], pytest.param(["--no-feedback"], marks=pytest.mark.slow)], ids=str
)
def test_processes_write_the_folder_of_one(options, model, text, tmp_path):
    options = ["--type", "W8A8", *options, "-c", text, "--samples", 6, "--sequence-length", 64, "--json"]
    one, many = tmp_path / "one", tmp_path / "many"
    told = json.loads(printed("quantize", model, one, *options))
    ended = quantize(2, model, many, *options)
    assert [e.code for e in ended] == [0, 0], ended
    assert ended[1].out == ""
    first = json.loads(ended[0].out)
    for ours, theirs in zip(first["tensors"], told["tensors"], strict=True):
        assert ours == theirs | {"error": pytest.approx(theirs["error"], rel=1e-5)}
    assert contents(many) == contents(one)


@pytest.mark.slow
@pytest.mark.processes
def test_processes_share_the_error_feedback_of_a_folder(model, text, tmp_path):
    options = ["--type", "W4A16", "--feedback", "-c", text, "--samples", 6, "--sequence-length", 64, "--json"]
    one, many = tmp_path / "one", tmp_path / "many"
    told = json.loads(printed("quantize", model, one, *options, "--batch", 6))
    ended = quantize(2, model, many, *options, "--batch", 3)
    assert [e.code for e in ended] == [0, 0], ended
    errors = {tensor["name"]: tensor["error"] for tensor in json.loads(ended[0].out)["tensors"]}
    for tensor in told["tensors"]:
        if re.search(r"layers\.0\..*[qkv]_proj", tensor["name"]):  # what follows learns from other codes
            assert errors[tensor["name"]] == pytest.approx(tensor["error"], rel=0.1), tensor["name"]
    assert contents(many).keys() == contents(one).keys()


def test_processes_with_other_calibration_write_no_folder(tiny, tmp_path, monkeypatch):
    def write(column: float) -> None:
        checkpoint = folders.open_checkpoint(tiny)
        importance = {"blk.0.attn_q.weight": np.full((1, 64), column, np.float32)}
        made = folder_writer.Ingredients(importance=importance)
        chosen = folders.plan_folder(checkpoint, SCHEMES["W4A16"])
        folder_writer.write_folder(checkpoint, chosen, tmp_path / "out", made)

    beside(monkeypatch, lambda: write(2.0))
    with pytest.raises(mesh.SharedError, match="process 1 has calibration "):
        write(1.0)
    assert not list(tmp_path.iterdir())
