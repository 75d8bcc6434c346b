"""A calibration that is killed and resumed: the same bytes as one that was left alone."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import processes, tables
from helpers.commands import JQUANT, run
from helpers.processes import JOIN
from helpers.tiny_models import LINES, write_tiny

from jquant.calibration import _collect
from jquant.calibration import activations as between
from jquant.calibration import sharded as parallel
from jquant.calibration.resume import SharedCheckpoint
from jquant.core import OutputError, UserError
from jquant.distributed.team import Team
from jquant.io import imatrix
from jquant.io.resume import Checkpoint

SMALL = ("--samples", 5, "--sequence-length", 20, "--batch", 2, "-q")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "llama", "LlamaForCausalLM", num_hidden_layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(LINES * 4))
    return path


class KilledError(Exception):
    pass


def stop_and_continue(model, text, tmp_path, monkeypatch, step, steps, whole):
    """A run that stops before call `steps` + 1 of `step`, (module, name), and is then continued in so many
    calls that those of finished blocks are not made again; whole: (calls of a run, calls of a block)."""
    run("analyze", model, "-c", text, "-o", tmp_path / "whole.gguf", *SMALL)
    left, original = steps, getattr(*step)

    def stopping(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        return original(*arguments)

    arguments = ("analyze", model, "-c", text, "-o", tmp_path / "out.gguf", *SMALL)
    arguments += ("--checkpoint-dir", tmp_path / "checkpoint")
    monkeypatch.setattr(*step, stopping)
    with pytest.raises(AssertionError):
        run(*arguments)
    assert not (tmp_path / "out.gguf").exists()
    left = whole[0] - steps + steps % whole[1]
    run(*arguments, "--resume")
    assert left == 0
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("steps", tables.rows([0, 1, 2, 3, 4, 7, 8, 9, 11], {0, 4, 11}))
def test_a_run_that_stops_anywhere_continues_to_the_same_bytes(steps, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("jquant_cli._runtime.mesh", lambda asked: None)  # one device, whose steps are counted
    # Three batches a block, of which the head is the fourth.
    stop_and_continue(model, text, tmp_path, monkeypatch, (_collect, "_step"), steps, (12, 3))


@pytest.mark.parametrize("steps", tables.rows([0, 1, 3, 5, 7], {3}))
def test_a_run_over_two_devices_continues_to_the_same_bytes(steps, model, text, tmp_path, monkeypatch):
    # Two steps a block, of two samples on each device.
    stop_and_continue(model, text, tmp_path, monkeypatch, (parallel, "check_finite"), steps, (8, 2))


TOGETHER = (
    JOIN
    + """
import os, signal
from pathlib import Path
import jax
from jquant.calibration import _measure as methods
from jquant.calibration import load_samples
from jquant.checkpoints.model import open_model
from jquant.io import imatrix
folder, text, kept, out, resume, killed = sys.argv[4:]
blocks = []

def progress(done, count):
    blocks.append(done)
    if done == 2 and str(process) == killed:
        os.kill(os.getpid(), signal.SIGKILL)

try:
    with mesh.together():
        model = open_model(Path(folder))
        samples = load_samples(model, text, samples=5, sequence_length=20)
        devices = mesh.make_mesh() if jax.device_count() > 1 else None
        options = dict(checkpoint=Path(kept), resume=bool(resume), mesh=devices, progress=progress)
        found = methods.measure("imatrix", model, samples, batch=1, **options)
        if process == 0:
            imatrix.write_gguf(Path(out), found)
    print(blocks)
except mesh.LostError as error:
    print(error, file=sys.stderr, flush=True)
    mesh.leave(3)
"""
)


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after"), [(2, 3), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_a_killed_process_and_another_number_of_them_measure_what_one_does(
    before, after, model, text, tmp_path
):
    out, alone, kept = (tmp_path / name for name in ("out.gguf", "alone.gguf", "kept"))
    arguments = [str(model), str(text), str(kept), str(out)]
    ended = processes.run(TOGETHER, before, *arguments, "", "1")
    assert ended[1].code == -signal.SIGKILL
    assert [e.code for e in (ended[0], *ended[2:])] == [3] * (before - 1), ended
    done = len(list(kept.glob("block-*.npz")))
    assert 1 <= done <= 2
    ended = processes.run(TOGETHER, after, *arguments, "resume", "")
    assert [e.code for e in ended] == [0] * after, ended
    assert [json.loads(e.out) for e in ended] == [list(range(done + 1, 4))] * after
    (whole,) = processes.run(TOGETHER, 1, str(model), str(text), str(tmp_path / "own"), str(alone), "", "")
    assert whole.code == 0
    ours, theirs = imatrix.read(out), imatrix.read(alone)
    assert ours.entries.keys() == theirs.entries.keys()
    for name, entry in theirs.entries.items():
        np.testing.assert_allclose(ours.entries[name], entry, rtol=1e-4, err_msg=name)


def test_samples_in_a_file_share_no_page(tmp_path):
    made = Checkpoint(tmp_path / "run", {"data": "x"}, resume=False)
    whole = made.activations(0, (3, 5, 7))
    whole[:] = np.arange(105).reshape(3, 5, 7)
    assert whole.strides[0] % 65536 == 0
    own = SharedCheckpoint(tmp_path / "own", {"data": "x"}, resume=False, samples=3, mine=slice(1, 2))
    part = own.activations(0, (1, 5, 7))
    part[:] = whole[1:2]
    own.activations(1, (1, 5, 7))
    own.finish(0, {})
    data = np.fromfile(tmp_path / "run/activations-00000", np.float32).reshape(3, -1)
    np.testing.assert_array_equal(data[:, :35], np.arange(105).reshape(3, 35))
    assert own.activations(1, (1, 5, 7)).shape == (1, 5, 7)


def test_a_checkpoint_in_a_folder_that_is_not_shared_is_told(tmp_path, monkeypatch):
    second = SharedCheckpoint(tmp_path, {}, resume=False, samples=3, mine=slice(1, 2), team=Team(2, 1))
    monkeypatch.setattr(Team, "told", lambda self, text: "1")  # of a first process elsewhere
    with pytest.raises(OutputError, match=r"block-00000\.npz: is not here; name a folder that all"):
        list(second.restore())
    with pytest.raises(OutputError, match="activations-00001: is not here; name a folder that all"):
        second.activations(1, (1, 5, 7))


def test_a_finished_checkpoint_is_used_as_it_is(model, text, tmp_path, monkeypatch):
    arguments = ("analyze", model, "-c", text, *SMALL, "--checkpoint-dir", tmp_path / "checkpoint")
    run(*arguments, "-o", tmp_path / "a.gguf")
    monkeypatch.setattr(_collect, "_step", None)
    run(*arguments, "-o", tmp_path / "b.gguf", "--resume")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert not list((tmp_path / "checkpoint").glob("activations*"))


def test_the_checkpoint_of_another_run_is_refused_with_what_differs(model, text, tmp_path):
    folder = tmp_path / "checkpoint"
    arguments = ("analyze", model, "-c", text, "--checkpoint-dir", folder, *SMALL)
    run(*arguments)
    assert "holds a checkpoint; add --resume" in run(*arguments, code=3).stderr
    other = tmp_path / "other.txt"
    other.write_text("\n".join(LINES[::-1] * 4))
    refused = run("analyze", model, "-c", other, "--checkpoint-dir", folder, "--resume", *SMALL, code=3)
    assert "another run (data: calibration.txt there, other.txt here; tokens: " in refused.stderr
    refused = run(*arguments, "--resume", "--batch", 3, code=3)
    assert "(batch: 2 there, 3 here)" in refused.stderr
    refused = run(*arguments, "--resume", "--precision", "bfloat16", code=3)
    assert "(precision: float32 there, bfloat16 here)" in refused.stderr
    assert "needs --checkpoint-dir" in run("analyze", model, "--resume", code=2).stderr


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match="is not empty and holds no checkpoint"):
        Checkpoint(tmp_path, {"data": "x"}, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    Checkpoint(folder, {"data": "x"}, resume=False)
    (folder / "block-00000.npz").write_bytes(b"PK not a zip")
    again = Checkpoint(folder, {"data": "x"}, resume=True)
    with pytest.raises(UserError, match=r"block-00000\.npz: is damaged"):
        list(again.restore())
    with pytest.raises(UserError, match="activations-00001: is missing or cut short"):
        again.activations(1, (2, 3, 4))
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: is damaged"):
        Checkpoint(folder, {"data": "x"}, resume=True)


def test_activations_that_a_kill_left_behind_are_deleted(tmp_path):
    made = Checkpoint(tmp_path / "run", {"data": "x"}, resume=False)
    made.activations(0, (2, 3))
    left = (tmp_path / "run/activations-00000").read_bytes()
    made.activations(1, (2, 3))
    made.finish(0, {})
    (tmp_path / "run/activations-00000").write_bytes(left)
    again = Checkpoint(tmp_path / "run", {"data": "x"}, resume=True)
    assert list(again.restore()) == [{}]
    assert [path.name for path in (tmp_path / "run").glob("activations*")] == ["activations-00001"]


def test_a_full_disk_is_told_before_anything_is_mapped(tmp_path, monkeypatch):
    def full(fd: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = Checkpoint(tmp_path / "run", {"data": "x"}, resume=False)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"activations-00000: cannot be written: No space.*resume=True"):
        made.activations(0, (2, 3))
    with pytest.raises(OutputError, match="cannot take 24 B of activations: No space left"):
        between.Scratch(tmp_path, in_memory=0).activations(0, (2, 3))


def test_activations_occupy_the_disk_from_the_start(tmp_path):
    made = Checkpoint(tmp_path / "run", {"data": "x"}, resume=False)
    assert made.activations(0, (1, 1 << 18)).shape == (1, 1 << 18)
    assert (tmp_path / "run/activations-00000").stat().st_blocks * 512 >= 1 << 20


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_byte(shared, tmp_path):
    folder, text = shared("data/models/stories15M"), shared("data/text/tinystories-130kB.txt")
    base = [
        JQUANT,
        "analyze",
        str(folder),
        "-c",
        str(text),
        "--samples",
        "64",
        "--sequence-length",
        "256",
        "-q",
    ]
    subprocess.run([*base, "-o", str(tmp_path / "whole.gguf")], check=True, stdout=subprocess.DEVNULL)
    out, checkpoint = tmp_path / "out.gguf", tmp_path / "checkpoint"
    command = [*base, "-o", str(out), "--checkpoint-dir", str(checkpoint)]
    chance, kills = random.Random(0), 0
    while not out.exists():
        resume = ["--resume"] if (checkpoint / "run.json").exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL)
        if kills < 10:
            done = len(list(checkpoint.glob("block-*")))
            time.sleep(chance.uniform(2, 5))
            while kills < 9 and process.poll() is None and len(list(checkpoint.glob("block-*"))) == done:
                if chance.random() < 0.02:
                    break
                time.sleep(0.05)
            process.kill()
            kills += 1
        process.wait()
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert json.loads((checkpoint / "run.json").read_text())["samples"] == 64
