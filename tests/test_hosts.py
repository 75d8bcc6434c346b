"""Quantization by several processes: the bytes of one, also after a kill and with another number of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from processes import JOIN, Ended, free_address, run, start, wait
from test_quantize_command import JQUANT, WIDE, imatrix_file
from test_quantize_command import run as command
from tiny_models import write_tiny

from jquant.hosts import spread

QUANTIZE = (
    JOIN
    + """
import os, signal
from pathlib import Path
from jquant import convert, hosts
from jquant.plan import plan
folder, out, kind, resume, killed = sys.argv[4:]

def progress(name, done):
    if name and str(process) == killed:
        os.kill(os.getpid(), signal.SIGKILL)

try:
    with mesh.together():
        model = convert.open_model(Path(folder))
        planned = plan(model.source.specs, model.metadata, kind)
        write = hosts.write_gguf if processes > 1 else convert.write_gguf
        write(model, planned, Path(out), resume=bool(resume), threads=1, progress=progress)
except mesh.LostError as error:
    print(error, file=sys.stderr, flush=True)
    mesh.leave(3)
"""
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "moe"
    return write_tiny(folder, "MixtralForCausalLM", **WIDE)


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


@pytest.mark.parametrize(
    ("processes", "kind"),
    [(2, "Q2_K"), *(pytest.param(n, "IQ2_M", marks=pytest.mark.slow) for n in (2, 3, 4))],
)
def test_several_processes_write_the_bytes_of_one(processes, kind, model, tmp_path):
    matrix = imatrix_file(tmp_path / "imatrix.gguf", model, prefix="blk.")
    options = ["--type", kind, "--imatrix", matrix, "--max-shard-size", "700kB", "--threads", 1]
    one, many = tmp_path / "one.gguf", tmp_path / "many.gguf"
    told = json.loads(command("quantize", model, one, *options, "--json"))
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


@pytest.mark.parametrize("others", [["--type", "Q8_0"], ["--effort", "best"], ["--resume"]], ids=" ".join)
def test_processes_with_other_options_are_refused(others, model, tmp_path):
    out = tmp_path / "m.gguf"
    for ended in quantize(2, model, out, "--type", "Q4_K_M", others=tuple(others)):
        assert ended.code == 3
        assert "process 1 has" in ended.err
        assert "need the same version, model and options" in ended.err
        assert len(ended.err.strip().splitlines()) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["model", "jquant"])
def test_processes_with_another_model_or_version_are_refused(what, model, tmp_path):
    # The same shapes, and another seed: only the weights differ.
    other = write_tiny(tmp_path / "other", "MixtralForCausalLM", seed=1, **WIDE)
    hook = {
        "model": f"if process: folder = {str(other)!r}\n",
        "jquant": "if process: convert.version = lambda name: '9.9'\n",
    }[what]
    out = tmp_path / "out"
    out.mkdir()
    script = QUANTIZE.replace("\ntry:", f"\n{hook}\ntry:", 1)
    for ended in run(script, 2, str(model), str(out / "m.gguf"), "Q8_0", "", ""):
        assert ended.code == 1
        assert f"SharedError: process 1 has {what} " in ended.err
    assert not list(out.iterdir())


def test_an_output_that_exists_ends_all_with_one_line(model, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"mine")
    for ended in quantize(2, model, out, "--type", "Q8_0"):
        assert ended.code in (3, 4)
        assert f"{out}: exists; give another name, or --force" in ended.err
    assert out.read_bytes() == b"mine"


def test_error_feedback_is_refused_in_several_processes(model, tmp_path):
    for ended in quantize(2, model, tmp_path / "m.gguf", "--type", "Q4_K_M", "--feedback"):
        assert ended.code != 0
        assert "runs in one process only" in ended.err
